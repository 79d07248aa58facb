"""Training: `Trainer` for loops of one's own, `fit` for runs that are saved and gone on with."""

from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.loop import fit
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer, make_loss

__all__ = ["CheckpointConfig", "FitConfig", "OptimConfig", "Trainer", "fit", "make_loss"]
