"""DeepSeek-VL's prompts: a placeholder stands for the 576 tokens of an image.

Its chat template writes no BOS, which the tokenizer adds, and shows content that is a plain string
as an empty turn: it gets lists of parts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmprep_jax.models.prompt_processor import PromptProcessor
from llmprep_jax.text.image_text import stack_rows
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.processor import ImageProcessor

MARKER = "<image_placeholder>"


class Processor(PromptProcessor):
    """Texts or conversations, and images, to `tokens`, `mask`, `images` and, in 7B,
    `images_high`."""

    model_type = "deepseek_vl"
    default_tokens = 576

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, padding_side: str = "left"):
        super().__init__(tokenizer, images, MARKER, padding_side)

    def media(self, pixels: Sequence[Any]) -> dict[str, np.ndarray]:
        """Of each row; the large pictures too where there are any."""
        media = super().media(pixels)
        if all(row is None or row.high is None for row in pixels):
            return media
        rows = [None if row is None else self.images.normalize_high(row.high) for row in pixels]
        return {**media, "images_high": stack_rows(rows)}
