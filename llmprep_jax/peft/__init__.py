"""Parameter-efficient fine-tuning: `inject`, `split`, `merge`, `save` and `load` adapters."""

from llmprep_jax.peft.adapter import inject, is_adapted, merge, split, strip
from llmprep_jax.peft.counts import count, print_counts
from llmprep_jax.peft.dora import DoRA
from llmprep_jax.peft.ia3 import IA3
from llmprep_jax.peft.loha import LoHa
from llmprep_jax.peft.lokr import LoKr
from llmprep_jax.peft.longlora import LongLoRA
from llmprep_jax.peft.lora import LoRA
from llmprep_jax.peft.peft_format import load, save
from llmprep_jax.peft.tied import untie
from llmprep_jax.peft.training import train_mode

__all__ = [
    "IA3",
    "DoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LongLoRA",
    "count",
    "inject",
    "is_adapted",
    "load",
    "merge",
    "print_counts",
    "save",
    "split",
    "strip",
    "train_mode",
    "untie",
]
