"""Speculative decoding with a model's own multi-token prediction modules as the draft.

Of M modules each drafts one token; the model reads the last token and the drafts in one pass and
keeps the drafts up to the first that it rejects (Leviathan et al. 2023, algorithm 1; Chen et al.
2023): a draft d of probability q(d) with probability min(1, p(d) / q(d)), and in place of a
rejected one it draws from max(p - q, 0), normalised, so the text has the model's own distribution
p. Greedy, both are one-hot and the text is that of plain decoding. Rows keep different numbers of
tokens, and the next step writes over what each rejected.

Letters of this file: M modules, and drafts of a step; W tokens that the modules read in a step.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.generate.prompt import by_row, everywhere, read_prompt
from llmprep_jax.generate.sampler import Sampling, draw, likeliest, shape_logits
from llmprep_jax.nn.attention import Tokens
from llmprep_jax.nn.cache import KVCache
from llmprep_jax.types import Array

_DRAFT, _ACCEPT, _DRAW = range(3)  # what a row's key of a token is used for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one step hands to the next.

    Attributes:
      cache: the model's, which lacks the last token, and that of the modules.
      drafts_BM, probs_BMV: the tokens to verify, and the distributions that they were drawn from.
      last_BM: the last M tokens of the text. hidden_BND: what the modules read before the next
        step's tokens: hidden states of the M - 1 tokens before the last.
      num_B: tokens drawn so far. done_B: rows that have met a stop id or drawn all.
      seen_BV: tokens of the prompt and the text, with a repetition penalty; else None.
      tokens_BT, logprobs_BT: what was drawn, with room for more. limit: of a row's tokens.
      keys_B: each row's random key.
      steps_B: verifying passes. accepted_BM: how many of them accepted each module's draft.
    """

    cache: tuple[KVCache, KVCache]
    drafts_BM: Array
    probs_BMV: Array
    last_BM: Array
    hidden_BND: Array
    num_B: Array
    done_B: Array
    seen_BV: Array | None
    tokens_BT: Array
    logprobs_BT: Array
    limit: Array
    keys_B: Array
    steps_B: Array
    accepted_BM: Array

    @property
    def step(self) -> int:
        """Tokens that every row has drawn, as far as it is not done."""
        num_B, going_B = np.asarray(self.num_B), ~np.asarray(self.done_B)
        return int(num_B[going_B].min() if going_B.any() else num_B.max())


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """How the drafts of a generation fared.

    Attributes:
      steps: passes that verified drafts, [B]. accepted: how many of them accepted the draft of each
        module, [B, M]; a draft after a rejected one is not accepted.
      tokens: that were drawn, [B], the first of each row without a pass.
    """

    steps: np.ndarray
    accepted: np.ndarray
    tokens: np.ndarray

    @property
    def rate(self) -> float:
        """Accepted drafts of all."""
        return float(self.accepted.sum() / max(self.steps.sum() * self.accepted.shape[1], 1))

    @property
    def rate_by_module(self) -> list[float]:
        """The same for each module's drafts."""
        return (self.accepted.sum(axis=0) / max(self.steps.sum(), 1)).tolist()

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a verifying pass yields; 1 without speculation."""
        return float((self.tokens - 1).sum() / max(self.steps.sum(), 1))

    def __str__(self) -> str:
        drafts = int(self.steps.sum()) * self.accepted.shape[1]
        return (
            f"{self.rate:.0%} of {drafts} drafts accepted,"
            f" {self.tokens_per_step:.2f} tokens a verifying pass"
        )


def acceptance(state: State) -> Acceptance:
    """The account of what a state's text took."""
    return Acceptance(*map(np.asarray, (state.steps_B, state.accepted_BM, state.num_B)))


def check_draft(model: Any, draft: str | None) -> None:
    """Refuses a way of drafting that there is not, or that the model has no modules for."""
    if draft not in (None, "mtp"):
        raise ValueError(f'draft is {draft!r}; it must be "mtp" or None')
    if draft and model.drafts is None:
        raise ValueError(
            'draft="mtp" needs a model with multi-token prediction modules, and this one has none;'
            " leave draft out"
        )


