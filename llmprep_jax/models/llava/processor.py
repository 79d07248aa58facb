"""LLaVA's prompts: <image> in a text stands for an image's tokens.

Older folders do not say how many these are; 576 is what 336 pixels make with patches of 14.
"""

from llmprep_jax.models.prompt_processor import PromptProcessor
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.processor import ImageProcessor

MARKER = "<image>"


class Processor(PromptProcessor):
    """Texts or conversations, and images, to `tokens`, `mask` and `images`."""

    model_type = "llava"
    default_tokens = 576

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, padding_side: str = "left"):
        super().__init__(tokenizer, images, MARKER, padding_side)
