"""Arbitrary damage to pictures and to image processors' files: a right reading, or one line."""

import copy
import json
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llmprep_jax.vision import ImageProcessor, image_size, open_image
from llmprep_jax.vision.kinds import KINDS, Tiled
from tests.grids import cases
from tests.vision.samples import (
    draw,
    encode,
    png_header,
    with_exif_behind,
    write_locked_pdf,
    write_pdf,
)

EXIF = Image.Exif()
EXIF[0x0112] = 6
PICTURES = [
    *[encode(draw(23, 17, mode)) for mode in ("RGB", "RGBA", "P", "L", "LA", "1")],
    encode(Image.fromarray(np.arange(391, dtype=np.uint16).reshape(17, 23) * 99)),
    *[encode(draw(23, 17), format, exif=EXIF) for format in ("PNG", "JPEG", "WEBP", "TIFF")],
    *[encode(draw(23, 17), format) for format in ("GIF", "BMP", "PPM", "JPEG2000")],
    encode(draw(23, 17, "CMYK"), "JPEG"),
    encode(draw(23, 17), "TIFF", compression="tiff_lzw"),
    encode(draw(23, 17), "GIF", save_all=True, append_images=[draw(23, 17, seed=1)]),
    with_exif_behind(encode(draw(23, 17)), 8),
    *[png_header(2**15, 2**15), write_pdf(2), write_pdf(0), write_locked_pdf(b"x")],
]
RUNS = cases([300, 10_000], fast=[300])


def damage(rng: random.Random, content: bytes) -> bytes:
    out = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(out) + 1)
        kind = rng.choice(["cut", "insert", "replace", "repeat", "number", "drop"])
        piece = rng.randbytes(rng.randrange(1, 9))
        if kind == "cut":
            del out[at:]
        elif kind == "insert":
            out[at:at] = piece
        elif kind == "replace":
            out[at : at + len(piece)] = piece
        elif kind == "repeat":
            out[at:at] = out[at : at + 40]
        elif kind == "number":
            out[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\0\0\0\1", b"\x7f\xff\xff\xff"])
        else:
            del out[at : at + rng.randrange(1, 30)]
    return bytes(out)


def check_line(text: str, start: str) -> None:
    """What it is of, what is wrong and, behind a semicolon, what to do."""
    assert re.fullmatch(f"{start}.*; .+", text)
    assert len(text) < 500


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.filterwarnings("ignore")  # of Pillow, on what it reads all the same
def test_damaged_pictures_are_read_or_refused_in_one_line(runs):
    rng, refused = random.Random(runs), 0
    for i in range(runs):
        content = damage(rng, PICTURES[i % len(PICTURES)])
        for read in (open_image, image_size):
            try:
                out = read(content, max_pixels=2**18, name="a.tar: 3", dpi=50)
            except ValueError as error:
                refused += 1
                check_line(str(error), r"a\.tar: 3\b")
            else:
                size = out.shape[1::-1] if read is open_image else out
                assert 1 <= size[0] * size[1] <= 2**18
    assert runs / 4 < refused < runs * 1.9  # some of both


VALUES = [
    *[None, True, False, 0, 1, -1, 3, 14, 2**13, 2**63, 10**400, 0.5, -0.0, 1e308],
    *[float("nan"), float("inf"), "", "224", "x" * 300, [], {}, [0.5] * 3, [1, 2], [[64, 64]]],
    *[[[64, 64], [128, 64]], [[True, True]], [[0, 0]], {"height": 48, "width": 48}, [None] * 3],
    *[{"shortest_edge": 40}, {"height": None}, {"height": 48, "width": "48"}, {1: 2}, [[]], "Fast"],
    *["SiglipImageProcessor", "DeepseekVLV2Processor", "CLIPProcessor", "default"],
]
NAMES = [
    *sorted({name for kind in KINDS.values() for name in kind.defaults}),
    *["image_processor_type", "feature_extractor_type", "processor_class", "image_size"],
    *["image_seq_length", "num_image_tokens", "of_others"],
]
SMALL = {"height": 48, "width": 48}
SIZES = {"size": SMALL, "crop_size": SMALL, "high_res_size": SMALL}
SIZES["candidate_resolutions"] = [[48, 48], [96, 48]]
OUTER = ["image_processor", "patch_size", "num_image_tokens", "candidate_resolutions", "a"]


@pytest.mark.parametrize("runs", RUNS)
def test_damaged_processor_files_are_read_or_refused_in_one_line(runs, tmp_path):
    rng, read = random.Random(runs), 0
    for i in range(runs):
        kind = list(KINDS)[i % len(KINDS)]
        fields = {"image_processor_type": kind, **KINDS[kind].defaults, **copy.deepcopy(SIZES)}
        for _ in range(rng.randrange(3)):
            fields[rng.choice(NAMES)] = rng.choice(VALUES)
        outer = {rng.choice(OUTER): rng.choice(VALUES) for _ in range(rng.randrange(2))}
        if rng.random() < 0.5:
            outer["image_processor"] = fields
        write(rng, tmp_path / "preprocessor_config.json", fields)
        write(rng, tmp_path / "processor_config.json", outer)
        try:
            use(ImageProcessor.from_folder(tmp_path, "janus"), tmp_path, see=i % 5 == 0)
            read += 1
        except ValueError as error:
            check_line(str(error), rf"({re.escape(str(tmp_path))}/\S+json|image 0): ")
    assert runs / 4 < read < runs * 0.95


def write(rng: random.Random, path: Path, fields: dict) -> None:
    text = json.dumps(fields)
    if rng.random() < 0.1:
        text = damage(rng, text.encode()).decode("latin-1")
    path.write_bytes(text.encode("latin-1"))


def use(processor: ImageProcessor, folder: Path, see: bool) -> None:
    """What was read as right must work, and be written as it was read."""
    image = Image.new("RGB", (50, 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numbers that overflow
        if see and max(made_size(processor)) <= 256:  # others take their time
            pixels = processor(image)
            assert processor.normalize(pixels.values).dtype == np.float32
            assert len(pixels.values) == processor.count_pictures(50, 20) == pixels.pieces.sum()
    if processor.tokens is not None:
        assert processor.count(50, 20) >= 1
    processor.save(folder / "again")
    again = ImageProcessor.from_folder(folder / "again", "janus")
    assert type(again) is type(processor)
    written = processor.fields()
    if isinstance(processor, Tiled):  # whose file is one
        written = {**processor.processor_fields, **written}
    # as text: nan is not nan
    assert json.dumps(again.fields(), sort_keys=True) == json.dumps(written, sort_keys=True)


def made_size(processor: ImageProcessor) -> list[int]:
    sizes = [getattr(processor, name, None) for name in ("size", "crop", "edge", "high_edge")]
    flat = [side for size in sizes for side in (size if isinstance(size, tuple) else (size,))]
    return [side for side in flat if side is not None] + [0]
