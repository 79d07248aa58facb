"""What each method trains, at full size: `jax.eval_shape` alone, no weights."""

import functools

import jax
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.stack import stack, unstack
from llmprep_jax.peft import DoRA, LoHa, LoRA, VeRA
from tests.grids import cases
from tests.peft.test_lora import abstract_base

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


class Block(nnx.Module):
    """The linear layers of one layer of OPT-125M, without biases."""

    def __init__(self, *, rngs: nnx.Rngs):
        def linear(ins: int, outs: int) -> Einsum:
            axes = ("embed", "mlp"), ("batch", "seq", "mlp")
            return Einsum("BTD,DF->BTF", (ins, outs), *axes, compute=Compute(), rngs=rngs)

        self.q, self.k, self.v, self.out = (linear(768, 768) for _ in range(4))
        self.fc1, self.fc2 = linear(768, 3072), linear(3072, 768)


class Blocks(nnx.Module):
    """All 12 layers."""

    def __init__(self, *, listed: bool = False):
        layers = stack(Block, 12, rngs=nnx.Rngs(0))
        self.layers = unstack(layers) if listed else layers


@functools.cache
def blocks(listed: bool) -> nnx.Module:
    return jax.eval_shape(lambda: Blocks(listed=listed))


WEIGHTS = 12 * (4 * 768 * 768 + 2 * 768 * 3072)


# a layer has (in + out) = 4 * 1536 + 2 * 3840 = 13,824 rows and columns: 12 * 13,824 * 8 of LoRA.
# VeRA: 4 * (768 + 128) + (3072 + 128) + (768 + 128) = 7,680 numbers a layer, and one A and one B of
# 128 * 3072 each
# one list, of the method whose layers share arrays, beside the stacks
@pytest.mark.parametrize(
    ("method", "trainable", "shared", "listed"),
    cases(
        OPT := [
            (method, trainable, shared, listed)
            for listed in (False, True)
            for method, trainable, shared in (
                (LoRA(rank=8), 1_327_104, 0),
                (LoHa(rank=8), 2_654_208, 0),
                (LoRA(rank=128), 21_233_664, 0),
                (VeRA(rank=128), 92_160, 786_432),
            )
        ],
        fast=[*OPT[:4], OPT[-1]],
    ),
)
def test_methods_on_opt_125m_train_the_numbers_by_hand(method, trainable, shared, listed):
    found = lp.peft.count(jax.eval_shape(lambda x: lp.peft.inject(x, method), blocks(listed)))
    assert (found.trainable, found.frozen) == (trainable, WEIGHTS + shared)
    assert found.trainable_bytes == 4 * trainable
    assert found.frozen_bytes == 4 * (WEIGHTS + shared)


# q and o 4096 + 4096, k and v 4096 + 1024: 26,624 rows and columns a layer, 32 layers. DoRA adds an
# output's magnitude, 10,240 a layer; VeRA has that and 256 a matrix, 11,264
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (LoRA(rank=8, targets=QKVO), 6_815_744),
        (DoRA(rank=8, targets=QKVO), 7_143_424),
        (VeRA(rank=256, targets=QKVO), 360_448),
    ],
    ids=["lora", "dora", "vera"],
)
def test_methods_on_llama_train_the_published_numbers(method, expected):
    model = abstract_base("llama-3.1-8b")
    found = lp.peft.count(jax.eval_shape(lambda x: lp.peft.inject(x, method), model))
    base = sum(x.size for x in jax.tree.leaves(model))
    shared = 2 * 256 * 4096 if isinstance(method, VeRA) else 0
    assert (found.trainable, found.frozen) == (expected, base + shared)
