"""What adapters cost: operations of a decoding step, memory of a training step and of putting them
around a model, by what compilers say of the programs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.models.llama.config import Config
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam, Compute
from llmprep_jax.nn.settle import settle
from llmprep_jax.peft import HRA, IA3, OFT, DoRA, LoHa, LoKr, LoRA
from llmprep_jax.peft.injection import _of_layer, init_layer
from llmprep_jax.quant import quantize_model

SIZES = dict(vocab_size=64, dim=1024, mlp_dim=2816, num_layers=1, head_dim=64, max_seq_len=64)
HEADS = dict(num_heads=16, num_kv_heads=16, model_type="llama")


def model_of(**sizes) -> nnx.Module:
    return registry.build(Config(**{**SIZES, **HEADS, **sizes}), rngs=nnx.Rngs(0))


@functools.cache
def abstract_model() -> nnx.Module:
    return jax.eval_shape(model_of)


@functools.cache
def decoding_flops(method) -> float:
    """Of one token, of a model with the adapter as an engine settles it."""
    abstract = jax.eval_shape(lambda model: settle(lp.peft.inject(model, method)), abstract_model())
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    run = jax.jit(lambda model, tokens: model(tokens).logits)
    return run.lower(abstract, tokens).cost_analysis()["flops"]


@pytest.mark.parametrize(
    "method",
    [DoRA(16), LoHa(16), LoKr(16), LoKr(16, decompose_both=True), IA3(), OFT(), HRA()],
    ids=["dora", "loha", "lokr", "lokr-both", "ia3", "oft", "hra"],
)
def test_decoding_takes_at_most_half_as_many_operations_again_as_loras(method):
    lora = decoding_flops(LoRA(16))
    assert lora < 28e6  # 2 * (4 * 1024 + 3 * 2816) * 1024 of the weights, and LoRA's
    assert decoding_flops(method) < 1.5 * lora


def training_temporaries(method) -> int:
    """Bytes, of gradients of the adapters around a packed base."""

    def make():
        return lp.peft.inject(quantize_model(model_of(dim=256, mlp_dim=512, num_heads=4,
                              num_kv_heads=4), "nf4"), method)  # fmt: skip

    graph, adapters, frozen = jax.eval_shape(lambda: nnx.split(make(), AdapterParam, ...))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)

    def loss(adapters, frozen, tokens):
        return jnp.square(nnx.merge(graph, adapters, frozen)(tokens).logits).mean()

    compiled = jax.jit(jax.grad(loss)).lower(adapters, frozen, tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow  # compiles two training steps on packed layers
def test_training_dora_on_packed_layers_takes_little_more_memory_than_lora():
    assert training_temporaries(DoRA(8)) < 1.3 * training_temporaries(LoRA(8))


@pytest.mark.parametrize(
    ("method", "times"),
    [(DoRA(8), 2), (LoRA(8, init_weights="pissa"), 4), (LoRA(8, init_weights="olora"), 4)],
    ids=["dora", "pissa", "olora"],
)
def test_putting_a_method_around_a_stack_takes_memory_for_one_layer(method, times):
    axes = ("embed", "mlp"), ("batch", "seq", "mlp")
    make = functools.partial(Einsum, "BTD,DF->BTF", (128, 384), *axes, compute=Compute())
    stack = jax.eval_shape(lambda: jax.vmap(lambda rngs: make(rngs=rngs))(nnx.Rngs(0).split(64)))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 64))
    lowered = _of_layer.lower(init_layer, method, (stack, keys), 3)
    temporary = lowered.compile().memory_analysis().temp_size_in_bytes
    assert temporary < times * 4 * 128 * 384
