"""DeepSeek-VL2 against numbers that its official code computed, one rung after the other.

The folders of `tests/golden/deepseek_vl2` are tiny models as Hugging Face lays them out, of each
kind of language model that was released: plain attention (Tiny), latent attention (Small), latent
attention with V3's router (Base). Their pictures are 2 x 1 and 1 x 2 tiles.
"""

import dataclasses
import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.generate import prompt as prompts
from llmprep_jax.models import deepseek_vl2, registry
from llmprep_jax.models.deepseek_vl2.layout import count_tiles, count_tokens, index_features
from llmprep_jax.models.deepseek_vl2.model import join_patches
from llmprep_jax.nn.param import Idle
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.vision.tiles import RESOLUTIONS
from llmprep_jax.weights.safetensors import SafetensorsFile
from tests.grids import cases
from tests.random_modules import random_module

FOLDER = Path(__file__).parent.parent / "golden" / "deepseek_vl2"
NAMES = ["mha_greedy", "mla_greedy", "mla_noaux"]
# Small's parts are in the other two
kinds = pytest.mark.parametrize("name", cases(NAMES, fast=["mha_greedy", "mla_noaux"]))
IMAGE = 3  # of the golden files


@functools.cache
def load(name="mha_greedy"):
    model = lp.load_model(FOLDER / name)
    model.cfg = dataclasses.replace(model.cfg, image_id=IMAGE)
    return model


@functools.cache
def inputs(name="mha_greedy"):
    """Two rows with a picture each, the first with two tokens of padding, and one of text."""
    arrays = np.load(FOLDER / name / "golden.npz")
    length = arrays["input_ids"].shape[1] - arrays["text_ids"].shape[1]
    text, real = np.pad(arrays["text_ids"], ((0, 0), (length, 0))), np.arange(27) >= length
    images = np.moveaxis(arrays["images"], 2, -1)
    return arrays, {
        "tokens": np.concatenate([arrays["input_ids"], text]),
        "mask": np.concatenate([arrays["attention_mask"], real[None]]),
        "images": np.concatenate([images, images[:1]]),
        "grids": np.concatenate([arrays["tiles"], [[[0, 0]]]]).astype(np.int32),
    }


@jax.jit
def rungs(model, tokens, mask, images, grids):
    vision = model.vision.features(images[0])
    embeds = model.embed_inputs(tokens, images=images, grids=grids)
    logits = model(tokens, mask=mask, images=images, grids=grids).logits
    return vision, model.projector(vision), embeds, logits


@kinds
def test_every_rung_is_that_of_the_official_code(name):
    arrays, given = inputs(name)
    mask = given["mask"]
    vision, projected, embeds, logits = rungs(load(name), **given)
    np.testing.assert_allclose(vision, arrays["vision_out"], atol=1e-5)
    np.testing.assert_allclose(projected, arrays["projector_out"], atol=1e-5)
    np.testing.assert_allclose(embeds[:2][mask[:2]], arrays["inputs_embeds"][mask[:2]], atol=1e-5)
    for row, expected in enumerate(["logits_0", "logits_1", "text_logits"]):
        expected = arrays[expected].reshape(-1, 160)
        np.testing.assert_allclose(logits[row][mask[row]], expected, atol=1e-4)


def laid_out(grid, side, first, newline, separator, tail=False):
    """The layout of one picture, written down row by row."""
    across, down = grid
    area, whole, tiles = side * side, [], []
    for row in range(side):
        whole += [*range(first * area + row * side, first * area + (row + 1) * side), newline]
    for row in range(down * side):
        for column in range(across):
            tile = first + 1 + row // side * across + column
            start = tile * area + row % side * side
            tiles += range(start, start + side)
        tiles.append(newline)
    parts = [tiles, [separator], whole] if tail else [whole, [separator], tiles]
    return [index for part in parts for index in part]


