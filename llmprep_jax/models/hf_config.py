"""What every family's `from_hf` and `to_hf` share: RoPE fields, token ids, and refusals.

Hugging Face wrote RoPE as `rope_theta` + `rope_scaling` up to transformers 4 and as
`rope_parameters` from 5 on; both are read, and both are written so that either reads us. The one
thing a reader would get wrong: `type` is an old alias of `rope_type`.
"""

import math
from collections.abc import Mapping
from typing import Any

from llmprep_jax.nn.rope import RopeScaling


def require(hf: Mapping[str, Any], *names: str) -> None:
    """Raises ValueError naming the fields of config.json that are missing or not whole numbers."""
    missing = [name for name in names if name not in hf]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}; it is not a whole config")
    odd = [f"{name}={hf[name]!r}" for name in names if not _is_size(hf[name])]
    if odd:
        raise ValueError(f"config.json has {', '.join(odd)}; these must be positive whole numbers")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_numbers(cfg: Any) -> None:
    """Raises ValueError naming a number of a family's Config that no model has.

    The bounds keep what follows from computing with nonsense: shapes multiply sizes, and layers are
    counted one by one.
    """
    sizes = ("vocab_size", "dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "window")
    sizes += ("expert_dim", "q_rank", "kv_rank", "nope_dim", "rope_dim", "value_dim", "moe_every")
    most = dict.fromkeys(sizes, 2**24) | {"num_layers": 10_000, "max_seq_len": 2**31 - 1}
    least = dict.fromkeys(most, 1) | dict.fromkeys(("rope_base", "norm_eps", "query_scale"), 0)
    most |= {"num_shared": 1_000, "num_dense": 10_000, "num_mtp": 100, "num_experts": 10_000}
    least |= {"num_shared": 0, "num_dense": 0, "num_mtp": 0, "num_experts": 1}
    for name, bound in least.items():
        value = getattr(cfg, name, getattr(getattr(cfg, "routing", None), name, None))
        if value is not None and not bound <= value <= most.get(name, math.inf):
            raise ValueError(f"config.json gives {name} as {value}, which no model has; check it")


def refuse_unsupported(hf: Mapping[str, Any], **allowed: tuple) -> None:
    """Raises ValueError when a field that changes results has a value that is not computed here."""
    for name, values in allowed.items():
        if name in hf and hf[name] not in values:
            raise ValueError(
                f"config.json has {name}={hf[name]!r}; supported: {', '.join(map(repr, values))}"
            )
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"config.json describes weights quantised by {method!r}; load the original ones"
        )


def read_rope(
    hf: Mapping[str, Any], max_seq_len: int, default_base: float = 10_000.0
) -> tuple[float, RopeScaling | None]:
    """The RoPE base and scaling of a config.json, from either spelling."""
    new = hf.get("rope_parameters") or {}
    old = hf.get("rope_scaling") or {}
    bases = (new.get("rope_theta"), hf.get("rope_theta"), old.get("rope_theta"), default_base)
    base = next(base for base in bases if base)
    return float(base), read_scaling(new or old, max_seq_len)


def read_scaling(fields: Mapping[str, Any], max_seq_len: int) -> RopeScaling | None:
    """A `RopeScaling` from `rope_scaling`'s or `rope_parameters`' fields; None for plain RoPE."""
    refuse_unsupported(fields, partial_rotary_factor=(None, 1.0))
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "ntk", "llama3", "yarn"):
        raise ValueError(
            f"config.json asks for RoPE scaling {kind!r}; supported: linear, ntk, llama3, yarn"
        )
    optional = {
        "low_freq_factor": fields.get("low_freq_factor"),
        "high_freq_factor": fields.get("high_freq_factor"),
        "beta_fast": fields.get("beta_fast"),
        "beta_slow": fields.get("beta_slow"),
        "attention_factor": fields.get("attention_factor"),
        "mscale": fields.get("mscale"),
        "mscale_all_dim": fields.get("mscale_all_dim"),
        "truncate": fields.get("truncate"),
    }
    return RopeScaling(
        kind=kind,
        factor=float(fields["factor"]),
        original_max_seq_len=fields.get("original_max_position_embeddings") or max_seq_len,
        **{name: value for name, value in optional.items() if value is not None},
    )


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `read_scaling`."""
    if scaling is None:
        return {"rope_type": "default"}
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = scaling.original_max_seq_len
    if scaling.kind == "llama3":
        fields["low_freq_factor"] = scaling.low_freq_factor
        fields["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        fields |= {"truncate": scaling.truncate}
        if scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
        if scaling.mscale:
            fields |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return fields


def write_rope(base: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """RoPE in both spellings."""
    fields = write_scaling(scaling)
    return {
        "rope_theta": base,
        "rope_scaling": None if scaling is None else fields,
        "rope_parameters": {**fields, "rope_theta": base},
    }


def token_ids_from_hf(hf: Mapping[str, Any]) -> dict[str, Any]:
    """bos_id, eos_ids and pad_id as keyword arguments of a Config."""
    eos = hf.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    return {"bos_id": hf.get("bos_token_id"), "eos_ids": eos_ids, "pad_id": hf.get("pad_token_id")}


def token_ids_to_hf(
    bos_id: int | None, eos_ids: tuple[int, ...], pad_id: int | None
) -> dict[str, Any]:
    """The inverse of `token_ids_from_hf`."""
    eos = None if not eos_ids else eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    return {"bos_token_id": bos_id, "eos_token_id": eos, "pad_token_id": pad_id}
