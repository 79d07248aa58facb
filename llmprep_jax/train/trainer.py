"""A model made ready for training: its parts, its optimizer and its compiled step, each made once.

`TrainSteps` is the one loop of steps: `fit` adds checkpoints, evaluation and logs to it, studies
and benchmarks take it as it is. A trainer takes the model's arrays over: after `start` the model
that it was made of must not be used.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from llmprep_jax.config import settle
from llmprep_jax.nn.param import TRAINED, AdapterParam
from llmprep_jax.peft import is_adapted, train_mode
from llmprep_jax.train.batches import Pixels, place_batch
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.contrastive import ContrastiveLoss
from llmprep_jax.train.losses import next_token_loss, training_loss
from llmprep_jax.train.optim import (
    OptimConfig,
    make_bias_schedule,
    make_optimizer,
    make_schedule,
)
from llmprep_jax.train.state import TrainState, count_bytes, create_state, merge, split_model
from llmprep_jax.train.step import LossFn, Metrics, make_train_step

Batch = Mapping[str, np.ndarray]
Step = Callable[[TrainState, Any, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long and how to train, whatever the model and the data are.

    Attributes:
      steps: where the run ends, counted from its beginning.
      schedule_steps: the steps that the learning rate's schedule is laid over; None: `steps`.
      accumulate: microbatches that a batch is cut into, of batch_size / accumulate rows each; the
        update is the same, memory is less.
      ema_decay: of the running average of the parameters; None: none is kept.
      seed: of the model's random numbers while it trains.
      log_every: steps between looks at the metrics; all steps are recorded whatever it is.
      eval_every: steps between evaluations; None: only at the end.
      skip_nonfinite: batches of the whole run whose loss or gradient may be infinite or no number;
        such a step changes nothing and is named with its documents, and one more ends the run.
      peak_flops: FLOP/s of one device for MFU, where it is not known by its name.
    """

    steps: int = 1000
    schedule_steps: int | None = None
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    accumulate: int = 1
    ema_decay: float | None = None
    seed: int = 0
    log_every: int = 1
    eval_every: int | None = None
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    skip_nonfinite: int = 0
    peak_flops: float | None = None

    def __post_init__(self):
        settle(self)
        for name in ("steps", "schedule_steps", "accumulate", "log_every", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be between 0 and 1, not {self.ema_decay}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), not {self.seed}")
        if self.skip_nonfinite < 0:
            raise ValueError(f"skip_nonfinite must be at least 0, not {self.skip_nonfinite}")
        make_schedule(self.optim, self.horizon)  # that the warmup fits is told before any loading

    @property
    def horizon(self) -> int:
        """The steps that schedules are laid over."""
        return self.schedule_steps or self.steps


class Trainer:
    """A model ready to be trained.

    Call it, and what is made of it, under the mesh that the model is on.

    Args:
      model: its arrays are taken over.
      trainable: what is trained, a Variable class or filter (`nnx.split`); None: the adapters, or
        all weights where there are none.
      cfg: how; None: the defaults.
      loss_fn: `loss_fn(model, microbatch, key) -> LossSum`; None: `make_loss()`.

    Attributes:
      split: the model in three (`split_model`).
      tx: the optimizer.
      step: `step(state, frozen, batch) -> (state, metrics)`, compiled when it is first called.

    Raises:
      ValueError: nothing to train, or settings that do not fit the run.
    """

    def __init__(
        self,
        model: nnx.Module,
        trainable: Any = None,
        cfg: FitConfig | None = None,
        loss_fn: LossFn | None = None,
    ):
        if trainable is None:
            trainable = AdapterParam if is_adapted(model) else TRAINED
        cfg, loss_fn = cfg or FitConfig(), loss_fn or make_loss()
        if cfg.accumulate > 1 and isinstance(loss_fn, ContrastiveLoss):
            raise ValueError(
                f"accumulate={cfg.accumulate}: a contrastive loss holds each row of a batch against"
                ' all others, so a batch is not cut; set accumulate=1, and form="ring" or'
                " compute.remat for memory"
            )
        self.cfg, self.split = cfg, split_model(model, trainable)
        self.tx = make_optimizer(cfg.optim, self.split, cfg.horizon)
        self.step = make_train_step(
            self.split.graphdef,
            self.tx,
            loss_fn,
            make_schedule(cfg.optim, cfg.horizon),
            make_bias_schedule(cfg.optim, cfg.horizon),
            ema_decay=cfg.ema_decay,
            counts_nonfinite=cfg.skip_nonfinite > 0,
        )

    @property
    def optimizer_bytes(self) -> int:
        """Of the optimizer's state."""
        return count_bytes(jax.eval_shape(self.tx.init, self.split.params))

    def start(self, params: Any = None, seed: int | None = None) -> TrainState:
        """The state before the first step.

        Args:
          params: in place of the model's; they are donated to the state.
          seed: in place of the config's.
        """
        params = self.split.params if params is None else params
        seed = self.cfg.seed if seed is None else seed
        return create_state(params, self.tx, seed=seed, ema=self.cfg.ema_decay is not None)

    def steps(self, batches: Iterable[Batch], state: TrainState | None = None) -> "TrainSteps":
        """Steps from a state on, or from the model that the trainer was made of."""
        state = self.start() if state is None else state
        return TrainSteps(self.step, state, self.split.frozen, batches, self.cfg.accumulate)

    def model(self, state: TrainState, *, ema: bool = False) -> nnx.Module:
        """The model with a state's parameters, or with their running average."""
        params = state.params
        if ema:
            params = jax.tree.map(lambda e, p: e.astype(p.dtype), state.ema, params)
        return merge(self.split.graphdef, params, self.split.frozen)


def make_loss(z_loss: float = 0.0, pixels: Pixels | None = None) -> LossFn:
    """The loss of a model, with dropout and shifts where its adapters have them.

    Args:
      z_loss, pixels: as of `next_token_loss`; of an image processor, `images.pixels`.
    """

    def loss_fn(model, batch, key):
        # an adapter learns from the next token alone: no further ones, and no balance of experts
        loss_of = next_token_loss if is_adapted(model) else training_loss
        return loss_of(train_mode(model, key), batch, z_loss=z_loss, pixels=pixels)

    return loss_fn


class TrainSteps:
    """An iterator that takes a step on each batch and gives its metrics, maybe still under way.

    Args:
      step: as `Trainer.step`; the state is donated to it.
      frozen: what of the model is not trained.
      accumulate: microbatches that a batch is cut into.

    Attributes:
      state: after the last step.
      batch: of the last step, on the host.
    """

    def __init__(
        self,
        step: Step,
        state: TrainState,
        frozen: Any,
        batches: Iterable[Batch],
        accumulate: int = 1,
    ):
        self._step, self._frozen, self._accumulate = step, frozen, accumulate
        self._batches, self.state, self.batch = iter(batches), state, None

    def __iter__(self) -> "TrainSteps":
        return self

    def __next__(self) -> Metrics:
        self.batch = next(self._batches)
        arrays = place_batch(self.batch, self._accumulate)
        self.state, metrics = self._step(self.state, self._frozen, arrays)
        return metrics