@pytest.mark.parametrize("order", ["head", "tail"])
@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_tokens_take_features_row_by_row_across_tiles(order, xp):
    grids = np.array([[[1, 1], [3, 2]], [[2, 3], [0, 0]]], np.int32)
    newline, separator, num_tiles = 9 * 4, 9 * 4 + 1, 9
    ends, is_tail = (newline, separator), order == "tail"
    expected = [
        laid_out((1, 1), 2, 0, *ends, is_tail) + laid_out((3, 2), 2, 2, *ends, is_tail),
        laid_out((2, 3), 2, 0, *ends, is_tail),
    ]
    # words before and between are none of it, and what is left over is nothing
    rows = [[-1, *row[:9], -1, -1, *row[9:]] for row in expected]
    width = max(map(len, rows)) + 1
    numbers = np.full((2, width), -1, np.int32)
    for row, numbered in zip(rows, numbers, strict=True):
        numbered[: len(row)] = np.where(np.array(row) < 0, -1, np.cumsum(np.array(row) >= 0) - 1)
    numbers[:, -1] = numbers.max(axis=1) + 1
    found = index_features(xp.asarray(numbers), xp.asarray(grids), num_tiles, 2, order)
    assert isinstance(found, np.ndarray) == (xp is np)
    padded = [row + [-1] * (width - len(row)) for row in rows]
    np.testing.assert_array_equal(found, padded)


@pytest.mark.parametrize(
    ("grid", "count"),
    [((1, 1), 421), ((2, 2), 1023), ((3, 1), 813), ((3, 3), 2017), ((9, 1), 1989), ((1, 9), 2101)],
)
def test_a_picture_has_the_published_number_of_tokens(grid, count):
    assert count_tokens(np.array([grid]), 14).tolist() == [count]
    across, down = grid
    assert count_tiles(np.array([grid, (0, 0)])).tolist() == [1 + across * down, 0]
    numbers, grids = np.arange(count)[None], np.array([[grid]])
    found = index_features(numbers, grids, 1 + across * down, 14)[0]
    features = (1 + across * down) * 196
    uses = np.bincount(found, minlength=features + 2)
    assert np.all(uses[:features] == 1)
    assert uses[features:].tolist() == [14 + 14 * down, 1]


