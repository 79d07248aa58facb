"""From logits to the next token: penalties, temperature, and the truncations of the tail.

The order is Hugging Face's, since the settings do not commute: repetition penalty (Keskar et al.
2019), temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024). Each row draws
from a key of its own (seed, row, step), so a row's text does not depend on what it is batched with.
Inside jit a `Sampling` holds traced numbers: another temperature compiles nothing anew, since a
program is compiled for the `Switches` alone.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key

from llmprep_jax.kernels.flash_attention.masks import NEG_INF
from llmprep_jax.types import Array, Bool, Float, Int

Number = int | float | np.number
_COLDEST = 1e-30  # logits divided by less overflow float32, and every token is alike again
_MOST = 2**31 - 1  # a top_k that keeps all
OTHER_NAMES = {  # what other libraries call it: what it is here
    "do_sample": "temperature (0 takes the most likely token, more than 0 samples)",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "num_return_sequences": "num_samples",
    "n": "num_samples",
    "logprobs": "return_logprobs",
    "output_scores": "return_logprobs",
    "output_logits": "return_logprobs",
    "return_dict_in_generate": "return_logprobs",
    "eos_token_id": "stop_ids",
    "stop_token_ids": "stop_ids",
    "stop_strings": "stop",
    "pad_token_id": "pad_id",
    "streamer": "stream=True",
    "attention_mask": "mask",
    "input_ids": "tokens",
    "num_beams": "num_samples (there is no beam search)",
    "assistant_model": 'draft="mtp"',
}


class Switches(NamedTuple):
    """What a program that samples is compiled for; all else is a number."""

    is_greedy: bool
    truncates: bool
    penalises: bool


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; None is the default of each setting.

    Attributes:
      temperature: 0 takes the most likely token.
      top_k: only the k most likely. top_p: the fewest whose probabilities reach p. min_p: those at
        least min_p times as likely as the most likely one. None: not applied.
      repetition_penalty: divides the positive and multiplies the negative logits of tokens that the
        prompt or the text so far holds; 1 changes nothing.
      switches: what of these a program is compiled for.

    Raises:
      ValueError: a setting that is no number, or out of its range.
    """

    temperature: Number | None = 0.0
    top_k: Number | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = 1.0
    switches: Switches = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)  # the class is frozen
        for name, (default, read, holds, must) in _RULES.items():
            value = getattr(self, name)
            value = default if value is None else read(name, value)
            if value is not None and not holds(value):
                raise ValueError(f"{name} is {value}; it must be {must}")
            put(name, value)
        is_greedy = self.temperature == 0
        truncates = self.top_k is not None or self.top_p not in (None, 1) or bool(self.min_p)
        penalises = self.repetition_penalty != 1
        put("switches", Switches(is_greedy, truncates and not is_greedy, penalises))

    def tree_flatten(self) -> tuple[tuple[Any, ...], Switches]:
        """Numbers, where what is not applied changes nothing, and the switches."""
        if type(self.temperature) is not float:  # traced
            return tuple(getattr(self, name) for name in _RULES), self.switches
        top_k = min(self.top_k or _MOST, _MOST)
        top_p = 1.0 if self.top_p is None else self.top_p
        penalty = min(max(self.repetition_penalty, _COLDEST), 1 / _COLDEST)
        floats = (max(self.temperature, _COLDEST), top_p, self.min_p or 0.0, penalty)
        temperature, *others = map(np.float32, floats)
        return (temperature, np.int32(top_k), *others), self.switches

    @classmethod
    def tree_unflatten(cls, switches: Switches, numbers: Sequence[Any]) -> "Sampling":
        """Settings whose numbers are traced; what they may be has been checked."""
        sampling = object.__new__(cls)
        for name, value in zip((*_RULES, "switches"), (*numbers, switches), strict=True):
            object.__setattr__(sampling, name, value)
        return sampling


def real(name: str, value: Any) -> float:
    """A setting as a float; whatever holds one number will do.

    Raises:
      ValueError: it is none.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if getattr(value, "dtype", np.dtype(bool)).kind in "iuf" and np.size(value) == 1:
        return float(np.asarray(value).item())
    raise ValueError(f"{name} is {value!r}; it must be a number")


def whole(name: str, value: Any) -> int:
    """A setting as an int, also from a float without a fraction.

    Raises:
      ValueError: it is none.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # exactly: a float holds 53 bits
    if getattr(value, "dtype", np.dtype(float)).kind in "iu" and np.size(value) == 1:
        return int(np.asarray(value).item())
    number = real(name, value)
    if not number.is_integer():
        raise ValueError(f"{name} is {value}; it must be a whole number")
    return int(number)


# name: (default, how it is read, whether it will do, what it must be)
_RULES: dict[str, tuple[Any, Callable[[str, Any], Any], Callable[[Any], bool], str]] = {
    "temperature": (0.0, real, lambda x: 0 <= x < math.inf, "finite and at least 0"),
    "top_k": (None, whole, lambda x: x >= 1, "at least 1"),
    "top_p": (None, real, lambda x: 0 < x <= 1, "in (0, 1]"),
    "min_p": (None, real, lambda x: 0 <= x <= 1, "in [0, 1]"),
    "repetition_penalty": (1.0, real, lambda x: 0 < x < math.inf, "finite and above 0"),
}


