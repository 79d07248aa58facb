"""What packed weights take, at the size of SmolLM2-135M: alone, in the whole model, while loading.

Its linear layers are 106 million of 135 million parameters; the rest is the embedding, which is the
head too and stays dense. So the share of the whole is larger than that of the layers.
"""

import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.nn.param import Buffer, Param
from llmprep_jax.quant import export, quantize_model
from llmprep_jax.weights import table
from llmprep_jax.weights.safetensors import write_folder

LINEAR, WHOLE = 2 * 106_168_320, 2 * 134_515_008  # bytes in bf16


def smollm2():
    return registry.build(registry.preset("smollm2-135m"), rngs=nnx.Rngs(0))


WEIGHTS = jax.eval_shape(smollm2).weights


def num_bytes(arrays):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


@pytest.mark.parametrize(("preset", "share"), [("smollm2-135m", 0.4143), ("llama-3.1-8b", 0.3551)])
def test_nf4_takes_a_quarter_of_bf16_for_the_linear_layers_and_more_for_the_whole(preset, share):
    make = lambda: registry.build(registry.preset(preset), rngs=nnx.Rngs(0))  # noqa: E731
    packed = jax.eval_shape(lambda: quantize_model(make(), "nf4"))
    linear, rest = num_bytes(nnx.state(packed, Buffer)), nnx.state(packed, Param)
    rest = 2 * sum(x.size for x in jax.tree.leaves(rest))
    whole = 2 * sum(x.size for x in jax.tree.leaves(nnx.state(jax.eval_shape(make))))
    assert linear / (whole - rest) == pytest.approx(0.258, abs=0.0005)
    assert (linear + rest) / whole == pytest.approx(share, abs=0.0002)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """SmolLM2-135M of random bf16 weights, and the same packed; both on disk."""
    root, rng = tmp_path_factory.mktemp("smollm2"), np.random.default_rng(0)

    def tensors():
        for row in table.entries(jax.eval_shape(smollm2), WEIGHTS).values():
            for name in row.names().values():
                w = rng.standard_normal(row.their_shape(), np.float32)
                yield name, (0.05 * w).astype(ml_dtypes.bfloat16)

    def write(name, tensors, fields):
        (root / name).mkdir()
        cfg = registry.preset("smollm2-135m")
        config = registry.to_hf(cfg) | {"dtype": "bfloat16"} | fields
        (root / name / "config.json").write_text(json.dumps(config))
        write_folder(root / name, tensors)
        return root / name

    dense = write("dense", tensors(), {})
    packed = lp.load_model(dense, "nf4")
    write("packed", export.tensors(packed, WEIGHTS), export.config_fields(packed, WEIGHTS))
    return root


@pytest.mark.slow  # 135 million numbers are packed three times
@pytest.mark.parametrize(("name", "dtype"), [("dense", "nf4"), ("packed", "stored")])
def test_loading_never_holds_the_model_whole_in_bf16(folders, name, dtype):
    command = [sys.executable, "-m", "tests.quant.peak_of_loading", str(folders / name), dtype]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."}
    )
    found = json.loads(run.stdout)
    assert found["linear"] / LINEAR == pytest.approx(0.258, abs=0.0005)  # live buffers
    assert found["whole"] / WHOLE == pytest.approx(0.414, abs=0.0005)
    # the model, and beside it one packed stack and one dense tensor
    assert found["whole"] <= found["peak"] < 0.7 * WHOLE
