"""What the processors of CLIP and SigLIP have in common: texts to rows of ids, images to pixels.

Rows are padded on the right, and there is no mask: CLIP sees nothing of what follows a text's end,
and SigLIP was trained to see its padding.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from llmprep_jax.text.processor import Processor
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision import ImageProcessor

Inputs = dict[str, np.ndarray]
MOST_TOKENS = 2**16  # tokenizer_config.json says 10^30 where nobody has


class TowerProcessor(Processor):
    """A tokenizer and an image processor; see `clip.processor` and `siglip.processor`.

    Attributes:
      images: the image processor. max_len: tokens of a row, at most.
    """

    model_type: ClassVar[str]
    processor_class: ClassVar[str]
    default_len: ClassVar[int]

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, max_len: int | None = None):
        super().__init__(tokenizer, "right")
        self.images, self.max_len = images, max_len or self.default_len

    @classmethod
    def from_path(cls, path: str | Path) -> "TowerProcessor":
        """Reads a Hugging Face folder, or a run folder of ours, which has one in `tokenizer/`.

        Raises FileNotFoundError or ValueError, on one line, naming the file and the remedy.
        """
        folder = Path(path)
        if (folder / "tokenizer").is_dir():
            folder /= "tokenizer"
        tokenizer = Tokenizer.from_folder(folder)
        images = ImageProcessor.from_folder(folder, cls.model_type)
        return cls(tokenizer, images, _read_length(folder))

    def __call__(
        self, messages_or_texts: str | Sequence[Any] | None = None, images: Any = None
    ) -> Inputs:
        """`tokens` [texts, T] int32 and `images` [images, H, W, 3] float32: what was given.

        Args:
          messages_or_texts: a text or several; longer ones are cut, and keep their end.
          images: one or several, as `vision.open_image` takes them.

        Raises:
          ValueError: on one line: neither is given, messages, an image that cannot be read.
        """
        if messages_or_texts is None and images is None:
            raise ValueError("give texts, images or both")
        inputs = {}
        if messages_or_texts is not None:
            inputs["tokens"] = self.encode(messages_or_texts)
        if images is not None:
            inputs["images"] = self.normalize(self.pixels(images))
        return inputs

    def encode(
        self, texts: str | Sequence[Any], width: int | None = None
    ) -> Int32[np.ndarray, "B T"]:
        """Rows of ids, with the end of each text in them.

        Args:
          width: tokens of a row; None: as the family has it.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if (
            not isinstance(texts, Sequence)
            or not texts
            or not all(isinstance(t, str) for t in texts)
        ):
            raise ValueError("this model reads texts: give a text or a list of them, no messages")
        most = min(width or self.max_len, self.max_len)
        rows = [self._ids(text, most) for text in texts]
        width = width or self._width(max(map(len, rows)))
        pad = self.tokenizer.pad_id if self.tokenizer.pad_id is not None else self.tokenizer.eos_id
        tokens_BT = np.full((len(rows), width), pad, np.int32)
        for tokens_T, row in zip(tokens_BT, rows, strict=True):
            tokens_T[: len(row)] = row
        return tokens_BT

    def pixels(self, images: Any) -> UInt8[np.ndarray, "B H W 3"]:
        """Images as bytes of the tower's size, for batches that are normalised on the device."""
        return self.images(images).values

    def normalize(self, pixels: UInt8[np.ndarray, "B H W 3"]) -> Float32[np.ndarray, "B H W 3"]:
        """What the tower takes."""
        return self.images.normalize(pixels)

    def decode(self, ids: Iterable, skip_special: bool = True) -> str | list[str]:
        """The text of one row of ids, or a list of texts for several."""
        texts = super().decode(ids, skip_special)
        return [self._clean(x) for x in texts] if isinstance(texts, list) else self._clean(texts)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's and the image processor's files, for transformers too."""
        super().save(folder)
        path = Path(folder) / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"model_max_length": self.max_len, "padding_side": "right"}
        path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        self.images.save(folder, processor_class=self.processor_class)

    def _ids(self, text: str, most: int) -> list[int]:
        """Of a text, with its end; at most so many."""
        raise TypeError(f"{type(self).__name__} does not say what a text becomes")

    def _width(self, longest: int) -> int:
        """Of rows whose longest text has so many tokens."""
        return self.max_len

    def _clean(self, text: str) -> str:
        return text


def _read_length(folder: Path) -> int | None:
    """The positions that the model of a folder has, else what its tokenizer says."""
    for name, keys in (
        ("config.json", ("text_config", "max_position_embeddings")),
        ("tokenizer_config.json", ("model_max_length",)),
    ):
        path = folder / name
        value: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float) and 2 <= value <= MOST_TOKENS:
            return int(value)
    return None
