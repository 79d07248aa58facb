"""Prompts with images in them: read once, in blocks, from prompt caches and with drafts, they are
what a full forward pass makes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llmprep_jax as lp
from llmprep_jax.generate import prompt as prompts
from llmprep_jax.generate.media import cache_keys
from llmprep_jax.generate.prompt import columns_of_blocks
from llmprep_jax.nn.composed import group_images
from llmprep_jax.sharding import make_mesh, use_mesh
from tests.grids import cases
from tests.models.seeing import EACH, IMAGE, make, pictures, prompt, seeing
from tests.random_modules import random_module

# words and images (0) of three rows
ROWS = [prompt(3, 0, 2, 0, 5), prompt(7), prompt(1, 0, 0, 2)]
IMAGES = pictures(4)
NEW = 5
families = pytest.mark.parametrize(
    "name", cases(["llama-tied-9-3-heads", "gemma3", "deepseek-v3"], slow=["deepseek-v3"])
)


@jax.jit
def logits_of(model, tokens, **media):
    return model(tokens, **media).logits


def by_full_passes(model, row, images, new=NEW):
    """Greedy tokens after one row, each from a pass over all before it."""
    for _ in range(new):
        padded = np.array([row + [1] * (40 - len(row))])
        media = {"images": images[None]} if len(images) else {}
        row = [*row, int(np.argmax(logits_of(model, padded, **media)[0, len(row) - 1]))]
    return row[-new:]


@functools.cache
def expected(name):
    images = [IMAGES[:2], IMAGES[:0], IMAGES[2:]]
    return [by_full_passes(seeing(name), row, x) for row, x in zip(ROWS, images, strict=True)]


@families
@pytest.mark.parametrize("block", [None, 4, 8])
def test_rows_of_unlike_images_generate_as_each_alone_from_full_passes(name, block, monkeypatch):
    if block is not None:
        monkeypatch.setattr(prompts, "MAX_BLOCK", block)
    found = lp.generate_tokens(
        seeing(name), ROWS, max_new_tokens=NEW, media={"images": IMAGES}, pad_id=IMAGE - 1
    )
    assert np.asarray(found).tolist() == expected(name)


@pytest.mark.slow  # compiles for ten seconds
def test_drafts_change_no_token_after_images():
    settings = dict(max_new_tokens=NEW, media={"images": IMAGES})
    found = lp.generate_tokens(seeing("deepseek-v3"), ROWS, draft="mtp", **settings)
    assert np.asarray(found).tolist() == expected("deepseek-v3")


@families
def test_a_chat_reads_only_what_is_new_unless_the_picture_is_another(name):
    model, kept = seeing(name), lp.PromptCache()

    def answer(row, images):
        settings = dict(max_new_tokens=NEW, media={"images": images}, prompt_cache=kept)
        return np.asarray(lp.generate_tokens(model, [row], **settings))[0].tolist()

    first = ROWS[0]
    said = answer(first, IMAGES[:2])
    assert said == expected(name)[0]
    longer = first + said + prompt(2, 0, 1)
    images = np.concatenate([IMAGES[:2], pictures(1, seed=5)])
    assert answer(longer, images) == by_full_passes(model, longer, images)
    others = pictures(3, seed=7)
    again = answer(longer, others)
    assert again == by_full_passes(model, longer, others)
    assert again != by_full_passes(model, longer, images)


def test_keys_of_prompt_caches_tell_images_apart_one_by_one():
    tokens = np.array(ROWS[0])
    keys = cache_keys(seeing("gemma3"), tokens, {"images": IMAGES[None, :2]})
    others = cache_keys(seeing("gemma3"), tokens, {"images": IMAGES[None, [0, 3]]})
    is_image = tokens == IMAGE
    np.testing.assert_array_equal(keys[~is_image], tokens[~is_image])
    assert np.all(keys[is_image] < 0)
    np.testing.assert_array_equal(keys == others, ~(is_image & (np.cumsum(is_image) > EACH)))


@families
def test_images_of_rows_and_images_one_after_another_are_the_same_call(name):
    model = seeing(name)
    width = max(map(len, ROWS))
    tokens = np.array([row + [1] * (width - len(row)) for row in ROWS])
    by_row = group_images(tokens, IMAGE, EACH, jnp.asarray(IMAGES))
    assert by_row.shape == (3, 2, 4, 4, 3)
    np.testing.assert_array_equal(by_row[1], np.zeros((2, 4, 4, 3)))
    np.testing.assert_array_equal(by_row[2], IMAGES[2:])
    found, same = model(tokens, images=IMAGES).logits, logits_of(model, tokens, images=by_row)
    np.testing.assert_allclose(found, same, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "count", "problem"),
    [
        ([ROWS[0]], 1, "1 images are 4 image tokens .id 95., 4 each, and the rows have 8"),
        ([ROWS[0]], 3, "3 images are 12 image tokens"),
        ([ROWS[0][:-6] + [1] * 6], 2, "the rows have 7"),
        (ROWS, 3, "the rows have 8, 0, 8"),
    ],
)
def test_images_that_the_tokens_are_not_of_are_refused_in_numbers(rows, count, problem):
    model = seeing("gemma3")
    with pytest.raises(ValueError, match=problem):
        lp.generate_tokens(model, rows, max_new_tokens=2, media={"images": pictures(count)})


def test_rows_with_more_image_tokens_than_they_hold_images_are_refused():
    model, tokens = seeing("gemma3"), np.array([ROWS[0]])
    one = IMAGES[None, :1]
    with pytest.raises(ValueError, match=r"row 0 has 8 image tokens .id 95., 4 an image, and rows"):
        model(tokens, images=one)
    cut = np.where(np.cumsum(tokens == IMAGE, axis=1) == 8, 1, tokens)
    with pytest.raises(ValueError, match="row 0 has 7 image tokens"):
        model(cut, images=IMAGES[None, :2])


def test_a_model_of_text_refuses_images():
    with pytest.raises(ValueError, match="this model reads text only; leave images out"):
        lp.generate_tokens(seeing("gemma3").language, [[1, 2]], media={"images": IMAGES})


def test_images_beyond_the_context_are_told_in_tokens():
    row = prompt(100, 0, 0, 20)
    message = "128 prompt tokens, 8 of them of images, and 5 new exceed the model's context of 128"
    media = {"images": IMAGES[:2]}
    with pytest.raises(ValueError, match=message):
        lp.generate_tokens(seeing("gemma3"), [row], max_new_tokens=NEW, media=media)


@pytest.mark.parametrize("name", ["llama-tied-9-3-heads", "gemma3"])
def test_a_logit_depends_on_what_its_token_sees_and_on_nothing_else(name):
    model, tokens = seeing(name), np.array([prompt(2, 0, 2, 0, 2)])
    T = tokens.shape[1]

    @jax.jit
    def influence(x_BTD, spans):
        def one(weights_T):
            def total(x_BTD):
                hidden, _ = model.language.features(x_BTD, spans=spans)
                return jnp.sum(jnp.sin(hidden[0]) * weights_T[:, None])

            return jnp.linalg.norm(jax.grad(total)(x_BTD)[0], axis=-1)

        return jax.lax.map(one, jnp.eye(T))

    x_BTD = model.embed_inputs(tokens, images=IMAGES[None, :2])
    found = influence(x_BTD, model.spans(tokens)) > 0
    sees = np.tril(np.ones((T, T), bool))
    if name == "gemma3":
        for start in (2, 8):
            sees[start : start + EACH, start : start + EACH] = True
        reach = sees.copy()  # through all layers, of which some have a window
        assert np.all(found <= reach)
        assert np.all(np.diagonal(found))
        assert found[2, 5]
        assert found[8, 11]
    else:
        np.testing.assert_array_equal(found, sees)


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", cases(["llama-tied-9-3-heads", "gemma3"], fast=["gemma3"]))
def test_a_mesh_gives_the_logits_of_one_device(name, axes):
    tokens = np.array([prompt(2, 0, 2, 0, 2), prompt(4, 0, 6)] * 2)
    images = np.stack([pictures(2, seed) for seed in range(4)])
    expected = logits_of(seeing(name), tokens, images=images)
    with use_mesh(make_mesh(axes)):
        model = random_module(lambda: make(name))
        found = logits_of(model, tokens, images=images)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_runs_that_a_block_would_cut_begin_the_next_one():
    spans = np.array([[0, 0, 1, 1, 1, 0, 2, 2], [0, 1, 1, 0, 0, 0, 0, 0]])
    mask = np.array([[1] * 8, [1] * 5 + [0] * 3], bool)
    prompts_block = columns_of_blocks(mask, spans, 8, 64)
    assert prompts_block[1] == 64
    columns, _ = prompts_block
    np.testing.assert_array_equal(columns[0, :8], range(8))
    np.testing.assert_array_equal(columns[1, :8], [0, 1, 2, 3, 4, -1, -1, -1])


def test_a_block_is_as_long_as_the_longest_run(monkeypatch):
    monkeypatch.setattr(prompts, "MAX_BLOCK", 4)
    spans = np.array([[0, 0, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0]])
    columns, block = columns_of_blocks(np.ones((1, 12), bool), spans, 12, 16)
    assert block == 4
    no = [-1, -1]
    expected = [[0, 1, *no, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, *no]]
    np.testing.assert_array_equal(columns, expected)
