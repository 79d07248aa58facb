"""Linear output head and softmax cross-entropy in one."""

from llmprep_jax.kernels.cross_entropy.api import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
