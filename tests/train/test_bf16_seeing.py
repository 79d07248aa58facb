"""Models that see, trained in bf16, have the gradients of float32: towers and projectors too.

As `test_bf16_gradients` has it for models of text: programs are read for all families, which
compiles nothing, and numbers compared where a batch has many patches.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.nn.param import Compute, Param
from llmprep_jax.train.contrastive import ContrastiveLoss
from llmprep_jax.train.losses import training_loss
from tests.grids import cases
from tests.models import drawing, test_deepseek_vl2, test_janus, test_seeing, towers
from tests.random_modules import fill
from tests.train.test_bf16_gradients import QUICK, gradients, narrow_sums


def contrastive(model: nnx.Module, batch: dict) -> Any:
    return ContrastiveLoss()(model, batch, jax.random.key(0))


def of_towers() -> dict[str, np.ndarray]:
    return {"tokens": towers.make_texts(8), "images": towers.make_images(8)}


def of_tiles() -> dict[str, np.ndarray]:
    """DeepSeek-VL2's golden rows, of which the targets are the next tokens."""
    _, given = test_deepseek_vl2.inputs()
    tokens, mask = given["tokens"].astype(np.int32), given["mask"]
    weights = (mask & (tokens != test_deepseek_vl2.IMAGE)).astype(np.float32)
    more = {"images": given["images"], "grids": given["grids"], "loss_mask": weights}
    return dict(
        tokens=tokens, targets=np.roll(tokens, -1, 1), segment_ids=mask.astype("i4"), **more
    )


# the model's Config, its loss, and a batch
FAMILIES = {
    **{
        name: (cfg, training_loss, functools.partial(test_seeing.make_batch, name))
        for name, cfg in test_seeing.CONFIGS.items()
    },
    **{name: (cfg, contrastive, of_towers) for name, cfg in towers.CONFIGS.items()},
    "deepseek-vl2": (test_deepseek_vl2.load().cfg, training_loss, of_tiles),
    "janus": (drawing.CONFIG, training_loss, test_janus.make_batch),
}


def abstract(name: str, **compute) -> nnx.Module:
    return registry.abstract(FAMILIES[name][0].with_compute(Compute(**compute)))


FAST = ["gemma3", "llava", "siglip", "deepseek-vl2"]


@pytest.mark.parametrize("name", cases(FAMILIES, fast=FAST, slow=set(FAMILIES) - set(FAST)))
def test_no_gradient_of_a_model_that_sees_is_summed_in_bf16(name):
    cfg, loss, batch = FAMILIES[name]
    model = abstract(name, dtype="bfloat16", param_dtype="bfloat16")
    jaxpr = jax.make_jaxpr(gradients, static_argnums=(1, 2))(model, Param, loss, batch())
    once = set()
    if loss is training_loss and model.tokens_per_image is not None:
        # what a feature gets from its one token is added to nothing; VL2's newline has many
        rows, pictures = batch()["images"].shape[:2]
        shape = (rows, pictures * model.tokens_per_image, cfg.decoder.dim)
        once = {f"scatter-add {shape} -> {shape}"}
    assert narrow_sums(jaxpr.jaxpr) == once


COPIES = 512


@pytest.mark.slow  # compiles three programs
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_gradients_of_many_pictures_in_bf16_are_as_near_float32s_as_those_of_few(name):
    """The same rows many times over: only sums differ. One in bf16 would be wrong by half."""
    _, loss, batch = FAMILIES[name]
    few = batch()
    many = {key: np.concatenate([x] * COPIES) for key, x in few.items()}
    run = jax.jit(gradients, static_argnums=(1, 2), compiler_options=QUICK)

    def of(dtype: str, batch: dict) -> dict[str, np.ndarray]:
        grads = run(fill(abstract(name, dtype=dtype)), Param, loss, batch)
        flat = nnx.to_flat_state(grads)
        return {".".join(map(str, path)): np.asarray(x[...], np.float32) for path, x in flat}

    exact, alone, summed = of("float32", few), of("bfloat16", few), of("bfloat16", many)
    # a softmax sees no bias that all keys share
    exact = {path: x for path, x in exact.items() if not path.endswith("attn.k.b")}
    errors = {
        path: [
            float(np.linalg.norm(found[path] - x) / np.linalg.norm(x)) for found in (alone, summed)
        ]
        for path, x in exact.items()
    }
    assert not {path: e for path, e in errors.items() if e[1] > min(2 * e[0] + 0.01, 0.1)}
    assert {path.split(".")[0] for path in errors} == {"language", "vision", "projector"}
