"""Training for the study: one compiled step of a method, which runs of several seeds share."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.study.text import draw_batch
from llmprep_jax import peft
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.train.optim import OptimConfig, make_optimizer, make_schedule
from llmprep_jax.train.rank_budget import adalora_of, with_orthogonality
from llmprep_jax.train.state import count, create_state, merge, split_model
from llmprep_jax.train.step import make_train_step, place_batch


class Trainer:
    """A compiled training step, which runs of several seeds share."""

    def __init__(
        self, model: nnx.Module, kind: type, *, lr: float, steps: int, rows: int, length: int
    ):
        self.kind, self.lr, self.steps, self.seconds = kind, lr, steps, []
        self.sizes = (rows, length)
        parts = split_model(model, kind)
        self.trainable = count(parts.params)
        optim = OptimConfig(lr=lr, schedule="linear", warmup_steps=min(10, steps), weight_decay=0.0)
        ranks = adalora_of(model)
        self.tx = make_optimizer(optim, parts.params, steps, ranks)
        loss = with_orthogonality(
            lambda model, batch, key: next_token_loss(peft.train_mode(model, key), batch), ranks
        )
        step = make_train_step(parts.graphdef, self.tx, loss, make_schedule(optim, steps))
        state = jax.eval_shape(lambda p: create_state(p, self.tx, seed=0), parts.params)
        batch = place_batch(
            draw_batch(np.zeros(10_000, int), *self.sizes, np.random.default_rng(0))
        )
        self.step = step.lower(state, parts.frozen, batch).compile()
        memory = self.step.memory_analysis()
        self.peak_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def run(self, model: nnx.Module, tokens: np.ndarray, seed: int) -> None:
        """Trains a model; what it became is `self.model`."""
        parts, rng = split_model(model, self.kind), np.random.default_rng(seed)
        # copied: a state takes its arrays over, and the base is used again
        state = create_state(jax.tree.map(jnp.copy, parts.params), self.tx, seed=seed)
        for _ in range(self.steps):
            batch = place_batch(draw_batch(tokens, *self.sizes, rng))
            began = time.perf_counter()
            state, metrics = self.step(state, parts.frozen, batch)
            jax.block_until_ready(metrics)
            self.seconds.append(time.perf_counter() - began)
        self.model = merge(parts.graphdef, state.params, parts.frozen)
