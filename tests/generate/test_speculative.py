"""Speculative decoding against plain decoding: the same text, or the same distribution of texts.

The models' modules draft right about half of the time, so that every test meets accepted and
rejected drafts in one batch.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import llmprep_jax as lp
from llmprep_jax.generate import engine
from llmprep_jax.generate import prompt as prompts
from llmprep_jax.generate.decoding import generate_tokens, stream_tokens
from llmprep_jax.generate.engine import Engine
from llmprep_jax.generate.sampler import Sampling, shape_logits
from llmprep_jax.nn.attention import Tokens
from llmprep_jax.nn.moe import Routing
from tests.generate.drafting import drafting_model, with_modules
from tests.models.tiny import make_model, make_tokens

NEW, NOWHERE = 24, 96  # the latter is a stop id outside the vocabulary: programs know their number
PROMPTS = make_tokens(50, 11)
MASK = np.arange(11) < np.random.default_rng(0).integers(1, 12, 50)[:, None]
SAMPLED = dict(temperature=1.5, top_k=40)
# experts are in the modules; a router that is quick to compile
PLAIN = dict(num_dense=2, routing=Routing(4, 2))


@functools.cache
def model_with(num_mtp):
    return with_modules(drafting_model(2, **PLAIN), num_mtp)


def plain(tokens, mask=None, *, stop=NOWHERE, **settings):
    """What the model says without modules."""
    settings = dict(max_new_tokens=NEW, stop_ids=[stop], return_logprobs=True) | settings
    return map(np.asarray, generate_tokens(model_with(0), tokens, mask, **settings))


def drafted(num_mtp, tokens, mask=None, *, stop=NOWHERE, **settings):
    """What it says with drafts: tokens, log-probabilities and the account."""
    found = []
    settings = dict(max_new_tokens=NEW, stop_ids=[stop], return_logprobs=True) | settings
    settings |= dict(draft="mtp", report=found.append)
    result = generate_tokens(model_with(num_mtp), tokens, mask, **settings)
    return *map(np.asarray, result), *found


@pytest.mark.slow  # compiles for seven seconds; the small model's draws are in the fast suite
@pytest.mark.parametrize("num_mtp", [1, 2])
def test_fifty_ragged_prompts_are_answered_as_without_drafts(num_mtp):
    expected, expected_logprobs = plain(PROMPTS, MASK)
    tokens, logprobs, account = drafted(num_mtp, PROMPTS, MASK)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-4)
    assert 0.2 < account.rate < 0.8
    assert np.all(account.accepted.sum(axis=0) > 0)


@pytest.mark.slow  # compiles for ten seconds
def test_one_row_with_a_penalty_is_answered_as_without_drafts():
    settings = dict(repetition_penalty=1.3, max_new_tokens=60)
    expected, _ = plain(PROMPTS[:1], **settings)
    tokens, _, account = drafted(1, PROMPTS[:1], **settings)
    np.testing.assert_array_equal(tokens, expected)
    assert 0 < account.rate < 1
    assert np.any(tokens != next(plain(PROMPTS[:1], max_new_tokens=60)))


@functools.cache
def start(num_mtp=2):
    """Three ragged rows in which as many drafts were verified as give 8 tokens each."""
    sampling, engine = Sampling(**SAMPLED), Engine(model_with(num_mtp))
    state = engine.start(PROMPTS[:3], MASK[:3], sampling, NEW, 0, 0, (), "mtp")
    return engine.advance(state, 8, [NOWHERE], sampling), sampling


@jax.jit
def by_full_reads(model, text_BT):
    """Each module's logits at every place, from one read of whole texts without a cache."""
    hidden, _ = model.features(model.embed_inputs(text_BT))
    found = []
    place = Tokens(jnp.broadcast_to(jnp.arange(text_BT.shape[1]), text_BT.shape))
    for m, module in enumerate(model.mtp):
        following = model.embed(jnp.roll(text_BT, -m - 1, axis=1))
        hidden, _, _ = module(hidden, following, place, model.rope(place))
        found.append(model.unembed(hidden))
    return found


