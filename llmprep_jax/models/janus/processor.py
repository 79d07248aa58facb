"""Janus' prompts: to see, a placeholder becomes an image's tokens between those that begin and end
it; to draw, a prompt ends with the one that begins it.

A sentence of the system comes before what is said, not before what is drawn, where the processor's
files ask for it (`use_default_system_prompt`). Its chat template writes no BOS, which the tokenizer
adds, and shows content that is a plain string as an empty turn: it gets lists of parts.
"""

from collections.abc import Sequence
from typing import Any

from llmprep_jax.models.prompt_processor import PromptProcessor
from llmprep_jax.text.processor import Inputs
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.processor import ImageProcessor

MARKER, BEGIN, END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content"
    " that the user provides, and assist the user with a variety of tasks using natural"
    " language.\n\n"
)


class Processor(PromptProcessor):
    """Texts or conversations, and images, to `tokens`, `mask` and `images`; prompts of pictures to
    `tokens` and `mask`.

    Attributes:
      begin, end: what stands around an image. pad_id: what prompts are replaced by, so that a
        picture is drawn of none.
    """

    model_type = "janus"
    default_tokens = 576
    draws = True

    def __init__(self, tokenizer: Tokenizer, images: ImageProcessor, padding_side: str = "left"):
        named = tokenizer.special_tokens
        super().__init__(tokenizer, images, named.get("image_token", MARKER), padding_side)
        self.begin, self.end = named.get("boi_token", BEGIN), named.get("eoi_token", END)
        self.pad_id = next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
        has_system = images.processor_fields.get("use_default_system_prompt", False)
        self.system = SYSTEM if has_system else ""

    def wrapped(self, pictures: Sequence[int]) -> list[str]:
        """What stands for each image."""
        return [f"{self.begin}{self.marker}{self.end}"] * len(pictures)

    def opened(self, text: str) -> tuple[str, int]:
        """(the text with the system's sentence, behind BOS if that is written out; how long that
        is)."""
        bos = self.tokenizer.special_tokens.get("bos_token")
        at = len(bos) if bos and text.startswith(bos) else 0
        return text[:at] + self.system + text[at:], len(self.system)

    def for_drawing(self, prompts: Any) -> Inputs:
        """`tokens` and `mask` of prompts of pictures; `prompts` are as of `generate_images`.

        Raises:
          ValueError: an empty prompt, or one that holds an image.
        """
        items = [prompts] if isinstance(prompts, str) or _is_conversation(prompts) else prompts
        rows = []
        for number, item in enumerate(items):
            messages = [{"role": "user", "content": item}] if isinstance(item, str) else item
            text = self.chat.apply(messages, True, False)
            if self.marker in text:
                raise ValueError(
                    f"prompt {number} holds an image, and pictures are drawn of words alone"
                )
            adds = self.chat.adds_special(text)
            rows.append(self.tokenizer.encode_with_offsets(text + self.begin, adds)[0])
        if not rows:
            raise ValueError("there are no prompts; give a text or a conversation, or several")
        return self._pad(rows)

    def _write_places(
        self, text: str, seen: Any, literals: Sequence[int] = ()
    ) -> tuple[str, list[int]]:
        text, literals = super()._write_places(text, seen, literals)
        text, added = self.opened(text)
        return text, [place + added for place in literals]


def _is_conversation(prompts: Any) -> bool:
    return bool(prompts) and isinstance(prompts[0], dict)
