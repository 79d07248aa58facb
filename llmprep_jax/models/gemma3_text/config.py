"""Shapes of Gemma 3's text models (Gemma 3 technical report 2025, section 2): 270M to 27B.

Hub files omit most fields, so the defaults in `from_hf` decide; they are transformers'. The window
is 512 for 270M and 1B and 1024 above, and 27B scales its scores by 168^-0.5, which is neither its
head width nor what the other sizes do.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.models.hf_config import (
    read_scaling,
    refuse_unsupported,
    released_rope,
    require,
    rope_fields,
    rope_kind,
    token_ids_from_hf,
    token_ids_to_hf,
    write_scaling,
)
from llmprep_jax.models.model_config import UNSAVED, LanguageConfig
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """One Gemma 3 text model.

    Attributes:
      rope_base, rope_scaling: of the global layers. rope_local_base: of the local ones, never
        scaled.
      query_scale: the scores are multiplied by query_scale^-0.5 (Hugging Face's
        query_pre_attn_scalar).
      window: tokens that a local layer sees, the query included.
      global_every: layer i is global when (i + 1) % global_every == 0.
      is_local: says so layer by layer instead, if given.
      logits_soft_cap: tanh cap of the logits, None in every release.
    """

    vocab_size: int
    dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 256
    max_seq_len: int = 131072
    rope_base: float = 1_000_000.0
    rope_scaling: RopeScaling | None = None
    rope_local_base: float = 10_000.0
    query_scale: float = 256.0
    window: int = 512
    global_every: int = 6
    # `layer_types` say which layers are local, and `local_layers` again when it is read
    is_local: tuple[bool, ...] | None = dataclasses.field(default=None, metadata=UNSAVED)
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    logits_soft_cap: float | None = None
    bos_id: int | None = 2
    eos_ids: tuple[int, ...] = (1,)
    pad_id: int | None = 0
    model_type: str = "gemma3_text"
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) is no multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.is_local is not None and len(self.is_local) != self.num_layers:
            raise ValueError(f"is_local has {len(self.is_local)} of {self.num_layers} layers")

    def local_layers(self) -> tuple[bool, ...]:
        """For each layer, whether it is a sliding-window one."""
        if self.is_local is not None:
            return self.is_local
        return tuple((layer + 1) % self.global_every != 0 for layer in range(self.num_layers))


_DEFAULTS = dict(
    vocab_size=262208,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=131072,
    sliding_window=4096,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
)


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a config.json of model_type gemma3_text.

    Args:
      names: of the checkpoint's tensors, which say nothing more here.

    Raises:
      ValueError: a field asks for something that this family does not compute.
    """
    # of token ids null has a meaning: there is none
    ids = {name: value for name, value in hf.items() if name.endswith("_token_id")}
    given = {name: value for name, value in hf.items() if value is not None}
    hf = {**_DEFAULTS, **given, **ids}
    refuse_unsupported(
        hf,
        hidden_activation=("gelu_pytorch_tanh",),
        attention_bias=(False,),
        use_bidirectional_attention=(False,),
    )
    require(hf, *[name for name in list(_DEFAULTS)[:8]], "sliding_window")
    base, scaling, local_base = _read_rope(hf)
    kinds = hf.get("layer_types")
    unknown = set(kinds or ()) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"config.json has layer_types {sorted(unknown)}, which Gemma 3 has not")
    every = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    return Config(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        mlp_dim=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf["head_dim"],
        max_seq_len=hf["max_position_embeddings"],
        rope_base=base,
        rope_scaling=scaling,
        rope_local_base=local_base,
        query_scale=float(hf["query_pre_attn_scalar"]),
        window=hf["sliding_window"],
        global_every=every,
        is_local=_unlike_the_pattern(kinds, every, hf["num_hidden_layers"]),
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf["tie_word_embeddings"],
        logits_soft_cap=hf.get("final_logit_softcapping"),
        **token_ids_from_hf(hf),
    )


