"""Attention that never holds the scores of all queries and keys."""

from llmprep_jax.kernels.flash_attention.api import attention

__all__ = ["attention"]
