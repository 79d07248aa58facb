"""What the studies of DeepSeek-V3 share: a small model of bytes, and its training."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx

from experiments.study.text import draw_batch
from llmprep_jax.models import registry
from llmprep_jax.models.deepseek.config import Config
from llmprep_jax.nn.balance import Balance
from llmprep_jax.nn.param import TRAINED, Compute
from llmprep_jax.train.losses import training_loss
from llmprep_jax.train.optim import OptimConfig, make_optimizer, make_schedule
from llmprep_jax.train.state import create_state, merge, split_model
from llmprep_jax.train.step import make_train_step, place_batch

# 4 layers of 128, 4 of 16 experts and a shared one; 2.4 M weights
TINY = dataclasses.replace(
    registry.preset("deepseek-v3-tiny"),
    vocab_size=256,
    num_mtp=0,
    balance=Balance(),
    compute=Compute(matmul_dtype="bfloat16"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a study: steps of each training, its batches, and how often it is done."""

    steps: int = 300
    seeds: int = 3
    rows: int = 8
    length: int = 128
    lr: float = 3e-3


def train(
    cfg: Config, sizes: Sizes, text: np.ndarray, rate: float
) -> Iterator[tuple[nnx.Module, dict[str, list[float]]]]:
    """For each seed the trained model, and the metrics of its steps.

    Args:
      rate: of the routers' biases.
    """
    make = jax.jit(lambda key: registry.build(cfg, rngs=nnx.Rngs(key)))
    optim = OptimConfig(lr=sizes.lr, schedule="linear", warmup_steps=sizes.steps // 10)
    schedule, step = make_schedule(optim, sizes.steps), None
    for seed in range(sizes.seeds):
        parts = split_model(make(jax.random.key(seed)), TRAINED)
        tx, rng = make_optimizer(optim, parts.params, sizes.steps), np.random.default_rng(seed)
        step = step or make_train_step(
            parts.graphdef,
            tx,
            lambda m, b, _: training_loss(m, b),
            schedule,
            bias_rate=lambda _: rate,
        )
        state, history = create_state(parts.params, tx, seed=seed), []
        for _ in range(sizes.steps):
            batch = place_batch(draw_batch(text, sizes.rows, sizes.length, rng))
            state, metrics = step(state, parts.frozen, batch)
            history.append(metrics)
        values = jax.device_get(history)
        series = {name: [float(m[name]) for m in values] for name in values[0]}
        yield merge(parts.graphdef, state.params, parts.frozen), series