def num_slots(model: nnx.Module, length: int, max_new_tokens: int) -> int:
    """Slots that a cache needs: a step writes up to 2 M tokens beyond those that a row keeps."""
    return length + max_new_tokens + 2 * len(model.drafts)


@functools.partial(jax.jit, static_argnames=("slots", "block"))
def prefill(
    model, tokens_BT, mask_BT, key, pad_id, limit, sampling, slots, block, inputs=None
) -> State:
    """Reads the prompts in, draws the first token and drafts the next ones."""
    B, M, V = len(tokens_BT), len(model.drafts), model.cfg.vocab_size
    cache = model.init_cache(B, slots), model.drafts.init_cache(B, slots)
    kind = dict(block=block, inputs=inputs, is_new=True)
    hidden_BTD, main = read_prompt(model, tokens_BT, mask_BT, cache[0], **kind)
    rows_B, last_B = jnp.arange(B), jnp.sum(mask_BT, axis=1) - 1
    logits_BV = _logits(model, hidden_BTD[rows_B, last_B][:, None])[:, 0]
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)
    num_B = jnp.zeros(B, jnp.int32)
    seen_BV = None
    if sampling.switches.penalises:
        seen_BV = _add(jnp.zeros((B, V), bool), jnp.where(mask_BT, tokens_BT, V))
    shaped_BV = shape_logits(logits_BV, seen_BV, sampling)
    first_B = draw(shaped_BV, sampling, _keys(keys_B, num_B, _DRAW))
    logprobs_B = jax.nn.log_softmax(logits_BV)[rows_B, first_B]
    state = State(
        (main, cache[1]),
        jnp.zeros((B, M), jnp.int32),
        jnp.zeros((B, M, V)),
        jnp.zeros((B, M), jnp.int32),
        hidden_BTD[:, : M - 1],
        num_B + 1,
        jnp.broadcast_to(limit == 1, B),
        _add(seen_BV, first_B[:, None]),
        jnp.full((B, slots), pad_id, jnp.int32).at[:, 0].set(first_B),
        jnp.zeros((B, slots)).at[:, 0].set(logprobs_B),
        limit,
        keys_B,
        jnp.zeros(B, jnp.int32),
        jnp.zeros((B, M), jnp.int32),
    )
    place = Tokens(jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0), mask_BT.astype(jnp.int32))
    text_BT = jnp.roll(tokens_BT, -1, axis=1).at[rows_B, last_B].set(first_B)
    return _draft(model, sampling, state, hidden_BTD, text_BT, place, last_B)


def decode(model, state, until, stop_ids, ended_B, sampling) -> State:
    """Draws until every row that is not done, or ended, has `until` tokens or more.

    To be compiled, the state donated.
    """
    done_B = state.done_B | ended_B | jnp.isin(state.last_BM[:, -1], stop_ids)
    state = dataclasses.replace(state, done_B=done_B)

    def going(state):
        return jnp.any(~state.done_B & (state.num_B < until))

    def step(state):
        # tied to the step, as in plain decoding
        model_here, num_B = jax.lax.optimization_barrier((model, state.num_B))
        return _step(model_here, stop_ids, sampling, dataclasses.replace(state, num_B=num_B))

    return jax.lax.while_loop(going, step, state)


