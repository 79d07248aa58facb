"""AdaLoRA's budget (Zhang et al. 2023, sections 3.2 and 3.3): which triplets are pruned, and when.

The sensitivity of a weight is |w g|; its importance is the product of two averages over the steps,
of the sensitivity and of how far it strays from its average (eq. 8 to 11). A triplet's is that of
its number in E, plus the means over its row of A and its column of B; triplets of all layers
compete, and a cubic schedule (eq. 12) says how many stay. A pruned E is set to zero after the
update, yet trains on and may come back at the next pruning; only the last one is final.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.layout import dims
from llmprep_jax.peft.peft_fields import mapping, number
from llmprep_jax.peft.targets import Number, Pattern, check_number
from llmprep_jax.sharding import spec
from llmprep_jax.types import Array
from llmprep_jax.weights.safetensors import quoted

FIELDS = {  # settings by PEFT's names
    "init_r": "rank",
    "orth_reg_weight": "orthogonality",
    "target_r": "target_rank",
    "tinit": "warmup_steps",
    "tfinal": "final_steps",
    "deltaT": "every",
    "beta1": "beta1",
    "beta2": "beta2",
    "total_step": "total_steps",
}
Triplets = dict[str, dict[str, Array]]  # lora_a, lora_b and lora_e by the layer's path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """When how many triplets are pruned.

    Attributes:
      total_steps: T of the schedule (section 3.3, eq. 12); None: the steps of the run.
      target_rank: mean over the layers at its end.
      warmup_steps, final_steps: first and last of the T steps, which prune nothing.
      every: steps between prunings.
      beta1, beta2: of the averages of sensitivity and uncertainty (eq. 9 and 10).
      orthogonality: weight of the regulariser in the loss (eq. 7).
    """

    total_steps: int | None = None
    target_rank: int = 8
    warmup_steps: int = 0
    final_steps: int = 0
    every: int = 1
    beta1: Number = 0.85
    beta2: Number = 0.85
    orthogonality: Number = 0.5

    def check_budget(self, rank: int, rank_pattern: Pattern, alpha_pattern: Pattern) -> None:
        """Refuses settings that make no sense, beside those of LoRA."""
        if alpha_pattern:
            raise ValueError(f"AdaLoRA's alpha_pattern must be empty, not {alpha_pattern}")
        if any(own > rank for _, own in rank_pattern):
            raise ValueError(f"AdaLoRA's rank_pattern must not exceed rank, not {rank_pattern}")
        counts = ["target_rank", "every", *(["total_steps"] * (self.total_steps is not None))]
        for name in counts:
            check_number(f"AdaLoRA's {name}", getattr(self, name), whole=True)
        wrong = {
            "warmup_steps must be >= 0": self.warmup_steps < 0,
            "final_steps must be >= 0": self.final_steps < 0,
            "total_steps must exceed warmup_steps + final_steps": self.total_steps is not None
            and self.total_steps <= self.warmup_steps + self.final_steps,
            "beta1 must be in (0, 1)": not 0 < self.beta1 < 1,
            "beta2 must be in (0, 1)": not 0 < self.beta2 < 1,
            "orthogonality must be >= 0": not self.orthogonality >= 0,
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"AdaLoRA's {message}, not {getattr(self, message.split()[0])}")


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
    tx: optax.GradientTransformation, budget: Budget, params: Any, num_steps: int
) -> optax.GradientTransformation:
    """The same optimizer, which prunes triplets after its updates, over a run of `num_steps`.

    Parameters are nested dicts; of two stacked layers' triplets each counts for itself.

    Raises:
      ValueError: nothing in params is AdaLoRA's, or the last pruning lies behind the run's end.
    """
    if budget.total_steps is None:
        budget = dataclasses.replace(budget, total_steps=num_steps)
    end = budget.total_steps - budget.final_steps
    if not triplets(params):
        raise ValueError("the model has AdaLoRA adapters, but nothing trained is a lora_e")
    if end > num_steps:
        raise ValueError(
            f"AdaLoRA prunes until step {end} (total_steps - final_steps), but the run ends at step"
            f" {num_steps}; set total_steps to it"
        )

    def init(params):
        layers = triplets(params)
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), layers)
        kept = {path: jnp.ones_like(layer["lora_e"], bool) for path, layer in layers.items()}
        more = jax.tree.map(jnp.copy, zeros)  # of its own, since a step may take its state over
        return RankState(jnp.zeros((), jnp.int32), zeros, more, kept, tx.init(params))

    def update(grads, state, params):
        updates, inner = tx.update(grads, state.inner, params)
        layers, step = triplets(optax.apply_updates(params, updates)), state.step + 1
        averages = _averages(budget, layers, triplets(grads), state)
        averages = jax.tree.map(
            lambda new, old: jnp.where(step < end, new, old),
            averages,
            (state.sensitivity, state.uncertainty),
        )
        counts = jnp.asarray(num_pruned(budget, layers))[jnp.minimum(step, end)]
        prunes = (step <= end) & (counts >= 0)
        kept = jax.tree.map(
            lambda new, old: jnp.where(prunes, new, old), _best(counts, *averages), state.kept
        )
        updates = _without(updates, params, kept, prunes | (step > end))
        return updates, RankState(step, *averages, kept, inner)

    return optax.GradientTransformation(init, update)


def triplets(tree: Any) -> Triplets:
    """The leaves of a tree that are AdaLoRA's, by layer."""
    by_layer: Triplets = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        layer, name = _split(path)
        by_layer.setdefault(layer, {})[name] = leaf
    names = ("lora_a", "lora_b", "lora_e")
    return {
        path: {name: leaves[name] for name in names}
        for path, leaves in by_layer.items()
        if "lora_e" in leaves
    }


