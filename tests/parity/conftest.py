"""How the live comparison compiles, and its models, each made once a process."""

import functools
import os
import pathlib

import jax
import pytest
import torch
import transformers

import llmprep_jax as lp
from configs.data.shipped import find_smollm2
from tests.parity import torch_models
from tests.quick_compile import make_room, quick_compile

torch.set_num_threads(1)  # tests run in a process a core


@pytest.fixture(scope="session")
def compilation(tmp_path_factory):
    """As other tests compile; with XLA_FLAGS= as users do, with all of XLA's passes."""
    if os.environ.get("XLA_FLAGS") == "":
        yield
        return
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    with quick_compile(kept or tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(autouse=True)
def room_for_programs():
    """In place of other tests' look between modules: one of these may take 20,000 memory maps."""
    yield
    make_room()


@pytest.fixture
def compiled_as_users_do():
    """For a program that runs for longer than it compiles."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def smollm2():
    """The path of SmolLM2's weights, and transformers' reading of them, which takes long."""
    path = pathlib.Path(find_smollm2())
    return path, transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory):
    """transformers' model of a case and ours with its weights, by way of a folder.

    Many tests share them: they leave theirs as it is, or copy it.
    """

    @functools.cache
    def make(name: str):
        theirs = torch_models.make(name)
        folder = torch_models.save(theirs, tmp_path_factory.mktemp(name))
        return theirs, lp.load_model(folder)

    return make
