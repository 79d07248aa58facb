"""PEFT's adapters that are compared with ours, and the pairs of base and adapter that tell most.

The bases differ in what adapters meet: qwen2 has biases, qwen3 norms of heads, gemma3 a tied,
scaled table, heads wider than the model and layers of two kinds.
"""

import itertools

import peft
import pytest

from tests.grids import cases

BASES = ("llama", "qwen2", "gemma3")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "all-linear": dict(r=4, lora_alpha=8, target_modules="all-linear"),
    "q_proj": dict(r=8, lora_alpha=8, target_modules=["q_proj"]),
    "rslora": dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=ALL,
        rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={"layers.0.self_attn.v_proj": 1, "down_proj": 3},
    ),
    "patterns-by-name": dict(
        r=4,
        lora_alpha=8,
        target_modules=ALL,
        rank_pattern={"q_proj": 2, "mlp.up_proj": 6},
        alpha_pattern={"down_proj": 3},
    ),
    "regex": dict(r=4, lora_alpha=8, target_modules=r".*\.(0|2)\..*(q|o)_proj"),
    "some-layers": dict(
        r=4, lora_alpha=8, target_modules=ALL, layers_to_transform=[1], exclude_modules=["k_proj"]
    ),
}
WHOLE = dict(modules_to_save=["embed_tokens", "norm", "v_proj"])
MORE = {
    "dora": (peft.LoraConfig, dict(r=4, lora_alpha=8, target_modules=ALL, use_dora=True)),
    "dora-rslora": (
        peft.LoraConfig,
        dict(
            r=4, lora_alpha=3, target_modules=["q_proj", "o_proj"], use_dora=True, use_rslora=True
        ),
    ),
    "whole": (
        peft.LoraConfig,
        dict(r=4, target_modules=["q_proj"], **WHOLE, ensure_weight_tying=True),
    ),
    "tables": (
        peft.LoraConfig,
        dict(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
    "biases": (peft.LoraConfig, dict(r=4, target_modules=["q_proj", "o_proj"], bias="lora_only")),
    "dora-biases": (
        peft.LoraConfig,
        dict(r=4, target_modules=["k_proj", "up_proj"], use_dora=True, bias="all"),
    ),
    "loha": (peft.LoHaConfig, dict(r=4, alpha=8, target_modules=ALL)),
    "loha-patterns": (
        peft.LoHaConfig,
        dict(
            r=4,
            alpha=8,
            target_modules=ALL,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"up_proj": 3},
        ),
    ),
    "lokr": (peft.LoKrConfig, dict(r=2, alpha=4, target_modules=ALL)),
    "lokr-both": (
        peft.LoKrConfig,
        dict(r=1, alpha=2, target_modules=ALL, decompose_both=True, decompose_factor=8),
    ),
    "vera": (peft.VeraConfig, dict(r=48, target_modules=ALL, projection_prng_key=5)),
    "vera-drawn": (
        peft.VeraConfig,
        dict(r=16, target_modules=["q_proj", "o_proj", "up_proj"], save_projection=False),
    ),
    "adalora": (
        peft.AdaLoraConfig,
        dict(init_r=4, lora_alpha=6, target_modules=ALL, total_step=10),
    ),
    "oft": (peft.OFTConfig, dict(oft_block_size=8, target_modules=ALL)),
    "oft-exact": (
        peft.OFTConfig,
        dict(r=4, oft_block_size=0, target_modules=ALL, use_cayley_neumann=False),
    ),
    "oft-coft": (
        peft.OFTConfig,
        dict(oft_block_size=7, target_modules=["q_proj"], coft=True, eps=0.3, block_share=True),
    ),
    "hra": (peft.HRAConfig, dict(r=4, target_modules=ALL)),
    "hra-gs": (peft.HRAConfig, dict(r=3, target_modules=["o_proj", "up_proj"], apply_GS=True)),
    "ia3": (
        peft.IA3Config,
        dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}


def pairs(**telling: tuple[str, ...]):
    """Parametrises by (base, name): each base's telling names, the rest under the mark `grid`."""
    fast = [(base, name) for base, names in telling.items() for name in names]
    rows = itertools.product(telling, dict.fromkeys(name for _, name in fast))
    return pytest.mark.parametrize(("base", "name"), cases(rows, fast=fast), indirect=["base"])
