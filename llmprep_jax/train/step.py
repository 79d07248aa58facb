"""The training step: gradients by microbatches, one update, metrics; one jitted function.

Pre-training, full fine-tuning and adapters differ in what `state.params` holds and in nothing here.
Losses and gradients are summed over microbatches and divided once by the number of tokens, so
accumulation is exact. A step whose loss or gradient is not finite changes nothing but, with
`counts_nonfinite`, the count of steps (and `finite` is False), so the host may look at the metrics
later than the next step starts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmprep_jax.nn.balance import load_metrics, rebalanced
from llmprep_jax.peft.training import extra_loss
from llmprep_jax.train.losses import LossSum
from llmprep_jax.train.offload import fetch, put_back
from llmprep_jax.train.state import TrainState, merge, path_name

Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], LossSum]


def make_train_step(
    graphdef: Any,
    tx: optax.GradientTransformation,
    loss_fn: LossFn,
    schedule: optax.Schedule,
    bias_rate: optax.Schedule | None = None,
    *,
    ema_decay: float | None = None,
    counts_nonfinite: bool = False,
) -> Callable[[TrainState, Any, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]:
    """Makes `train_step(state, frozen, batch) -> (state, metrics)`.

    The batch's arrays are [A, B / A, T] (`batches.place_batch`): A microbatches, one after another.
    Metrics are scalars on the device: loss (mean over tokens), objective where more than that is
    minimised, tokens (with a target), input_tokens, images and, of these, drawn where a batch has
    any, grad_norm (before clipping), param_norm, lr, finite; of experts `load_metrics` and dropped.

    Args:
      graphdef: of the model, from `split_model`.
      loss_fn: `loss_fn(model, microbatch, key) -> LossSum`; adapters' `extra_loss` is added.
      schedule: the learning rate, for the metrics.
      bias_rate: the step by which routers' biases follow the load; None: they stay.
      ema_decay: of the running average, where the state has one.
      counts_nonfinite: whether a step that is not finite, which changes nothing, counts as one.
    """

    def loss_of(params, frozen, micro, key):
        model = merge(graphdef, params, frozen)
        loss = loss_fn(model, micro, key)
        return _with_extra(loss, model)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, frozen, batch):
        key = jax.random.fold_in(state.key, state.step)
        total, (tokens, stats), grads = _sum_gradients(loss_of, state.params, frozen, batch, key)
        grads = jax.tree.map(lambda g: g / jnp.maximum(tokens, 1.0), grads)
        loss, grad_norm = total / jnp.maximum(tokens, 1.0), _norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        old_opt_state, grads = fetch(state.opt_state, grads)
        updates, opt_state = tx.update(grads, old_opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = _follow_load(params, stats, bias_rate and bias_rate(state.step))
        ema = _average(state.ema, params, state.step, ema_decay)
        # a batch without targets moves nothing either: its zero gradient would still decay weights
        old = state.params, old_opt_state, state.ema
        params, opt_state, ema = _choose(finite & (tokens > 0), (params, opt_state, ema), old)
        opt_state = put_back(opt_state, state.opt_state)
        metrics = {
            "tokens": tokens,
            **_count_inputs(batch),
            "grad_norm": grad_norm,
            "param_norm": _norm(params),
            "lr": schedule(state.step),
            "finite": finite,
            **_describe(loss, stats, tokens),
        }
        step = state.step + (finite | counts_nonfinite).astype(jnp.int32)
        return TrainState(step, params, opt_state, ema, state.key), metrics

    return train_step


def _with_extra(loss: LossSum, model: Any) -> tuple[jax.Array, tuple[Any, Mapping[str, Any]]]:
    """The summed loss with what adapter methods add to the mean; the tokens, and statistics."""
    added, stats = extra_loss(model), loss.stats or {}
    if added is None:
        return loss.total, (loss.count, stats)
    alone = {"parts": {"next_token_loss": loss.total}, "loads": {}, "dropped": jnp.zeros(())}
    return loss.total + loss.count * added, (loss.count, stats or alone)


def _sum_gradients(loss_of, params, frozen, batch, key):
    """Loss, (tokens, statistics) and float32 gradients, summed over the microbatches."""
    num_micro = batch["tokens"].shape[0]

    def one(micro, key):
        (total, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(params, frozen, micro, key)
        return total, sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    if num_micro == 1:
        return one(jax.tree.map(lambda x: x[0], batch), key)

    def body(sums, micro_and_key):
        return jax.tree.map(jnp.add, sums, one(*micro_and_key)), None

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    first = jax.tree.map(lambda x: x[0], batch)
    _, sums = jax.eval_shape(loss_of, params, frozen, first, key)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    start = (jnp.zeros((), jnp.float32), sums, zeros)
    return jax.lax.scan(body, start, (batch, jax.random.split(key, num_micro)))[0]


def _follow_load(params, stats, rate):
    """The parameters with the biases of routers moved towards experts with little load."""
    loads = stats.get("loads")
    if rate is None or not loads:
        return params

    def move(path, value):
        counts = loads.get(path_name(path).removesuffix(".bias"))
        return value if counts is None else rebalanced(value, counts, rate)

    return jax.tree_util.tree_map_with_path(move, params)


def _describe(loss, stats, tokens):
    """Metrics out of a loss and its statistics.

    Where the loss has further terms, `loss` is that of the next token, as evaluations give it, and
    `objective` is the whole.
    """
    if not stats:
        return {"loss": loss}
    parts = {name: total / jnp.maximum(tokens, 1.0) for name, total in stats["parts"].items()}
    metrics = {"loss": parts.pop("next_token_loss"), "objective": loss, **parts}
    for name, (total, count) in stats.get("means", {}).items():
        metrics[name] = total / jnp.maximum(count, 1.0)
    if stats["loads"]:
        counts = [load.reshape(-1, load.shape[-1]) for load in stats["loads"].values()]
        metrics |= {**load_metrics(jnp.concatenate(counts)), "dropped": stats["dropped"]}
    return metrics


def _norm(tree):
    """The global norm, in float32 whatever the leaves are."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares))


def _average(ema, params, step, decay):
    """decay * ema + (1 - decay) * params, with a shorter memory while the run is young."""
    if ema is None:
        return None
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p.astype(e.dtype), ema, params)


def _choose(use_new, new, old):
    return jax.tree.map(lambda n, o: jnp.where(use_new, n, o), new, old)


def _count_inputs(batch):
    """Tokens and images that are no padding, and images that are drawn, as float32."""
    counts = {"input_tokens": jnp.float32(batch["tokens"].size)}
    if "segment_ids" in batch:
        counts["input_tokens"] = jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32)
    if "image_mask" in batch:
        counts["images"] = jnp.sum(batch["image_mask"], dtype=jnp.float32)
    if "drawn" in batch:
        counts["drawn"] = jnp.sum(batch["drawn"], dtype=jnp.float32)
    return counts
