"""Gemma 3's prompts: a marker in the text becomes two newlines, the image's tokens between two of
their own, and two newlines; with pan and scan, a sentence that says what the pieces are.

The newlines are written before the text is tokenised, since they join those around them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmprep_jax.models.prompt_processor import PromptProcessor
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.processor import ImageProcessor

BEGIN, SOFT, END = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
_WHOLE = "Here is the original image {} and here are some crops to help you see better {}"


class Processor(PromptProcessor):
    """Texts or conversations, and images, to `tokens`, `mask` and `images`."""

    model_type = "gemma3"
    default_tokens = 256

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, padding_side: str = "left"):
        super().__init__(tokenizer, images, BEGIN, padding_side, SOFT)

    def wrapped(self, pictures: Sequence[int]) -> list[str]:
        """What stands for each image, its pieces one after another."""
        one = f"\n\n{BEGIN}{SOFT}{END}\n\n"
        return [
            one if count == 1 else _WHOLE.format(one, " ".join([one] * (count - 1)))
            for count in pictures
        ]

    def count_tokens(self, pixels: Any) -> list[int]:
        """Of each piece."""
        return [self.images.tokens] * int(np.sum(pixels.pieces))