@pytest.mark.parametrize("side", [3, 4, 27])
def test_squares_of_patches_are_joined_colour_by_colour_and_odd_sides_continued(side):
    rng, half = np.random.default_rng(0), -(-side // 2)
    patches = rng.normal(size=(2, side, side, 3)).astype(np.float32)
    padded = np.zeros((2, 2 * half, 2 * half, 3), np.float32)
    padded[:, :side, :side] = patches
    expected = np.zeros((2, half * half, 12), np.float32)
    for i in range(half):
        for j in range(half):
            square = padded[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            for c in range(3):
                for k in range(4):
                    expected[:, i * half + j, c * 4 + k] = square[:, k // 2, k % 2, c]
    found = join_patches(jnp.asarray(patches.reshape(2, side * side, 3)))
    np.testing.assert_array_equal(found, expected)


def prompt(grids, seed=0):
    """(tokens, images) of a row with a picture of each grid among words."""
    rng, row, tiles = np.random.default_rng(seed), [], 0
    for grid in grids:
        count = int(count_tokens(np.array([grid]), 2)[0])
        row += [*rng.integers(4, 160, 3).tolist(), *[IMAGE] * count]
        tiles += 1 + grid[0] * grid[1]
    row += rng.integers(4, 160, 4).tolist()
    return row, rng.normal(size=(tiles, 56, 56, 3)).astype(np.float32)


def batch(rows, first=0):
    """Rows of `prompt`, padded on the left; `first` is the number of the first."""
    length = max(len(prompt(row)[0]) for row in rows)
    most = max(len(prompt(row)[1]) for row in rows)
    tokens = np.full((len(rows), length), 2, np.int32)
    mask = np.zeros((len(rows), length), bool)
    images = np.zeros((len(rows), most, 56, 56, 3), np.float32)
    grids = np.zeros((len(rows), max(map(len, rows)), 2), np.int32)
    for i, row in enumerate(rows):
        ids, tiles = prompt(row, first + i)
        tokens[i, length - len(ids) :], mask[i, length - len(ids) :] = ids, True
        images[i, : len(tiles)], grids[i, : len(row)] = tiles, np.array(row).reshape(-1, 2)
    return {"tokens": tokens, "mask": mask, "images": images, "grids": grids}


ROWS = [[(1, 1)], [(3, 3)], [(2, 1), (1, 2)]]


@jax.jit
def logits_of(model, given):
    return model(**given).logits


@functools.cache
def logits_of_rows():
    given = batch(ROWS)
    logits = np.asarray(logits_of(load(), given))
    return [x[real] for x, real in zip(logits, given["mask"], strict=True)]


def test_a_row_depends_on_no_padding_nor_neighbour_of_another_tile_count():
    given = batch(ROWS)
    for row in range(3):  # padded on the other side, next to others: the same program
        real = given["mask"][row]
        order = np.argsort(~real, kind="stable")
        for name in ("tokens", "mask"):
            given[name][row] = given[name][row][order]
    turned = {name: np.roll(x, 1, axis=0) for name, x in given.items()}
    found = np.roll(logits_of(load(), turned), -1, axis=0)
    for logits, real, expected in zip(found, given["mask"], logits_of_rows(), strict=True):
        np.testing.assert_allclose(logits[real], expected, atol=2e-5)


@pytest.mark.slow  # a program for each shape
@pytest.mark.parametrize("number", range(3))
def test_a_row_in_a_batch_is_the_row_alone(number):
    alone = logits_of(load(), batch([ROWS[number]], first=number))[0]
    np.testing.assert_allclose(logits_of_rows()[number], alone, atol=2e-5)


@pytest.mark.parametrize("block", cases([8, 32], fast=[32]))
def test_a_prompt_that_is_read_in_blocks_is_answered_as_the_whole(block, monkeypatch):
    model, given = load(), batch(ROWS)
    media = {"images": given["images"], "grids": given["grids"]}
    settings = dict(max_new_tokens=3, media=media)
    whole = lp.generate_tokens(model, given["tokens"], given["mask"], **settings)
    first = [np.argmax(logits[-1]) for logits in logits_of_rows()]
    np.testing.assert_array_equal(np.asarray(whole)[:, 0], first)
    monkeypatch.setattr(prompts, "MAX_BLOCK", block)
    found = lp.generate_tokens(model, given["tokens"], given["mask"], **settings)
    np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(grids=None), "takes images and grids together; it got images"),
        (
            dict(grids=[[[1, 2]], [[1, 2]]]),
            "row 0 has 17 image tokens .id 3., and its pictures of 1 x 2 tiles are 19",
        ),
        (
            dict(grids=[[[2, 1]], [[0, 0]]]),
            "row 1 has 19 image tokens .id 3., and its pictures of no tiles are 0",
        ),
        (dict(images=np.zeros((2, 2, 56, 56, 3))), "grids are of 3 tiles a row, and images hold 2"),
        (
            dict(images=np.zeros((3, 56, 56, 3))),
            r"images \(3, 56, 56, 3\) and grids \(2, 1, 2\) of 2 rows",
        ),
        (dict(grids=[[[2, 1]]]), r"grids \(1, 1, 2\) of 2 rows"),
    ],
)
def test_pictures_that_the_tokens_are_not_of_are_refused_in_numbers(change, problem):
    given = {name: x[:2] for name, x in inputs()[1].items()}
    given |= {name: np.asarray(x, given[name].dtype) for name, x in change.items() if x is not None}
    given = {name: x for name, x in given.items() if change.get(name, True) is not None}
    with pytest.raises(ValueError, match=problem):
        load()(**given)


def test_a_config_that_names_no_image_token_says_so_when_it_is_given_pictures():
    model = lp.load_model(FOLDER / "mha_greedy")
    assert model.image_id is None
    with pytest.raises(ValueError, match="write image_token_id, the id of <image>"):
        model(**inputs()[1])


