"""Strategies of config.json files and of Configs, over every field of every family.

`files(model_type)` are files that a user may have: fields absent, null or given, RoPE in each
spelling. `configs(cls)` are Configs as Python can make them, whether a file can hold them or not.
"""

import dataclasses
import functools
import typing
from typing import Any, Literal

from hypothesis import strategies as st

from llmprep_jax.config import field_types
from llmprep_jax.nn.param import Compute
from llmprep_jax.values import members

ids = st.integers(0, 63)
flags = st.booleans()
lists_of_ids = st.lists(ids, min_size=1, max_size=3)
sizes = st.sampled_from([1, 2, 4, 6, 64])
rates = st.sampled_from([0.0, 0.001, 0.3])
TOKEN_IDS = {
    "bos_token_id": st.none() | ids,
    "eos_token_id": st.none() | ids | lists_of_ids,
    "pad_token_id": st.none() | ids,
}
LLAMA = {
    "num_key_value_heads": st.sampled_from([None, 1, 2]),
    "head_dim": st.sampled_from([None, 4, 6, 8]),
    "max_position_embeddings": st.sampled_from([64, 128, 4096]),
    "rms_norm_eps": st.sampled_from([1e-5, 1e-6]),
    "tie_word_embeddings": flags,
    **TOKEN_IDS,
}
WINDOWS = {
    "use_sliding_window": flags,
    "sliding_window": st.sampled_from([None, 5, 4096]),
    "max_window_layers": st.integers(0, 6),
}
FULL, SLIDING = "full_attention", "sliding_attention"
BY_LAYER = st.none() | st.lists(st.sampled_from([SLIDING, FULL]), min_size=4, max_size=4)
DEEPSEEK = {
    **{name: values for name, values in LLAMA.items() if name != "head_dim"},
    "moe_intermediate_size": sizes,
    "n_routed_experts": st.just(8),
    "num_experts_per_tok": st.sampled_from([1, 2]),
    "n_shared_experts": st.integers(0, 2),
    "n_group": st.sampled_from([1, 2, 4]),
    "topk_group": st.just(1),
    "routed_scaling_factor": st.sampled_from([1.0, 2.5, 16]),
    "kv_lora_rank": sizes,
    "q_lora_rank": st.none() | sizes,
    "qk_nope_head_dim": sizes,
    "qk_rope_head_dim": st.sampled_from([4, 8]),
    "v_head_dim": sizes,
    "first_k_dense_replace": st.integers(0, 6),
    "moe_layer_freq": st.integers(1, 2),
    "aux_loss_alpha": rates,
}
OPTIONAL = {
    "llama": LLAMA | {"attention_bias": flags, "mlp_bias": flags},
    "qwen2": LLAMA | WINDOWS | {"layer_types": BY_LAYER},
    "qwen3": LLAMA | WINDOWS | {"layer_types": BY_LAYER, "attention_bias": flags},
    "mistral": LLAMA | {"sliding_window": st.sampled_from([None, 5, 4096])},
    "gemma3_text": {
        **LLAMA,
        "num_key_value_heads": st.sampled_from([1, 2]),
        "sliding_window": st.sampled_from([None, 5, 512]),
        "sliding_window_pattern": st.sampled_from([1, 2, 6]),
        "layer_types": BY_LAYER,
        "query_pre_attn_scalar": st.sampled_from([8, 168, 168.5]),
        "final_logit_softcapping": st.sampled_from([None, 30.0]),
    },
    "deepseek_v2": DEEPSEEK | {"topk_method": st.sampled_from(["greedy", "group_limited_greedy"])},
    "deepseek_v3": {
        **DEEPSEEK,
        "rope_interleave": flags,
        "norm_topk_prob": flags,
        "num_nextn_predict_layers": st.integers(0, 2),
    },
}
# composed models: the type of `text_config`, what stands beside it, and what may
_TOWER = {"image_size": 56, "patch_size": 14, "hidden_size": 24, "num_attention_heads": 2}
COMPOSED = {
    "gemma3": (
        "gemma3_text",
        {
            "mm_tokens_per_image": st.sampled_from([1, 4, 16]),
            "vision_config": st.just(_TOWER | {"vision_use_head": False}),
        },
        {"image_token_index": st.integers(1, 60)},
    ),
    "deepseek_vl": (
        "llama",
        {"vision_config": st.just(_TOWER)},
        {"image_token_id": st.integers(1, 60)},
    ),
    "deepseek_vl_hybrid": (
        "llama",
        {
            "vision_config": st.just(_TOWER),
            "high_res_vision_config": st.fixed_dictionaries(
                {"hidden_size": st.just(24), "num_attention_heads": st.just(2)},
                optional={
                    "num_hidden_layers": st.sampled_from([12, 13]),
                    "global_attn_indexes": st.sampled_from([[0], [3, 11]]),
                    "window_size": st.integers(2, 9),
                    "output_channels": st.integers(1, 9),
                    "mlp_ratio": st.sampled_from([2.0, 4.0]),
                    "mlp_dim": st.integers(8, 30),
                    "qkv_bias": flags,
                },
            ),
        },
        {"image_token_id": st.integers(1, 60)},
    ),
    "janus": (
        "llama",
        {
            "vision_config": st.fixed_dictionaries(
                {
                    "image_size": st.sampled_from([16, 32]),
                    "patch_size": st.just(4),
                    "projection_dim": st.just(24),
                    "hidden_size": st.just(24),
                    "num_attention_heads": st.just(2),
                },
                optional={"mlp_ratio": st.sampled_from([2.0, 3, 59 / 24]), "depth": st.just(2)},
            ),
            "vq_config": st.fixed_dictionaries(
                {
                    "channel_multiplier": st.sampled_from([[1, 1, 2], [2, 1, 1]]),
                    "projection_dim": st.just(24),
                    "image_token_embed_dim": st.just(24),
                },
                optional={
                    "base_channels": st.sampled_from([32, 64]),
                    "num_res_blocks": st.integers(1, 3),
                    "num_embeddings": st.integers(1, 9),
                    "embed_dim": st.integers(1, 9),
                    "latent_channels": st.integers(1, 9),
                    "num_patches": st.integers(1, 99),  # which nothing reads
                },
            ),
        },
        {"image_token_id": st.integers(1, 60)},
    ),
    "llava": (
        "llama",
        {"vision_config": st.just(_TOWER | {"model_type": "clip_vision_model"})},
        {
            "vision_feature_layer": st.sampled_from([-2, -1, 0, 5]),
            "vision_feature_select_strategy": st.sampled_from(["default", "full"]),
            "projector_hidden_act": st.sampled_from(["gelu", "silu"]),
            "multimodal_projector_bias": flags,
            "image_token_index": st.integers(1, 60),
        },
    ),
}
NEEDED = {
    "vocab_size": st.just(64),
    "hidden_size": st.just(24),
    "intermediate_size": sizes,
    "num_hidden_layers": st.just(4),
    "num_attention_heads": st.sampled_from([2, 4]),
}
# what would not go together by transformers' defaults
ALWAYS = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "qk_rope_head_dim")
ALWAYS += ("num_key_value_heads",)

