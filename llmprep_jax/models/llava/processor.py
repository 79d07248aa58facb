"""LLaVA's prompts: <image> in a text stands for an image's tokens.

Older folders do not say how many these are; 576 is what 336 pixels make with patches of 14.
"""

from pathlib import Path

from llmprep_jax.text.image_text import ImageTextProcessor
from llmprep_jax.text.processor import Processor as TextProcessor
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.processor import ImageProcessor

MARKER = "<image>"
TOKENS = 576


class Processor(ImageTextProcessor):
    """Texts or conversations, and images, to `tokens`, `mask` and `images`."""

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, padding_side: str = "left"):
        super().__init__(tokenizer, images, MARKER, padding_side)

    @classmethod
    def from_path(cls, path: str | Path, padding_side: str = "left") -> "Processor":
        """Reads a folder of a model, or one of a run, which has `tokenizer/`.

        Raises FileNotFoundError or ValueError, on one line, naming the file and the remedy.
        """
        tokenizer = TextProcessor.from_path(path).tokenizer
        own = Path(path) / "tokenizer"
        images = ImageProcessor.from_folder(own if own.is_dir() else path, "llava")
        images.tokens = images.tokens or TOKENS
        return cls(tokenizer, images, padding_side)
