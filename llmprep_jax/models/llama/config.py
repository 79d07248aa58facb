"""Shapes of Llama 2/3.x, SmolLM2, Qwen2/2.5/3, Mistral, DeepSeek-LLM and the DeepSeek-R1 distills.

One architecture, a few switches: Qwen2 has biases on queries, keys and values, Qwen3 norms of each
head's queries and keys, Mistral a window on all layers or on none, small models tie their
embeddings, Llama 3.1 and later scale RoPE. Hugging Face's field names occur in `from_hf` and
`to_hf` only. The R1 distill of Qwen-1.5B is not tied although its base model is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
      qk_norm: whether each head's queries and keys are normed before they are rotated.
      window: sliding window of the layers from `first_window_layer` on; None: no layer has one.
      has_window: says layer by layer which have it, where these are not the last ones.
      bos_id, eos_ids, pad_id: token ids that the checkpoint's config states; for generation and
        export.
      model_type: how Hugging Face calls the architecture: "llama", "qwen2", "qwen3" or "mistral".
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
    qk_norm: bool = False
    window: int | None = None
    first_window_layer: int = 0
    has_window: tuple[bool, ...] | None = None
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
        if self.model_type not in _KINDS:
            kinds = ", ".join(_KINDS)
            raise ValueError(f"model_type is {self.model_type!r}; this family has {kinds}")
        if self.has_window is None:
            return
        if len(self.has_window) != self.num_layers:
            raise ValueError(f"has_window has {len(self.has_window)} of {self.num_layers} layers")
        first = _first_of_the_last(self.has_window)
        if self.window is None or self.first_window_layer or first is not None:
            raise ValueError(
                f"has_window is {self.has_window} beside window={self.window} and"
                f" first_window_layer={self.first_window_layer}; it is for layers with a window"
                " that are not all those from some first one on"
            )

    def windows(self) -> tuple[int | None, ...]:
        """For each layer, its sliding window, or None."""
        has_window = self.has_window
        if has_window is None:
            has_window = [layer >= self.first_window_layer for layer in range(self.num_layers)]
        return tuple(self.window if has else None for has in has_window)


class _Kind(NamedTuple):
    """What transformers' class of a model type has where a file leaves a field out."""

    architecture: str
    max_seq_len: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = 4096
    bos_id: int | None = None
    eos_id: int | None = None


_KINDS = {
    "llama": _Kind("LlamaForCausalLM", 2048, window=None, bos_id=1, eos_id=2),
    "qwen2": _Kind("Qwen2ForCausalLM", 32768, num_kv_heads=32),
    "qwen3": _Kind("Qwen3ForCausalLM", 32768, num_kv_heads=32, head_dim=128),
    "mistral": _Kind("MistralForCausalLM", 131072, num_kv_heads=8, bos_id=1, eos_id=2),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a Hugging Face config.json of one of the family's model types.

    Args:
      names: of the checkpoint's tensors, which say nothing more here.

    Raises:
      ValueError: a field is missing, or asks for something that this family does not compute.
    """
    name = hf["model_type"]
    kind = _KINDS[name]
    refuse_unsupported(hf, hidden_act=("silu",), pretraining_tp=(1, None))
    require(
        hf,
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    num_heads = hf["num_attention_heads"]
    max_seq_len = hf.get("max_position_embeddings") or kind.max_seq_len
    rope_base, rope_scaling = read_rope(hf, max_seq_len)
    bias = name in ("llama", "qwen3") and hf.get("attention_bias", False)
    return Config(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        mlp_dim=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads", kind.num_kv_heads) or num_heads,
        head_dim=hf.get("head_dim", kind.head_dim) or hf["hidden_size"] // num_heads,
        max_seq_len=max_seq_len,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=name == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=name == "llama" and hf.get("mlp_bias", False),
        qk_norm=name == "qwen3",
        model_type=name,
        **_read_window(hf, kind.window),
        **token_ids_from_hf(hf, bos=kind.bos_id, eos=kind.eos_id),
    )


def _read_window(hf: Mapping[str, Any], default: int | None) -> dict[str, Any]:
    """`window`, `first_window_layer` and `has_window` of a Config, of what is not their default.

    Mistral's holds in all layers; Qwen's from `max_window_layers` on, unless `layer_types` say
    otherwise, and only where `use_sliding_window` does.
    """
    name, num_layers = hf["model_type"], hf["num_hidden_layers"]
    if name == "llama":
        return {}
    window = hf.get("sliding_window", default)
    if name == "mistral":  # with layers of two kinds transformers makes a Ministral of it
        refuse_unsupported(hf, layer_types=(None,))
        return {"window": window}
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        is_given = window is not None and hf.get("use_sliding_window") and first < num_layers
        return {"window": window, "first_window_layer": first} if is_given else {}
    unknown = sorted(set(kinds) - {_FULL, _SLIDING})
    if unknown or len(kinds) != num_layers:
        raise ValueError(
            f"config.json has layer_types {kinds} of {num_layers} layers; each must be"
            f" {_FULL!r} or {_SLIDING!r}"
        )
    has_window = tuple(kind == _SLIDING for kind in kinds)
    if window is None or not any(has_window):
        return {}
    first = _first_of_the_last(has_window)
    where = {"has_window": has_window} if first is None else {"first_window_layer": first}
    return {"window": window, **where}


def _first_of_the_last(has_window: Sequence[bool]) -> int | None:
    """The layer from which on all have a window and none before; None: that is not how they lie."""
    first = len(has_window) - sum(has_window)
    return first if all(has_window[first:]) else None


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers reads back as the same model."""
    hf: dict[str, Any] = {
        "architectures": [_KINDS[cfg.model_type].architecture],
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
    if cfg.model_type in ("llama", "qwen3"):
        hf["attention_bias"] = cfg.qkv_bias
    if cfg.model_type == "llama":
        hf["mlp_bias"] = cfg.mlp_bias
    else:
        hf["sliding_window"] = cfg.window
    if cfg.model_type in ("qwen2", "qwen3"):
        hf["use_sliding_window"] = cfg.window is not None
        hf["max_window_layers"] = cfg.num_layers if cfg.window is None else cfg.first_window_layer
        if cfg.has_window is not None:
            hf["layer_types"] = [_SLIDING if has else _FULL for has in cfg.has_window]
    return hf
