"""A linear layer with several adapters, of which each row of a batch may take another.

The layer's LoRAs are stacked, those of lower rank filled up with zeros, each row takes its own A
and B (S-LoRA, Sheng et al. 2023, section 5) and the base multiplies the batch once. With other
methods the layer computes the batch once an adapter, and each row takes its own. Which row has
which adapter is an array, not structure, so other names for as many rows compile nothing anew.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.linear import Einsum, contract
from llmprep_jax.nn.param import Shared
from llmprep_jax.peft.adapter import Adapted, drop
from llmprep_jax.peft.layout import dims
from llmprep_jax.peft.method import Method
from llmprep_jax.peft.targets import Number
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Float


class Several(Adapted):
    """A linear layer and several adapters around it.

    Args:
      order: the names of all adapters of the model; a row's number is its name's place here, from 1
        on, and 0 is the base.
      parts: the adapters around this layer, by name.
      rows: the numbers of a batch's rows, if they are chosen.
    """

    def __init__(
        self,
        base: Einsum,
        order: tuple[str, ...],
        parts: Mapping[str, Adapted],
        rows: Array | None = None,
    ):
        self.base, self.order = base, order
        self.methods = tuple((name, part.method, part.kept) for name, part in parts.items())
        self.parts = nnx.Dict({name: nnx.Dict(_variables(part)) for name, part in parts.items()})
        self.rows = None if rows is None else Shared(rows)
        self.key = None

    @property
    def method(self) -> Method:
        """There is no one method.

        Raises:
          ValueError: always.
        """
        raise self._unchosen()

    @property
    def is_by_row(self) -> bool:
        """Whether each row of a batch has an adapter of its own."""
        return self.rows is not None

    def weight(self) -> Float[Array, "..."]:
        """There is no one weight.

        Raises:
          ValueError: always.
        """
        if self.rows is None:
            raise self._unchosen()
        raise ValueError(
            f"{self.base.eqn} is used by its weight, of which adapters by row have none; select one"
            " adapter for the whole batch"
        )

    def _unchosen(self) -> ValueError:
        return ValueError(
            f"the model holds several adapters: {', '.join(self.order)}; choose one by"
            " lp.peft.select(model, name), or merge by lp.peft.merge(model, {name: weight})"
        )

    def each(self) -> dict[str, Adapted]:
        """The layer with each adapter alone."""
        by_name = {}
        for name, method, kept in self.methods:
            by_name[name] = adapted = Adapted(self.base, method, {}, kept=kept)
            adapted.names = tuple(self.parts[name])
            for key, variable in self.parts[name].items():
                setattr(adapted, key, variable.replace(variable.get_value()))
        return by_name

    def owned(self) -> dict[str, Adapted]:
        return {f"parts.{name}": adapted for name, adapted in self.each().items()}

    def settled(self) -> "Several":
        parts = {name: adapted.settled() for name, adapted in self.each().items()}
        return Several(self.base, self.order, parts, None if self.rows is None else self.rows[...])

    def by_row(self, rows: Array) -> "Several":
        """The layer with an adapter for each row of a batch."""
        return Several(self.base, self.order, self.each(), rows)

    def check_weights(self, weights: Mapping[str, Number] | None) -> None:
        """Refuses a merge without weights, and weights of unknown names.

        Raises:
          ValueError: there are none, or one of an unknown name.
        """
        if weights is None:
            raise self._unchosen()
        check_weights(self.order, weights)

    def merged(self, weights: Mapping[str, Any] | None = None) -> tuple[Array, Array | None]:
        """(weight, bias) in float32: the base's plus the sum of w (merged - base)."""
        base, bias = self.base.weight().astype(jnp.float32), self.base.b
        bias = None if bias is None else bias[...].astype(jnp.float32)
        weight_sum, bias_sum = base, bias
        for name, adapted in self.each().items():
            if name in weights:
                weight, b = adapted.merged()
                weight_sum = weight_sum + weights[name] * (weight - base)
                bias_sum = None if bias is None else bias_sum + weights[name] * (b - bias)
        return weight_sum, bias_sum

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        rows, by_name = self._rows(x), self.each()
        loras = {name: adapted for name, adapted in by_name.items() if _is_plain(adapted.method)}
        y = self.base(x)
        if loras:
            y = y + self._added(loras, rows, self._dropped(loras, rows, x))
        for name in (name for name in by_name if name not in loras):
            own = rows == self.order.index(name) + 1
            own = jax.reshard(own, spec("batch", shape=own.shape)) if has_mesh() else own
            by_name[name].key = self.key
            y = jnp.where(own.reshape(-1, *[1] * (y.ndim - 1)), by_name[name](x), y)
        return y

    def _dropped(self, loras: Mapping[str, Adapted], rows: Array, x: Array) -> Array:
        """The inputs of LoRAs, each row's after the dropout of its own."""
        if self.key is None:
            return x
        rates = np.zeros(len(self.order) + 1, np.float32)
        for name, adapted in loras.items():
            rates[self.order.index(name) + 1] = adapted.method.dropout
        rate = jnp.asarray(rates)[rows].reshape(-1, *[1] * (x.ndim - 1))
        return drop(x, rate, self.key[...])

    def _rows(self, x: Array) -> Array:
        """Which adapter each row of a batch has, as numbers."""
        if self.rows is None:
            raise self._unchosen()
        if x.shape[0] != self.rows.shape[0]:
            raise ValueError(
                f"adapters are selected for {self.rows.shape[0]} rows and the batch has"
                f" {x.shape[0]}; give lp.peft.select(model, names) a name, or None, for each row"
            )
        return self.rows[...]

    def _added(self, loras: Mapping[str, Adapted], rows: Array, x: Array) -> Array:
        """What each row's LoRA adds to the layer's result."""
        x_dims, ins, outs, y_dims = dims(self.base)
        row, kept = x_dims[0], "".join(dim for dim in y_dims if dim not in outs)
        rank = max(adapted.method.rank for adapted in loras.values())
        place = np.zeros(len(self.order) + 1, np.int32)  # the base's rows, and other methods'
        place[[self.order.index(name) + 1 for name in loras]] = np.arange(len(loras)) + 1
        at_B = jnp.asarray(place)[rows]
        a = [_padded(adapted.lora_a[...], len(ins), rank) for adapted in loras.values()]
        b = [
            _padded(adapted.lora_b[...].astype(jnp.float32) * adapted.method.scale, 0, rank)
            for adapted in loras.values()
        ]
        axes, dtype = self.base.out_axes, self.base.dtype
        eqns = f"{x_dims},{row}{ins}r->{kept}r", f"{kept}r,{row}r{outs}->{y_dims}"
        low = contract(eqns[0], x, _take(a, at_B), dtype, (*axes[: len(kept)], None))
        return contract(eqns[1], low, _take(b, at_B), dtype, axes)


