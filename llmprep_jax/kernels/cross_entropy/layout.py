"""Where the tokens and the weights of a head lie on a mesh, and what devices exchange."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.kernels.cross_entropy.head import Sums


class Layout(NamedTuple):
    """The mesh axes that tokens, words and the model dimension of the weights are laid over.

    Tokens are on no axis that words are on: devices that share the vocabulary see the same ones.
    """

    tokens: tuple[str, ...]
    words: tuple[str, ...]
    model: tuple[str, ...]
    w_axis: int

    def by_token(self) -> jax.P:
        """Of numbers a token, [N]."""
        return jax.P(self.tokens or None)

    def of_x(self) -> jax.P:
        return jax.P(self.tokens or None, None)

    def of_w(self) -> jax.P:
        model, words = self.model or None, self.words or None
        return jax.P(model, words) if self.w_axis == 0 else jax.P(words, model)

    def of_logits(self) -> jax.P:
        return jax.P(self.tokens or None, self.words or None)

    def first_word(self, w: jax.Array) -> jax.Array | int:
        """The id of the first word whose weights are here."""
        here = w.shape[1 - self.w_axis]
        return jax.lax.axis_index(self.words) * here if self.words else 0

    def gather(self, w_C: jax.Array) -> jax.Array:
        """A chunk of weights, whole along the model dimension."""
        for axis in reversed(self.model):
            w_C = jax.lax.all_gather(w_C, axis, axis=self.w_axis, tiled=True)
        return w_C

    def reduce(self, dw_C: jax.Array) -> jax.Array:
        """A chunk's gradient: the sum over all tokens, of which this device keeps its part."""
        for axis in self.model:
            if axis in self.tokens:
                dw_C = jax.lax.psum_scatter(dw_C, axis, scatter_dimension=self.w_axis, tiled=True)
            else:  # devices along it have the same tokens
                size = dw_C.shape[self.w_axis] // jax.lax.axis_size(axis)
                start = jax.lax.axis_index(axis) * size
                dw_C = jax.lax.dynamic_slice_in_dim(dw_C, start, size, self.w_axis)
        rest = tuple(axis for axis in self.tokens if axis not in self.model)
        return jax.lax.psum(dw_C, rest) if rest else dw_C

    def add_up(self, sums: Sums) -> Sums:
        """Over the devices that share the vocabulary."""
        if not self.words:
            return sums
        top_N = jax.lax.pmax(sums.lse_N, self.words)
        lse_N = top_N + jnp.log(jax.lax.psum(jnp.exp(sums.lse_N - top_N), self.words))
        return Sums(lse_N, *jax.lax.psum(sums[1:], self.words))


def layout_of(x_ND: jax.Array, w: jax.Array, w_axis: int) -> Layout:
    """The layout of arrays as they lie; on no axis without a mesh, and inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return Layout((), (), (), w_axis)
    x_axes, w_axes = [
        [(axes,) if isinstance(axes, str) else axes or () for axes in (*spec, None, None)[:2]]
        for spec in (jax.typeof(x_ND).sharding.spec, jax.typeof(w).sharding.spec)
    ]
    words = w_axes[1 - w_axis]
    tokens = tuple(axis for axis in x_axes[0] if axis not in words)
    return Layout(tokens, words, w_axes[w_axis], w_axis)


def sizes_here(x_ND: jax.Array, w: jax.Array, layout: Layout) -> tuple[int, int]:
    """Tokens and words of one device."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    tokens, words = len(x_ND), w.shape[1 - layout.w_axis]
    for axis in layout.tokens:
        tokens //= sizes[axis]
    for axis in layout.words:
        words //= sizes[axis]
    return tokens, words
