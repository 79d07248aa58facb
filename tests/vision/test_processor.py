"""Image processors: what each kind makes of a picture, what it counts, and which files say it."""

import json
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from llmprep_jax.vision import KINDS, ImageProcessor
from llmprep_jax.vision.kinds import (
    Padded,
    PaddedFirst,
    PaddedTwice,
    PanAndScan,
    ShortestEdge,
    Square,
    Tiled,
)
from llmprep_jax.vision.normalize import Normalization
from tests.vision.samples import draw, encode

SMALL = {"height": 32, "width": 32}
RED = Image.new("RGB", (50, 20), (200, 0, 0))


def test_bytes_become_what_arithmetic_makes_of_them():
    values = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    half = Normalization((0.5,) * 3, (0.5,) * 3)(values)
    assert half.dtype == np.float32
    assert np.abs(half[0, :, 1] - np.linspace(-1, 1, 256)).max() < 1e-7
    clip = ShortestEdge().normalize(values[None])
    assert clip.shape == (1, 1, 256, 3)
    # (0 - mean) / std and (1 - mean) / std of CLIP's three channels
    assert np.allclose(clip[0, 0, 0], [-1.79226, -1.75210, -1.48022], atol=1e-5)
    assert np.allclose(clip[0, 0, 255], [1.93034, 2.07488, 2.14590], atol=1e-5)


def test_every_channel_has_its_own_std():
    out = Normalization((0.0,) * 3, (1.0, 0.5, 0.25))(np.full((1, 1, 1, 3), 51, np.uint8))
    assert np.allclose(out.ravel(), [0.2, 0.4, 0.8])


@pytest.mark.parametrize(("fields", "expected"), [
    ({"image_mean": 0.2, "image_std": 0.2}, [0, 3]),
    ({"image_mean": 0.2, "image_std": 0.2, "do_normalize": False}, [0.2, 0.8]),
    ({"image_mean": 51, "image_std": 2.0, "do_rescale": False}, [0, 76.5]),
    ({"do_rescale": False, "do_normalize": False}, [51, 204]),
    ({"image_mean": 0, "image_std": 1, "rescale_factor": 1 / 51}, [1, 4]),
], ids=["both", "scaled", "normalized", "neither", "factor"])  # fmt: skip
def test_fields_say_what_is_done_to_bytes(fields, expected):
    out = Square(fields).normalize(np.array([[[[51] * 3, [204] * 3]]], np.uint8))
    assert np.allclose(out[0, 0, :, 2], expected, atol=1e-5)


def test_clip_sees_the_middle_of_the_shorter_edge():
    image = draw(90, 61)
    pixels = ShortestEdge({"size": {"shortest_edge": 32}, "crop_size": SMALL})([image, RED])
    expected = np.asarray(image.resize((47, 32), 3).crop((7, 0, 39, 32)))
    assert np.array_equal(pixels.values[0], expected)
    assert pixels.values.shape == (2, 32, 32, 3)
    assert pixels.values.dtype == np.uint8
    assert pixels.pieces.tolist() == [1, 1]
    assert pixels.grids.tolist() == [[0, 0], [0, 0]]
    assert pixels.high is None


def test_siglip_sees_all_in_a_square():
    image = draw(90, 61)
    assert np.array_equal(Square({"size": SMALL})(image).values[0], image.resize((32, 32), 3))
    low = {"size": {"height": 20, "width": 30}, "resample": 2}
    assert np.array_equal(Square(low)(image).values[0], image.resize((30, 20), 2))


def test_llava_pads_before_it_resizes_where_the_file_says_so():
    fields = {"size": {"shortest_edge": 32}, "crop_size": SMALL, "do_pad": True}
    values = PaddedFirst(fields)(RED).values[0]
    assert values[0, 0].tolist() == values[-1, -1].tolist() == [122, 116, 104]
    assert values[16, 0].tolist() == values[16, -1].tolist() == [200, 0, 0]
    cropped = PaddedFirst({**fields, "do_pad": False})(RED).values[0]
    assert cropped[0, 0].tolist() == [200, 0, 0]


def test_gemma_3_sees_the_whole_and_its_crops():
    image = draw(90, 30)
    fields = {"size": SMALL, "pan_and_scan_min_crop_size": 16}
    whole = np.asarray(image.resize((32, 32), 2))
    assert np.array_equal(PanAndScan(fields)(image).values, whole[None])
    processor = PanAndScan({**fields, "do_pan_and_scan": True}, tokens=256)
    pixels = processor([image, draw(30, 30)])
    assert pixels.pieces.tolist() == [4, 1]
    assert np.array_equal(pixels.values[0], whole)
    crop = image.crop((60, 0, 90, 30)).resize((32, 32), 2)
    assert np.array_equal(pixels.values[3], crop)
    assert processor.count(90, 30) == 4 * 256
    assert processor.count_pictures(90, 30) == 4
    assert processor.count(30, 30) == 256


