"""Shapes of DeepSeek-V2, V2-Lite and V2.5, and of DeepSeek-V3, V3.1 and R1.

One architecture (latent attention, a few dense layers, then mixtures of experts) with two routers:
V2 gates by a softmax, V3 by sigmoids with a bias, normalised. DeepSeek-VL2 Tiny's has plain
multi-head attention in place of the latent one. Hugging Face's field names occur in `from_hf` and
`to_hf` only. A file that leaves a field out means its class's default, which differs between V2 and
V3 and from every release.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llmprep_jax.models.hf_config import (
    read_rope,
    refuse_unsupported,
    require,
    token_ids_from_hf,
    token_ids_to_hf,
    write_rope,
)
from llmprep_jax.models.model_config import TRAINED_BY, UNSAVED, LanguageConfig
from llmprep_jax.nn.balance import Balance
from llmprep_jax.nn.moe import Routing
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Config(LanguageConfig):
    """One model of the family.

    Attributes:
      mlp_dim: hidden width of the dense layers. expert_dim: of each expert.
      q_rank: of the queries' latent; None: they have none (V2-Lite).
      kv_rank: of the latent that keys and values come from, which is what is cached, with the
        rotary key.
      nope_dim, rope_dim: of a head's query and key, without and with rotation. value_dim: of its
        value.
      attention: "latent", or "heads": multi-head attention whose heads share out `dim`, each
        rotated as a whole; ranks and the three widths above are then of nothing.
      num_shared: shared experts of a layer, one MLP together.
      num_dense: the first layers, which have no experts. moe_every: after them, layers whose index
        is no multiple of it have none either.
      num_mtp: multi-token prediction modules after the last layer. mtp_weight: lambda of their
        loss.
      transport: of tokens between devices (`nn.dispatch`).
      buffer_factor: room for the tokens that a device receives in training, as a multiple of an
        even load; what does not fit is dropped, and counted in the metrics. None: room for all.
      model_type: how Hugging Face calls the architecture: "deepseek_v2" or "deepseek_v3".
    """

    vocab_size: int
    dim: int
    mlp_dim: int
    expert_dim: int
    num_layers: int
    num_heads: int
    routing: Routing
    kv_rank: int = 512
    q_rank: int | None = 1536
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    attention: Literal["latent", "heads"] = "latent"
    num_shared: int = 1
    num_dense: int = 1
    moe_every: int = 1
    max_seq_len: int = 163840
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_interleaved: bool = True
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    num_mtp: int = 0
    mtp_weight: float = dataclasses.field(default=0.3, metadata=TRAINED_BY)
    balance: Balance = dataclasses.field(default=Balance(), metadata=TRAINED_BY)
    # a transport is of a machine
    transport: str | None = dataclasses.field(default=None, metadata=UNSAVED)
    buffer_factor: float | None = dataclasses.field(default=2.0, metadata=TRAINED_BY)
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    model_type: str = "deepseek_v3"
    compute: Compute = dataclasses.field(default=Compute(), metadata=UNSAVED)

    def __post_init__(self):
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} is odd; it is rotated in pairs")
        if self.attention == "heads" and self.dim % (2 * self.num_heads):
            raise ValueError(
                f"dim={self.dim} is not num_heads={self.num_heads} heads of an even width"
            )
        if self.moe_every < 1:
            raise ValueError(f"moe_every={self.moe_every} must be at least 1")

    def check_platform(self, platform: str) -> None:
        if self.transport == "ragged" and platform == "cpu":
            raise ValueError(
                "architecture.transport=ragged needs an all-to-all that CPUs do not have; leave it"
                " out there, or give emulated, ring or capacity"
            )

    @property
    def is_moe(self) -> tuple[bool, ...]:
        """For each layer, whether it has experts."""
        layers = range(self.num_layers)
        return tuple(l >= self.num_dense and l % self.moe_every == 0 for l in layers)

    @property
    def runs(self) -> list[tuple[bool, range]]:
        """The layers in order, as runs of one kind: (whether they have experts, their numbers)."""
        groups = itertools.groupby(range(self.num_layers), key=lambda layer: self.is_moe[layer])
        runs = [(is_moe, list(layers)) for is_moe, layers in groups]
        return [(is_moe, range(layers[0], layers[-1] + 1)) for is_moe, layers in runs]

    @property
    def head_dim(self) -> int | float:
        """Mean width of a head's two products, which is what its FLOPs are counted by."""
        if self.attention == "heads":
            return self.dim // self.num_heads
        return (self.nope_dim + self.rope_dim + self.value_dim) / 2

    @property
    def rotated_dim(self) -> int:
        """Of a head, how much is rotated."""
        return self.dim // self.num_heads if self.attention == "heads" else self.rope_dim

    @property
    def active_share(self) -> float:
        """Of the routed experts, the share that computes for a token."""
        return self.routing.num_active / self.routing.num_experts


_COMMON = dict(
    hidden_act="silu",
    rms_norm_eps=1e-6,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_layer_freq=1,
    tie_word_embeddings=False,
)
# of transformers' classes, which hold where a file leaves a field out
_DEFAULTS = {
    "deepseek_v2": dict(
        _COMMON,
        vocab_size=102400,
        hidden_size=4096,
        intermediate_size=11008,
        moe_intermediate_size=1407,
        num_hidden_layers=32,
        num_attention_heads=32,
        n_routed_experts=64,
        n_shared_experts=2,
        first_k_dense_replace=0,
        routed_scaling_factor=1.0,
        topk_method="greedy",
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "deepseek_v3": dict(
        _COMMON,
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_experts_per_tok=8,
        n_routed_experts=256,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=3,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        topk_method="noaux_tc",
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    ),
}
_METHODS = {
    "deepseek_v2": ("greedy", "group_limited_greedy", "gready"),
    "deepseek_v3": ("noaux_tc",),
}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_experts_per_tok", "n_routed_experts"),
)
_LATENT = {
    "q_lora_rank": "q_rank",
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim",
    "v_head_dim": "value_dim",
}