def _step(model: nnx.Module, stop_ids: Array, sampling: Sampling, state: State) -> State:
    """Verifies the drafts, keeps what is accepted and a token more, and drafts anew."""
    M, limit, size = len(model.drafts), state.limit, state.tokens_BT.shape[1]
    block_BT = jnp.concatenate([state.last_BM[:, -1:], state.drafts_BM], axis=1)
    length_B = state.cache[0].length_B
    start_B = length_B - (M - 1)
    x_BTD = model.embed_inputs(by_row(block_BT))
    hidden_BTD, main = model.features(x_BTD, cache=state.cache[0])
    hidden_BTD = everywhere(hidden_BTD)
    logits_BTV = _logits(model, hidden_BTD)
    new_BT, accepted_B = _verify(logits_BTV, state, sampling)

    at_BT = state.num_B[:, None] + jnp.arange(1 + M)
    kept_BT = (jnp.arange(1 + M) <= accepted_B[:, None]) & ~state.done_B[:, None]
    stops_BT = jnp.isin(new_BT, stop_ids)
    kept_BT &= (at_BT < limit) & (jnp.cumsum(stops_BT, axis=1) - stops_BT == 0)
    num_kept_B = jnp.sum(kept_BT, axis=1, dtype=jnp.int32)
    num_B = state.num_B + num_kept_B
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    logprobs_BT = jnp.take_along_axis(logprobs_BTV, new_BT[:, :, None], axis=-1)[:, :, 0]
    rows_B1, at_BT = jnp.arange(len(num_B))[:, None], jnp.where(kept_BT, at_BT, size)
    going_B = ~state.done_B
    state = dataclasses.replace(
        state,
        cache=(main.back_to(length_B + num_kept_B), state.cache[1]),
        num_B=num_B,
        done_B=state.done_B | jnp.any(kept_BT & stops_BT, axis=1) | (num_B == limit),
        seen_BV=_add(state.seen_BV, jnp.where(kept_BT, new_BT, logits_BTV.shape[-1])),
        tokens_BT=state.tokens_BT.at[rows_B1, at_BT].set(new_BT, mode="drop"),
        logprobs_BT=state.logprobs_BT.at[rows_B1, at_BT].set(logprobs_BT, mode="drop"),
        steps_B=state.steps_B + going_B,
        accepted_BM=state.accepted_BM + (going_B[:, None] & (jnp.arange(M) < accepted_B[:, None])),
    )
    # the modules read these tokens, and once more the M - 1 before, whose entries held drafts
    hidden_BWD = jnp.concatenate([state.hidden_BND, hidden_BTD], axis=1)
    text_BW = jnp.concatenate([state.last_BM[:, 1:], new_BT], axis=1)
    last_B = accepted_B + M - 1
    positions_BW = start_B[:, None] + jnp.arange(2 * M)
    segments_BW = (positions_BW >= 0) & (jnp.arange(2 * M) <= last_B[:, None])
    place = Tokens(jnp.maximum(positions_BW, 0), segments_BW.astype(jnp.int32))
    return _draft(model, sampling, state, hidden_BWD, text_BW, place, last_B)


def _verify(logits_BTV: Array, state: State, sampling: Sampling) -> tuple[Array, Array]:
    """(accepted drafts and a token more, junk behind it; how many drafts are accepted)."""
    B, T, V = logits_BTV.shape
    rows_B1 = jnp.arange(B)[:, None]
    seen_BTV = None
    if state.seen_BV is not None:  # each draft counts for those after it
        drafted_BMV = jnp.cumsum(jax.nn.one_hot(state.drafts_BM, V, dtype=jnp.int32), axis=1) > 0
        drafted_BTV = jnp.pad(drafted_BMV, ((0, 0), (1, 0), (0, 0)))
        seen_BTV = (state.seen_BV[:, None] | drafted_BTV).reshape(B * T, V)
    p_BTV = _probabilities(logits_BTV.reshape(B * T, V), seen_BTV, sampling).reshape(B, T, V)
    q_BTV = jnp.pad(state.probs_BMV, ((0, 0), (0, 1), (0, 0)))  # nothing is drafted for the last
    at_BM = state.num_B[:, None] + jnp.arange(T - 1)
    keys_BM = jax.vmap(_keys, in_axes=(None, 1, None), out_axes=1)(state.keys_B, at_BM, _ACCEPT)
    drafts_BM1 = state.drafts_BM[:, :, None]
    p_BM, q_BM = [
        jnp.take_along_axis(x_BTV[:, :-1], drafts_BM1, axis=-1)[:, :, 0] for x_BTV in (p_BTV, q_BTV)
    ]
    accepted_BM = jax.vmap(jax.vmap(jax.random.uniform))(keys_BM) * q_BM < p_BM
    accepted_B = jnp.sum(jnp.cumprod(accepted_BM, axis=1), axis=1, dtype=jnp.int32)
    p_BV, q_BV = p_BTV[rows_B1[:, 0], accepted_B], q_BTV[rows_B1[:, 0], accepted_B]
    left_BV = jnp.maximum(p_BV - q_BV, 0)
    # none is left where p = q, which rejects by rounding alone
    left_BV = jnp.where(jnp.any(left_BV > 0, axis=-1, keepdims=True), left_BV, p_BV)
    keys_B = _keys(state.keys_B, state.num_B + accepted_B, _DRAW)
    new_B1 = draw(jnp.log(left_BV), sampling, keys_B)[:, None]
    drafts_BT = jnp.pad(state.drafts_BM, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(T) < accepted_B[:, None], drafts_BT, new_B1), accepted_B


