"""Pictures from prompts, by models that draw: one prefill, then a loop over the codes of a picture.

Classifier-free guidance (Ho and Salimans 2022; Janus, 2410.13848, section 3.4): each prompt is read
twice, as it is and with padding in place of all but its first and last token, and a code is drawn
from l_u + guidance (l_c - l_u) of the two rows' logits. The thing a reader would get wrong: both
rows are given the code that was drawn, and the padding of the second is seen, not masked.

Letters of this file: I codes of a picture, R rows: those of prompts, then those without them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.generate import layout
from llmprep_jax.generate.decoding import at_least_one, read_seed
from llmprep_jax.generate.engine import Engine, engine_of, fit
from llmprep_jax.generate.prompt import (
    block_size,
    by_row,
    check_length,
    everywhere,
    pad,
    prompt_width,
    read_batch,
    read_prompt,
)
from llmprep_jax.generate.sampler import Number, Sampling, draw, read_sampling, real, shape_logits
from llmprep_jax.sharding import on_mesh_of
from llmprep_jax.types import Array, Float, Int

AT_A_TIME = 4  # pictures that are decoded together: one of 384 x 384 takes 0.23 GB on the way
Report = Callable[[int, int], None]
OTHERS = ("guidance", "seed", "num_samples", "report")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one step hands to the next.

    Attributes:
      cache: keys and values. x_R1D: hidden states that the next codes are read from.
      step: codes drawn so far. codes_BI: these. keys_B: each picture's random key.
    """

    cache: Any
    x_R1D: Array
    step: Array
    codes_BI: Array
    keys_B: Array


class Settings(NamedTuple):
    """How codes are drawn; `guidance` is traced, whether there are pairs is not."""

    sampling: Sampling
    guidance: Array | None


def generate_images(
    model: nnx.Module,
    processor: Any,
    prompts: Any,
    *,
    guidance: Number = 5.0,
    seed: Number | None = 0,
    num_samples: Number | None = None,
    report: Report | None = None,
    **sampling: Any,
) -> np.ndarray:
    """Pictures of prompts, uint8 [B, H, W, 3] (numpy; `PIL.Image.fromarray` takes each).

    Args:
      prompts: a text, a conversation, or a list of either. A text is what a user asks for.
      guidance: how far from the picture of no prompt: logits are l_u + guidance (l_c - l_u); 1 and
        below draw from the prompt's own distribution, in half the time.
      seed: of the draws; None draws anew at each call. A picture does not depend on its batch.
      num_samples: pictures of each prompt: [B, num_samples, H, W, 3]. None: one, without that axis.
      report: called with the codes that are drawn and how many there will be, once a row of them.
      sampling: temperature (1 unless given; 0 takes the most likely code), top_k, top_p, min_p.

    Raises:
      ValueError: a model that does not draw, an unknown setting or one out of its range, prompts
        beyond the model's context.
    """
    check_draws(model)
    inputs = processor.for_drawing(prompts)
    settings = dict(guidance=guidance, seed=seed, num_samples=num_samples, report=report)
    codes = generate_codes(model, **inputs, pad_id=processor.pad_id, **settings, **sampling)
    pictures = decode(model, codes)
    if num_samples is None:
        return pictures
    return pictures.reshape(-1, at_least_one("num_samples", num_samples), *pictures.shape[1:])


def check_draws(model: Any) -> None:
    """Raises ValueError for a model that does not draw."""
    if model.drawing is None:
        raise ValueError(
            f"a model of type {model.cfg.model_type} does not draw; give a Janus model"
        )


def decode(model: nnx.Module, codes_BI: Int[Array, "B I"]) -> np.ndarray:
    """Pictures of codes as bytes: (x + 1) / 2 of 255, cut off at both ends."""
    codes_BI, count = np.asarray(codes_BI), len(codes_BI)
    groups = []
    for start in range(0, count, AT_A_TIME):
        group = codes_BI[start : start + AT_A_TIME]
        # as many each time, so that one program does
        missing = min(AT_A_TIME, count) - len(group)
        group = np.pad(group, ((0, missing), (0, 0)))
        groups.append(np.asarray(model.decode_codes(group))[: AT_A_TIME - missing])
    values = np.concatenate(groups)[:count]
    return (np.clip((values + 1) / 2, 0, 1) * 255).astype(np.uint8)


def generate_codes(
    model: nnx.Module,
    tokens: Any,
    mask: Any | None = None,
    *,
    pad_id: int,
    guidance: Number = 5.0,
    seed: Number | None = 0,
    num_samples: Number | None = None,
    report: Report | None = None,
    **sampling: Any,
) -> Int[Array, "B I"]:
    """Codes of the pictures that follow some prompts, a prompt's samples one after another.

    Args:
      tokens, mask: as of `generate_tokens`; the last token of each begins a picture.
      pad_id: what prompts are replaced by where there is guidance. The others are those of
        `generate_images`, whose errors it raises.
    """
    check_draws(model)
    chosen = read_sampling({"temperature": 1.0, **sampling}, OTHERS)
    if chosen.switches.penalises:
        raise ValueError("repetition_penalty is of words; codes of a picture may repeat")
    guidance = real("guidance", guidance)
    if not -1e6 < guidance < 1e6:
        raise ValueError(f"guidance is {guidance}; it must be a number up to 1e6")
    samples = 1 if num_samples is None else at_least_one("num_samples", num_samples)
    cfg, count = model.decoder.cfg, model.tokens_per_image
    tokens_BT, mask_BT = read_batch(tokens, mask, cfg.vocab_size)
    check_length(tokens_BT, count, cfg.max_seq_len)
    settings = Settings(chosen, np.float32(guidance) if guidance > 1 else None)
    if settings.guidance is not None:
        tokens_BT = np.concatenate([tokens_BT, without_prompt(tokens_BT, mask_BT, pad_id)])
        mask_BT = np.concatenate([mask_BT, mask_BT])
    engine = engine_of(model)
    with on_mesh_of(model):
        key = jax.random.key(read_seed(seed))
        state, stepper = _start(engine, tokens_BT, mask_BT, key, settings, samples, count)
        run = _compiled(engine.is_on_cpu)
        side = round(count**0.5)
        for until in range(side, count + 1, side):
            state = run(stepper, engine.model.drawing, state, np.int32(until), settings)
            if report is not None:
                report(int(state.step), count)
    return jnp.asarray(np.asarray(state.codes_BI))


