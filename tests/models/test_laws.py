"""Laws that hold for every family, whatever its weights are.

Compiling takes all the time here, so the laws of a family read the same few programs: `forward`
plain and with places, `gradients`, and `step` on blocks of one and of five tokens; tokens are of
shape (2, 14). What a row would be alone is read off a row that begins with it, since no logit
depends on a later token.
"""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.nn.cache import KVCache
from llmprep_jax.nn.param import Param
from llmprep_jax.nn.stack import unstack
from tests.grids import cases
from tests.models.tiny import (
    CONFIGS,
    ODD_CONFIGS,
    forward,
    make_model,
    make_tokens,
    random_model,
)

ROWS, LENGTH, SLOTS = 2, 14, 16
ONES, FIVES = [1] * LENGTH, [5, 1, 5, 1, 1, 1]

families = pytest.mark.parametrize("name", CONFIGS)
model_of = functools.cache(make_model)


def listed(model):
    """The same model with its layers in a list."""
    model = nnx.merge(*nnx.split(model))
    for name in model.stacks:
        setattr(model, name, unstack(getattr(model, name)))
    return model


@functools.cache
def logits_of(name: str) -> np.ndarray:
    return np.asarray(forward(model_of(name), make_tokens()))


def logits_of_rows(name: str, *rows: np.ndarray) -> list[np.ndarray]:
    """Logits of each row as if it were alone, of up to 14 tokens; up to two rows."""
    tokens = np.zeros((ROWS, LENGTH), np.int32)
    for whole, row in zip(tokens, rows, strict=False):
        whole[: len(row)] = row
    found = forward(model_of(name), tokens)
    return [np.asarray(logits[: len(row)]) for logits, row in zip(found, rows, strict=False)]


@jax.jit
def gradients(model, table, tokens, mask, weights_BT):
    """(logits, gradients of a weighted sum of their sines by the model and by embeddings)."""

    def total(model, table):
        embedding = nnx.merge(*nnx.split(model))
        embedding.embed.w = Param(table)
        hidden_BTD, _ = embedding.features(embedding.embed_inputs(tokens), mask=mask)
        logits = model.unembed(hidden_BTD)
        return jnp.sum(jnp.sin(logits) * weights_BT[..., None]), logits

    by_model, logits = jax.grad(total, argnums=(0, 1), has_aux=True)(model, table)
    return logits, *by_model


def gradients_of(model, mask=None, weights=None, tokens=None):
    ones = np.ones((ROWS, LENGTH), np.float32)
    return gradients(
        model,
        model.embed.w[...],
        make_tokens() if tokens is None else tokens,
        ones.astype(bool) if mask is None else mask,
        ones if weights is None else weights,
    )


@families
def test_no_logit_depends_on_a_later_token_or_on_another_row(name):
    # each token is another row of the table
    tokens = np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH)
    influence = []
    for one in np.eye(LENGTH, dtype=np.float32):
        weights = np.stack([one, np.zeros_like(one)])
        _, _, by_table = gradients_of(model_of(name), weights=weights, tokens=tokens)
        influence.append(np.linalg.norm(by_table, axis=-1)[: ROWS * LENGTH])
    own, other = np.split(np.array(influence), 2, axis=1)
    later = np.triu(np.ones((LENGTH, LENGTH), bool), 1)
    assert np.all(own[later] == 0)
    assert np.all(own[~later] > 0)
    assert np.all(other == 0)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_layers_with_a_window_reach_back_as_far_as_their_windows_add_up(num_layers):
    cfg = dataclasses.replace(ODD_CONFIGS["gemma3-all-local"], num_layers=num_layers)
    model, tokens = random_model(cfg), make_tokens()
    plain = np.asarray(forward(model, tokens))
    for at in range(LENGTH):
        changed = tokens.copy()
        changed[:, at] = 95 - changed[:, at]
        differs = np.any(np.asarray(forward(model, changed)) != plain, axis=-1)
        back = np.arange(LENGTH) - at
        expected = (back >= 0) & (back <= num_layers * (cfg.window - 1))
        np.testing.assert_array_equal(differs, np.stack([expected] * ROWS))


