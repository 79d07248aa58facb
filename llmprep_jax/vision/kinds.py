"""The kinds of image processors, by how they make sizes equal.

`ShortestEdge` (CLIP), `PaddedFirst` (LLaVA), `Square` (SigLIP), `PanAndScan` (Gemma 3), `Padded`
(DeepSeek-VL 1.3B), `JanusPadded`, `PaddedTwice` (DeepSeek-VL 7B) and `Tiled` (DeepSeek-VL2).
Defaults are those of transformers' classes; released folders state most fields.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from llmprep_jax.vision import crops, resize, tiles
from llmprep_jax.vision.fields import MAX_EDGE, Fields, short, write_files
from llmprep_jax.vision.normalize import Normalization
from llmprep_jax.vision.processor import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    MAX_TOKENS,
    ImageProcessor,
    Views,
    check_count,
    read_normalization,
)

_SCALED = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_CLIP = {**_SCALED, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
_SIGLIP = {**_SCALED, "image_mean": list(HALF), "image_std": list(HALF)}
_RESIZED = {"do_convert_rgb": True, "do_resize": True, "resample": 3}


def _square(edge: int) -> dict[str, int]:
    return {"height": edge, "width": edge}


def read_color(fields: Fields, mean: str) -> tuple[int, int, int]:
    """The mean as a colour, rounded down as released: (122, 116, 104) of CLIP's.

    Also where it is not used otherwise, since `do_normalize` is false.
    """
    return tuple(min(max(int(x * 255), 0), 255) for x in fields.triple(mean, -1e3, 1e3))


class _Resized(ImageProcessor):
    """One resize, to a shorter edge or to a size, and perhaps a crop of the middle."""

    def _read(self, fields: Fields) -> None:
        super()._read(fields)
        self.resample = read_filter(fields, "resample")
        self.size = fields.size("size", square=False) if fields.flag("do_resize") else None
        crop = fields.size("crop_size") if fields.flag("do_center_crop") else None
        self.crop: tuple[int, int] | None = crop

    def _view(self, image: Image.Image, num_images: int) -> Views:
        return Views([self._fit(image)])

    def _fit(self, image: Image.Image) -> Image.Image:
        size = image.size if self.size is None else self.size
        if isinstance(size, int):
            size = resize.shortest_edge_size(*image.size, size)
        return resize.resize_and_crop(image, size, self.crop or size, self.resample)

    def _find_tokens(self, fallback: int | None) -> int | None:
        """LLaVA's files give the patch, and tokens that the tower adds or its user drops."""
        said = Fields(self.processor_fields, {"num_additional_image_tokens": 0}, self._fields.where)
        size = self.crop or self.size
        if said.get("patch_size") is None or not isinstance(size, tuple):
            return super()._find_tokens(fallback)
        patch = said.integer("patch_size", 1, MAX_EDGE)
        added = said.integer("num_additional_image_tokens", 0, MAX_TOKENS)
        dropped = said.get("vision_feature_select_strategy") == "default"
        tokens = (size[0] // patch) * (size[1] // patch) + added - dropped
        if tokens < 1:
            raise said.wrong("patch_size", f"at most {min(size)}, the side of a picture")
        return tokens


class ShortestEdge(_Resized):
    """CLIP's: the shorter edge to `size`, and the middle of that."""

    kind = "CLIPImageProcessor"
    defaults: ClassVar[Mapping[str, Any]] = {
        **_RESIZED,
        **_CLIP,
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "crop_size": _square(224),
    }


class PaddedFirst(ShortestEdge):
    """LLaVA's: as CLIP's, and with `do_pad` on a square of the mean's colour before."""

    kind = "LlavaImageProcessor"
    defaults: ClassVar[Mapping[str, Any]] = {**ShortestEdge.defaults, "do_pad": False}

    def _read(self, fields: Fields) -> None:
        super()._read(fields)
        self.color = read_color(fields, "image_mean") if fields.flag("do_pad") else None

    def _fit(self, image: Image.Image) -> Image.Image:
        return super()._fit(
            image if self.color is None else resize.pad_to_square(image, self.color)
        )


class Square(_Resized):
    """SigLIP's: to `size`, whatever the shape was."""

    kind = "SiglipImageProcessor"
    defaults: ClassVar[Mapping[str, Any]] = {
        **_RESIZED,
        **_SIGLIP,
        "size": _square(224),
        "do_center_crop": False,
    }


class PanAndScan(Square):
    """Gemma 3's: the whole and, with `do_pan_and_scan`, pieces of long pictures, each to `size`.

    transformers' processor of text and images overrides a folder's `do_pan_and_scan` with False;
    here the folder decides.
    """

    kind = "Gemma3ImageProcessor"
    defaults: ClassVar[Mapping[str, Any]] = {
        **Square.defaults,
        "resample": 2,
        "do_pan_and_scan": False,
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }

    def _read(self, fields: Fields) -> None:
        super()._read(fields)
        self.cutting = crops.PanAndScan(
            fields.integer("pan_and_scan_min_crop_size", 1, 2**16),
            fields.integer("pan_and_scan_max_num_crops", 1, 64),
            fields.number("pan_and_scan_min_ratio_to_activate", 0.0, 2.0**16),
        )
        self.pans = fields.flag("do_pan_and_scan")

    def _view(self, image: Image.Image, num_images: int) -> Views:
        boxes = self.cutting.boxes(*image.size) if self.pans else []
        return Views([self._fit(image), *[self._fit(image.crop(box)) for box in boxes]])

    def count_pictures(self, width: int, height: int, num_images: int = 1) -> int:
        check_count(width, height, num_images)
        return 1 + len(self.cutting.boxes(width, height)) if self.pans else 1


class Padded(ImageProcessor):
    """DeepSeek-VL's: the longer edge to `size`, in the middle of a square of the mean's colour.

    The square's colour follows from the mean alone, as in transformers: a file's `background_color`
    is not read. DeepSeek's own files have `image_size` for `size`.
    """

    kind = "DeepseekVLImageProcessor"
    defaults: ClassVar[Mapping[str, Any]] = {
        **_RESIZED,
        **_CLIP,
        "size": _square(384),
        "min_size": 14,
        "do_pad": True,
    }

    def _read(self, fields: Fields) -> None:
        super()._read(fields)
        name = "size" if fields.given.get("image_size") is None else "image_size"
        self.edge = read_edge(fields, name)
        self.resample = read_filter(fields, "resample")
        self.least = fields.integer("min_size", 1, self.edge)
        self.resizes, self.pads = fields.flag("do_resize"), fields.flag("do_pad")
        self.color = read_color(fields, "image_mean")

    def _view(self, image: Image.Image, num_images: int) -> Views:
        return Views([self._fit(image, self.edge, self.resample, self.color)])

    def _fit(
        self, image: Image.Image, edge: int, resample: int, color: tuple[int, int, int]
    ) -> Image.Image:
        if self.resizes:
            size = resize.longest_edge_size(*image.size, edge, self.least)
            image = image.resize(size, resample)
        return resize.pad_to_square(image, color) if self.pads else image


class JanusPadded(Padded):
    """Janus': as DeepSeek-VL's."""

    kind = "JanusImageProcessor"


class PaddedTwice(Padded):
    """DeepSeek-VL 7B's: a large picture, and a small one that is made of the large one.

    So the small one has the bars of the large one's colour, (122, 116, 104) as released.
    """

    kind = "DeepseekVLHybridImageProcessor"
    defaults: ClassVar[Mapping[str, Any]] = {
        **Padded.defaults,
        "high_res_size": _square(1024),
        "high_res_resample": 3,
        "high_res_image_mean": list(CLIP_MEAN),
        "high_res_image_std": list(CLIP_STD),
    }

    def _read(self, fields: Fields) -> None:
        super()._read(fields)
        self.high_edge = read_edge(fields, "high_res_size")
        self.high_resample = read_filter(fields, "high_res_resample")
        self.high_color = read_color(fields, "high_res_image_mean")
        self.high_normalization = read_normalization(
            fields, "high_res_image_mean", "high_res_image_std"
        )

    def _view(self, image: Image.Image, num_images: int) -> Views:
        if not self.resizes:
            return Views([image], high=image)
        high = self._fit(image, self.high_edge, self.high_resample, self.high_color)
        return Views([self._fit(high, self.edge, self.resample, self.color)], high=high)

    @property
    def pixels(self) -> dict[str, Normalization]:
        return {**super().pixels, "images_high": self.high_normalization}

    def normalize_high(
        self, values: UInt8[np.ndarray, "*N P Q 3"]
    ) -> Float32[np.ndarray, "*N P Q 3"]:
        """By the mean and std of the large pictures."""
        return self.high_normalization(values)


class Tiled(ImageProcessor):
    """DeepSeek-VL2's: the whole on one tile, then tiles of the resolution that suits it best.

    Of a conversation of more than two images each is seen as one tile, twice; so a third image
    changes what the first two became.
    """

    kind = "DeepseekVLV2Processor"  # of text and pictures; pictures alone have no type
    defaults: ClassVar[Mapping[str, Any]] = {
        "candidate_resolutions": [list(size) for size in tiles.RESOLUTIONS],
        "patch_size": 14,
        "downsample_ratio": 2,
        "image_mean": list(HALF),
        "image_std": list(HALF),
        "normalize": True,
        "processor_class": kind,
    }

    def _read(self, fields: Fields) -> None:
        scaled = Fields(fields.given, {**_SCALED, **self.defaults}, fields.where)
        self.normalization = read_normalization(scaled, "image_mean", "image_std", "normalize")
        self.color = read_color(fields, "image_mean")
        self.resolutions = self._read_resolutions(fields)
        self.edge = self.resolutions[0][0]
        patch = fields.integer("patch_size", 1, self.edge)
        self.side = -(-(self.edge // patch) // fields.integer("downsample_ratio", 1, self.edge))

    def _read_resolutions(self, fields: Fields) -> list[resize.Size]:
        name, remedy = "candidate_resolutions", "a list of [width, height], multiples of the first"
        value = fields.get(name)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= 256:
            raise fields.wrong(name, remedy)
        edge = value[0][0] if isinstance(value[0], list | tuple) and value[0] else None
        for pair in value:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2
            if not is_pair or not all(_divides(edge, side) for side in pair):
                raise fields.wrong(name, remedy)
        return [(width, height) for width, height in value]

    def fields(self) -> dict[str, Any]:
        return self._fields.all()

    def save(self, folder: str | Path, **processor_fields: Any) -> None:
        """Writes processor_config.json, with the fields at its top as released."""
        fields = {**self.processor_fields, **processor_fields}
        write_files(folder, self.fields(), fields, nested=False)

    def grid(self, width: int, height: int, num_images: int = 1) -> tuple[int, int]:
        """The tiles of an image, across and down, beside its view as a whole."""
        check_count(width, height, num_images)
        if num_images > 2:
            return 1, 1
        best = tiles.best_resolution(width, height, self.resolutions)
        return best[0] // self.edge, best[1] // self.edge

    def count_pictures(self, width: int, height: int, num_images: int = 1) -> int:
        across, down = self.grid(width, height, num_images)
        return 1 + across * down

    def count(self, width: int, height: int, num_images: int = 1) -> int:
        """Newline and separator tokens too: 421 to 2,101 of the released models."""
        return tiles.count_tokens(*self.grid(width, height, num_images), self.side)

    def _view(self, image: Image.Image, num_images: int) -> Views:
        grid = self.grid(*image.size, num_images)
        size = grid[0] * self.edge, grid[1] * self.edge
        return Views(tiles.cut_tiles(image, size, self.edge, self.color), grid)


def _divides(edge: Any, side: Any) -> bool:
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (edge, side))
    return whole and 1 <= edge <= side <= MAX_EDGE and side % edge == 0


def read_filter(fields: Fields, name: str) -> int:
    """A number of Pillow's filters."""
    return fields.integer(name, min(resize.FILTERS), max(resize.FILTERS))


def read_edge(fields: Fields, name: str) -> int:
    """The side of a square."""
    size = fields.size(name)
    if size[0] != size[1]:
        raise fields.wrong(name, "the same height and width")
    return size[0]


KINDS = {
    kind.kind: kind
    for kind in (
        *[ShortestEdge, PaddedFirst, Square, PanAndScan, Padded, JanusPadded, PaddedTwice, Tiled],
    )
}
# what files without a type of their own are known by, and DeepSeek's own names
_OF_PROCESSORS = {
    "CLIPProcessor": "CLIPImageProcessor",
    "LlavaProcessor": "LlavaImageProcessor",
    "SiglipProcessor": "SiglipImageProcessor",
    "Gemma3Processor": "Gemma3ImageProcessor",
    "DeepseekVLProcessor": "DeepseekVLImageProcessor",
    "DeepseekVLHybridProcessor": "DeepseekVLHybridImageProcessor",
    "JanusProcessor": "JanusImageProcessor",
    "DeepseekVLV2Processor": "DeepseekVLV2Processor",
    "VLMImageProcessor": "DeepseekVLImageProcessor",
}
_OF_MODELS = {
    "clip": "CLIPImageProcessor",
    "llava": "LlavaImageProcessor",
    "siglip": "SiglipImageProcessor",
    "gemma3": "Gemma3ImageProcessor",
    "deepseek_vl": "DeepseekVLImageProcessor",
    "deepseek_vl_hybrid": "DeepseekVLHybridImageProcessor",
    "janus": "JanusImageProcessor",
    "deepseek_vl_v2": "DeepseekVLV2Processor",
}


def find_kind(
    fields: Mapping[str, Any], model_type: str | None, where: str
) -> type[ImageProcessor]:
    """The kind of `image_processor_type`, else of `processor_class`, else of the model's type.

    Older files have `feature_extractor_type`, and names that end in "Fast" or "FeatureExtractor".
    """
    type_name = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    if type_name is not None:
        text = type_name if isinstance(type_name, str) else ""
        text = text.removesuffix("Fast").removesuffix("Pil")
        text = text.replace("FeatureExtractor", "ImageProcessor")
        name = _OF_PROCESSORS.get(text, text)
    else:
        written = fields.get("processor_class")
        name = _OF_PROCESSORS.get(written) if isinstance(written, str) else None
        type_name = name = name or _OF_MODELS.get(model_type)
    if name not in KINDS:
        raise ValueError(
            f"{where}: image_processor_type is {short(type_name)}; known are {', '.join(KINDS)}"
        )
    return KINDS[name]
