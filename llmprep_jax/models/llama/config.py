"""Shapes of Llama 2/3.x, SmolLM2, Qwen2/2.5, DeepSeek-LLM and the DeepSeek-R1 distills.

One architecture, a few switches: Qwen2 has biases on queries, keys and values, small models tie
their embeddings, Llama 3.1 and later scale RoPE. Hugging Face's field names occur in `from_hf` and
`to_hf` only. The R1 distill of Qwen-1.5B is not tied although its base model is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.models.hf_config import (
    read_rope,
    refuse_unsupported,
    require,
    token_ids_from_hf,
    token_ids_to_hf,
    write_rope,
)
from llmprep_jax.models.model_config import UNSAVED, LanguageConfig
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """One model of the family.

    Attributes:
      window: sliding window of the layers from `first_window_layer` on; None: no layer has one.
      bos_id, eos_ids, pad_id: token ids that the checkpoint's config states; for generation and
        export.
      model_type: how Hugging Face calls the architecture: "llama" or "qwen2".
    """

    vocab_size: int
    dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    first_window_layer: int = 0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    model_type: str = "llama"
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) is no multiple of num_kv_heads ({self.num_kv_heads})"
            )

    def windows(self) -> tuple[int | None, ...]:
        """For each layer, its sliding window, or None."""
        layers = range(self.num_layers)
        return tuple(self.window if layer >= self.first_window_layer else None for layer in layers)


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a Hugging Face config.json of model_type llama or qwen2.

    Args:
      names: of the checkpoint's tensors, which say nothing more here.

    Raises:
      ValueError: a field is missing, or asks for something that this family does not compute.
    """
    kind = hf["model_type"]
    refuse_unsupported(hf, hidden_act=("silu",), pretraining_tp=(1, None))
    require(
        hf,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    qwen = kind == "qwen2"
    num_heads = hf["num_attention_heads"]
    max_seq_len = hf.get("max_position_embeddings") or (32768 if qwen else 2048)
    rope_base, rope_scaling = read_rope(hf, max_seq_len)
    window, first_window_layer = _read_window(hf) if qwen else (None, 0)
    return Config(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        mlp_dim=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads", 32 if qwen else None) or num_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
        max_seq_len=max_seq_len,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=True if qwen else hf.get("attention_bias", False),
        out_bias=False if qwen else hf.get("attention_bias", False),
        mlp_bias=False if qwen else hf.get("mlp_bias", False),
        window=window,
        first_window_layer=first_window_layer,
        model_type=kind,
        **(token_ids_from_hf(hf) if qwen else token_ids_from_hf(hf, bos=1, eos=2)),
    )


def _read_window(hf: Mapping[str, Any]) -> tuple[int | None, int]:
    """Qwen2's window holds from `max_window_layers` on, unless `layer_types` says otherwise."""
    types = hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", 28)
        window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    else:
        first = types.index("sliding_attention") if "sliding_attention" in types else len(types)
        window = hf.get("sliding_window", 4096)
        if "full_attention" in types[first:]:
            raise ValueError(f"layer_types {types}: a full layer after sliding ones is not Qwen2's")
    return (None, 0) if window is None or first >= hf["num_hidden_layers"] else (window, first)


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers reads back as the same model."""
    qwen = cfg.model_type == "qwen2"
    hf: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": cfg.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_dropout": 0.0,
        **write_rope(cfg.rope_base, cfg.rope_scaling, cfg.head_dim),
        **token_ids_to_hf(cfg.bos_id, cfg.eos_ids, cfg.pad_id),
    }
    if qwen:
        hf["use_sliding_window"] = cfg.window is not None
        hf["sliding_window"] = cfg.window
        hf["max_window_layers"] = cfg.num_layers if cfg.window is None else cfg.first_window_layer
    else:
        hf["attention_bias"] = cfg.qkv_bias
        hf["mlp_bias"] = cfg.mlp_bias
    return hf