def without_prompt(tokens_BT: np.ndarray, mask_BT: np.ndarray, pad_id: int) -> np.ndarray:
    """Prompts of which the first and the last token are left, and padding between."""
    columns_T, last_B1 = np.arange(tokens_BT.shape[1]), mask_BT.sum(axis=1, keepdims=True) - 1
    is_kept_BT = (columns_T == 0) | (columns_T == last_B1)
    return np.where(is_kept_BT, tokens_BT, np.where(mask_BT, pad_id, 0)).astype(np.int32)


def _start(
    engine: Engine,
    tokens_RT: np.ndarray,
    mask_RT: np.ndarray,
    key: Array,
    settings: Settings,
    num_samples: int,
    count: int,
) -> tuple[State, nnx.Module]:
    """The state before the first code, and the layout of the decoder that steps."""
    length = tokens_RT.shape[1]
    width = prompt_width(length)
    prompt = [pad(x, width) for x in (tokens_RT, mask_RT)]
    num_rows = len(tokens_RT) * num_samples
    num_pictures = num_rows if settings.guidance is None else num_rows // 2
    reader, stepper = engine.model_for(tokens_RT.size), engine.stepper(num_rows)
    cache, x_R1D = _prefill(reader, *prompt, block=block_size(width))
    sizes = dict(num_slots=engine.num_slots(max(width, length + count)), num_codes=count)
    sizes |= dict(num_samples=num_samples, num_pictures=num_pictures)
    return _begin(stepper, cache, x_R1D, key, **sizes), stepper


@functools.partial(jax.jit, static_argnames="block")
def _prefill(model, tokens_RT, mask_RT, block) -> tuple[Any, Array]:
    """(the cache, the hidden state of each row's last token)."""
    cache = model.init_cache(*tokens_RT.shape)
    kind = dict(block=block, last_only=True, is_new=True)
    x_R1D, cache = read_prompt(model, tokens_RT, mask_RT, cache, **kind)
    return cache, x_R1D


@functools.partial(
    jax.jit, static_argnames=("num_slots", "num_codes", "num_samples", "num_pictures")
)
def _begin(model, cache, x_R1D, key, num_slots, num_codes, num_samples, num_pictures) -> State:
    x_R1D = jnp.repeat(x_R1D, num_samples, axis=0)
    return State(
        fit(cache, model.init_cache(len(x_R1D), num_slots)),
        x_R1D,
        jnp.int32(0),
        jnp.zeros((num_pictures, num_codes), jnp.int32),
        jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_pictures)),
    )


@functools.cache
def _compiled(on_cpu: bool) -> Callable[..., State]:
    options = layout.cpu_options() if on_cpu else None
    return jax.jit(_draw, donate_argnames="state", compiler_options=options)


def _draw(model, drawing, state: State, until: Array, settings: Settings) -> State:
    """Draws codes up to `until` in all."""

    def step(state: State) -> State:
        # tied to the step, or XLA's CPU compiler turns bf16 weights into float32 ahead of the loop
        parts, number = jax.lax.optimization_barrier(((model, drawing), state.step))
        return _step(*parts, dataclasses.replace(state, step=number), settings)

    return jax.lax.while_loop(lambda state: state.step < until, step, state)


def _step(model, drawing, state: State, settings: Settings) -> State:
    """Draws one code a picture, and computes what the next is read from."""
    logits_RV = everywhere(drawing.unembed(by_row(state.x_R1D))[:, 0])
    logits_BV = guided(logits_RV, settings.guidance)
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys_B, state.step)
    logits_BV = shape_logits(logits_BV, None, settings.sampling)
    code_B = draw(logits_BV, settings.sampling, keys_B)
    code_R = code_B if settings.guidance is None else jnp.concatenate([code_B, code_B])
    x_R1D, cache = model.features(drawing.embed(by_row(code_R[:, None])), cache=state.cache)
    return State(
        cache,
        everywhere(x_R1D),
        state.step + 1,
        state.codes_BI.at[:, state.step].set(code_B),
        state.keys_B,
    )


def guided(logits_RV: Float[Array, "R V"], guidance: Any) -> Float[Array, "B V"]:
    """l_u + guidance (l_c - l_u) of pairs of rows; as they are where there is no guidance."""
    if guidance is None:
        return logits_RV
    with_BV, without_BV = jnp.split(logits_RV, 2)
    return without_BV + guidance * (with_BV - without_BV)
