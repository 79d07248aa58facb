"""Parameter-efficient fine-tuning: `inject`, `split`, `merge`, `save` and `load` adapters."""

from llmprep_jax.peft.adalora import AdaLoRA
from llmprep_jax.peft.adapter import is_adapted, merge, split, strip
from llmprep_jax.peft.by_name import combine, select
from llmprep_jax.peft.counts import count, print_counts
from llmprep_jax.peft.dora import DoRA
from llmprep_jax.peft.hra import HRA
from llmprep_jax.peft.ia3 import IA3
from llmprep_jax.peft.injection import inject
from llmprep_jax.peft.loha import LoHa
from llmprep_jax.peft.lokr import LoKr
from llmprep_jax.peft.longlora import LongLoRA
from llmprep_jax.peft.lora import LoRA
from llmprep_jax.peft.merging import blend, unmerge
from llmprep_jax.peft.oft import OFT
from llmprep_jax.peft.peft_format import load, read_method, save
from llmprep_jax.peft.qlora import QLoRA
from llmprep_jax.peft.tied import untie
from llmprep_jax.peft.training import train_mode
from llmprep_jax.peft.vera import VeRA

# what a run may name
AnyMethod = LoRA | QLoRA | DoRA | LongLoRA | LoHa | LoKr | IA3 | VeRA | AdaLoRA | OFT | HRA

__all__ = [
    "HRA",
    "IA3",
    "OFT",
    "AdaLoRA",
    "AnyMethod",
    "DoRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LongLoRA",
    "QLoRA",
    "VeRA",
    "blend",
    "combine",
    "count",
    "inject",
    "is_adapted",
    "load",
    "merge",
    "print_counts",
    "read_method",
    "save",
    "select",
    "split",
    "strip",
    "train_mode",
    "unmerge",
    "untie",
]