temperatures = st.sampled_from([None, 0.0, 0.707, 1.0])
RATIO = st.sampled_from([2.0, 4, 40.0])
contexts = st.sampled_from([32, 64])
KINDS = {
    "default": {},
    "linear": {"factor": RATIO},
    "llama3": {
        "factor": RATIO,
        "original_max_position_embeddings": contexts,
        "low_freq_factor": st.sampled_from([1.0, 2.0]),
        "high_freq_factor": st.sampled_from([4.0, 8.0]),
    },
    "yarn": {"factor": RATIO},
}
MORE_OF_YARN = {
    "original_max_position_embeddings": contexts,
    "beta_fast": st.sampled_from([None, 0, 16.0, 32]),
    "beta_slow": st.sampled_from([None, 1, 2.0]),
    "attention_factor": st.sampled_from([None, 1.25]),
    "truncate": flags,
    "mscale": temperatures,
    "mscale_all_dim": temperatures,
}
bases = st.sampled_from([5e3, 10_000, 1e6])


@functools.cache
def scalings(kind: str | None = None) -> st.SearchStrategy[dict[str, Any]]:
    """`rope_scaling` or a part of `rope_parameters`."""
    if kind is None:
        return st.one_of(*map(scalings, KINDS))
    more = MORE_OF_YARN if kind == "yarn" else {}
    more = more | ({"mscale_all_dim": temperatures} if kind == "linear" else {})
    return st.builds(
        lambda name, fields, base: {name: kind, **fields, **base},
        st.sampled_from(["rope_type", "type"]),
        st.fixed_dictionaries(KINDS[kind], optional=more),
        st.fixed_dictionaries({}, optional={"rope_theta": bases}),
    )


