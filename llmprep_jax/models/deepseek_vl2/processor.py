"""DeepSeek-VL2's prompts: its conversation, tiles of pictures, and places in them.

A conversation of more than two pictures is not tiled, as released, so a third picture changes what
the first two became. The released code has no chat template; the one here writes what it writes and
is saved with the folder. It tokenises each turn on its own and this the whole at once: ids differ
where an answer begins with a mark that BPE joins to the colon before it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmprep_jax.models.deepseek_vl2.layout import count_tokens
from llmprep_jax.models.prompt_processor import PromptProcessor, text_macro
from llmprep_jax.text.image_text import stack_rows
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.grounding import TOKENS
from llmprep_jax.vision.processor import ImageProcessor

MARKER = "<image>"
# in this order, where a tokenizer lacks them
SPECIAL = (MARKER, *TOKENS, "<|User|>", "<|Assistant|>")
TEMPLATE = (
    text_macro(MARKER + r"\n")
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<|User|>: ' + text(message['content']) + '\\n\\n<|Assistant|>:' -}}
{%- elif message['role'] == 'assistant' -%}
{{- text(message['content']) + eos_token -}}
{%- elif message['role'] == 'system' and loop.first -%}
{{- text(message['content']) -}}
{%- else -%}
{{- raise_exception('roles are user and assistant, after one system message at most') -}}
{%- endif -%}
{%- endfor -%}
"""
)


class Processor(PromptProcessor):
    """Texts or conversations, and pictures, to `tokens`, `mask`, `images` and `grids`."""

    model_type = "deepseek_vl_v2"

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, padding_side: str = "left"):
        marker = images.fields().get("image_token") or MARKER
        tokenizer = tokenizer.extended((marker, *SPECIAL[1:]), TEMPLATE)
        tokenizer.shown = TOKENS  # what they say of a picture is of the answer
        super().__init__(tokenizer, images, marker, padding_side)

    def count_tokens(self, pixels: Any) -> list[int]:
        """Newlines and separators too."""
        return count_tokens(pixels.grids, self.images.side).tolist()

    def media(self, pixels: Sequence[Any]) -> dict[str, np.ndarray]:
        """Tiles [B, M, H, W, 3] and grids [B, N, 2]."""
        grids = stack_rows([None if row is None else row.grids for row in pixels])
        return {**super().media(pixels), "grids": grids}
