"""DeepSeek-VL2's tiling, against what its released code chose, and Gemma 3's crops."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmprep_jax.vision import tiles
from llmprep_jax.vision.crops import PanAndScan
from llmprep_jax.vision.kinds import Tiled

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/deepseek_vl2/tiling.json").read_text())


def test_all_300_sizes_are_tiled_as_by_the_released_code():
    assert len(GOLDEN["rows"]) == 300
    processor = Tiled({"candidate_resolutions": GOLDEN["candidate_resolutions"]})
    for width, height, best_width, best_height, tokens in GOLDEN["rows"]:
        best = tiles.best_resolution(width, height, processor.resolutions)
        assert best == (best_width, best_height), (width, height)
        assert processor.grid(width, height) == (best_width // 384, best_height // 384)
        assert processor.count(width, height) == tokens, (width, height)


def test_the_default_resolutions_are_the_released_ones_in_their_order():
    assert [list(size) for size in tiles.RESOLUTIONS] == GOLDEN["candidate_resolutions"]


def test_the_first_of_equal_resolutions_is_taken():
    # twice the area of the picture either way
    assert tiles.best_resolution(10, 10, [(10, 20), (20, 10)]) == (10, 20)
    assert tiles.best_resolution(10, 10, [(20, 10), (10, 20)]) == (20, 10)


def test_of_resolutions_that_keep_all_the_smaller_is_taken():
    assert tiles.best_resolution(10, 10, [(20, 20), (10, 11), (30, 30)]) == (10, 11)


def test_sides_are_rounded_down_before_they_are_compared():
    # 1.95 x 13 keeps 13 pixels of 3 x 20, 2 x 13.33 keeps 26
    assert tiles.best_resolution(3, 20, [(2, 13), (2, 14)]) == (2, 14)
    assert tiles.best_resolution(1, 5000, [(384, 384), (384, 768)]) == (384, 384)


def test_tokens_of_the_paper():
    sizes = {(1, 1): 421, (2, 2): 1023, (3, 1): 813, (3, 3): 2017, (8, 1): 1793, (1, 9): 2101}
    assert {grid: tiles.count_tokens(*grid, 14) for grid in sizes} == sizes


def test_tiles_are_the_whole_and_then_row_by_row():
    colours = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(np.kron(colours, np.ones((8, 8), np.uint8))).convert("RGB")
    whole, *cut = tiles.cut_tiles(image, (24, 16), 8, (127, 127, 127))
    assert [np.unique(tile).tolist() for tile in cut] == [[0], [40], [80], [120], [160], [200]]
    seen = np.asarray(whole)[..., 0]
    assert seen.shape == (8, 8)
    assert np.unique(seen[[0, -1]]).tolist() == [127]  # 8 x 5 in the middle of 8 x 8
    assert seen[2, 0] < seen[2, -1] < seen[5, -1]


CROPS = {
    (500, 500): [],
    (599, 500): [],
    (600, 500): [(0, 0, 300, 500), (300, 0, 600, 500)],
    (511, 300): [(0, 0, 256, 300), (256, 0, 511, 300)],
    (510, 300): [],
    (300, 900): [(0, 0, 300, 300), (0, 300, 300, 600), (0, 600, 300, 900)],
    (1000, 400): [(0, 0, 334, 400), (334, 0, 668, 400), (668, 0, 1000, 400)],
    (4000, 260): [(x, 0, x + 1000, 260) for x in (0, 1000, 2000, 3000)],
    (4000, 255): [],
}


@pytest.mark.parametrize("size", CROPS, ids=str)
def test_long_pictures_are_cut_as_gemma_3s(size):
    assert PanAndScan().boxes(*size) == CROPS[size]
    turned = [(top, left, bottom, right) for left, top, right, bottom in CROPS[size]]
    if size[0] != size[1]:
        assert PanAndScan().boxes(*size[::-1]) == turned


def test_no_crop_is_empty():
    boxes = PanAndScan(min_size=1, max_crops=64, min_ratio=1.0).boxes(65, 1)
    assert boxes[-1] == (64, 0, 65, 1)
    assert len(boxes) == 33