def ropes(model_type: str) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of RoPE, in either spelling or both."""
    new = scalings()
    beside = {"rope_theta": bases, "rope_scaling": st.none() | scalings()}
    if model_type.startswith("gemma3"):
        kinds = {FULL: new, SLIDING: scalings("default")}
        new = st.fixed_dictionaries({}, optional=kinds)
        beside["rope_local_base_freq"] = bases
    else:
        beside["original_max_position_embeddings"] = contexts
    return st.fixed_dictionaries({}, optional={**beside, "rope_parameters": st.none() | new})


@functools.cache
def files(model_type: str) -> st.SearchStrategy[dict[str, Any]]:
    """A config.json."""
    if model_type in COMPOSED:
        text_type, beside, more = COMPOSED[model_type]
        more = more | TOKEN_IDS | {"tie_word_embeddings": flags}
        return st.builds(
            lambda text, rest: {"model_type": model_type, "text_config": text} | rest,
            files(text_type),
            st.fixed_dictionaries(beside, optional=more),
        )
    optional = OPTIONAL[model_type]
    needed = {name: optional[name] for name in ALWAYS if name in optional}
    rest = {name: value for name, value in optional.items() if name not in needed}
    fields = st.builds(
        lambda plain, rope: plain | rope,
        st.fixed_dictionaries(NEEDED | needed, optional=rest),
        ropes(model_type),
    )
    kind = {"model_type": model_type}
    return fields.map(lambda fields: kind | fields)


# what a number of a Config may be, so that most configs make sense together
NUMBERS = {
    "num_heads": st.just(4),
    "num_kv_heads": st.sampled_from([2, 4]),
    "head_dim": st.sampled_from([4, 8]),
    "rope_dim": st.sampled_from([4, 8]),
    "num_layers": st.just(4),
    "num_experts": st.just(8),
    "num_active": st.integers(1, 2),
    "num_groups": st.sampled_from([1, 2]),
    "num_active_groups": st.just(1),
    "original_max_seq_len": contexts,
    "first_window_layer": st.integers(0, 3),
    "has_window": st.none() | st.lists(flags, min_size=4, max_size=4).map(tuple),
    "is_local": st.none() | st.lists(flags, min_size=4, max_size=4).map(tuple),
}


@functools.cache
def configs(cls: type, model_types: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """A Config, each of its fields drawn by its declared type."""
    fields = {}
    for name, kind in field_types(cls).items():
        values = st.sampled_from(model_types) if name == "model_type" else NUMBERS.get(name)
        values = st.just(Compute()) if kind is Compute else values
        fields[name] = values if values is not None else _of(kind)
    return st.builds(cls, **fields)


def _of(kind: Any) -> st.SearchStrategy:
    options = []
    for member in members(kind):
        if dataclasses.is_dataclass(member):
            options.append(configs(member, ("",)))
        elif typing.get_origin(member) is Literal:
            options.append(st.sampled_from(typing.get_args(member)))
        elif typing.get_origin(member) is tuple:
            options.append(st.lists(ids, max_size=2).map(tuple))
        else:
            plain = {bool: flags, int: st.integers(1, 3), float: st.sampled_from([0.5, 2.0])}
            plain |= {type(None): st.none(), str: st.sampled_from(["ring", "emulated"])}
            options.append(plain[member])
    return st.one_of(options)
