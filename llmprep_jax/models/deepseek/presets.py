"""Every released size of DeepSeek-V2 and V3, by name, and two tiny ones to train on a laptop.

Fields are those of the released config.json files; tests hold the parameter counts against the
published ones. R1 and V3.1 are V3's shapes, and the R1 distills are of the family `llama`.
"""

import dataclasses

from llmprep_jax.models.deepseek.config import Config
from llmprep_jax.nn.balance import Balance
from llmprep_jax.nn.moe import Routing
from llmprep_jax.nn.rope import RopeScaling


def _yarn(mscale: float) -> RopeScaling:
    return RopeScaling("yarn", 40.0, 4096, mscale=mscale, mscale_all_dim=mscale)


_V2 = dict(
    vocab_size=102400,
    num_shared=2,
    num_dense=1,
    bos_id=100000,
    eos_ids=(100001,),
    rope_scaling=_yarn(0.707),
    model_type="deepseek_v2",
)
V2_LITE = Config(
    dim=2048,
    mlp_dim=10944,
    expert_dim=1408,
    num_layers=27,
    num_heads=16,
    q_rank=None,
    routing=Routing(64, 6),
    balance=Balance(expert=0.001),
    **_V2,
)
V2 = Config(
    dim=5120,
    mlp_dim=12288,
    expert_dim=1536,
    num_layers=60,
    num_heads=128,
    routing=Routing(160, 6, num_groups=8, num_active_groups=3, scale=16.0),
    balance=Balance(expert=0.003, device=0.05, communication=0.02),
    **_V2,
)
V3 = Config(
    vocab_size=129280,
    dim=7168,
    mlp_dim=18432,
    expert_dim=2048,
    num_layers=61,
    num_heads=128,
    routing=Routing(
        256,
        8,
        score="sigmoid",
        num_groups=8,
        num_active_groups=4,
        has_bias=True,
        normalize=True,
        scale=2.5,
    ),
    num_shared=1,
    num_dense=3,
    rope_scaling=_yarn(1.0),
    num_mtp=1,
    balance=Balance(expert=1e-4),
    bos_id=0,
    eos_ids=(1,),
)
_TINY = dict(  # a vocabulary of SmolLM2's size
    vocab_size=49152,
    dim=128,
    mlp_dim=384,
    expert_dim=96,
    num_layers=4,
    num_heads=4,
    kv_rank=64,
    nope_dim=32,
    rope_dim=16,
    value_dim=32,
    max_seq_len=1024,
    rope_scaling=None,
    num_dense=1,
    bos_id=1,
    eos_ids=(2,),
)
V2_TINY = dataclasses.replace(
    V2,
    **_TINY,
    q_rank=None,
    routing=Routing(16, 4, num_groups=4, num_active_groups=2, scale=1.0),
    num_shared=1,
)
V3_TINY = dataclasses.replace(
    V3,
    **_TINY,
    q_rank=96,
    routing=dataclasses.replace(
        V3.routing, num_experts=16, num_active=4, num_groups=4, num_active_groups=2
    ),
)

PRESETS: dict[str, Config] = {
    "deepseek-v2-lite": V2_LITE,
    "deepseek-v2": V2,
    "deepseek-v3": V3,
    "deepseek-v2-tiny": V2_TINY,
    "deepseek-v3-tiny": V3_TINY,
}
