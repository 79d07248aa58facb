"""What a profile names operations by: the parts of a model, as the papers call them."""

import jax
import pytest

from llmprep_jax.train.losses import training_loss
from tests.grids import cases
from tests.models.tiny import make_model, make_tokens


@pytest.fixture(autouse=True)
def own_names():
    """Programs from the compile cache keep the names with which they were compiled first."""
    key = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, key)
    jax.config.update(key, True)
    yield
    jax.config.update(key, before)


def compiled_training(family):
    model, tokens = make_model(family), make_tokens()
    batch = dict(tokens=tokens, targets=tokens, loss_mask=tokens)
    gradient = jax.grad(lambda model: training_loss(model, batch).total)
    return jax.jit(gradient).lower(model).compile()


def compiled_decoding(family):
    model, tokens = make_model(family), make_tokens()[:, :1]
    leaves, structure = jax.tree.flatten(model.init_cache(2, 16))

    def run(model, leaves):
        return jax.tree.leaves(model(tokens, cache=jax.tree.unflatten(structure, leaves)))

    return jax.jit(run).lower(model, leaves).compile()


ATTENTION, LATENT = "block/attention/", "block/latent_attention/"
SCOPES = {
    ("llama-tied-9-3-heads", compiled_training): (
        *("jvp(embed)/", f"/{ATTENTION}attention/", f"/{ATTENTION}attention_backward/"),
        *("/block/mlp/", "jvp(loss)/", "transpose(jvp(loss))/"),
    ),
    ("gemma3", compiled_decoding): (
        *("/embed/", f"/local/{ATTENTION}cache/", f"/local/{ATTENTION}attention/", "/head/"),
        *(f"/global/{ATTENTION}cache/", f"/global/{ATTENTION}attention/", "/global/block/mlp/"),
    ),
    ("deepseek-v3", compiled_decoding): (
        *(f"/{LATENT}cache/", f"/{LATENT}absorbed/attention/", "/block/router/", "/block/experts/"),
        *("/block/mlp/", "/head/"),
    ),
    ("deepseek-v3", compiled_training): (
        *(f"/{LATENT}naive/attention/", "jvp(mtp)/", "/block/router/", "/block/experts/"),
        "transpose(jvp(loss))/",
    ),
}
FAST = [("llama-tied-9-3-heads", compiled_training), ("deepseek-v3", compiled_decoding)]


@pytest.mark.parametrize(
    ("family", "compiled"), cases(SCOPES, fast=FAST, slow=[("deepseek-v3", compiled_training)])
)
def test_operations_go_by_the_part_of_the_model_that_they_are_of(family, compiled):
    text = compiled(family).as_text()
    assert [scope for scope in SCOPES[family, compiled] if scope not in text] == []
