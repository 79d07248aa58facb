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
        images = cls.open_images(own if own.is_dir() else Path(path))
        images.tokens = images.tokens or cls.default_tokens
        return cls(tokenizer, images, padding_side)

    @classmethod
    def open_images(cls, folder: Path) -> ImageProcessor:
        """The image processor of a folder."""
        return ImageProcessor.from_folder(folder, cls.model_type)


def text_macro(image: str) -> str:
    """A macro `text(content)` for chat templates: a string, or parts of which an image is `image`;
    without spaces at both ends."""
    return """\
{%- macro text(content) -%}
{%- set said = namespace(text='') -%}
{%- if content is string -%}
{%- set said.text = content -%}
{%- else -%}
{%- for part in content -%}
{%- set said.text = said.text + ('IMAGE' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- endif -%}
{{- said.text | trim -}}
{%- endmacro -%}
""".replace("IMAGE", image)
