"""Models laid out for one CPU: they compute what they did, copy no weights, compile one layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.generate import layout
from llmprep_jax.generate.engine import _prefill
from llmprep_jax.generate.prompt import read_prompt
from llmprep_jax.nn.param import AdapterParam, Compute
from llmprep_jax.nn.stack import InPlace
from llmprep_jax.peft import LoRA, VeRA
from tests.grids import cases
from tests.models.tiny import CONFIGS, ODD_CONFIGS, forward, make_model, make_tokens, random_model

# a layer's weights are most of what a step needs beside its inputs
WIDE = dict(dim=256, mlp_dim=768, num_heads=4, num_kv_heads=2, head_dim=64)
SLOTS = 32


@pytest.mark.parametrize(
    "name",
    cases(
        [*CONFIGS, *ODD_CONFIGS],
        fast=["qwen2-window", "gemma3"],
        slow=["deepseek-v3", "deepseek-v2-every-other"],
    ),
)
def test_row_wise_models_have_the_logits_of_the_model_for_prompts_and_single_tokens(name):
    model, tokens = make_model(name), make_tokens()
    laid = layout.row_wise(model)
    for some in (tokens, tokens[:1, :1]):
        np.testing.assert_allclose(forward(laid, some), forward(model, some), atol=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("bfloat16", 0.05)])
@pytest.mark.parametrize("rows", [1, 2])
def test_wide_weights_are_multiplied_by_parts(monkeypatch, dtype, atol, rows):
    monkeypatch.setattr(layout, "MAX_INPUTS", 20)
    compute = Compute(dtype=dtype, param_dtype=dtype)
    model = random_model(dataclasses.replace(CONFIGS["qwen2-window"], compute=compute))
    tokens = make_tokens()[:rows, : 14 if rows > 1 else 1]
    found, expected = forward(layout.row_wise(model), tokens), forward(model, tokens)
    np.testing.assert_allclose(found, expected, atol=atol)


def test_stacks_of_linear_layers_stay_stacks_and_those_with_experts_become_lists():
    laid = layout.row_wise(make_model("deepseek-v3"))
    assert isinstance(laid.dense_layers, InPlace)
    assert isinstance(laid.moe_layers, nnx.List)


@pytest.mark.parametrize(
    ("method", "stays"), [(LoRA(rank=2), True), (VeRA(rank=2), False)], ids=["LoRA", "VeRA"]
)
def test_adapters_are_laid_out_with_their_layers(method, stays):
    # VeRA's layers share their factors, so that they are no stack
    model = lp.peft.inject(make_model("qwen2-window"), method)
    graph, trained, rest = nnx.split(model, AdapterParam, ...)
    model = nnx.merge(graph, jax.tree.map(lambda x: x + 0.1, trained), rest)
    laid = layout.row_wise(model)
    assert isinstance(laid.layers, InPlace) == stays
    np.testing.assert_allclose(
        forward(laid, make_tokens()), forward(model, make_tokens()), atol=1e-5
    )


def wide(num_layers, dtype):
    compute = Compute(dtype=dtype, param_dtype=dtype)
    cfg = dataclasses.replace(CONFIGS["llama-tied-9-3-heads"], **WIDE, compute=compute)
    return layout.row_wise(random_model(dataclasses.replace(cfg, num_layers=num_layers)))


def take_steps(model, cache):
    """Three decode steps in a loop, as generation runs them."""

    def step(_, carry):
        model_here, (token, cache) = jax.lax.optimization_barrier((model, carry))
        out = model_here(token, cache=cache)
        return jnp.argmax(out.logits, axis=-1).astype(jnp.int32), out.cache

    return jax.lax.fori_loop(0, 3, step, (jnp.zeros((1, 1), jnp.int32), cache))


def compiled(num_layers, dtype):
    model = wide(num_layers, dtype)
    leaves, structure = jax.tree.flatten((model, model.init_cache(1, SLOTS)))
    run = jax.jit(lambda leaves: take_steps(*jax.tree.unflatten(structure, leaves)))
    return run.lower(leaves).compile()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decode_step_copies_no_weights_and_is_compiled_for_one_layer(dtype):
    few, many = [compiled(num_layers, dtype) for num_layers in (3, 9)]
    itemsize = jnp.dtype(dtype).itemsize
    layer = itemsize * 256 * (768 * 3 + 256 * 2 + 128 * 2)
    # the head of 96 words and the cache's slots are far smaller than a product's weight
    assert many.memory_analysis().temp_size_in_bytes < layer / 4
    lengths = [len(program.as_text().splitlines()) for program in (few, many)]
    assert lengths[1] < 1.05 * lengths[0]


@pytest.mark.parametrize("name", ["qwen2-window", "gemma3", "deepseek-v3"])
def test_a_prompt_of_one_block_is_read_without_a_loop_and_without_what_it_wrote(name):
    model, tokens = make_model(name), make_tokens(2, 32)
    mask = np.ones((2, 32), bool)
    read = functools.partial(_prefill, block=32, inputs=None)
    new = str(jax.make_jaxpr(read)(model, tokens, mask, None))
    kept = str(jax.make_jaxpr(read)(model, tokens, mask, model.init_cache(2, 32)))
    plain = str(
        jax.make_jaxpr(lambda model, tokens: model(tokens, mask=mask).logits)(model, tokens)
    )
    # experts have loops of their own
    assert new.count("while") == kept.count("while") == plain.count("while")
    assert new.count("dynamic_slice") < kept.count("dynamic_slice")


def flops_of_a_prompt(is_new, length=384):
    model = make_model("llama-tied-9-3-heads")
    leaves, structure = jax.tree.flatten(model)
    tokens, mask = jnp.zeros((1, length), jnp.int32), jnp.ones((1, length), bool)

    def run(leaves):
        model = jax.tree.unflatten(structure, leaves)
        cache, kind = model.init_cache(1, length), dict(block=length, is_new=is_new)
        return read_prompt(model, tokens, mask, cache, **kind)[0]

    return jax.jit(run).lower(leaves).cost_analysis()["flops"]


def test_of_a_new_prompt_no_block_of_queries_is_held_against_keys_behind_it():
    # 3 blocks of queries: 6 of 9 tiles of scores, where the cache's order is not known
    assert flops_of_a_prompt(is_new=True) < 0.85 * flops_of_a_prompt(is_new=False)
