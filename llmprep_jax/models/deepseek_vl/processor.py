"""DeepSeek-VL's prompts: a placeholder stands for the 576 tokens of an image.

Its chat template writes no BOS, which the tokenizer adds, and shows content that is a plain string
as an empty turn: it gets lists of parts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmprep_jax.text.image_text import ImageTextProcessor, stack_rows
from llmprep_jax.text.processor import Processor as TextProcessor
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.processor import ImageProcessor

MARKER = "<image_placeholder>"
TOKENS = 576  # of an image, where no file says it


class Processor(ImageTextProcessor):
    """Texts or conversations, and images, to `tokens`, `mask`, `images` and, in 7B,
    `images_high`."""

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, padding_side: str = "left"):
        super().__init__(tokenizer, images, MARKER, padding_side)

    @classmethod
    def from_path(cls, path: str | Path, padding_side: str = "left") -> "Processor":
        """Reads a folder of a model, or one of a run, which has `tokenizer/`.

        Raises FileNotFoundError or ValueError, on one line, naming the file and the remedy.
        """
        tokenizer = TextProcessor.from_path(path).tokenizer
        own = Path(path) / "tokenizer"
        images = ImageProcessor.from_folder(own if own.is_dir() else path, "deepseek_vl")
        images.tokens = images.tokens or TOKENS
        return cls(tokenizer, images, padding_side)

    def media(self, pixels: Sequence[Any]) -> dict[str, np.ndarray]:
        """Of each row; the large pictures too where there are any."""
        media = super().media(pixels)
        if all(row is None or row.high is None for row in pixels):
            return media
        rows = [None if row is None else self.images.normalize_high(row.high) for row in pixels]
        return {**media, "images_high": stack_rows(rows)}