@pytest.mark.slow  # compiles for ten seconds
def test_modules_draft_from_the_whole_text_however_it_was_accepted():
    state, sampling = start()
    assert len({*state.num_B.tolist()}) > 1
    texts = np.zeros((3, 11 + NEW + 2), np.int32)
    for row in range(3):
        drawn = np.asarray(state.tokens_BT)[row, : state.num_B[row]]
        text = np.concatenate([PROMPTS[row][MASK[row]], drawn, state.drafts_BM[row]])
        texts[row, : len(text)] = text
    lengths = MASK[:3].sum(axis=1) + state.num_B
    for m, logits in enumerate(by_full_reads(model_with(2), texts)):
        # the last hidden state is that of the token before the last one drawn
        shaped = shape_logits(logits[np.arange(3), lengths - 2], None, sampling)
        np.testing.assert_allclose(state.probs_BMV[:, m], jax.nn.softmax(shaped), atol=1e-5)


@functools.cache
def exact_probabilities(settings, new):
    """Of every text of `new` tokens after the prompt [0, 1], from forward passes."""
    model, sampling = small(0), Sampling(**dict(settings))
    V = model.cfg.vocab_size
    texts = np.array(list(itertools.product(range(V), repeat=new)), np.int32)
    whole = np.concatenate([np.tile([[0, 1]], (len(texts), 1)), texts], axis=1)
    logits = jax.jit(lambda model, tokens: model(tokens).logits)(model, whole)[:, 1:-1]
    p = jax.nn.softmax(shape_logits(logits.reshape(-1, V), None, sampling)).reshape(logits.shape)
    chosen = np.take_along_axis(np.asarray(p, np.float64), texts[:, :, None], axis=-1)
    return chosen[:, :, 0].prod(axis=1)


def small_model(layers):
    return drafting_model(2, layers, **dict(PLAIN, vocab_size=4, num_layers=1, num_dense=1))


@functools.cache
def small(num_mtp):
    return with_modules(small_model(0.5), num_mtp)


@pytest.fixture
def few_slots(monkeypatch):
    """Room for prompts of 4 tokens and 8 more, in which the small model's programs are shared."""
    monkeypatch.setattr(prompts, "MIN_PROMPT", 4)
    monkeypatch.setattr(engine, "MIN_SLOTS", 32)


# one program with drafts serves all that follows; the likeliest tokens have temperature 0
ROWS, TRUNCATED = 500, dict(temperature=2.0, top_k=3, top_p=0.95)
SMALL_PROMPTS = np.random.default_rng(1).integers(0, 4, (ROWS, 3), np.int32)
SMALL_MASK = np.arange(3) < np.random.default_rng(2).integers(1, 4, ROWS)[:, None]


def small_drafted(tokens=SMALL_PROMPTS, num_mtp=2, **settings):
    """What the small model draws after ragged rows, with drafts."""
    settings = (
        dict(max_new_tokens=8, stop_ids=[NOWHERE], draft="mtp", seed=5) | TRUNCATED | settings
    )
    model, mask = small(num_mtp), SMALL_MASK[: len(tokens)]
    return np.asarray(generate_tokens(model, tokens, mask, **settings))


@pytest.mark.parametrize("num_mtp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stop_id_among_accepted_drafts_ends_the_row(few_slots, num_mtp):
    stop, found = 1, []
    settings = dict(temperature=0.0, stop_ids=[stop], pad_id=3)
    expected = small_drafted(num_mtp=0, draft=None, **settings)
    ends = np.where(np.any(expected == stop, axis=1), np.argmax(expected == stop, axis=1) + 1, 0)
    assert np.all(np.bincount(ends, minlength=9) > 3)  # none, and at each of eight tokens
    drafted = small_drafted(num_mtp=num_mtp, report=found.append, **settings)
    np.testing.assert_array_equal(drafted, expected)
    (account,) = found
    np.testing.assert_array_equal(account.tokens, np.where(ends > 1, ends, account.tokens))


@pytest.mark.slow  # compiles for ten seconds
def test_a_rows_draws_do_not_depend_on_how_far_its_neighbours_are():
    settings = dict(seed=5, **SAMPLED)
    tokens = drafted(2, PROMPTS[:3], MASK[:3], **settings)[0]
    assert len({tuple(row) for row in tokens}) == 3
    for row in range(3):
        copies = np.repeat(PROMPTS[row : row + 1], 3, axis=0), np.repeat(MASK[row : row + 1], 3, 0)
        np.testing.assert_array_equal(drafted(2, *copies, **settings)[0][row], tokens[row])


@pytest.mark.slow  # compiles for seven seconds
def test_a_rows_draws_do_not_depend_on_how_many_rows_there_are(few_slots):
    np.testing.assert_array_equal(small_drafted(SMALL_PROMPTS[:3]), small_drafted()[:3])


def test_a_rows_draws_are_its_own_and_do_not_depend_on_what_others_say(few_slots):
    alike, other = 0 * SMALL_PROMPTS, 0 * SMALL_PROMPTS
    other[3:] = SMALL_PROMPTS[3:]
    found = small_drafted(alike)
    np.testing.assert_array_equal(small_drafted(other)[:3], found[:3])
    assert len({tuple(row) for row in found}) > ROWS / 2


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_a_stream_is_the_text_in_pieces_and_reports_at_its_end(few_slots, chunk):
    found, settings = [], dict(max_new_tokens=8, stop_ids=[NOWHERE], draft="mtp", seed=5)
    expected = small_drafted(report=found.append)
    pieces = stream_tokens(
        small(2), SMALL_PROMPTS, SMALL_MASK, chunk=chunk, report=found.append,
        **settings, **TRUNCATED,
    )  # fmt: skip
    pieces = list(pieces)
    assert [piece.shape[1] for piece in pieces[:-1]] == [chunk] * (len(pieces) - 1)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), expected)
    assert str(found[0]) == str(found[1])


