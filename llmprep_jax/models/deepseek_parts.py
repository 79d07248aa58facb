"""What DeepSeek-VL and Janus have in common: SigLIP at 384 pixels, DeepSeek-LLM in two sizes, and
how config.json tells of the latter.
"""

from collections.abc import Mapping
from typing import Any

from llmprep_jax.models import llama, siglip
from llmprep_jax.models.hf_config import refuse_unsupported, require

SIGLIP = siglip.VisionConfig(
    1024, 4096, 24, 16, image_size=384, patch_size=16, act="gelu", has_pool=False
)
_TEXT = dict(vocab_size=102400, head_dim=128, max_seq_len=16384, bos_id=100000, eos_ids=(100001,))
LANGUAGE = {
    "1.3b": llama.Config(
        dim=2048, mlp_dim=5632, num_layers=24, num_heads=16, num_kv_heads=16, **_TEXT
    ),
    "7b": llama.Config(
        dim=4096, mlp_dim=11008, num_layers=30, num_heads=32, num_kv_heads=32, **_TEXT
    ),
}
_SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")


def read_language(hf: Mapping[str, Any], image_id: int) -> tuple[llama.Config, int]:
    """The language model of a config.json, and the token that stands for a feature.

    Args:
      image_id: what it is where no field says it.

    Raises:
      ValueError: a field is missing, or asks for something that is not computed.
    """
    refuse_unsupported(hf)
    text = {"model_type": "llama", **(hf.get("text_config") or {})}
    refuse_unsupported(text, model_type=llama.MODEL_TYPES)
    text["tie_word_embeddings"] = hf.get("tie_word_embeddings", True)
    image_id = hf.get("image_token_id", image_id)
    require({"image_token_id": image_id}, "image_token_id")
    return llama.from_hf(text), image_id


def write_language(language: llama.Config, image_id: int) -> dict[str, Any]:
    """The fields of the language model, some of them at the top too."""
    text = llama.to_hf(language)
    text.pop("architectures")
    shared = {name: text[name] for name in _SHARED}
    return {"text_config": text, "image_token_id": image_id, **shared}
