"""AdaLoRA's budget (Zhang et al. 2023, sections 3.2 and 3.3): which triplets are pruned, and when.

The sensitivity of a weight is |w g|; its importance is the product of two averages over the steps,
of the sensitivity and of how far it strays from its average (eq. 8 to 11). A triplet's is that of
its number in E, plus the means over its row of A and its column of B; triplets of all layers
compete, and a cubic schedule (eq. 12) says how many stay. The one thing a reader would get wrong: a
pruned E is set to zero after the update, yet trains on and may come back at the next pruning; only
the last one is final.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.adalora import AdaLoRA
from llmprep_jax.peft.adapter import adapters, dims
from llmprep_jax.sharding import spec
from llmprep_jax.train.step import LossFn
from llmprep_jax.types import Array, Float

Triplets = dict[str, dict[str, Array]]  # lora_a, lora_b and lora_e by the layer's path


class RankState(NamedTuple):
    """State of `allocate_ranks`.

    Attributes:
      step: updates done.
      sensitivity, uncertainty: averages of each weight, by layer and name, float32.
      kept: which triplets the last pruning left, by layer.
      inner: the optimizer's own state.
    """

    step: Any  # Any throughout: abstract values and shardings come in states too
    sensitivity: Any
    uncertainty: Any
    kept: Any
    inner: Any


def allocate_ranks(
    tx: optax.GradientTransformation, method: AdaLoRA
) -> optax.GradientTransformation:
    """The same optimizer, which prunes triplets after its updates.

    Parameters are nested dicts; of two stacked layers' triplets each counts for itself.
    """
    end = method.total_steps - method.final_steps

    def init(params):
        layers = triplets(params)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), layers)
        kept = {path: jnp.ones_like(layer["lora_e"], bool) for path, layer in layers.items()}
        more = jax.tree.map(jnp.copy, zeros)  # of its own, since a step may take its state over
        return RankState(jnp.zeros((), jnp.int32), zeros, more, kept, tx.init(params))

    def update(grads, state, params):
        updates, inner = tx.update(grads, state.inner, params)
        layers, step = triplets(optax.apply_updates(params, updates)), state.step + 1
        averages = _averages(method, layers, triplets(grads), state)
        averages = jax.tree.map(
            lambda new, old: jnp.where(step < end, new, old),
            averages,
            (state.sensitivity, state.uncertainty),
        )
        counts = jnp.asarray(num_pruned(method, layers))[jnp.minimum(step, end)]
        prunes = (step <= end) & (counts >= 0)
        kept = jax.tree.map(
            lambda new, old: jnp.where(prunes, new, old), _best(counts, *averages), state.kept
        )
        updates = _without(updates, params, kept, prunes | (step > end))
        return updates, RankState(step, *averages, kept, inner)

    return optax.GradientTransformation(init, update)


def triplets(tree: Any) -> Triplets:
    """The leaves of a tree that are AdaLoRA's, by layer."""
    found: Triplets = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        layer, name = _split(path)
        found.setdefault(layer, {})[name] = leaf
    names = ("lora_a", "lora_b", "lora_e")
    return {
        path: {name: leaves[name] for name in names}
        for path, leaves in found.items()
        if "lora_e" in leaves
    }


def adalora_of(model: nnx.Module) -> AdaLoRA | None:
    """The settings of a model's AdaLoRA adapters."""
    found = (each.method for each in adapters(model).values())
    return next((method for method in found if isinstance(method, AdaLoRA)), None)


def check_ranks(method: AdaLoRA, params: Any, num_steps: int) -> None:
    """Refuses settings that do not fit a run.

    Raises:
      ValueError: nothing trained is AdaLoRA's, or the last pruning lies behind the run's end.
    """
    if not triplets(params):
        raise ValueError("the model has AdaLoRA adapters, but nothing trained is a lora_e")
    end = method.total_steps - method.final_steps
    if end > num_steps:
        raise ValueError(
            f"AdaLoRA prunes until step {end} (total_steps - final_steps), but the run ends at step"
            f" {num_steps}; set total_steps to it"
        )


