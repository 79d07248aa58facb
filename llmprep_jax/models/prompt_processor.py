"""What the processors of models that read images among words have in common: their opening."""

from pathlib import Path
from typing import ClassVar

from llmprep_jax.text.image_text import ImageTextProcessor
from llmprep_jax.text.processor import Processor
from llmprep_jax.vision.processor import ImageProcessor


class PromptProcessor(ImageTextProcessor):
    """Made of a tokenizer, an image processor and a padding side.

    Attributes:
      model_type: whose image processor it is, where no file says it.
      default_tokens: of an image, likewise; None: the image processor counts them.
    """

    model_type: ClassVar[str]
    default_tokens: ClassVar[int | None] = None

    @classmethod
    def from_path(cls, path: str | Path, padding_side: str = "left") -> "PromptProcessor":
        """Reads a folder of a model, or one of a run, which has `tokenizer/`.

        Raises FileNotFoundError or ValueError, on one line, naming the file and the remedy.
        """
        tokenizer, own = Processor.from_path(path).tokenizer, Path(path) / "tokenizer"
        images = ImageProcessor.from_folder(own if own.is_dir() else path, cls.model_type)
        images.tokens = images.tokens or cls.default_tokens
        return cls(tokenizer, images, padding_side)
