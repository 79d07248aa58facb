"""Opening pictures: from everything that holds one, in RGB and upright, or refused in one line."""

import io
import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from llmprep_jax.vision import image_size, open_image
from llmprep_jax.vision.open import open_rgb
from tests.vision.samples import draw, encode, png_header, with_exif_behind

GREY16 = np.array([[0, 128, 32768, 65535]], np.uint16)
# a picture of one row of pixels, and what they are in RGB
COLOURS = {
    "1": (Image.fromarray(np.array([[False, True]])), [[0] * 3, [255] * 3]),
    "L": (Image.fromarray(np.array([[7, 200]], np.uint8)), [[7] * 3, [200] * 3]),
    "RGB": (Image.new("RGB", (1, 1), (1, 2, 3)), [[1, 2, 3]]),
    "RGBA": (Image.new("RGBA", (1, 1), (255, 0, 0, 51)), [[255, 204, 204]]),
    "clear": (Image.new("RGBA", (1, 1), (9, 9, 9, 0)), [[255, 255, 255]]),
    "LA": (Image.new("LA", (1, 1), (0, 51)), [[204, 204, 204]]),
    "RGBa": (Image.new("RGBA", (1, 1), (255, 0, 0, 51)).convert("RGBa"), [[255, 204, 204]]),
    "La": (Image.new("LA", (1, 1), (0, 51)).convert("La"), [[204, 204, 204]]),
    "LAB": (Image.new("LAB", (1, 1), (255, 128, 128)), [[254, 255, 254]]),
    "P": (Image.new("RGB", (1, 1), (10, 20, 30)).quantize(), [[10, 20, 30]]),
    "CMYK": (Image.new("CMYK", (1, 1), (255, 0, 0, 51)), [[0, 204, 204]]),
    "YCbCr": (Image.new("YCbCr", (1, 1), (100, 128, 128)), [[100, 100, 100]]),
    "HSV": (Image.new("HSV", (1, 1), (0, 0, 77)), [[77, 77, 77]]),
    "I;16": (Image.fromarray(GREY16), [[0] * 3, [0] * 3, [128] * 3, [255] * 3]),
    "I": (Image.fromarray(GREY16.astype(np.int32)), [[0] * 3, [0] * 3, [128] * 3, [255] * 3]),
    "bytes as I": (Image.fromarray(np.array([[3, 255]], np.int32)), [[3] * 3, [255] * 3]),
    "F": (Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), [[0] * 3, [128] * 3, [255] * 3]),
}


@pytest.mark.parametrize("mode", COLOURS)
def test_every_mode_becomes_rgb(mode):
    image, pixels = COLOURS[mode]
    opened = open_image(image)
    assert opened.dtype == np.uint8
    assert opened.tolist() == [pixels]


def test_palettes_and_transparent_colours_are_laid_over_white():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 0, 0, 200, 9, 9, 9])
    image.putdata([0, 1, 2])
    expected = [[[255] * 3, [0, 0, 200], [9] * 3]]
    assert open_image(encode(image, transparency=0)).tolist() == expected
    assert open_image(encode(image, "GIF", transparency=0)).tolist() == expected
    rgb = image.convert("RGB")
    image.putpalette([0, 0, 0, 0, 0, 0, 200, 255, 9, 9, 9, 255], "RGBA")
    assert open_image(image).tolist() == expected
    assert open_image(encode(rgb, transparency=(0, 0, 0))).tolist() == expected
    grey = Image.fromarray(GREY16)
    grey.info["transparency"] = 128
    assert open_image(grey).tolist() == [[[0] * 3, [255] * 3, [128] * 3, [255] * 3]]


def test_16_bits_are_scaled_in_files_too():
    opened = open_image(encode(Image.fromarray(GREY16)))
    assert opened[0, :, 0].tolist() == [0, 0, 128, 255]
    big_endian = Image.fromarray(GREY16.astype(">u2"))
    assert open_image(encode(big_endian, "TIFF"))[0, :, 0].tolist() == [0, 0, 128, 255]


ARRAYS = {
    "grey": (np.array([[5, 6]], np.uint8), [[5] * 3, [6] * 3]),
    "one channel": (np.array([[[5], [6]]], np.uint8), [[5] * 3, [6] * 3]),
    "grey with alpha": (np.array([[[0, 51]]], np.uint8), [[204] * 3]),
    "alpha": (np.array([[[255, 0, 0, 51]]], np.uint8), [[255, 204, 204]]),
    "mask": (np.array([[True, False]]), [[255] * 3, [0] * 3]),
    "16 bits": (GREY16, [[0] * 3, [0] * 3, [128] * 3, [255] * 3]),
    "dark 16 bits": (np.array([[0, 255]], np.uint16), [[0] * 3, [1] * 3]),
    "whole": (np.array([[0, 255]], np.int64), [[0] * 3, [255] * 3]),
    "floats to 1": (np.array([[0.0, 0.3, 1.0]]), [[0] * 3, [76] * 3, [255] * 3]),
    "floats to 255": (np.array([[0.0, 1.6, 255.0]], np.float16), [[0] * 3, [2] * 3, [255] * 3]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_every_range_are_bytes(kind):
    array, pixels = ARRAYS[kind]
    assert open_image(array).tolist() == [pixels]


def test_a_picture_is_the_same_from_everywhere(tmp_path):
    image = draw(23, 17)
    path = tmp_path / "a.png"
    data = encode(image)
    path.write_bytes(data)
    unseekable = io.BufferedReader(io.BytesIO(data))
    sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data)]
    for source in (*sources, unseekable, path.open("rb"), image, np.asarray(image)):
        assert np.array_equal(open_image(source), np.asarray(image)), source
    assert open_image(path).flags.writeable