def test_deepseek_vl_sees_all_between_bars():
    values = Padded({"size": SMALL})(RED).values[0]
    assert values[0, 0].tolist() == values[-1, -1].tolist() == [122, 116, 104]
    assert values[16, 0].tolist() == [200, 0, 0]
    assert (values[:, 0, 1] == 0).sum() == 14  # 12.8 rounds to 13, and min_size is 14
    # as in transformers, the file's own colour is not read
    grey = Padded({"size": SMALL, "image_mean": [0.5] * 3, "background_color": [9, 9, 9]})
    assert grey(RED).values[0][0, 0].tolist() == [127, 127, 127]
    assert Padded({"image_size": 64}).edge == 64  # DeepSeek's own files


def test_the_hybrid_makes_the_small_picture_of_the_large_one():
    processor = PaddedTwice(
        {"size": SMALL, "high_res_size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3}
    )
    pixels = processor([RED, draw(40, 40)])
    assert pixels.high.shape == (2, 64, 64, 3)
    assert pixels.values.shape == (2, 32, 32, 3)
    assert pixels.high[0][0, 0].tolist() == pixels.values[0][0, 0].tolist() == [122, 116, 104]
    small = Image.fromarray(pixels.high[0]).resize((32, 32), 3)
    assert np.array_equal(pixels.values[0], small)
    assert processor.high_normalization.mean != processor.mean


def test_deepseek_vl2_sees_the_whole_and_its_tiles():
    image = draw(120, 50)
    processor = Tiled({"candidate_resolutions": [[32, 32], [64, 32], [32, 64]], "patch_size": 8})
    pixels = processor([image, RED])
    assert pixels.grids.tolist() == [[2, 1], [2, 1]]
    assert pixels.pieces.tolist() == [3, 3]
    whole = ImageOps.pad(image, (32, 32), color=(127, 127, 127))
    canvas = np.asarray(ImageOps.pad(image, (64, 32), color=(127, 127, 127)))
    assert np.array_equal(pixels.values[0], whole)
    assert np.array_equal(np.concatenate(pixels.values[1:3], axis=1), canvas)
    assert processor.side == 2  # 32 / 8 / 2
    assert processor.count(120, 50) == 2 * 3 + 1 + 2 * 5


def test_tiling_is_off_above_two_images():
    processor = Tiled({"candidate_resolutions": [[32, 32], [64, 32]]})
    assert processor([RED, RED]).grids.tolist() == [[2, 1]] * 2
    pixels = processor([RED] * 3)
    assert pixels.grids.tolist() == [[1, 1]] * 3
    assert pixels.pieces.tolist() == [2, 2, 2]
    assert Tiled().count(1000, 300, num_images=2) == 813
    assert Tiled().count(1000, 300, num_images=3) == 421


def test_counts_agree_with_what_is_made():
    tiled, panned = Tiled(), PanAndScan({"do_pan_and_scan": True, "size": SMALL}, tokens=3)
    for size in ((700, 500), (300, 800), (1100, 260)):
        image = draw(*size)
        pixels, crops = tiled(image), panned(image)
        assert tiled.count_pictures(*size) == pixels.pieces[0] == len(pixels.values)
        across, down = pixels.grids[0].tolist()
        assert tiled.count(*size) == 14 * 15 + 1 + down * 14 * (across * 14 + 1)
        assert panned.count(*size) == 3 * crops.pieces[0]


def test_tokens_are_those_that_the_files_say():
    llava = {"patch_size": 14, "num_additional_image_tokens": 1}
    default = {**llava, "vision_feature_select_strategy": "default"}
    fields = {"crop_size": {"height": 336, "width": 336}}
    assert ShortestEdge(fields, processor_fields=default).count(9, 9) == 576
    full = {**llava, "vision_feature_select_strategy": "full"}
    assert ShortestEdge(fields, processor_fields=full).count(9, 9) == 577
    assert ShortestEdge(fields, tokens=5).count(9, 9) == 5
    assert Padded(processor_fields={"num_image_tokens": 576}, tokens=5).count(9, 9) == 576
    assert PanAndScan({"image_seq_length": 256}).count(9, 9) == 256
    assert PanAndScan({"image_seq_length": 1}, processor_fields={"image_seq_length": 2}).tokens == 2
    with pytest.raises(ValueError, match="a.json: does not say how many tokens"):
        ShortestEdge({}, where="a.json").count(9, 9)


NAMES = {
    "type": ({"image_processor_type": "SiglipImageProcessor"}, None, "Square"),
    "fast": ({"image_processor_type": "Gemma3ImageProcessorFast"}, None, "PanAndScan"),
    "older": ({"feature_extractor_type": "CLIPFeatureExtractor"}, None, "ShortestEdge"),
    "DeepSeek's": ({"image_processor_type": "VLMImageProcessor"}, None, "Padded"),
    "class": ({"processor_class": "DeepseekVLV2Processor"}, None, "Tiled"),
    "type first": (
        {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"},
        "llava",
        "ShortestEdge",
    ),
    "model": ({}, "janus", "JanusPadded"),
    "class first": ({"processor_class": "SiglipProcessor"}, "clip", "Square"),
    "unknown class": ({"processor_class": "OtherProcessor"}, "deepseek_vl_hybrid", "PaddedTwice"),
}


@pytest.mark.parametrize("case", NAMES)
def test_the_kind_is_named_by_the_file_or_the_model(case):
    fields, model_type, kind = NAMES[case]
    assert type(ImageProcessor.from_fields(fields, model_type)).__name__ == kind


def test_a_kind_that_is_named_in_code_is_that_kind():
    assert type(Square.from_fields({"processor_class": "CLIPProcessor"})) is Square


def test_the_other_file_may_name_the_class(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": 10}')
    (tmp_path / "processor_config.json").write_text('{"processor_class": "SiglipProcessor"}')
    assert type(ImageProcessor.from_folder(tmp_path, "clip")) is Square


def test_an_unknown_kind_is_refused_by_name():
    for fields in ({"image_processor_type": "Siglip2ImageProcessor"}, {}):
        with pytest.raises(ValueError, match="known are CLIPImageProcessor, Llava"):
            ImageProcessor.from_fields(fields, "siglip2")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again_with_fields_of_others(kind, tmp_path):
    fields = {"image_mean": [0.1, 0.2, 0.3], "of_others": {"a": [1]}, "resample": None}
    processor = KINDS[kind](fields, processor_fields={"num_image_tokens": 7, "chat": "x"})
    processor.save(tmp_path, processor_class="OursProcessor")
    again = ImageProcessor.from_folder(tmp_path, "deepseek_vl_v2")
    assert type(again) is type(processor)
    assert again.fields().items() >= fields.items()
    assert again.mean == (0.1, 0.2, 0.3)
    if kind == Tiled.kind:
        (path,) = tmp_path.iterdir()
        written = json.loads(path.read_text())
        assert path.name == "processor_config.json"
        assert written["candidate_resolutions"][1] == [384, 768]
        assert written["chat"] == "x"
    else:
        assert again.processor_fields["num_image_tokens"] == again.tokens == 7
        assert again.processor_fields["processor_class"] == "OursProcessor"
        flat = json.loads((tmp_path / "preprocessor_config.json").read_text())
        nested = json.loads((tmp_path / "processor_config.json").read_text())
        assert nested["image_processor"] == flat == processor.fields()
        (tmp_path / "processor_config.json").unlink()
        assert ImageProcessor.from_folder(tmp_path).fields() == processor.fields()


def test_the_nested_file_wins(tmp_path):
    flat = {"image_processor_type": "SiglipImageProcessor", "size": 10}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(flat))
    (tmp_path / "processor_config.json").write_text('{"image_seq_length": 4}')
    first = ImageProcessor.from_folder(tmp_path)
    assert (first.size, first.tokens) == (10, 4)
    nested = {"image_processor": {**flat, "size": {"height": 20, "width": 21}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert ImageProcessor.from_folder(tmp_path).size == (21, 20)


def test_null_is_the_default_and_older_sizes_are_numbers():
    nulls = {"do_pan_and_scan": None, "pan_and_scan_min_crop_size": None, "image_mean": None}
    assert PanAndScan(nulls).fields()["do_pan_and_scan"] is None
    assert PanAndScan(nulls).mean == (0.5, 0.5, 0.5)
    old = ShortestEdge({"size": 224, "crop_size": 224})
    assert (old.size, old.crop) == (224, (224, 224))
    assert Padded({"size": 48}).edge == 48
    assert Square({"size": [20, 30]}).size == (30, 20)


BAD = {
    "size": (Square, {"size": {"longest_edge": 5}}, "size is {'longest_edge': 5}; write"),
    "large": (Square, {"size": {"height": 9000, "width": 1}}, "whole numbers from 1 to 8192"),
    "zero": (ShortestEdge, {"size": {"shortest_edge": 0}}, "from 1 to 8192"),
    "text": (ShortestEdge, {"crop_size": "224"}, "crop_size is '224'"),
    "flag": (Square, {"do_resize": "yes"}, "do_resize is 'yes'; write true or false"),
    "filter": (Square, {"resample": 9}, "resample is 9; write whole numbers from 0 to 5"),
    "mean": (Square, {"image_mean": [0.5, 0.5]}, "image_mean is [0.5, 0.5]; write three numbers"),
    "std": (Square, {"image_std": [0, 1, 1]}, "image_std"),
    "nan": (Square, {"image_mean": [float("nan")] * 3}, "image_mean"),
    "huge": (Square, {"image_mean": 10**400}, "image_mean"),
    "oblong": (Padded, {"size": {"height": 8, "width": 9}}, "the same height and width"),
    "least": (Padded, {"min_size": 385}, "min_size is 385"),
    "pieces": (PanAndScan, {"pan_and_scan_max_num_crops": 0}, "pan_and_scan_max_num_crops is 0"),
    "tiles": (Tiled, {"candidate_resolutions": [[32, 32], [40, 32]]}, "multiples of the first"),
    "no tiles": (Tiled, {"candidate_resolutions": []}, "candidate_resolutions is []"),
    "patch": (Tiled, {"patch_size": 0}, "patch_size is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_field_is_named_with_its_file(case):
    kind, fields, words = BAD[case]
    with pytest.raises(ValueError, match="^a.json: ") as error:
        kind(fields, where="a.json")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no preprocessor_config.json, and no image_proc"):
        ImageProcessor.from_folder(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for text, words in (("{", "not valid JSON"), ("[]", "holds list"), ("[" * 10**5, "not valid")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {words}"):
            ImageProcessor.from_folder(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": 5}')
    with pytest.raises(ValueError, match="processor_config.json: image_processor is 5"):
        ImageProcessor.from_folder(tmp_path)


def test_images_come_from_anywhere_and_errors_name_them(tmp_path):
    processor = Square({"size": SMALL})
    path = tmp_path / "a.png"
    path.write_bytes(encode(RED))
    values = processor([path, str(path), path.read_bytes(), RED, np.asarray(RED)]).values
    assert all(np.array_equal(value, values[0]) for value in values)
    assert np.array_equal(processor(np.asarray([RED, RED])).values, values[:2])
    path.write_bytes(encode(draw(64, 64))[:900])
    with pytest.raises(ValueError, match="a.png: cannot be decoded"):
        processor([RED, path])
    with pytest.raises(ValueError, match="^image 1: has 0 bytes"):
        processor([RED, b""])
    with pytest.raises(ValueError, match="^7.jpg: has 0 bytes"):
        processor([RED, b""], names=["6.jpg", "7.jpg"])
    with pytest.raises(ValueError, match="there are no images"):
        processor([])
    small = Square({"size": SMALL}, max_pixels=999)
    with pytest.raises(ValueError, match="image 0: 50 x 20 are 1,000 pixels and 999 are allowed"):
        small(RED)


def test_pictures_that_are_not_resized_must_have_one_size():
    processor = Square({"do_resize": False})
    assert processor([RED, RED]).values.shape == (2, 20, 50, 3)
    with pytest.raises(ValueError, match="images stay 40 x 40 and 50 x 20"):
        processor([RED, draw(40, 40)])
    tall = Image.new("RGB", (1, 20_000))
    with pytest.raises(ValueError, match="^image 0: 1 x 20,000 pixels are a square of"):
        Padded({"do_resize": False})(tall)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2)], ids=str)
def test_pictures_of_any_shape_are_made(kind, size):
    processor = KINDS[kind]({"candidate_resolutions": [[32, 32], [64, 32]]})
    values = processor(draw(*size)).values
    assert values.shape[1:] == {"SiglipImageProcessor": (224, 224, 3)}.get(kind, values.shape[1:])
    assert len(values) == processor.count_pictures(*size)


def test_impossible_counts_are_refused():
    for arguments in ((0, 5), (5, -1), (5, 5, 0)):
        with pytest.raises(ValueError, match="give whole numbers from 1"):
            Tiled().count(*arguments)