@pytest.mark.parametrize("name", cases(CONFIGS, fast=["qwen2-window"], slow=["deepseek-v3"]))
def test_unrolled_layers_agree_with_scanned_ones(name):
    found = forward(make_model(name, unroll=0), make_tokens())
    np.testing.assert_allclose(found, logits_of(name), atol=1e-5)


# lists of layers compile for seconds; what generation on a CPU runs is in tests/generate too
LISTED = cases(CONFIGS, fast=["qwen2-window"], slow=["gemma3", "deepseek-v3"])


@pytest.mark.parametrize("name", LISTED)
def test_listed_layers_agree_with_scanned_ones(name):
    found = jax.jit(lambda model, tokens: listed(model)(tokens).logits)(
        model_of(name), make_tokens()
    )
    np.testing.assert_allclose(found, logits_of(name), atol=1e-5)


def test_padding_inside_a_row_of_several_query_blocks_changes_nothing_in_either_layout():
    cfg = dataclasses.replace(CONFIGS["gemma3"], window=40, global_every=2, num_layers=2)
    model, tokens = random_model(cfg), make_tokens(1, 290)
    columns = np.r_[:110, 170:350]
    inside, outside = np.zeros((2, 2, 1, 360), np.int32)
    for (padded, segments), at in ((inside, columns), (outside, np.arange(290))):
        padded[:, at], segments[:, at] = tokens, np.repeat([1, 2], [90, 200])
    expected = forward(model, outside[0], segment_ids=outside[1])[:, :290]
    run_listed = jax.jit(lambda model, tokens, **where: listed(model)(tokens, **where).logits)
    for run in (run_listed, forward):
        found = run(model, inside[0], segment_ids=inside[1])[:, columns]
        np.testing.assert_allclose(found, expected, atol=1e-5)


REMATS = cases(
    itertools.product(CONFIGS, ("dots", "full", "attention,mlp_hidden")),
    fast=[("qwen2-window", "attention,mlp_hidden")],
    slow=[("gemma3", "dots"), ("deepseek-v3", "full")],
)