FORMATS = {
    "PNG": {},
    "TIFF": {},
    "TIFF, packed": {"compression": "tiff_lzw"},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 100, "subsampling": 0},
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_files_and_pillow_images_alike(orientation):
    plain = np.asarray(draw(12, 5))
    exif = Image.Exif()
    exif[0x0112] = orientation
    # the sensor's rows and columns for each number of EXIF 2.3, table of tag 274
    upright = {
        1: plain, 2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1],
        5: plain.swapaxes(0, 1), 6: plain.swapaxes(0, 1)[:, ::-1],
        7: plain[::-1, ::-1].swapaxes(0, 1), 8: plain.swapaxes(0, 1)[::-1],
    }[orientation]  # fmt: skip
    size = (5, 12) if orientation > 4 else (12, 5)
    for name, settings in FORMATS.items():
        data = encode(Image.fromarray(plain), name.split(",")[0], exif=exif, **settings)
        opened = open_image(data)
        near = 40 if name == "JPEG" else 0
        assert np.abs(opened.astype(int) - upright).max() <= near, name
        held = Image.open(io.BytesIO(data))
        assert image_size(held) == image_size(data) == size, name
        assert np.array_equal(open_image(held), opened), name
        assert np.array_equal(open_image(held), opened), name  # not turned once more
        assert np.array_equal(open_image(ImageOps.exif_transpose(held)), opened), name


def test_exif_behind_the_pixels_of_a_png_counts():
    data = with_exif_behind(encode(draw(12, 5)), 6)
    assert open_image(data).shape == (12, 5, 3)
    assert image_size(data) == (5, 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_reason_to_refuse_a_picture():
    image = draw(12, 5)
    for exif in (b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"nonsense"):
        data = encode(image, exif=exif)
        assert np.array_equal(open_image(data), np.asarray(image))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_animated_pictures_the_first_frame_is_taken(format):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    settings = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **settings)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert open_image(data).tolist() == np.asarray(frames[0]).tolist()


def test_a_bomb_is_refused_by_its_header(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(20_000, 20_000))
    tracemalloc.start()
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match="bomb.png: has more than 134,217,728 pixels") as error:
            read(path)
        assert "raise max_pixels" in str(error.value)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def test_max_pixels_is_what_the_caller_says(monkeypatch):
    """Beyond Pillow's own limit too, silently."""
    image, data = draw(40, 30), encode(draw(40, 30), "TIFF")
    for source in (image, data, np.asarray(image)):
        assert open_image(source, max_pixels=1200).shape == (30, 40, 3)
        with pytest.raises(ValueError, match="1,199"):
            open_image(source, max_pixels=1199)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).shape == (30, 40, 3)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_side_beyond_what_jpeg_has_is_refused(tmp_path):
    path = tmp_path / "tall.png"
    path.write_bytes(png_header(1, 1_000_000))
    with pytest.raises(ValueError, match=r"tall\.png: 1 x 1,000,000 pixels; a side may have"):
        open_image(path)


BAD = {
    "empty": (b"", "has 0 bytes; copy or download"),
    "text": (b"<html>404</html>", "begins with b'<html>40', no picture"),
    "truncated PNG": (encode(draw(64, 64))[:2000], "cannot be decoded"),
    "truncated JPEG": (
        encode(draw(64, 64), "JPEG")[:900],
        "decoded (image file is truncated",
    ),
    "truncated WebP": (encode(draw(64, 64), "WEBP")[:900], "cannot be decoded"),
    "cut in the header": (encode(draw(64, 64))[:20], "cannot be decoded (Truncated File Read)"),
    "no pixels": (np.zeros((0, 5, 3), np.uint8), "no pixels; leave this picture out"),
    "channels first": (np.zeros((3, 8, 8)), "np.moveaxis(image, 0, -1)"),
    "batch": (np.zeros((2, 8, 8, 3)), "(2, 8, 8, 3) is no picture; give [H, W]"),
    "five channels": (np.zeros((8, 8, 5)), "1 to 4 of them"),
    "negative": (np.full((2, 2), -1), "values from -1 to -1"),
    "infinite": (np.full((2, 2), np.inf), "values from inf to inf"),
    "not a number": (np.full((2, 2), np.nan), "values from nan"),
    "too large": (np.full((2, 2), 256.0), "values up to 256"),
    "letters": (np.array([["a"]]), "are no pixels"),
    "floats beyond": (Image.new("F", (2, 2), 300.5), "mode F cannot become RGB (has values up to"),
    "number": (5, "give a path, bytes"),
    "url": ("https://example.org/a.png", "download it and give the file's path"),
    "text mode": (io.StringIO("a"), "is open as text; open it with mode 'rb'"),
    "page": (encode(draw(8, 8)), "is no PDF and has no page 1; leave page out"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_picture_is_named_in_one_line(kind):
    source, words = BAD[kind]
    page = 1 if kind == "page" else 0
    for read in (open_image, open_rgb):
        with pytest.raises(ValueError, match="^3.tar: 7.png: ") as error:
            read(source, page=page, name="3.tar: 7.png")
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.png: no such file; check the path"):
        open_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is a folder; give a file in it"):
        open_image(tmp_path)
    path = tmp_path / "b.jpg"
    path.write_bytes(encode(draw(64, 64), "JPEG")[:900])
    for source in (path, str(path), path.open("rb"), Image.open(path)):
        with pytest.raises(ValueError, match=r"b\.jpg: cannot be decoded"):
            open_image(source)