def _is_plain(method: Method) -> bool:
    """Whether a method is LoRA, and adds s B A and nothing else."""
    return method.adds_product and not method.takes_part


def _variables(part: Adapted) -> dict[str, nnx.Variable]:
    """An adapter's variables, of the classes that they have."""
    variables = {name: getattr(part, name) for name in part.names}
    return {name: variable.replace(variable.get_value()) for name, variable in variables.items()}


def _padded(factor: Array, axis: int, rank: int) -> Array:
    """A factor filled up to a rank, whole on every device."""
    factor = jax.reshard(factor, spec(*[None] * factor.ndim)) if has_mesh() else factor
    more = rank - factor.shape[axis]
    return jnp.pad(factor, [(0, more if i == axis else 0) for i in range(factor.ndim)])


def _take(factors: Sequence[Array], at_B: Array) -> Array:
    """For each row one of these, counted from 1 on; 0 gives zeros."""
    stacked = jnp.stack([jnp.zeros_like(factors[0]), *factors])
    shape = (*at_B.shape, *factors[0].shape)
    return stacked.at[at_B].get(out_sharding=spec("batch", *[None] * factors[0].ndim, shape=shape))


def check_names(known: Sequence[str], asked: Iterable[str | None]) -> None:
    """Refuses a name that no adapter has."""
    for name in asked:
        if name is not None and name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.3) or known
            raise ValueError(f"no adapter is named {name!r}; near names: {', '.join(near)}")


def check_weights(known: Sequence[str], weights: Mapping[str, Number]) -> None:
    """Refuses weights of unknown names, none, or what is no finite number."""
    check_names(known, weights)
    if not weights:
        raise ValueError(f"no weights are given; give some of {', '.join(known)} a number")
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} is {weight!r}; it must be a finite number")
