"""Parameter-efficient fine-tuning: `inject` a method, `split` what trains, `merge`, `save` and `load`."""

from llmprep_jax.peft.adapter import count, inject, is_adapted, merge, split, strip
from llmprep_jax.peft.lora import LoRA
from llmprep_jax.peft.peft_format import load, save

__all__ = ["LoRA", "count", "inject", "is_adapted", "load", "merge", "save", "split", "strip"]