SETTINGS = tuple(_RULES)


def read_sampling(settings: Mapping[str, Any], further: Sequence[str] = ()) -> Sampling:
    """Sampling of keyword arguments.

    Args:
      further: names that the caller takes beside these, for the message.

    Raises:
      ValueError: an unknown name, with what it is called here, or a setting that will not do.
    """
    for name in settings:
        if name not in SETTINGS:
            raise ValueError(unknown(name, (*SETTINGS, *further)))
    return Sampling(**settings)


def unknown(name: str, known: Sequence[str]) -> str:
    """One line about a keyword that nothing takes."""
    if name in OTHER_NAMES:
        return f"unknown setting {name}; here it is {OTHER_NAMES[name]}"
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
    return f"unknown setting {name}; {hint}"


def shape_logits(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"] | None, sampling: Sampling
) -> Float[Array, "B V"]:
    """Logits of the distribution that is drawn from; what is ruled out is NEG_INF.

    Args:
      seen_BV: tokens that the prompt or the text so far holds; needed for a repetition penalty
        only.
    """
    sampling = jax.tree.map(jnp.asarray, sampling)  # None becomes the number that changes nothing
    if sampling.switches.penalises:
        penalty = sampling.repetition_penalty
        penalised_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
    if sampling.switches.is_greedy:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if not sampling.switches.truncates:
        return logits_BV
    logits_BV = jnp.where(logits_BV < _kth_largest(logits_BV, sampling.top_k), NEG_INF, logits_BV)
    # top-p sorts the vocabulary, which is worth leaving out
    keep_all = lambda logits_BV, top_p: logits_BV  # noqa: E731
    logits_BV = jax.lax.cond(sampling.top_p < 1, _keep_top_p, keep_all, logits_BV, sampling.top_p)
    p_BV = jax.nn.softmax(logits_BV)
    least_B1 = sampling.min_p * jnp.max(p_BV, axis=-1, keepdims=True)
    return jnp.where(p_BV < least_B1, NEG_INF, logits_BV)


def _kth_largest(x_BV: Array, k: Array) -> Float[Array, "B 1"]:
    """The k-th largest number of each row, or the smallest where there are fewer.

    Bit by bit, the greatest number that k of the row reach: 32 passes over it, where `top_k` wants
    a static k and a sort takes ten times as long.
    """
    k, sign = jnp.minimum(k, x_BV.shape[-1]), jnp.uint32(1 << 31)
    bits_BV = jax.lax.bitcast_convert_type(x_BV, jnp.uint32)
    # unsigned integers in the order of the floats: negative ones run backwards
    order_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def narrow(at: Array, least_B1: Array) -> Array:
        higher_B1 = least_B1 | (sign >> at.astype(jnp.uint32))
        enough_B1 = jnp.sum(order_BV >= higher_B1, axis=-1, keepdims=True) >= k
        return jnp.where(enough_B1, higher_B1, least_B1)

    least_B1 = jax.lax.fori_loop(0, 32, narrow, jnp.zeros((len(x_BV), 1), jnp.uint32))
    bits_B1 = jnp.where(least_B1 >= sign, least_B1 ^ sign, ~least_B1)
    return jax.lax.bitcast_convert_type(bits_B1, x_BV.dtype)


def _keep_top_p(logits_BV: Array, top_p: Array) -> Array:
    """Keeps the most likely tokens whose probabilities, summed, first reach top_p."""
    order_BV = jnp.argsort(logits_BV, axis=-1)  # ascending, as the reference sums from the tail
    tail_BV = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, axis=-1)), axis=-1)
    dropped_BV = (tail_BV <= 1 - top_p).at[:, -1].set(False)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    dropped_BV = jnp.zeros_like(dropped_BV).at[rows_B1, order_BV].set(dropped_BV)
    return jnp.where(dropped_BV, NEG_INF, logits_BV)


def draw(
    logits_BV: Float[Array, "B V"], sampling: Sampling, keys_B: Key[Array, "B"]
) -> Int[Array, "B"]:
    """The next token of each row, from logits that `shape_logits` made."""
    if sampling.switches.is_greedy:
        return likeliest(logits_BV)
    # as `jax.random.categorical`
    make_noise = lambda key: jax.random.gumbel(key, logits_BV.shape[1:], logits_BV.dtype)  # noqa: E731
    return likeliest(logits_BV + jax.vmap(make_noise)(keys_B))


def likeliest(logits_BV: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The first of the largest logits of each row; of NaN, which has none, some token.

    In two passes, each of which XLA's CPU compiler vectorises: 49,152 words take 40 us, where its
    argmax takes 220, a fiftieth of SmolLM2's step in bf16.
    """
    last = logits_BV.shape[-1] - 1
    is_largest_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    left_BV = jnp.where(is_largest_BV, last - jnp.arange(last + 1, dtype=jnp.int32), 0)
    return last - jnp.max(left_BV, axis=-1)
