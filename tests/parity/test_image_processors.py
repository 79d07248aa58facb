"""Image processors against transformers' Pillow ones, live, pixel by pixel.

DeepSeek-VL2 has none there; its golden sizes and Pillow's own `pad` are in tests/vision.
"""

import io
import json

import numpy as np
import pytest
import transformers
from PIL import Image

from llmprep_jax.vision import ImageProcessor
from llmprep_jax.vision.kinds import KINDS
from tests.grids import cases
from tests.vision.samples import SIZES, draw, encode

pytestmark = pytest.mark.parity

EDGE = {"height": 48, "width": 48}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
FIELDS = {
    "CLIPImageProcessor": {"size": {"shortest_edge": 48}, "crop_size": EDGE},
    "LlavaImageProcessor": {"size": {"shortest_edge": 48}, "crop_size": EDGE, "do_pad": True},
    "SiglipImageProcessor": {"size": {"height": 40, "width": 48}},
    "Gemma3ImageProcessor": {
        "size": EDGE,
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    },
    "DeepseekVLImageProcessor": {"size": EDGE, "do_convert_rgb": True, **HALF},
    "JanusImageProcessor": {"size": EDGE, "do_convert_rgb": True},
    "DeepseekVLHybridImageProcessor": {
        "size": EDGE,
        "high_res_size": {"height": 128, "width": 128},
        "do_convert_rgb": True,
        **HALF,
    },
}
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr")
FILTERS = (1, 2, 3, 4, 5)


def their_processor(kind: str, fields: dict):
    return getattr(transformers, f"{kind}Pil")(**fields)


def assert_same(ours: ImageProcessor, theirs, images: list[Image.Image]) -> None:
    """Bytes and floats: both resize with Pillow, so there is nothing to differ in."""
    pixels = ours(images)
    expected = theirs(images, return_tensors="np")
    pairs = [(ours.normalize(pixels.values), expected["pixel_values"])]
    if pixels.high is not None:
        high = ours.normalize_high(pixels.high)
        pairs.append((high, expected["high_res_pixel_values"]))
    for made, wanted in pairs:
        assert made.dtype == wanted.dtype == np.float32
        assert made.shape == np.moveaxis(wanted, 1, -1).shape
        assert np.abs(made - np.moveaxis(wanted, 1, -1)).max() <= 1e-6
    if "num_crops" in expected:
        assert (pixels.pieces - 1).tolist() == list(expected["num_crops"])


@pytest.mark.parametrize("kind", FIELDS)
def test_every_shape_and_mode_is_seen_alike(kind):
    ours = KINDS[kind](FIELDS[kind])
    theirs = their_processor(kind, FIELDS[kind])
    for shape, size in SIZES.items():
        images = [draw(*size, mode) for mode in MODES]
        assert_same(ours, theirs, images[:1] if shape == "small" else images)


ROWS = [(kind, filter) for kind in FIELDS for filter in FILTERS]


@pytest.mark.parametrize(("kind", "filter"), cases(ROWS, fast=ROWS[::3]))
def test_every_filter_is_used_alike(kind, filter):
    fields = {**FIELDS[kind], "resample": filter, "high_res_resample": filter}
    ours, theirs = KINDS[kind](fields), their_processor(kind, fields)
    assert_same(ours, theirs, [draw(*size, seed=filter) for size in SIZES.values()])


@pytest.mark.parametrize("kind", FIELDS)
def test_defaults_and_released_sizes_are_theirs(kind):
    ours, theirs = KINDS[kind](), their_processor(kind, {})
    assert_same(ours, theirs, [draw(640, 427), draw(333, 500), draw(900, 97)])


SWITCHES = [
    {"do_normalize": False},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.3, 0.2]},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: min(switch))
@pytest.mark.parametrize("kind", FIELDS)
def test_switches_of_the_file_are_obeyed_alike(kind, switch):
    fields = {**FIELDS[kind], **switch}
    ours, theirs = KINDS[kind](fields), their_processor(kind, fields)
    pixels, images = ours(draw(61, 97)), [draw(61, 97)]
    expected = np.moveaxis(np.asarray(theirs(images, return_tensors="np")["pixel_values"]), 1, -1)
    assert np.allclose(ours.normalize(pixels.values), expected, atol=1e-6, rtol=1e-6)


def test_pictures_that_are_neither_resized_nor_cropped_stay():
    fields = {**FIELDS["CLIPImageProcessor"], "do_resize": False}
    ours = KINDS["CLIPImageProcessor"](fields)
    theirs = their_processor("CLIPImageProcessor", fields)
    assert_same(ours, theirs, [draw(40, 61), draw(91, 30), draw(48, 48)])
    fields |= {"do_center_crop": False}
    ours = KINDS["CLIPImageProcessor"](fields)
    assert_same(ours, their_processor("CLIPImageProcessor", fields), [draw(40, 61)] * 2)


@pytest.mark.parametrize("kind", FIELDS)
def test_files_go_both_ways(kind, tmp_path):
    theirs = their_processor(kind, FIELDS[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ImageProcessor.from_folder(tmp_path / "theirs")
    assert type(ours) is KINDS[kind]
    image = [draw(61, 97)]
    assert_same(ours, theirs, image)
    ours.save(tmp_path / "ours")
    again = getattr(transformers, f"{kind}Pil").from_pretrained(tmp_path / "ours")
    assert_same(ours, again, image)
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours", backend="pil")
    assert type(found) is type(theirs)
    flat = json.loads((tmp_path / "ours" / "preprocessor_config.json").read_text())
    theirs_flat = json.loads((tmp_path / "theirs" / "preprocessor_config.json").read_text())
    assert flat.items() >= theirs_flat.items()


def test_pictures_are_opened_alike(tmp_path):
    """Paths: EXIF too. Pillow images that carry the tag are turned by us alone."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(draw(61, 97), "JPEG", exif=exif))
    kind = "SiglipImageProcessor"
    ours, theirs = KINDS[kind](FIELDS[kind]), their_processor(kind, FIELDS[kind])
    expected = np.moveaxis(theirs([str(path)], return_tensors="np")["pixel_values"], 1, -1)
    assert np.array_equal(ours.normalize(ours(path).values), expected)
    held = Image.open(io.BytesIO(path.read_bytes()))
    assert np.array_equal(ours.normalize(ours(held).values), expected)
    lying = np.moveaxis(theirs([held], return_tensors="np")["pixel_values"], 1, -1)
    assert not np.array_equal(lying, expected)
