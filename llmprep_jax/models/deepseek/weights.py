"""Names of DeepSeek-V2's and V3's tensors in Hugging Face checkpoints.

Layers with and without experts are two stacks, so the table lists which numbers each holds; experts
are stored one by one and stacked here, and in transformers' memory are two parameters a layer. A
multi-token prediction module is stored as one more layer, with copies of the embedding and the head
that are the main model's.
"""

from collections.abc import Mapping, Sequence

from llmprep_jax.models.deepseek.config import Config
from llmprep_jax.weights.rows import Row, Table

_ATTENTION = {
    "attn_norm.scale": ("input_layernorm.weight", "d -> d"),
    "attn.q_a.w": ("self_attn.q_a_proj.weight", "q d -> d q"),
    "attn.q_norm.scale": ("self_attn.q_a_layernorm.weight", "q -> q"),
    "attn.q_b.w": ("self_attn.q_b_proj.weight", "(n h) q -> q n h"),
    "attn.kv_a.w": ("self_attn.kv_a_proj_with_mqa.weight", "c d -> d c"),
    "attn.kv_norm.scale": ("self_attn.kv_a_layernorm.weight", "c -> c"),
    "attn.kv_b.w": ("self_attn.kv_b_proj.weight", "(n h) c -> c n h"),
    "attn.o.w": ("self_attn.o_proj.weight", "d (n h) -> n h d"),
    "mlp_norm.scale": ("post_attention_layernorm.weight", "d -> d"),
}
_HEADS = {  # of plain multi-head attention
    "attn_norm.scale": ("input_layernorm.weight", "d -> d"),
    "attn.q.w": ("self_attn.q_proj.weight", "(n h) d -> d n h"),
    "attn.k.w": ("self_attn.k_proj.weight", "(n h) d -> d n h"),
    "attn.v.w": ("self_attn.v_proj.weight", "(n h) d -> d n h"),
    "attn.o.w": ("self_attn.o_proj.weight", "d (n h) -> n h d"),
    "mlp_norm.scale": ("post_attention_layernorm.weight", "d -> d"),
}
_MLP = {
    "gate.w": ("gate_proj.weight", "f d -> d f"),
    "up.w": ("up_proj.weight", "f d -> d f"),
    "down.w": ("down_proj.weight", "d f -> f d"),
}


_EXPERTS = {  # in memory a layer's are two parameters, of which the first is gate and then up
    "gate.w": Row(
        "{e}.gate_proj.weight", "f d -> d f", module=Row("gate_up_proj", "e f d -> e d f", (0, 2))
    ),
    "up.w": Row(
        "{e}.up_proj.weight", "f d -> d f", module=Row("gate_up_proj", "e f d -> e d f", (1, 2))
    ),
    "down.w": Row("{e}.down_proj.weight", "d f -> f d", module=Row("down_proj", "e d f -> e f d")),
}


def _below(path: str, name: str, rows: Mapping[str, tuple]) -> Mapping[str, Row]:
    return Table(rows).below(path, f"{name}.")


_DENSE = dict(_below("mlp", "mlp", _MLP))
_MOE = {
    "mlp.router.w": ("mlp.gate.weight", "e d -> d e"),
    "mlp.router.bias": ("mlp.gate.e_score_correction_bias", "e -> e"),
    **_below("mlp.experts", "mlp.experts", _EXPERTS),
    **_below("mlp.shared", "mlp.shared_experts", _MLP),
}
_MTP = {
    "embed_norm.scale": ("enorm.weight", "d -> d"),
    "hidden_norm.scale": ("hnorm.weight", "d -> d"),
    "proj.w": ("eh_proj.weight", "d i -> i d"),
    "norm.scale": ("shared_head.norm.weight", "d -> d"),
}


def table(cfg: Config) -> Table:
    """The table of a model with these layers."""
    layers = range(cfg.num_layers)
    dense = [layer for layer in layers if not cfg.is_moe[layer]]
    moe = [layer for layer in layers if cfg.is_moe[layer]]
    mtp = range(cfg.num_layers, cfg.num_layers + cfg.num_mtp)
    attention = _attention(cfg)
    rows = {
        "embed.w": ("model.embed_tokens.weight", "v d -> v d"),
        **(_below("dense_layers", _layer(dense), attention | _DENSE) if dense else {}),
        **_below("moe_layers", _layer(moe), attention | _MOE),
        **(_below("mtp", _layer(mtp), _MTP) if mtp else {}),
        **(_below("mtp.block", _layer(mtp), attention | _MOE) if mtp else {}),
        "norm.scale": ("model.norm.weight", "d -> d"),
        "head.w": ("lm_head.weight", "v d -> d v"),
    }
    return Table(rows, ignored=ignored(cfg), copies=copies(cfg), finds_prefix=True)


def _attention(cfg: Config) -> dict[str, tuple[str, str]]:
    if cfg.attention == "heads":
        return _HEADS
    without_q_rank = {"attn.q_b.w": ("self_attn.q_proj.weight", "(n h) d -> d n h")}
    return _ATTENTION | (without_q_rank if cfg.q_rank is None else {})


def _layer(numbers: Sequence[int]) -> str:
    return f"model.layers.{{l:{','.join(map(str, numbers))}}}"


def ignored(cfg: Config) -> tuple[str, ...]:
    """Regexes of tensors that the model does without: copies, and modules that it has not."""
    own_layers = range(cfg.num_layers, cfg.num_layers + cfg.num_mtp)
    others = range(own_layers.stop, own_layers.stop + 8)
    layers = {layer: r"(embed_tokens|shared_head\.head)\.weight$" for layer in own_layers}
    layers |= dict.fromkeys(others, "")
    # transformers stores shared experts of no width where there are none
    none = () if cfg.num_shared else (r"\.mlp\.shared_experts\.",)
    return (*(rf"^model\.layers\.{layer}\.{rest}" for layer, rest in layers.items()), *none)


def copies(cfg: Config) -> dict[str, str]:
    """For tensors that a file holds twice, the name of the copy: that of the original.

    vLLM reads an embedding and a head of each multi-token prediction module.
    """
    head = "model.embed_tokens.weight" if cfg.tie_embeddings else "lm_head.weight"
    modules = [f"model.layers.{cfg.num_layers + m}" for m in range(cfg.num_mtp)]
    return {
        **{f"{module}.embed_tokens.weight": "model.embed_tokens.weight" for module in modules},
        **{f"{module}.shared_head.head.weight": head for module in modules},
    }