def num_pruned(budget: Budget, layers: Triplets) -> np.ndarray:
    """How many triplets lack after each step, up to the last pruning; -1 where none is pruned.

    In whole numbers on the host: in float32 the budget would be off by one here and there.
    """
    start, end = budget.warmup_steps, budget.total_steps - budget.final_steps
    initial = sum(layer["lora_e"].size for layer in layers.values())
    matrices = sum(layer["lora_e"].size // layer["lora_e"].shape[-1] for layer in layers.values())
    target, counts = budget.target_rank * matrices, np.full(end + 1, -1, np.int32)
    for step in range(start + 1, end + 1):
        if step % budget.every == 0 or step == end:
            left = 1 - (step - start) / (end - start)
            counts[step] = max(initial - int((initial - target) * left**3 + target), 0)
    return counts


def _averages(
    budget: Budget, layers: Triplets, grads: Triplets, state: RankState
) -> tuple[Triplets, Triplets]:
    """Sensitivity and uncertainty after this step (eq. 8 to 10)."""

    def average(beta, old, new):
        return beta * old + (1 - beta) * new

    def product(w, grad):
        return jnp.abs(w.astype(jnp.float32) * grad.astype(jnp.float32))

    now = jax.tree.map(product, layers, grads)
    smooth = jax.tree.map(lambda *x: average(budget.beta1, *x), state.sensitivity, now)
    strays = jax.tree.map(lambda a, b: jnp.abs(a - b), now, smooth)
    return smooth, jax.tree.map(lambda *x: average(budget.beta2, *x), state.uncertainty, strays)


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

    def prune(path, update, param):
        layer, name = _split(path)
        if name != "lora_e":
            return update
        return jnp.where(prunes & ~kept[layer], -param.astype(update.dtype), update)

    return jax.tree_util.tree_map_with_path(prune, updates, params)


def _split(path: tuple[Any, ...]) -> tuple[str, str]:
    """A leaf's layer and name."""
    layer, _, name = jax.tree_util.keystr(path, simple=True, separator=".").rpartition(".")
    return layer, name


def read_budget(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `FIELDS` that an adapter_config.json holds."""
    for name in ("init_r", "total_step"):
        check_number(name, config.get(name), whole=True)
    return {ours: number(config, name, 0) for name, ours in FIELDS.items() if name in config}


def read_ranks(config: Mapping[str, Any]) -> dict[str, int]:
    """How many triplets pruning left, by module; modules that a config says nothing of lack."""
    kept = {}
    for name, left in mapping(config, "rank_pattern").items():
        is_list = isinstance(left, list) and all(isinstance(value, bool) for value in left)
        if not is_list or len(left) != config.get("init_r"):
            raise ValueError(
                f"rank_pattern of {quoted(name)} is {quoted(left)}; it must hold true or false for"
                " each of init_r triplets"
            )
        kept[name.split(".lora_E")[0]] = sum(left)
    return kept


def write_budget(by_name: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `read_budget` and `read_ranks`, of AdaLoRAs by module."""
    first = next(iter(by_name.values()))
    left = {
        f"{name}.lora_E": [i < method.rank for i in range(first.initial_rank)]
        for name, method in by_name.items()
    }
    settings = {name: getattr(first, ours) for name, ours in FIELDS.items()}
    if first.total_steps is None:  # PEFT takes no such; this is the shortest schedule
        settings["total_step"] = first.warmup_steps + first.final_steps + 1
    pruned = any(False in kept for kept in left.values())
    return settings | {"init_r": first.initial_rank, "rank_pattern": left if pruned else None}


def orthogonality(layers: Sequence[Any]) -> Array:
    """The mean over A and B of all layers of |A A^T - I| and |B^T B - I|, Frobenius norms.

    It is eq. 7 as its authors' code and PEFT compute it: norms, not their squares, and a mean.
    """

    def norms(params: Mapping[str, Array], base: Einsum) -> Array:
        _, ins, outs, _ = dims(base)
        lengths = []
        for name, eqn in (("lora_a", f"{ins}r,{ins}s->rs"), ("lora_b", f"r{outs},s{outs}->rs")):
            x = params[name].astype(jnp.float32)
            gram = jnp.einsum(eqn, x, x, precision="highest", out_sharding=spec(None, None))
            lengths.append(jnp.linalg.norm(gram - jnp.eye(len(gram))))
        return jnp.stack(lengths)

    return jnp.mean(jnp.concatenate([layer.map(norms).reshape(-1) for layer in layers]))
