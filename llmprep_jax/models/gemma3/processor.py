"""Gemma 3's prompts: a marker in the text becomes two newlines, the image's tokens between two of
their own, and two newlines; with pan and scan, a sentence that says what the pieces are.

The newlines are written before the text is tokenised, since they join those around them.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llmprep_jax.text.image_text import ImageTextProcessor
from llmprep_jax.text.processor import Processor as TextProcessor
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.processor import ImageProcessor

BEGIN, SOFT, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
TOKENS = 256  # of an image, where no file says it
_WHOLE = "Here is the original image {} and here are some crops to help you see better {}"


class Processor(ImageTextProcessor):
    """Texts or conversations, and images, to `tokens`, `mask` and `images`."""

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, padding_side: str = "left"):
        super().__init__(tokenizer, images, BEGIN, padding_side, SOFT)

    @classmethod
    def from_path(cls, path: str | Path, padding_side: str = "left") -> "Processor":
        """Reads a folder of a model, or one of a run, which has `tokenizer/`.

        Raises FileNotFoundError or ValueError, on one line, naming the file and the remedy.
        """
        tokenizer = TextProcessor.from_path(path).tokenizer
        own = Path(path) / "tokenizer"
        images = ImageProcessor.from_folder(own if own.is_dir() else path, "gemma3")
        images.tokens = images.tokens or TOKENS
        return cls(tokenizer, images, padding_side)

    def wrapped(self, pixels: Any) -> list[str]:
        """What stands for each image, its pieces one after another."""
        one = f"\n\n{BEGIN}{SOFT}{END}\n\n"
        return [
            one if count == 1 else _WHOLE.format(one, " ".join([one] * (count - 1)))
            for count in pixels.pieces.tolist()
        ]

    def count_tokens(self, pixels: Any) -> list[int]:
        """Of each piece."""
        return [self.images.tokens] * int(np.sum(pixels.pieces))
