"""CLIP's processor: byte-level BPE of lower-cased words between two special tokens, and images."""

from typing import ClassVar

from llmprep_jax.models.tower_processor import TowerProcessor
from llmprep_jax.text.towers import WORD_END

STEP = 16  # rows are as wide as a multiple of it: five programs for texts of any length


class Processor(TowerProcessor):
    """Texts and images to what `model(**inputs)` takes; rows have up to 77 tokens."""

    model_type: ClassVar[str] = "clip"
    processor_class: ClassVar[str] = "CLIPProcessor"
    default_len: ClassVar[int] = 77

    def _ids(self, text: str, most: int) -> list[int]:
        ids = self.tokenizer.encode(text, add_special=False)
        return [self.tokenizer.bos_id, *ids[: most - 2], self.tokenizer.eos_id]

    def _width(self, longest: int) -> int:
        return min(-(-longest // STEP) * STEP, self.max_len)

    def _clean(self, text: str) -> str:
        return text.replace(WORD_END, " ").strip()
