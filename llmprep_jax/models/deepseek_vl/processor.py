"""DeepSeek-VL's prompts: a placeholder stands for the 576 tokens of an image.

Its chat template writes no BOS, which the tokenizer adds, and shows content that is a plain string
as an empty turn: it gets lists of parts. DeepSeek's own folders have no template; the one here
writes what their code writes, and is saved with the folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmprep_jax.models.deepseek_vl import released
from llmprep_jax.models.prompt_processor import PromptProcessor, text_macro
from llmprep_jax.text.image_text import stack_rows
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.fields import read_files, read_object
from llmprep_jax.vision.processor import ImageProcessor

MARKER = "<image_placeholder>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content"
    " that the user provides, and assist the user with a variety of tasks using natural language."
)
TEMPLATE = (
    text_macro(MARKER)
    + """\
{%- if messages[0]['role'] != 'system' -%}
{{- 'SYSTEM' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '\\n\\n' if loop.index0 == 0 or messages[loop.index0 - 1]['role'] == 'system' else '' -}}
{{- 'User: ' + text(message['content']) -}}
{{- '\\n\\n' if add_generation_prompt or not loop.last else '' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'Assistant: ' + text(message['content']) + eos_token -}}
{%- elif message['role'] == 'system' and loop.first -%}
{{- text(message['content']) -}}
{%- else -%}
{{- raise_exception('roles are user and assistant, after one system message at most') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
""".replace("SYSTEM", SYSTEM)
)


class Processor(PromptProcessor):
    """Texts or conversations, and images, to `tokens`, `mask`, `images` and, in 7B,
    `images_high`."""

    model_type = "deepseek_vl"
    default_tokens = 576

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, padding_side: str = "left"):
        tokenizer = tokenizer.extended((MARKER,), TEMPLATE)
        super().__init__(tokenizer, images, MARKER, padding_side)

    @classmethod
    def open_images(cls, folder: Path) -> ImageProcessor:
        """Of a folder of Hugging Face's form, or of DeepSeek's own."""
        config = read_object(folder / "config.json")
        tower = config.get("vision_config")
        if not isinstance(tower, Mapping) or tower.get("cls") != released.HYBRID:
            return super().open_images(folder)
        files = read_files(folder)
        return ImageProcessor.from_fields(
            released.image_fields_as_hf(files.image), cls.model_type, where=str(files.path)
        )

    def media(self, pixels: Sequence[Any]) -> dict[str, np.ndarray]:
        """Of each row; the large pictures too where there are any."""
        media = super().media(pixels)
        if all(row is None or row.high is None for row in pixels):
            return media
        rows = [None if row is None else self.images.normalize_high(row.high) for row in pixels]
        return {**media, "images_high": stack_rows(rows)}