@pytest.mark.parametrize(
    ("num_mtp", "settings"),
    [
        (2, TRUNCATED),
        # compiles for seconds what the other covers but for the truncation
        pytest.param(1, dict(temperature=1.2, min_p=0.1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sampled_texts_have_the_models_own_probabilities(few_slots, num_mtp, settings):
    seeds, new, account = range(8), 4, []
    prompts = np.tile(np.array([[0, 1]], np.int32), (ROWS, 1))
    settings_ = dict(max_new_tokens=new, stop_ids=[NOWHERE], draft="mtp", **settings)
    settings_ |= dict(report=account.append)
    draw = functools.partial(generate_tokens, small(num_mtp), prompts, **settings_)
    tokens = np.concatenate([np.asarray(draw(seed=seed)) for seed in seeds])
    rows = len(tokens)
    assert all(0.3 < each.rate < 0.9 for each in account)
    p = exact_probabilities(tuple(settings.items()), new)
    counts = np.bincount(tokens @ 4 ** np.arange(new - 1, -1, -1), minlength=len(p))
    assert not counts[p == 0].any()
    common = rows * p >= 5
    assert common.sum() > 50
    observed = np.append(counts[common], counts[~common].sum())
    expected = rows * np.append(p[common], max(1 - p[common].sum(), 1e-9))
    assert scipy.stats.chisquare(observed, expected).pvalue > 0.01


def test_right_drafts_are_all_accepted_and_counted(few_slots, monkeypatch):
    right, found = small_model(layers=0.0), []
    monkeypatch.setitem(globals(), "small", lambda num_mtp: right)
    small_drafted(temperature=0.0, report=found.append)
    (account,) = found
    # one token, twice three, and one
    assert account.steps.tolist() == [3] * ROWS
    assert account.accepted.tolist() == [[3, 3]] * ROWS
    assert account.rate_by_module == [1.0, 1.0]
    assert str(account) == "100% of 3000 drafts accepted, 2.33 tokens a verifying pass"


@pytest.mark.parametrize(
    ("model", "draft", "problem"),
    [
        (lambda: make_model("gemma3"), "mtp", "this one has none; leave draft out"),
        (lambda: model_with(0), "mtp", "this one has none; leave draft out"),
        (lambda: model_with(2), "eagle", "draft is 'eagle'; it must be \"mtp\" or None"),
    ],
)
def test_a_draft_that_there_is_not_is_refused_on_one_line(model, draft, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        lp.generate_tokens(model(), PROMPTS[:1], draft=draft)
    assert "\n" not in str(caught.value)


def test_the_caches_of_a_lone_row_are_the_power_of_two_above_its_text(monkeypatch):
    monkeypatch.setattr(engine, "MIN_SLOTS", 1)
    lone, prompt = Engine(model_with(1)), (PROMPTS[:1], None, Sampling(), 60, 0, 0, (), "mtp")
    found = []
    jax.eval_shape(lambda: found.extend(c.num_slots for c in lone.start(*prompt).cache))
    assert found == [128, 128]  # of 32 + 59 + 2