@pytest.mark.parametrize(("said", "expected"), [(None, 7), (IMAGE, IMAGE)], ids=["not", "said"])
def test_which_token_images_are_is_read_off_the_tokenizer_where_config_does_not_say(
    tmp_path, said, expected
):
    config = json.loads((FOLDER / "mha_greedy" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": said}))
    weights = "model.safetensors"
    (tmp_path / weights).symlink_to(FOLDER / "mha_greedy" / weights)
    added = [{"id": 5, "content": "<|User|>"}, {"id": 7, "content": "<image>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    model = lp.load_model(tmp_path)
    assert model.image_id == expected
    if said is None:  # what is said is saved as it is, in the test below
        assert lp.load_model(lp.save_model(model, tmp_path / "saved")).image_id == expected


@pytest.mark.parametrize("name", cases(NAMES, fast=["mla_noaux"]))
def test_a_folder_that_is_loaded_and_saved_is_the_same_tensors_by_the_same_names(name, tmp_path):
    lp.save_model(load(name), tmp_path / "again")
    stored, again = (
        SafetensorsFile(x / "model.safetensors") for x in (FOLDER / name, tmp_path / "again")
    )
    assert sorted(stored.names) == sorted(again.names)
    for tensor in stored.names:
        np.testing.assert_array_equal(stored.read(tensor), again.read(tensor), err_msg=tensor)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["image_token_id"] == IMAGE
    assert config["language_config"]["use_mla"] == (name != "mha_greedy")
    assert config["language_config"]["model_type"] == "deepseek_v2"
    assert deepseek_vl2.from_hf(config) == load(name).cfg


def test_an_adapter_beside_its_base_names_the_bases_modules(tmp_path):
    method = lp.peft.LoRA(rank=2, targets=("k_proj", "projector.layers.0"))
    adapted = lp.peft.inject(lp.load_model(FOLDER / "mha_greedy"), method)
    folder = lp.peft.save(adapted, tmp_path / "adapter")
    names = SafetensorsFile(folder / "adapter_model.safetensors").names
    begin = "base_model.model.language.model.layers.0.self_attn.k_proj"
    assert {f"{begin}.lora_A.weight", "base_model.model.projector.layers.0.lora_B.weight"} <= {
        *names
    }


def test_the_towers_pooling_is_kept_and_never_trained():
    pool = nnx.state(load().vision.pool)
    assert all(
        isinstance(x, Idle) for x in jax.tree.leaves(pool, is_leaf=lambda x: isinstance(x, Idle))
    )
    assert sum(x.size for x in jax.tree.leaves(pool)) == 21240


def test_a_folder_without_the_pooling_loads():
    hf = json.loads((FOLDER / "mha_greedy" / "config.json").read_text())
    cfg = deepseek_vl2.from_hf(hf, ["vision.norm.weight"])
    assert not cfg.vision.has_pool
    assert deepseek_vl2.from_hf(hf, ["vision.attn_pool.latent"]).vision.has_pool
    assert deepseek_vl2.from_hf(deepseek_vl2.to_hf(cfg)) == cfg


@pytest.mark.parametrize(
    ("name", "billions"),
    [("deepseek-vl2-tiny", 2.935), ("deepseek-vl2-small", 15.706), ("deepseek-vl2", 27.034)],
)
def test_parts_of_a_preset_have_the_published_sizes(name, billions):
    model = registry.abstract(registry.preset(name))
    parts = (model.language, model.vision)
    sizes = [sum(x.size for x in jax.tree.leaves(nnx.state(part))) / 1e9 for part in parts]
    assert sizes == pytest.approx([billions, 0.428], abs=5e-4)


def test_presets_have_the_resolutions_that_pictures_are_tiled_by():
    for cfg in deepseek_vl2.PRESETS.values():
        assert cfg.resolutions == RESOLUTIONS
        assert cfg.side == 14


@jax.jit
def loss_and_gradients(model, given):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        logits = nnx.merge(graph, params, rest)(**given).logits[:, :-1]
        picked = jax.nn.one_hot(given["tokens"][:, 1:], logits.shape[-1])
        return jnp.mean(
            given["mask"][:, 1:] * jnp.sum(jax.nn.log_softmax(logits) * picked, axis=-1)
        )

    return jax.value_and_grad(loss)(params)


# compiles for half a minute
@pytest.mark.parametrize(
    "axes",
    cases(
        [
            {"fsdp": 8},
            {"data": 4, "tensor": 2},
            {"data": 2, "expert": 4},
            {"fsdp": 2, "tensor": 2, "expert": 2},
        ],
        slow=[{"fsdp": 2, "tensor": 2, "expert": 2}],
    ),
    ids=str,
)
def test_losses_and_gradients_on_a_mesh_are_those_of_one_device(axes):
    cfg = load("mla_noaux").cfg

    def make():
        return deepseek_vl2.Model(cfg, rngs=nnx.Rngs(0))

    given = batch([[(1, 1)], [(2, 1)], [(1, 2)], [(1, 1)]])
    expected, gradients = loss_and_gradients(random_module(make), given)
    with use_mesh(make_mesh(axes)):
        found, others = loss_and_gradients(random_module(make), given)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    others = jax.tree.map(np.asarray, others)
    chex.assert_trees_all_close(others, jax.tree.map(np.asarray, gradients), atol=2e-5, rtol=1e-4)
    assert np.abs(gradients["newline"][...]).max() > 1e-4
    assert np.abs(gradients["separator"][...]).max() > 1e-4
