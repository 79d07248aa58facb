"""Every family against numbers that transformers computed once, so that no test here needs torch.

`tests/golden/make_models.py` made the files. Tolerances are those of the live parity suite.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import registry
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.weights import table
from llmprep_jax.weights.folder import Checkpoint
from tests.grids import cases

FOLDER = Path(__file__).parent.parent / "golden"
NAMES = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "deepseek_v2", "deepseek_v3"]
# gradients compile for seconds; those that are slow are of layers that another has, but for
# Qwen2's biases and V2's softmax over experts, whose logits and own gradients are in the fast suite
GRADIENTS = cases(
    NAMES,
    fast=["llama", "qwen3", "gemma3", "deepseek_v3"],
    slow=["qwen2", "mistral", "deepseek_v2"],
)


class Golden(Checkpoint):
    """A checkpoint in memory, as `table.load` reads one."""

    def __init__(self, name):
        self.path = FOLDER / f"{name}.json"
        self.config = json.loads(self.path.read_text(encoding="utf-8"))
        self.arrays = dict(np.load(FOLDER / f"{name}.npz"))
        self.names = [key[len("weight/") :] for key in self.arrays if key.startswith("weight/")]

    def read(self, name):
        return self.arrays[f"weight/{name}"]

    def shape(self, name):
        return self.read(name).shape

    def dtype(self, name):
        return self.read(name).dtype

    def file(self, name):
        return self.path


@functools.cache
def load(name):
    golden = Golden(name)
    family = registry.family_of_type(golden.config["model_type"])
    cfg = family.from_hf(golden.config)
    abstract = jax.eval_shape(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))
    return table.load(abstract, golden, abstract.weights), golden.arrays


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    model, golden = load(name)
    mask = golden["mask"]
    found = np.asarray(jax.jit(lambda model: model(golden["tokens"], mask=mask).logits)(model))
    assert np.abs(golden["logits"]).max() > 0.5
    np.testing.assert_allclose(found[mask], golden["logits"][mask], atol=1e-4)


@pytest.mark.parametrize("name", GRADIENTS)
def test_loss_and_gradients_are_those_of_transformers(name):
    model, golden = load(name)
    tokens = golden["tokens"]
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones(tokens[:, 1:].shape, np.float32),
    }

    def mean_loss(model):
        loss = next_token_loss(model, batch)
        return loss.total / loss.count

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(model)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    found = dict(table.export(grads, model.weights))
    wanted = {key[len("grad/") :]: grad for key, grad in golden.items() if key.startswith("grad/")}
    assert len(wanted) >= 4
    for hf_name, grad in wanted.items():
        np.testing.assert_allclose(
            found[hf_name], grad, atol=1e-4 * np.abs(grad).max(), err_msg=hf_name
        )
