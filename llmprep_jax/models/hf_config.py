"""What every family's `from_hf` and `to_hf` share: RoPE fields, token ids, and refusals.

Hugging Face wrote RoPE as `rope_theta` + `rope_scaling` up to transformers 4 and as
`rope_parameters` from 5 on; both are read, and both are written so that either reads us. `type` is
an old alias of `rope_type`.
"""

import dataclasses
import math
import warnings
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


def check_numbers(cfg: Any, path: str = "") -> None:
    """Raises ValueError naming a number of a family's Config, or of a part, that no model has.

    The bounds keep what follows from computing with nonsense: shapes multiply sizes, and layers are
    counted one by one.
    """
    sizes = ("vocab_size", "dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "window")
    sizes += ("expert_dim", "q_rank", "kv_rank", "nope_dim", "rope_dim", "value_dim", "moe_every")
    sizes += ("projection_dim",)
    most = dict.fromkeys(sizes, 2**24) | {"num_layers": 10_000, "max_seq_len": 2**31 - 1}
    most |= {"image_size": 2**14, "patch_size": 2**14}
    most |= {"num_codes": 2**24, "code_dim": 2**14, "latent_dim": 2**14, "base_dim": 2**14}
    most |= {"num_blocks": 100}
    least = dict.fromkeys(most, 1) | {"rope_base": 0, "norm_eps": 0}
    least |= {"query_scale": 1e-6}  # what scores are divided by the root of
    most |= {"num_shared": 1_000, "num_dense": 10_000, "num_mtp": 100, "num_experts": 10_000}
    least |= {"num_shared": 0, "num_dense": 0, "num_mtp": 0, "num_experts": 1}
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{path}{name}.")
        if value is None or name not in least:
            continue
        if not least[name] <= value <= most.get(name, math.inf):
            raise ValueError(
                f"config.json gives {path}{name} as {value}, which no model has; check it"
            )


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
    """The RoPE base and scaling of a config.json, from either spelling.

    As in transformers 5, `rope_scaling` takes the place of `rope_parameters` as a whole, and the
    base is the `rope_theta` inside the one that counts, else the one beside it.
    """
    refuse_unsupported(hf, partial_rotary_factor=(None, 1.0))
    new, old = (rope_fields(hf, name) for name in ("rope_parameters", "rope_scaling"))
    fields = old or new
    by_layer = [name for name, value in fields.items() if isinstance(value, Mapping)]
    if by_layer:
        raise ValueError(f"config.json has RoPE by kind of layer ({', '.join(by_layer)}); give one")
    base = fields.get("rope_theta") or hf.get("rope_theta") or default_base
    replaced = new.get("rope_theta")
    if old and replaced and replaced != base:
        warnings.warn(
            "config.json has a rope_scaling, which takes the place of rope_parameters and of the"
            f" rope_theta {replaced} in it: the base is {base}, as in transformers; give rope_theta"
            " in rope_scaling if another is meant",
            stacklevel=2,
        )
    # what stands beside both counts for more, in transformers too
    original = hf.get("original_max_position_embeddings")
    if original is not None:
        fields["original_max_position_embeddings"] = original
    return float(base), read_scaling(fields, max_seq_len)


def rope_fields(hf: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of `rope_scaling`, `rope_parameters` or a part of it; null is as good as absent."""
    fields = hf.get(name) or {}
    if not isinstance(fields, Mapping):
        raise ValueError(f"config.json has {name}={fields!r}; it must hold RoPE fields by name")
    return dict(fields)


# fields that a kind of scaling uses
_SCALING_FIELDS = {
    "linear": (),
    "ntk": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "truncate"),
}
# the softmax of latent attention uses these whatever the kind
_TEMPERATURES = ("mscale", "mscale_all_dim")
_ORIGINAL = "original_max_position_embeddings"


def rope_kind(fields: Mapping[str, Any]) -> str:
    """The kind of scaling, by its new name or its old one."""
    return fields.get("rope_type") or fields.get("type") or "default"


def read_scaling(fields: Mapping[str, Any], max_seq_len: int) -> RopeScaling | None:
    """A `RopeScaling` from `rope_scaling`'s or `rope_parameters`' fields; None for plain RoPE."""
    refuse_unsupported(fields, partial_rotary_factor=(None, 1.0))
    kind = rope_kind(fields)
    if kind == "default":
        return None
    if kind not in _SCALING_FIELDS:
        raise ValueError(
            f"config.json asks for RoPE scaling {kind!r}; supported: {', '.join(_SCALING_FIELDS)}"
        )
    has_context = kind in ("llama3", "yarn")
    original = (fields.get(_ORIGINAL) or max_seq_len) if has_context else max_seq_len
    if not _is_size(original):
        raise ValueError(f"config.json has {_ORIGINAL}={original!r}; it must be a positive number")
    factor = fields.get("factor")
    if factor is None and kind == "yarn" and "factor" in fields:
        factor = max_seq_len / original  # what null means to transformers
    if not _is_number(factor) or not factor > 0:
        given = "no factor" if factor is None else f"the factor {factor!r}"
        raise ValueError(
            f"config.json asks for RoPE scaling {kind!r} with {given}; say by how many times the"
            ' context grows, e.g. "factor": 4.0'
        )
    if kind == "yarn" and fields.get("attn_factor") is not None:
        warnings.warn(
            f"config.json has attn_factor={fields['attn_factor']!r}, which transformers does not"
            " read, and so it is not here: yarn's own factor of cos and sin counts, which vLLM and"
            " llama.cpp multiply by it; give their product as attention_factor if that is meant",
            stacklevel=2,
        )
    own = {name: fields.get(name) for name in (*_SCALING_FIELDS[kind], *_TEMPERATURES)}
    # yarn's borders of 0 turns are its defaults too
    given = {name: x for name, x in own.items() if x is not None and (x or "beta" not in name)}
    given = {name: float(x) if _is_number(x) else x for name, x in given.items()}
    return RopeScaling(kind, float(factor), original, **given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `read_scaling`."""
    if scaling is None:
        return {"rope_type": "default"}
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        fields[_ORIGINAL] = scaling.original_max_seq_len
    own = {name: getattr(scaling, name) for name in _SCALING_FIELDS[scaling.kind]}
    fields |= {name: value for name, value in own.items() if value is not None}
    temperatures = {name: getattr(scaling, name) for name in _TEMPERATURES}
    return fields | {name: value for name, value in temperatures.items() if value}


def write_rope(base: float, scaling: RopeScaling | None, head_dim: int) -> dict[str, Any]:
    """RoPE in both spellings.

    Args:
      head_dim: of the part of a head that is rotated.
    """
    base, scaling = released_rope(base, scaling, head_dim)
    fields = write_scaling(scaling)
    return {
        "rope_theta": base,
        "rope_scaling": None if scaling is None else fields,
        "rope_parameters": {**fields, "rope_theta": base},
    }


def released_rope(
    base: float, scaling: RopeScaling | None, head_dim: int
) -> tuple[float, RopeScaling | None]:
    """Base and scaling that transformers has names for: NTK's scaling is a larger base."""
    if scaling is None or scaling.kind != "ntk":
        return base, scaling
    return base * scaling.factor ** (head_dim / (head_dim - 2)), None


def token_ids_from_hf(
    hf: Mapping[str, Any], *, bos: int | None = None, eos: int | None = None
) -> dict[str, Any]:
    """bos_id, eos_ids and pad_id as keyword arguments of a Config.

    Args:
      bos, eos: of transformers' class, which hold where a file leaves them out; null is none.
    """
    eos = hf.get("eos_token_id", eos)
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    bos = hf.get("bos_token_id", bos)
    return {"bos_id": bos, "eos_ids": eos_ids, "pad_id": hf.get("pad_token_id")}


def token_ids_to_hf(
    bos_id: int | None, eos_ids: tuple[int, ...], pad_id: int | None
) -> dict[str, Any]:
    """The inverse of `token_ids_from_hf`."""
    eos = None if not eos_ids else eos_ids[0] if len(eos_ids) == 1 else list(eos_ids)
    return {"bos_token_id": bos_id, "eos_token_id": eos, "pad_token_id": pad_id}