def _unlike_the_pattern(
    kinds: Sequence[str] | None, every: int, num_layers: int
) -> tuple[bool, ...] | None:
    """Which layers are local, where that is not as every `every`-th one being global."""
    is_local = None if kinds is None else tuple(kind == "sliding_attention" for kind in kinds)
    if is_local is None or len(is_local) != num_layers:  # too many, or few, are refused later
        return is_local
    pattern = tuple((layer + 1) % every != 0 for layer in range(num_layers))
    return None if is_local == pattern else is_local


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float]:
    """(global base, global scaling, local base) from either spelling.

    As in transformers 5, `rope_scaling` overrides what `rope_parameters` say of global layers,
    field by field, and the bases beside them are for those that have none.
    """
    refuse_unsupported(hf, partial_rotary_factor=(None, 1.0))
    by_kind, old = (rope_fields(hf, name) for name in ("rope_parameters", "rope_scaling"))
    full, local = (rope_fields(by_kind, name) for name in ("full_attention", "sliding_attention"))
    flat = set(by_kind) - {"full_attention", "sliding_attention"}
    if flat:
        raise ValueError(
            f"config.json has {', '.join(sorted(map(str, flat)))} in rope_parameters, which are by"
            " kind of layer in Gemma 3: full_attention and sliding_attention"
        )
    if old:
        full |= old | {"rope_type": rope_kind(old)}
    max_seq_len = hf["max_position_embeddings"]
    if read_scaling(local, max_seq_len) is not None:
        raise ValueError(f"config.json scales the RoPE of local layers ({local}); Gemma 3 none")
    base = full.get("rope_theta") or hf.get("rope_theta") or 1e6
    local_base = local.get("rope_theta") or hf.get("rope_local_base_freq") or 1e4
    return float(base), read_scaling(full, max_seq_len), float(local_base)


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json of the text model, as transformers' Gemma3ForCausalLM reads it."""
    kinds = ["sliding_attention" if local else "full_attention" for local in cfg.local_layers()]
    base, scaling = released_rope(cfg.rope_base, cfg.rope_scaling, cfg.head_dim)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "sliding_window": cfg.window,
        "sliding_window_pattern": cfg.global_every,
        "layer_types": kinds,
        "query_pre_attn_scalar": _whole(cfg.query_scale),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": cfg.logits_soft_cap,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": base,
        "rope_local_base_freq": cfg.rope_local_base,
        "rope_scaling": None if scaling is None else write_scaling(scaling),
        "rope_parameters": {
            "full_attention": {**write_scaling(scaling), "rope_theta": base},
            "sliding_attention": {"rope_type": "default", "rope_theta": cfg.rope_local_base},
        },
        **token_ids_to_hf(cfg.bos_id, cfg.eos_ids, cfg.pad_id),
    }


def _whole(number: float) -> int | float:
    """A whole number as such: transformers takes no other where it is one."""
    return int(number) if number == int(number) else number


_LONG = dict(window=1024, vocab_size=262208, rope_scaling=RopeScaling("linear", 8.0, 131072))

PRESETS: dict[str, Config] = {
    "gemma3-270m": Config(262144, 640, 2048, 18, 4, 1, max_seq_len=32768),
    "gemma3-1b": Config(262144, 1152, 6912, 26, 4, 1, max_seq_len=32768),
    "gemma3-4b": Config(
        dim=2560, mlp_dim=10240, num_layers=34, num_heads=8, num_kv_heads=4, **_LONG
    ),
    "gemma3-12b": Config(
        dim=3840, mlp_dim=15360, num_layers=48, num_heads=16, num_kv_heads=8, **_LONG
    ),
    "gemma3-27b": Config(
        dim=5376,
        mlp_dim=21504,
        num_layers=62,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        query_scale=168.0,
        **_LONG,
    ),
}