@pytest.mark.parametrize(("name", "remat"), REMATS)
def test_rematerialisation_changes_no_gradient(name, remat):
    plain, saved = gradients_of(model_of(name)), gradients_of(make_model(name, remat=remat))
    for found, expected in zip(*map(jax.tree.leaves, (saved, plain)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@functools.partial(jax.jit, static_argnums=(0, 2))
def empty_cache(is_listed, model, kind=()):
    return (listed(model) if is_listed else model).init_cache(ROWS, SLOTS, **dict(kind))


@functools.partial(jax.jit, static_argnums=0)
def step(is_listed, model, tokens, mask, cache):
    return (listed(model) if is_listed else model)(tokens, mask=mask, cache=cache)


def decode(model, tokens, blocks, mask=None, is_listed=False, **kind):
    """Logits of tokens that come in blocks, from the cache."""
    mask = np.ones(tokens.shape, bool) if mask is None else mask
    cache, logits, start = empty_cache(is_listed, model, tuple(kind.items())), [], 0
    for size in blocks:
        part = slice(start, start + size)
        out = step(is_listed, model, tokens[:, part], mask[:, part], cache)
        cache, start = out.cache, start + size
        logits.append(out.logits)
    return np.concatenate(logits, axis=1)


# windows in all layers are gemma3-all-local's too, and in none llama's
@pytest.mark.parametrize(
    "name",
    cases(
        [*CONFIGS, *ODD_CONFIGS],
        fast=[
            *CONFIGS,
            *["gemma3-all-local", "deepseek-v2-every-other", "qwen3-window-in-turns"],
        ],
    ),
)
@pytest.mark.parametrize("blocks", [ONES, FIVES], ids=str)
def test_decoding_from_the_cache_equals_the_full_forward(name, blocks):
    found = decode(model_of(name), make_tokens(), blocks)
    np.testing.assert_allclose(found, logits_of(name), atol=1e-5)


@pytest.mark.parametrize(
    "name",
    cases(
        [*CONFIGS, *ODD_CONFIGS],
        fast=[*CONFIGS, "deepseek-v2-every-other"],
        slow=["gemma3-all-local"],
    ),
)
def test_the_first_block_of_a_fresh_cache_is_that_of_any_empty_one(name):
    model, tokens = model_of(name), make_tokens()
    mask = np.ones((ROWS, LENGTH), bool)
    mask[0, :3], mask[1, 4:7] = False, False
    empty = jax.jit(lambda model: model.init_cache(ROWS, SLOTS))(model)
    fresh = jax.tree.map(KVCache.fresh, empty, is_leaf=lambda x: isinstance(x, KVCache))
    outs = []
    for cache in (empty, fresh):
        first = step(False, model, tokens[:, :9], mask[:, :9], cache)
        rest = step(False, model, tokens[:, 9:], mask[:, 9:], first.cache)
        outs.append(np.concatenate([first.logits, rest.logits], axis=1)[mask])
        assert jax.tree.structure(rest.cache) == jax.tree.structure(empty)
    np.testing.assert_allclose(*outs, atol=1e-5)


def test_the_first_block_of_a_fresh_cache_of_8_bits_sees_itself_unrounded():
    model, tokens = model_of("qwen2-window"), make_tokens()
    mask = np.ones((ROWS, LENGTH), bool)
    empty = model.init_cache(ROWS, SLOTS, dtype="int8")
    expected = logits_of("qwen2-window")
    np.testing.assert_allclose(
        step(False, model, tokens, mask, empty.fresh()).logits, expected, atol=1e-5
    )
    rounded = step(False, model, tokens, mask, empty).logits
    assert np.abs(rounded - expected).max() > 1e-4


@pytest.mark.parametrize("name", LISTED)
def test_listed_layers_decode_from_the_same_cache(name):
    found = decode(model_of(name), make_tokens(), FIVES, is_listed=True)
    np.testing.assert_allclose(found, logits_of(name), atol=1e-5)


@pytest.mark.parametrize("name", cases(CONFIGS, slow=["gemma3"]))
def test_listed_layers_that_are_rematerialised_decode_too(name):
    found = decode(make_model(name, remat="full"), make_tokens(), FIVES, is_listed=True)
    np.testing.assert_allclose(found, logits_of(name), atol=1e-5)


@families
@pytest.mark.parametrize("left", [5, 2, 0])
def test_padding_on_either_side_changes_nothing(name, left):
    columns, row = slice(left, left + 9), make_tokens()[0, :9]
    tokens, mask = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), bool)
    tokens[:, columns], mask[:, columns] = row, True
    found = gradients_of(model_of(name), mask, tokens=tokens)[0][:, columns]
    np.testing.assert_allclose(found, np.stack([logits_of(name)[0, :9]] * ROWS), atol=1e-5)


@families
def test_left_padded_rows_decode_as_alone(name):
    tokens, mask = make_tokens(), np.arange(LENGTH) >= [[5], [3]]
    found = decode(model_of(name), tokens, FIVES, mask)
    for row, expected in enumerate(logits_of_rows(name, tokens[0, 5:], tokens[1, 3:])):
        np.testing.assert_allclose(found[row, mask[row]], expected, atol=1e-5)


# layers of two kinds, and latents: the others' caches are of one of the kinds
@pytest.mark.parametrize("name", cases(CONFIGS, fast=["gemma3", "deepseek-v3"]))
def test_a_cache_in_pages_or_in_8_bits_decodes_alike(name):
    model, tokens, mask = model_of(name), make_tokens(), np.arange(LENGTH) < [[9], [14]]
    plain, paged, small = [
        decode(model, tokens, FIVES, mask, **kind)
        for kind in ({}, dict(page_size=4), dict(page_size=4, dtype="int8"))
    ]
    np.testing.assert_allclose(paged[mask], plain[mask], atol=1e-5)
    assert 0 < np.abs(small - plain)[mask].max() < 0.02 * np.abs(plain[mask]).max()


@families
def test_padding_inside_rows_is_as_if_it_were_not_there(name):
    tokens, mask = make_tokens(), np.zeros((ROWS, LENGTH), bool)
    mask[0, [0, 1, 2, 3, 9, 10, 12]], mask[1, [2, 4, *range(6, 14)]] = True, True
    whole = gradients_of(model_of(name), mask)[0]
    cached = [decode(model_of(name), tokens, blocks, mask) for blocks in (ONES, FIVES)]
    expected = logits_of_rows(name, *[tokens[row, mask[row]] for row in (0, 1)])
    for found in (whole, *cached):
        for row in (0, 1):
            np.testing.assert_allclose(found[row, mask[row]], expected[row], atol=1e-5)


