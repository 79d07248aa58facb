"""What every test runs under: eight CPU devices, exact matrix products, and checked array shapes.

JAX looks for devices once and the import hook sees only modules that are not imported yet, so all
of this comes before the package. `JAX_PLATFORMS=cuda pytest` runs on a GPU; tests that need several
devices then use what there is.
"""

import importlib.metadata
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones know no such flag
    # compiles in a third of the time (1.7 s for 4.7 of the gradients of a tiny DeepSeek-V3), runs
    # slower; a set XLA_FLAGS, empty too, is left alone
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
os.environ["LLMPREP_COMPILE_CACHE"] = "off"  # commands that tests start leave the user's alone

import jax
import pytest
from hypothesis import settings

from tests import shape_checks
from tests.quick_compile import make_room, quick_compile

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
shape_checks.install("llmprep_jax")

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def compilation(tmp_path_factory):
    """Tests compile hundreds of programs and run each for a millisecond; parity overrides this.

    JAX_COMPILATION_CACHE_DIR keeps the programs from one run of the tests to the next.
    """
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    with quick_compile(kept or tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    yield
    make_room()
