"""SigLIP's processor: texts in lower case, padded to the full length, and images.

SigLIP's own tokenizer has no ASCII punctuation either; SigLIP 2's, which is Gemma's, has it.
"""

from typing import ClassVar

from llmprep_jax.models.tower_processor import TowerProcessor
from llmprep_jax.text.towers import canonical


class Processor(TowerProcessor):
    """Texts and images to what `model(**inputs)` takes; all rows have 64 tokens."""

    model_type: ClassVar[str] = "siglip"
    processor_class: ClassVar[str] = "SiglipProcessor"
    default_len: ClassVar[int] = 64

    def _ids(self, text: str, most: int) -> list[int]:
        # Gemma's vocabulary has tokens for turns of a conversation
        is_gemmas = self.tokenizer.special_tokens.get("eos_token") == "<eos>"
        text = text.lower() if is_gemmas else canonical(text)
        ids = self.tokenizer.encode(text, add_special=False, parse_special=False)
        return [*ids[: most - 1], self.tokenizer.eos_id]
