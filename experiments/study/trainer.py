"""Training for a study: one compiled step of a method, which runs of several seeds share."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from flax import nnx

from experiments.study.text import draw_batch
from llmprep_jax import peft
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.state import count, merge, split_model
from llmprep_jax.train.trainer import FitConfig, Trainer, TrainSteps


class StudyTrainer:
    """A compiled training step, which runs of several seeds share.

    Attributes:
      temporary_bytes, peak_bytes: XLA's for the step, without and with its arguments.
      seconds: of each step so far.
    """

    def __init__(
        self, model: nnx.Module, kind: type, *, lr: float, steps: int, rows: int, length: int
    ):
        self.kind, self.lr, self.steps, self.seconds = kind, lr, steps, []
        self.sizes = (rows, length)
        optim = OptimConfig(lr=lr, schedule="linear", warmup_steps=min(10, steps), weight_decay=0.0)
        self._trainer = Trainer(
            model,
            kind,
            FitConfig(steps=steps, optim=optim),
            lambda model, batch, key: next_token_loss(peft.train_mode(model, key), batch),
        )
        parts = self._trainer.split
        self.trainable = count(parts.params)
        state = jax.eval_shape(self._trainer.start, parts.params)
        batch = place_batch(
            draw_batch(np.zeros(10_000, int), *self.sizes, np.random.default_rng(0))
        )
        self.step = self._trainer.step.lower(state, parts.frozen, batch).compile()
        memory = self.step.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes
        self.peak_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def run(self, model: nnx.Module, tokens: np.ndarray, seed: int) -> None:
        """Trains a model; what it became is `self.model`."""
        parts, rng = split_model(model, self.kind), np.random.default_rng(seed)
        # copied: a state takes its arrays over, and the base is used again
        state = self._trainer.start(jax.tree.map(jnp.copy, parts.params), seed)
        batches = (draw_batch(tokens, *self.sizes, rng) for _ in range(self.steps))
        steps = TrainSteps(self._timed_step, state, parts.frozen, batches)
        for _ in rich.progress.track(steps, "training", self.steps, transient=True):
            pass
        self.model = merge(parts.graphdef, steps.state.params, parts.frozen)

    def _timed_step(self, *args):
        began = time.perf_counter()
        state, metrics = self.step(*args)
        jax.block_until_ready(metrics)
        self.seconds.append(time.perf_counter() - began)
        return state, metrics