@families
def test_packed_documents_do_not_see_each_other(name):
    tokens, lengths = make_tokens(), [(5, 6, 3), (1, 9, 4)]
    segments = np.array([np.repeat([1, 2, 3], x) for x in lengths], np.int32)
    positions = np.array([np.concatenate([*map(np.arange, x)]) for x in lengths], np.int32)
    packed = forward(model_of(name), tokens, positions=positions, segment_ids=segments)
    for number in (1, 2, 3):
        parts = segments == number
        alone = logits_of_rows(name, *[tokens[row, parts[row]] for row in (0, 1)])
        for row, expected in enumerate(alone):
            np.testing.assert_allclose(packed[row, parts[row]], expected, atol=1e-5)


@families
def test_only_distances_between_positions_matter(name):
    shifted = np.tile(np.arange(40, 54, dtype=np.int32), (ROWS, 1))
    ones = np.ones_like(shifted)
    found = forward(model_of(name), make_tokens(), positions=shifted, segment_ids=ones)
    np.testing.assert_allclose(found, logits_of(name), atol=1e-4)


@families
def test_rows_of_a_batch_do_not_meet(name):
    found = forward(model_of(name), make_tokens()[::-1])[::-1]
    np.testing.assert_allclose(found, logits_of(name), atol=1e-5)


@families
def test_a_row_of_padding_stays_finite(name):
    mask = np.array([[True] * LENGTH, [False] * LENGTH])
    chex.assert_tree_all_finite(gradients_of(model_of(name), mask))


def test_a_mask_and_segments_together_are_refused():
    tokens = make_tokens()
    ones = np.ones_like(tokens)
    with pytest.raises(ValueError, match="not both"):
        model_of("gemma3")(tokens, mask=ones.astype(bool), segment_ids=ones)


def test_more_tokens_than_cache_slots_are_refused():
    model = model_of("gemma3")
    with pytest.raises(ValueError, match="14 tokens do not fit a cache of 8"):
        model(make_tokens(), cache=model.init_cache(2, 8))


@families
def test_tokens_after_a_caches_last_slot_are_refused_or_compiled_give_nan(name):
    model, cache = model_of(name), empty_cache(False, model_of(name))
    tokens, mask = make_tokens(ROWS, 5), np.ones((ROWS, 5), bool)
    for is_finite in (True, True, True, False):
        if not is_finite:
            says = "5 tokens do not fit a cache of 16 slots, 15 of them taken"
            with pytest.raises(ValueError, match=says):
                model(tokens, cache=cache)
        logits, cache = step(False, model, tokens, mask, cache)
        assert np.isfinite(logits).all() if is_finite else np.isnan(logits).all()


# products in bf16 alone are the layers' own matter, and the same in every family
DTYPES = cases(
    itertools.product(CONFIGS, ("dtype", "matmul_dtype")),
    fast=[("gemma3", "dtype"), ("deepseek-v3", "dtype"), ("gemma3", "matmul_dtype")],
)


@pytest.mark.parametrize(("name", "setting"), DTYPES)
def test_bf16_compute_stays_near_float32(name, setting):
    expected = logits_of(name)
    found = forward(make_model(name, **{setting: "bfloat16"}), make_tokens())
    assert found.dtype == jnp.float32
    # a rounded score may send a token to another expert, and its logits elsewhere
    share = 0.5 if "deepseek" in name else 1.0
    assert np.quantile(np.abs(found - expected), share) < 0.05 * np.abs(expected).max()


def test_gemma_caps_logits_by_tanh():
    model = make_model("gemma3")
    model.cfg = dataclasses.replace(model.cfg, logits_soft_cap=2.0)
    expected = 2 * np.tanh(logits_of("gemma3") / 2)
    np.testing.assert_allclose(forward(model, make_tokens()), expected, atol=1e-5)


def test_gemma_scales_embeddings_by_a_root_in_the_dtype_of_the_weights():
    for dtype, scale in (("float32", 48**0.5), ("bfloat16", 6.9375)):
        model = make_model("gemma3", param_dtype=dtype)
        found = model.embed_inputs(jnp.array([[7]]))[0, 0]
        expected = np.asarray(model.embed.w[...][7], np.float32) * np.float32(scale)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
