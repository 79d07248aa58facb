"""What a user calls works for a model that was loaded on a mesh, outside of any mesh."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.evaluate.perplexity import perplexity
from llmprep_jax.models import registry
from llmprep_jax.sharding import has_mesh, make_mesh, use_mesh
from llmprep_jax.weights import table
from llmprep_jax.weights.safetensors import write_folder
from tests.grids import cases
from tests.models.tiny import CONFIGS, forward, make_tokens, random_model

MIXED = {"fsdp": 4, "tensor": 2}
MESHES = [{"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"expert": 8}, MIXED, {"data": 2, "expert": 4}]
LLAMA = "llama-tied-9-3-heads"

model_alone = functools.cache(lambda name: random_model(CONFIGS[name]))
call = jax.jit(lambda model, *args, **kwargs: model(*args, **kwargs))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A tiny model by name, loaded from its folder onto a mesh."""

    @functools.cache
    def folder(name):
        path, model = tmp_path_factory.mktemp(name), model_alone(name)
        config = registry.to_hf(model.cfg)
        (path / "config.json").write_text(json.dumps(config))
        write_folder(path, table.export(model, model.weights))
        return path

    return lambda name, axes: lp.load_model(folder(name), mesh=make_mesh(axes))


def test_a_model_on_a_mesh_is_called_as_one_on_a_single_device(load):
    model, tokens = load(LLAMA, MIXED), make_tokens()
    out = model(tokens)
    expected = forward(model_alone(LLAMA), tokens)
    np.testing.assert_allclose(out.logits, expected, atol=2e-5)
    np.testing.assert_array_equal(out.logits[:, -1].argmax(-1), expected[:, -1].argmax(-1))
    assert not has_mesh()


PAIRS = cases(
    itertools.product(CONFIGS, MESHES),
    fast=[(LLAMA, MIXED)],
    slow=[
        ("qwen2-window", {"tensor": 8}),
        ("gemma3", {"data": 8}),
        ("gemma3", {"fsdp": 8}),
        ("deepseek-v3", {"expert": 8}),
        ("deepseek-v3", {"data": 2, "expert": 4}),
    ],
)


@pytest.mark.parametrize(("name", "axes"), PAIRS, ids=str)
def test_every_family_computes_the_same_on_every_mesh_with_and_without_a_cache(load, name, axes):
    model, tokens = load(name, axes), make_tokens()
    expected = forward(model_alone(name), tokens)
    mask = np.ones(tokens.shape, bool)
    np.testing.assert_allclose(call(model, tokens, mask=mask).logits, expected, atol=2e-5)
    out = call(model, tokens[:, :12], cache=model.init_cache(2, 16))
    rest = call(model, tokens[:, 12:], cache=out.cache).logits
    np.testing.assert_allclose(rest, expected[:, 12:], atol=2e-5)


def specs(model: nnx.Module) -> dict:
    return {path: x[...].sharding.spec for path, x in nnx.to_flat_state(nnx.state(model))}


def test_adapters_are_put_on_merged_and_laid_out_as_inside_the_mesh(load):
    model, method = (
        load(LLAMA, MIXED),
        lp.peft.LoRA(rank=4, alpha=4, targets=("q_proj", "down_proj")),
    )
    adapted = lp.peft.inject(model, method)
    with use_mesh(make_mesh(MIXED)):
        assert specs(adapted) == specs(lp.peft.inject(model, method))
    q = adapted.layers.attn.q
    assert (q.lora_a[...].sharding.spec, q.lora_b[...].sharding.spec) == (
        jax.P(None, "fsdp", None),
        jax.P(None, None, None, None),  # of 9 heads
    )
    merged = lp.peft.merge(adapted)
    assert specs(merged) == specs(model)
    np.testing.assert_array_equal(merged.layers.mlp.down.w[...], model.layers.mlp.down.w[...])


@pytest.mark.slow  # saving and loading each compile a probe
def test_adapters_are_saved_and_loaded(load, tmp_path):
    model, tokens = load(LLAMA, MIXED), make_tokens()
    adapted = lp.peft.inject(model, lp.peft.LoRA(rank=4, alpha=4))
    graph, trained, rest = nnx.split(adapted, lp.peft.adapter.AdapterParam, ...)
    adapted = nnx.merge(graph, jax.tree.map(lambda x: x + 0.1, trained), rest)
    again = lp.peft.load(model, lp.peft.save(adapted, tmp_path / "adapter"))
    alone = lp.peft.load(model_alone(LLAMA), tmp_path / "adapter")
    expected = forward(alone, tokens)
    for each in (adapted, again, lp.peft.merge(again)):
        np.testing.assert_allclose(call(each, tokens).logits, expected, atol=1e-4)


def test_perplexity_is_that_of_one_device(load):
    tokens = make_tokens(8, 12)
    batch = dict(tokens=tokens, targets=tokens, loss_mask=np.ones(tokens.shape, np.float32))
    found, expected = [perplexity(x, [batch]) for x in (load(LLAMA, MIXED), model_alone(LLAMA))]
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)


def test_layers_are_packed_and_unpacked_with_the_bits_of_one_device(load):
    targets = r"layers\.mlp\.down"
    found, expected = [
        lp.quant.quantize_model(x, "int8", targets)
        for x in (load(LLAMA, MIXED), model_alone(LLAMA))
    ]
    np.testing.assert_array_equal(found.layers.mlp.down.codes, expected.layers.mlp.down.codes)
    down = lp.quant.dequantize_model(found).layers.mlp.down
    np.testing.assert_allclose(down.w, expected.layers.mlp.down.weight(), atol=1e-6)
