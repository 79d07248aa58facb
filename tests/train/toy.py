"""A language model, as far as training asks, compiled in a moment."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.language_model import LanguageModel
from llmprep_jax.nn.linear import Embed, Head
from llmprep_jax.nn.norm import RMSNorm
from llmprep_jax.nn.param import AdapterParam, Compute, Param

VOCAB, DIM = 32, 16


class Toy(LanguageModel):
    """Predicts the next token from this one and the mean of those before it."""

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        compute: Compute | None = None,
        lora: bool = False,
        dim: int = DIM,
    ):
        compute, self.source = compute or Compute(), Source()
        self.embed = Embed(VOCAB, dim, compute=compute, rngs=rngs)
        self.norm = RMSNorm(dim, param_dtype=compute.param_dtype, rngs=rngs)
        self.head = Head(dim, VOCAB, compute=compute, rngs=rngs)
        self.lora_a = (
            AdapterParam(0.1 * jax.random.normal(rngs.params(), (dim, 2))) if lora else None
        )
        self.lora_b = AdapterParam(jnp.zeros((2, dim))) if lora else None

    def features(self, x_BTD, positions=None, segment_ids=None, in_order=True):
        past_BTD = jnp.cumsum(x_BTD, axis=1) / (1.0 + jnp.arange(x_BTD.shape[1]))[:, None]
        x_BTD = x_BTD + past_BTD.astype(x_BTD.dtype)
        if self.lora_a is not None:
            x_BTD = x_BTD + jnp.tanh(x_BTD @ self.lora_a[...]) @ self.lora_b[...]
        return self.norm(x_BTD), None

    def unembed(self, x_BTD):
        return self.head(x_BTD)

    def unembedding(self):
        return None  # as of an adapted head


@functools.partial(jax.jit, static_argnames=("compute", "lora", "dim"))
def toy(seed: int = 0, compute: Compute | None = None, lora: bool = False, dim: int = DIM) -> Toy:
    return Toy(rngs=nnx.Rngs(jax.random.key(seed)), compute=compute, lora=lora, dim=dim)


def make_batch(seed: int = 0, rows: int = 8, length: int = 12, masked: bool = True) -> dict:
    """Rows of a rule that can be learned (the next token is twice this one plus one)."""
    rng = np.random.default_rng(seed)
    tokens = np.empty((rows, length + 1), np.int32)
    tokens[:, 0] = rng.integers(0, VOCAB, rows)
    for t in range(length):
        tokens[:, t + 1] = (2 * tokens[:, t] + 1 + rng.integers(0, 2, rows)) % VOCAB
    mask = (rng.random((rows, length)) < 0.7) if masked else np.ones((rows, length))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": mask.astype(np.float32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy(),
        "segment_ids": np.ones((rows, length), np.int32),
        "doc_ids": np.arange(rows, dtype=np.int64)[:, None] + 100 * seed,
    }


def params_of(model) -> dict:
    return {} if model is None else nnx.to_pure_dict(nnx.state(model, Param))


class Rows:
    """An endless iterator over `make_batch(i)` whose place is a number."""

    def __init__(self, rows: int = 8, poison: int | None = None):
        self.rows, self.poison, self.place = rows, poison, 0

    def __next__(self) -> dict:
        batch = make_batch(self.place, self.rows)
        if self.place == self.poison:
            batch["loss_mask"] = np.where(batch["loss_mask"] > 0, np.inf, 0).astype(np.float32)
        self.place += 1
        return batch

    def get_state(self) -> dict:
        return {"place": self.place}

    def set_state(self, state: dict) -> None:
        self.place = state["place"]