def from_hf(hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Config:
    """Reads a config.json of model_type deepseek_v2 or deepseek_v3.

    Args:
      names: of the checkpoint's tensors: transformers writes that there is a multi-token prediction
        module, and leaves it out.

    Raises:
      ValueError: a field is missing, or asks for something that this family does not compute.
    """
    kind = hf["model_type"]
    given = {name: value for name, value in hf.items() if value is not None}
    for name in ("q_lora_rank", "bos_token_id", "eos_token_id"):
        if name in hf:
            given[name] = hf[name]  # null has a meaning here
    hf = {**_DEFAULTS[kind], **given}
    is_v3 = kind == "deepseek_v3"
    refuse_unsupported(
        {name: hf[name] for name in hf if name != "quantization_config"},
        hidden_act=("silu",),
        attention_bias=(False,),
        mlp_bias=(False,),
        topk_method=_METHODS[kind],
        scoring_func=("sigmoid",) if is_v3 else ("softmax",),
        ep_size=(1, None),
        seq_aux=(True, None),
        pretraining_tp=(1,),
        **({} if is_v3 else {"norm_topk_prob": (False,), "rope_interleave": (True,)}),
    )
    require(hf, *_SIZES)
    max_seq_len = hf["max_position_embeddings"]
    rope_base, rope_scaling = read_rope(hf, max_seq_len)
    return Config(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        mlp_dim=hf["intermediate_size"],
        expert_dim=hf["moe_intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        routing=_read_routing(hf, is_v3),
        **_read_attention(hf),
        num_shared=hf["n_shared_experts"] or 0,
        num_dense=hf["first_k_dense_replace"] or 0,
        moe_every=hf["moe_layer_freq"],
        max_seq_len=max_seq_len,
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        rope_interleaved=hf.get("rope_interleave", True),
        norm_eps=hf["rms_norm_eps"],
        tie_embeddings=hf["tie_word_embeddings"],
        num_mtp=_read_num_mtp(hf, names) if is_v3 else 0,
        balance=Balance(expert=float(hf.get("aux_loss_alpha", 0.0))),
        model_type=kind,
        **token_ids_from_hf(hf),
    )


def _read_attention(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("use_mla") is not False:
        require(hf, *[name for name in _LATENT if name != "q_lora_rank"])
        return {ours: hf[theirs] for theirs, ours in _LATENT.items()}
    heads = hf["num_attention_heads"]
    refuse_unsupported(hf, num_key_value_heads=(heads, None))
    return {"attention": "heads", "q_rank": None}


def _read_routing(hf: Mapping[str, Any], is_v3: bool) -> Routing:
    limited = is_v3 or hf["topk_method"] == "group_limited_greedy"
    groups = {}
    if limited:
        groups = dict(num_groups=hf.get("n_group", 1), num_active_groups=hf.get("topk_group", 1))
    return Routing(
        num_experts=hf["n_routed_experts"],
        num_active=hf["num_experts_per_tok"],
        score="sigmoid" if is_v3 else "softmax",
        has_bias=is_v3,
        normalize=is_v3 and hf["norm_topk_prob"],
        scale=float(hf["routed_scaling_factor"]),
        **groups,
    )


def _read_num_mtp(hf: Mapping[str, Any], names: Sequence[str] | None) -> int:
    if names is not None and not any(name.endswith(".eh_proj.weight") for name in names):
        return 0
    # renamed in transformers 5, where there is one unless it is said
    return hf.get("num_nextn_predict_layers", hf.get("num_mtp_layers", 1))


def to_hf(cfg: Config) -> dict[str, Any]:
    """The config.json that transformers reads back as the same model."""
    is_v3, routing = cfg.model_type == "deepseek_v3", cfg.routing
    hf: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"],
        "model_type": cfg.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "intermediate_size": cfg.mlp_dim,
        "moe_intermediate_size": cfg.expert_dim,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_heads,
        **_write_attention(cfg),
        "n_routed_experts": routing.num_experts,
        "num_experts_per_tok": routing.num_active,
        "n_shared_experts": cfg.num_shared,
        "n_group": routing.num_groups,
        "topk_group": routing.num_active_groups,
        "topk_method": _method(routing),
        "scoring_func": routing.score,
        "norm_topk_prob": routing.normalize,
        "routed_scaling_factor": routing.scale,
        "first_k_dense_replace": cfg.num_dense,
        "moe_layer_freq": cfg.moe_every,
        "aux_loss_alpha": cfg.balance.expert,
        "seq_aux": True,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **write_rope(cfg.rope_base, cfg.rope_scaling, cfg.rotated_dim),
        **token_ids_to_hf(cfg.bos_id, cfg.eos_ids, cfg.pad_id),
    }
    if is_v3:
        hf["rope_interleave"] = cfg.rope_interleaved
        hf["num_nextn_predict_layers"] = cfg.num_mtp
    return hf


def _write_attention(cfg: Config) -> dict[str, Any]:
    if cfg.attention == "latent":
        return {theirs: getattr(cfg, ours) for theirs, ours in _LATENT.items()}
    nothing = {"kv_lora_rank": None, "q_lora_rank": None}
    widths = dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 0)
    return {"use_mla": False, **nothing, **widths}  # as released


def _method(routing: Routing) -> str:
    if routing.score == "sigmoid":
        return "noaux_tc"
    return "group_limited_greedy" if routing.num_groups > 1 else "greedy"
