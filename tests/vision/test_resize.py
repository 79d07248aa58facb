"""Sizes, crops and canvases, against Pillow doing the whole of each."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from llmprep_jax.vision import resize
from tests.vision.samples import draw


def test_the_shorter_edge_is_exact_and_the_longer_rounded_down():
    assert resize.shortest_edge_size(640, 480, 224) == (298, 224)  # 298.67
    assert resize.shortest_edge_size(480, 642, 224) == (224, 299)  # 299.6
    assert resize.shortest_edge_size(7, 7, 224) == (224, 224)
    assert resize.shortest_edge_size(1, 5000, 224) == (224, 1_120_000)


def test_the_longer_edge_is_exact_and_the_shorter_rounded():
    assert resize.longest_edge_size(640, 427, 384, 14) == (384, 256)  # 256.2
    assert resize.longest_edge_size(427, 641, 384, 14) == (256, 384)  # 255.8; int() has 255
    assert resize.longest_edge_size(1, 5000, 384, 14) == (14, 384)
    assert resize.longest_edge_size(768, 5, 384, 1) == (384, 2)  # 2.5 goes to the even number


@pytest.mark.parametrize("resample", resize.FILTERS)
@pytest.mark.parametrize(("size", "crop"), [
    ((40, 30), (24, 24)), ((39, 30), (24, 25)), ((20, 60), (24, 24)), ((60, 19), (24, 24)),
], ids=["even", "odd", "narrow", "flat"])  # fmt: skip
def test_what_is_cropped_in_effect_is_what_would_have_been_cropped(
    monkeypatch, resample, size, crop
):
    image = draw(87, 133)
    left, top = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    box = (left, top, left + crop[0], top + crop[1])
    whole = np.asarray(image.resize(size, resample).crop(box)).astype(int)
    assert np.array_equal(resize.resize_and_crop(image, size, crop, resample), whole)
    monkeypatch.setattr(resize, "_WHOLE", 0)
    part = np.asarray(resize.resize_and_crop(image, size, crop, resample))
    # a box has an edge: which side of it a pixel lies on follows from the last bit
    assert np.abs(part - whole).max() <= (20 if resample == Image.Resampling.BOX else 1)
    assert np.mean(part != whole) < (0.1 if resample == Image.Resampling.BOX else 0.01)


def test_a_crop_of_a_long_picture_never_makes_it_whole(monkeypatch):
    made = []
    original = Image.Image.resize

    def recorded(self, size, *args, **settings):
        made.append(size[0] * size[1])
        return original(self, size, *args, **settings)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    for size in ((1, 5000), (5000, 1), (1, 65_536)):
        image = draw(*size)
        scaled = resize.shortest_edge_size(*size, 224)
        cropped = np.asarray(resize.resize_and_crop(image, scaled, (224, 224), 3)).astype(int)
        assert cropped.shape == (224, 224, 3)
        # 224 pixels of the result lie in one of the source and half of each beside it
        middle = np.asarray(image).reshape(-1, 3)[sum(size) // 2 - 1]
        assert np.abs(cropped[112, 112] - middle).max() < 60
    assert sum(made) <= 3 * 224 * 224


def test_a_part_of_a_long_picture_is_that_part():
    """A ramp, so that a shifted part shows."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8), 40)[:, None, None].repeat(3, 2)
    image = Image.fromarray(ramp)  # 1 x 10,240
    cropped = np.asarray(resize.resize_and_crop(image, (224, 2_293_760), (224, 224), 2))
    assert set(cropped.ravel().tolist()) == {127, 128}
    assert (cropped[:112] == 127).all()


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (25, 25), (21, 20), (20, 21)])
def test_a_square_has_the_picture_in_its_middle(size):
    image = draw(*size)
    square = np.asarray(resize.pad_to_square(image, (122, 116, 104)))
    edge = max(size)
    x, y = (edge - size[0]) // 2, (edge - size[1]) // 2
    expected = np.empty((edge, edge, 3), np.uint8)
    expected[:] = (122, 116, 104)
    expected[y : y + size[1], x : x + size[0]] = image
    assert np.array_equal(square, expected)


def test_a_square_too_large_is_refused():
    with pytest.raises(ValueError, match="1 x 20,000 pixels are a square of 400,000,000"):
        resize.pad_to_square(Image.new("RGB", (1, 20_000)), (0, 0, 0))


@pytest.mark.parametrize("size", [(30, 20), (20, 31), (25, 25), (200, 300), (300, 7), (7, 301)])
def test_a_canvas_is_that_of_pillows_pad(size):
    image = draw(*size)
    for canvas in ((64, 64), (128, 64), (64, 191)):
        expected = ImageOps.pad(image, canvas, Image.Resampling.BICUBIC, (127, 127, 127))
        fitted = resize.fit_on_canvas(image, canvas, (127, 127, 127), 3)
        assert np.array_equal(fitted, expected), canvas


def test_a_hair_on_a_canvas_keeps_one_pixel():
    """Pillow rounds 5,000 to 1 down to nothing, and the picture is gone."""
    for size, line in (((1, 5000), np.s_[:, 31]), ((5000, 1), np.s_[31])):
        fitted = np.asarray(resize.fit_on_canvas(Image.new("RGB", size), (64, 64), (9, 9, 9), 3))
        expected = np.full((64, 64, 3), 9)
        expected[line] = 0
        assert np.array_equal(fitted, expected)