def _draft(
    model: nnx.Module,
    sampling: Sampling,
    state: State,
    hidden_BWD: Array,
    text_BW: Array,
    place: Tokens,
    last_B: Array,
) -> State:
    """Runs the modules one after the other, each on what the one before says and drafts.

    Args:
      hidden_BWD: the model's, of tokens that stand at `place`. text_BW: the tokens after those.
      last_B: index of the last hidden state; behind it is junk.
    """
    drafts = model.drafts
    M, W = len(drafts), text_BW.shape[1]
    place = jax.tree.map(by_row, place)
    rows_B, begun = jnp.arange(len(last_B)), drafts.begin(place)
    text_BW = jnp.pad(text_BW, ((0, 0), (0, M)))
    length_B = state.cache[1].length_B
    cache = state.cache[1].begin(place.positions_BT, place.segments_BT)
    h_BWD, seen_BV, tokens, probs = hidden_BWD, state.seen_BV, [], []
    for m in range(M):
        next_BWD = model.embed_inputs(by_row(text_BW[:, m : m + W]))
        h_BWD, cache = drafts(m, by_row(h_BWD), next_BWD, place, begun, cache)
        h_BWD = everywhere(h_BWD)
        logits_BV = _logits(model, h_BWD[rows_B, last_B][:, None])[:, 0]
        probs.append(_probabilities(logits_BV, seen_BV, sampling))
        keys_B = _keys(state.keys_B, state.num_B + m, _DRAFT)
        tokens.append(draw(jnp.log(probs[-1]), sampling, keys_B))
        text_BW = text_BW.at[rows_B, last_B + 1 + m].set(tokens[-1])
        seen_BV = _add(seen_BV, tokens[-1][:, None])
    # only entries that no draft has entered; a done row's are of no use
    num_kept_B = jnp.where(state.done_B, 0, jnp.maximum(last_B - M + 2, 0))
    ends_BM = jnp.maximum(last_B[:, None] + jnp.arange(1 - M, 1), 0)  # a prompt of one token
    return dataclasses.replace(
        state,
        cache=(state.cache[0], cache.end().back_to(length_B + num_kept_B)),
        drafts_BM=jnp.stack(tokens, axis=1),
        probs_BMV=jnp.stack(probs, axis=1),
        last_BM=jnp.take_along_axis(text_BW, ends_BM, axis=1),
        hidden_BND=jnp.take_along_axis(hidden_BWD, ends_BM[:, 1:, None], axis=1),
    )


def _logits(model: nnx.Module, hidden_BTD: Array) -> Array:
    return everywhere(model.unembed(by_row(hidden_BTD)))


def _probabilities(logits_BV: Array, seen_BV: Array | None, sampling: Sampling) -> Array:
    """The distribution that is drawn from; one-hot at temperature 0."""
    shaped_BV = shape_logits(logits_BV, seen_BV, sampling)
    if sampling.switches.is_greedy:
        return jax.nn.one_hot(likeliest(shaped_BV), shaped_BV.shape[-1])
    return jax.nn.softmax(shaped_BV)


def _keys(keys_B: Array, at_B: Array, use: int) -> Array:
    """Keys of a use of each row's token number `at`, whatever step draws it."""
    return jax.vmap(lambda key, at: jax.random.fold_in(jax.random.fold_in(key, at), use))(
        keys_B, at_B
    )


def _add(seen_BV: Array | None, tokens_BT: Array) -> Array | None:
    """Tokens seen, with further ones; an id beyond the vocabulary adds none."""
    if seen_BV is None:
        return None
    rows_B1 = jnp.arange(len(tokens_BT))[:, None]
    return seen_BV.at[rows_B1, tokens_BT].set(True, mode="drop")
