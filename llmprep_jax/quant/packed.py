"""What every packed weight has in common: a matrix of which rows can be had without the rest.

A packed weight is a frozen dataclass whose fields are arrays (codes, scales) and static settings;
it stands for a matrix [O, I], outputs by inputs as Hugging Face stores it. A leading axis of all
arrays makes it a stack of matrices (`jax.vmap` of a quantiser, or what `jax.lax.scan` slices).
Letters: O outputs, I inputs, R rows of a tile, G groups of g inputs. `shape` is that of one matrix,
stacked or not, since a static field cannot know how often it was mapped over.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from llmprep_jax.sharding import has_mesh
from llmprep_jax.types import Array, Float


def static() -> Any:
    """A field that is part of a dataclass's type and no array of it."""
    return dataclasses.field(metadata={"static": True})


class Packed:
    """A matrix in few bits; the subclasses are the formats.

    Attributes:
      codes: an array of the format, with `CODES_NDIM` dimensions in one matrix.
      shape: (O, I) of one matrix.
      kind: the format's name.
      row_step: tiles of rows must begin at a multiple of it.
    """

    CODES_NDIM = 2
    codes: Array
    shape: tuple[int, int]
    kind: str
    row_step = 1

    def rows(self, start: int | Array, count: int) -> Float[Array, "R I"]:
        """`count` rows from `start` on, in float32; the last tile may begin at any row_step."""
        raise TypeError(f"{type(self).__name__} has no rows")

    @property
    def is_split(self) -> bool:
        """Whether `tile` has the even inputs first, and then the odd ones."""
        return False

    def tile(self, start: int | Array, count: int) -> Float[Array, "R I"]:
        """`rows`, with the inputs in whatever order is had fastest; x follows by `arrange`."""
        return self.rows(start, count)

    def arrange(self, x: Float[Array, "... I"]) -> Float[Array, "... I"]:
        """Activations with their inputs in the order of `tile`."""
        return jnp.concatenate([x[..., ::2], x[..., 1::2]], axis=-1) if self.is_split else x

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the leading axes that all arrays have beyond those of one matrix."""
        return self.codes.shape[: self.codes.ndim - self.CODES_NDIM]

    def arrays(self) -> dict[str, Array]:
        """The array fields by name, without those that this weight does not use."""
        fields = [f.name for f in dataclasses.fields(self) if not f.metadata.get("static")]
        arrays = {name: getattr(self, name) for name in fields}
        return {name: value for name, value in arrays.items() if value is not None}

    def settings(self) -> tuple[tuple[str, Any], ...]:
        """The static fields, as pairs."""
        fields = [f.name for f in dataclasses.fields(self) if f.metadata.get("static")]
        return tuple((name, getattr(self, name)) for name in fields)

    @classmethod
    def of(cls, settings: tuple[tuple[str, Any], ...], arrays: dict[str, Array]) -> "Packed":
        """The inverse of `settings` and `arrays`."""
        fields = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]
        return cls(**{name: arrays.get(name) for name in fields}, **dict(settings))

    @property
    def num_bytes(self) -> int:
        """Of all arrays; of an abstract weight too."""
        return sum(x.size * x.dtype.itemsize for x in self.arrays().values())


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(packed: Packed, dtype: str | jnp.dtype = "float32") -> Float[Array, "..."]:
    """The matrix [O, I], or the stack of matrices, that a packed weight stands for."""

    def one(packed: Packed) -> Array:
        return packed.rows(0, packed.shape[0]).astype(dtype)

    for _ in packed.stacked:
        one = jax.vmap(one)
    return one(packed)


def whole(arrays: Any) -> Any:
    """A tree of arrays whole on every device; as it is without a mesh."""
    return jax.tree.map(lambda x: jax.reshard(x, jax.P()), arrays) if has_mesh() else arrays


def check_matrix(w: Array) -> Float[Array, "O I"]:
    """A weight in float32.

    Raises:
      ValueError: it is no matrix of floats.
    """
    if w.ndim != 2 or not w.size or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(
            f"a weight of shape {tuple(w.shape)} and dtype {w.dtype} cannot be quantised; give a"
            " matrix of floats, outputs by inputs"
        )
    return jnp.asarray(w).astype(jnp.float32)


def check_positive(label: str, value: Any, *, even: bool = False) -> None:
    """Refuses what is no whole number from 1 on, or from 2 on an even one."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < 1 or (even and value % 2):
        kind = "an even number of at least 2" if even else "a whole number of at least 1"
        raise ValueError(f"{label} is {value!r}; it must be {kind}")


def pack_nibbles(codes: Array) -> Array:
    """Numbers 0 to 15 two a byte along the last axis, the even element in the high half."""
    pad = [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)]
    codes = jnp.pad(codes.astype(jnp.uint8), pad)
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpack_nibbles(packed: Array) -> tuple[Array, Array]:
    """The even and the odd numbers of what `pack_nibbles` packed."""
    return packed >> 4, packed & 15


def interleave(even: Array, odd: Array) -> Array:
    """even[0], odd[0], even[1], ... along the last axis."""
    return jnp.stack([even, odd], axis=-1).reshape(*even.shape[:-1], -1)


def in_groups(x: Float[Array, "R I"], group: int) -> Float[Array, "R G g"]:
    """Rows cut into groups, the last filled up with zeros."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(x.shape[0], -1, group)


def slice_rows(x: Array, start: int | Array, count: int) -> Array:
    """`count` rows of an array from `start` on, which may be traced."""
    if isinstance(start, int) and start == 0 and count == x.shape[0]:
        return jnp.asarray(x)
    return jax.lax.dynamic_slice_in_dim(x, start, count)
