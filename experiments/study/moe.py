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
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.state import merge, split_model
from llmprep_jax.train.trainer import FitConfig, Trainer, TrainSteps

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

    steps: int = 300  # of each training
    seeds: int = 3  # trainings of each kind
    rows: int = 8  # of a batch
    length: int = 128  # tokens of a row
    lr: float = 3e-3  # peak learning rate


def train(
    cfg: Config, sizes: Sizes, text: np.ndarray, rate: float
) -> Iterator[tuple[nnx.Module, dict[str, list[float]]]]:
    """For each seed the trained model, and the metrics of its steps.

    Args:
      rate: of the routers' biases.
    """
    make = jax.jit(lambda key: registry.build(cfg, rngs=nnx.Rngs(key)))
    optim = OptimConfig(
        lr=sizes.lr,
        schedule="linear",
        warmup_steps=sizes.steps // 10,
        router_bias_rate=rate,
        router_bias_until=1.0,
    )
    trainer = Trainer(make(jax.random.key(0)), TRAINED, FitConfig(steps=sizes.steps, optim=optim))
    for seed in range(sizes.seeds):
        parts, rng = split_model(make(jax.random.key(seed)), TRAINED), np.random.default_rng(seed)
        state = trainer.start(parts.params, seed)
        batches = (draw_batch(text, sizes.rows, sizes.length, rng) for _ in range(sizes.steps))
        steps = TrainSteps(trainer.step, state, parts.frozen, batches)
        values = jax.device_get(list(steps))
        series = {name: [float(m[name]) for m in values] for name in values[0]}
        yield merge(parts.graphdef, steps.state.params, parts.frozen), series