def num_pruned(method: AdaLoRA, layers: Triplets) -> np.ndarray:
    """How many triplets lack after each step, up to the last pruning; -1 where none is pruned.

    In whole numbers on the host: in float32 the budget would be off by one here and there.
    """
    start, end = method.warmup_steps, method.total_steps - method.final_steps
    initial = sum(layer["lora_e"].size for layer in layers.values())
    matrices = sum(layer["lora_e"].size // layer["lora_e"].shape[-1] for layer in layers.values())
    target, counts = method.target_rank * matrices, np.full(end + 1, -1, np.int32)
    for step in range(start + 1, end + 1):
        if step % method.every == 0 or step == end:
            left = 1 - (step - start) / (end - start)
            counts[step] = max(initial - int((initial - target) * left**3 + target), 0)
    return counts


def _averages(
    method: AdaLoRA, layers: Triplets, grads: Triplets, state: RankState
) -> tuple[Triplets, Triplets]:
    """Sensitivity and uncertainty after this step (eq. 8 to 10)."""

    def average(beta, old, new):
        return beta * old + (1 - beta) * new

    def product(w, grad):
        return jnp.abs(w.astype(jnp.float32) * grad.astype(jnp.float32))

    now = jax.tree.map(product, layers, grads)
    smooth = jax.tree.map(lambda *x: average(method.beta1, *x), state.sensitivity, now)
    strays = jax.tree.map(lambda a, b: jnp.abs(a - b), now, smooth)
    return smooth, jax.tree.map(lambda *x: average(method.beta2, *x), state.uncertainty, strays)


def _best(count: Array, sensitivity: Triplets, uncertainty: Triplets) -> dict[str, Array]:
    """Which triplets stay when the `count` least important ones go, and those equal to them."""
    scores = {}
    for path, layer in jax.tree.map(jnp.multiply, sensitivity, uncertainty).items():
        a, b, e = (layer[name] for name in ("lora_a", "lora_b", "lora_e"))
        a = jnp.mean(a, axis=tuple(range(e.ndim - 1, a.ndim - 1)))
        scores[path] = e + a + jnp.mean(b, axis=tuple(range(e.ndim, b.ndim)))
    ranked = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
    threshold = jnp.where(count > 0, ranked[jnp.maximum(count, 1) - 1], -jnp.inf)
    return {path: score > threshold for path, score in scores.items()}


def _without(updates: Any, params: Any, kept: dict[str, Array], prunes: Array) -> Any:
    """Updates that end at zero for each E that is pruned."""

    def of(path, update, param):
        layer, name = _split(path)
        if name != "lora_e":
            return update
        return jnp.where(prunes & ~kept[layer], -param.astype(update.dtype), update)

    return jax.tree_util.tree_map_with_path(of, updates, params)


def _split(path: tuple[Any, ...]) -> tuple[str, str]:
    """A leaf's layer and name."""
    layer, _, name = jax.tree_util.keystr(path, simple=True, separator=".").rpartition(".")
    return layer, name


def orthogonality(model: nnx.Module) -> Float[Array, ""]:
    """The mean over A and B of all layers of |A A^T - I| and |B^T B - I|, Frobenius norms.

    It is eq. 7 as its authors' code and PEFT compute it: norms, not their squares, and a mean.
    """

    def norms(params: Mapping[str, Array], base: Einsum) -> Array:
        _, ins, outs, _ = dims(base)
        found = []
        for name, eqn in (("lora_a", f"{ins}r,{ins}s->rs"), ("lora_b", f"r{outs},s{outs}->rs")):
            x = params[name].astype(jnp.float32)
            gram = jnp.einsum(eqn, x, x, precision="highest", out_sharding=spec(None, None))
            found.append(jnp.linalg.norm(gram - jnp.eye(len(gram))))
        return jnp.stack(found)

    layers = [each for each in adapters(model).values() if isinstance(each.method, AdaLoRA)]
    return jnp.mean(jnp.concatenate([layer.map(norms).reshape(-1) for layer in layers]))


def with_orthogonality(loss_fn: LossFn, method: AdaLoRA | None) -> LossFn:
    """The loss whose mean has the weighted `orthogonality` added; without AdaLoRA as it is."""
    if method is None:
        return loss_fn

    def of(model, batch, key):
        loss = loss_fn(model, batch, key)
        added = method.orthogonality * orthogonality(model)
        return loss._replace(total=loss.total + loss.count * added)

    return of
