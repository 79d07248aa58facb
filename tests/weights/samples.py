"""A small model of every kind of parameter, its table, and hand-made safetensors bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from llmprep_jax.nn.param import Buffer, Param, param
from llmprep_jax.nn.stack import stack
from llmprep_jax.weights.folder import Checkpoint
from llmprep_jax.weights.rows import Table
from tests.random_modules import random_module

BF16 = np.dtype(ml_dtypes.bfloat16)
L, D, N, H, F, V = 3, 8, 4, 2, 6, 16


class Block(nnx.Module):
    """Parameters whose layouts differ from Hugging Face's in every way."""

    def __init__(self, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(1.0)
        self.q = param(rngs, (D, N, H), ("embed", "heads", None), normal)
        self.o = param(rngs, (N, H, D), ("heads", None, "embed"), normal)
        self.up = param(rngs, (D, F), ("embed", "mlp"), normal)
        self.scale = param(rngs, (D,), (None,), normal)


class Model(nnx.Module):
    """Embedding, stacked layers, a scalar, a buffer, and a head unless it is tied."""

    def __init__(self, *, tied: bool = False, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(1.0)
        self.embed = nnx.Dict(w=param(rngs, (V, D), ("vocab", "embed"), normal))
        self.layers = stack(Block, L, rngs=rngs)
        self.temperature = Param(jnp.float32(2.5))
        self.positions = Buffer(jnp.arange(5.0))
        self.head = None if tied else nnx.Dict(w=param(rngs, (D, V), ("embed", "vocab"), normal))


def random() -> Model:
    """Random, and the same each time."""
    return random_module(lambda: Model(rngs=nnx.Rngs(0)))


TABLE = Table(
    {
        "embed.w": ("embed.weight", "v d -> v d"),
        "layers.q": ("layers.{l}.q.weight", "(n h) d -> d n h"),
        "layers.o": ("layers.{l}.o.weight", "d (n h) -> n h d"),
        "layers.up": ("layers.{l}.up.weight", "f d -> d f"),
        "layers.scale": ("layers.{l}.norm.weight", "d -> d"),
        "temperature": ("temperature", "->"),
        "positions": ("positions", "1 p -> p"),
        "head.w": ("lm_head.weight", "v d -> d v"),
    }
)


def abstract(**settings) -> Model:
    return jax.eval_shape(lambda: Model(**settings, rngs=nnx.Rngs(0)))


class Memory(Checkpoint):
    """A checkpoint of arrays in memory that counts how often each is read."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors, self.reads = dict(tensors), dict.fromkeys(tensors, 0)
        self.path, self.config = Path("memory"), {}

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self.tensors[name].dtype

    def file(self, name: str) -> Path:
        return self.path

    def read(self, name: str) -> np.ndarray:
        self.reads[name] += 1
        return self.tensors[name]


def file_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def check_message(error: Exception, path: Path) -> None:
    """An error for a user: one line, of a readable length, that names the file."""
    message = str(error)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 1200
