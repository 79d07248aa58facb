"""Losses of two towers over all pairs of a batch: InfoNCE both ways (CLIP) and SigLIP's sigmoids.

Logits are z_ij = factor x_i y_j + bias of image i and text j. InfoNCE (Radford et al. 2021, figure
3) is the mean of two cross-entropies, of each image over the texts and of each text over the
images. SigLIP (Zhai et al. 2023, section 3.1) is -sum_ij log sigmoid(+-z_ij) / B: over B, not B^2.

Rows lie on many devices and each is held against all others. "gather" brings all texts to each
device, which then has B / n x B logits. "ring" (section 3.3) passes texts from neighbour to
neighbour: a device never has more than B / n x `chunk` of them, computes them once more for the
gradient, and what a text gathers travels with it. Gradients of factor and bias are summed over
devices once, by the rule below; autodiff of a sum over devices would do it twice.

Letters of this file: I images and J texts of a device or a piece of them, E width of their space.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from llmprep_jax.config import settle
from llmprep_jax.peft.training import train_mode
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.train.batches import normalize_images
from llmprep_jax.train.losses import LossSum
from llmprep_jax.types import Array, Float

Kind = Literal["softmax", "sigmoid"]
Form = Literal["gather", "ring"]
Axes = tuple[str, ...]
MOST_SCALE = math.log(100)  # CLIP, section 2.5
HALF = (0.5, 0.5, 0.5)


class Pairs(NamedTuple):
    """What a loss over all pairs is of: unit vectors [B, E], and two scalars; float32.

    A model without a bias has None.
    """

    images: Array
    texts: Array
    factor: Array
    bias: Array | None


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """The loss of a run that trains two towers.

    Attributes:
      kind: "softmax" (CLIP) or "sigmoid" (SigLIP); None: as the model's family has it.
      form: "gather" brings all texts to each device, "ring" passes them on: less memory, more
        messages. chunk: texts that the ring holds against a device's images at once; None: all that
        arrive.
    """

    kind: Kind | None = None
    form: Form = "gather"
    chunk: int | None = None

    def __post_init__(self):
        settle(self)
        if self.chunk is not None and (self.chunk < 1 or self.form != "ring"):
            raise ValueError(f"chunk={self.chunk} with form={self.form}; texts at a time of a ring")


@dataclasses.dataclass(frozen=True)
class ContrastiveLoss:
    """`loss_fn(model, batch, key) -> LossSum` of two towers, for `train.Trainer`.

    A batch has tokens [B, T], perhaps mask [B, T], and images [B, H, W, 3] or [B, 1, H, W, 3]; of
    uint8 they are normalised on the device. Losses are of whole batches: `accumulate` must be 1.

    Attributes:
      kind: "softmax" or "sigmoid"; None: "sigmoid" where the model has a bias.
      form: "gather" or "ring". chunk: texts that the ring holds against a device's images at once;
        None: all that arrive.
      mean, std, scale: of the images' normalisation, as the model's processor has it.
      most_scale: the log of the factor is held to at most this in softmax; None: it is not.
    """

    kind: Kind | None = None
    form: Form = "gather"
    chunk: int | None = None
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF
    most_scale: float | None = MOST_SCALE
    scale: float = 1 / 255

    def __call__(self, model: Any, batch: Mapping[str, Array], key: jax.Array) -> LossSum:
        pairs = self.encode(train_mode(model, key), batch)
        return LossSum(self.total(pairs), jnp.float32(len(pairs.images)))

    def encode(self, model: Any, batch: Mapping[str, Array]) -> Pairs:
        """What a model makes of a batch."""
        how = self.mean, self.std, self.scale
        images = normalize_images(_one_each(batch["images"]), *how)
        texts_BE = model.encode_text(batch["tokens"], batch.get("mask"))
        return Pairs(model.encode_image(images), texts_BE, *model.similarity())

    def total(self, pairs: Pairs) -> Float[Array, ""]:
        """B times the loss."""
        factor = pairs.factor
        kind = self.kind or ("softmax" if pairs.bias is None else "sigmoid")
        if kind == "softmax" and self.most_scale is not None:
            factor = jnp.exp(hold(jnp.log(factor), self.most_scale))
        vectors = pairs.images, pairs.texts
        return sum_pairs(*vectors, factor, pairs.bias, kind, self.form, self.chunk)


def make_loss(**options: Any) -> ContrastiveLoss:
    """The loss of two towers; options are the attributes of `ContrastiveLoss`."""
    return ContrastiveLoss(**options)


def _one_each(images: Array) -> Array:
    """[B, H, W, 3] of rows that have one image each."""
    if images.ndim == 5:
        if images.shape[1] != 1:
            raise ValueError(f"images {images.shape}: a text goes with one image, [B, 1, H, W, 3]")
        return images[:, 0]
    return images


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def hold(x: Float[Array, ""], most: float) -> Float[Array, ""]:
    """min(x, most), whose gradient is x's own where that lowers x: above `most` it still returns.

    A plain minimum would leave x where one step too far took it.
    """
    return jnp.minimum(x, most)


def _hold_forward(x, most):
    return hold(x, most), x


def _hold_backward(most, x, dy):
    return (jnp.where(x > most, jnp.maximum(dy, 0), dy),)


hold.defvjp(_hold_forward, _hold_backward)


@jax.named_scope("contrastive")
def sum_pairs(
    images_BE: Float[Array, "B E"],
    texts_BE: Float[Array, "B E"],
    factor: Float[Array, ""],
    bias: Float[Array, ""] | None,
    kind: Kind,
    form: Form = "gather",
    chunk: int | None = None,
) -> Float[Array, ""]:
    """B times the loss of a batch whose image i goes with text i.

    Args:
      factor, bias: of the logits; softmax has no use for a bias, which sigmoid must have.

    Raises:
      ValueError: an unknown kind or form, or sigmoid without a bias.
    """
    if kind not in _RULES or form not in ("gather", "ring"):
        raise ValueError(f"kind={kind!r}, form={form!r}; softmax or sigmoid, gather or ring")
    if kind == "sigmoid" and bias is None:
        raise ValueError("the sigmoid loss needs a bias, which this model has not; use softmax")
    bias = jnp.zeros_like(factor) if bias is None else bias
    pairs = Pairs(*[x.astype(jnp.float32) for x in (images_BE, texts_BE, factor, bias)])
    if form == "gather":
        return _sum_gathered(pairs, kind)
    return _sum_ring(pairs, kind, chunk)


def _sum_gathered(pairs: Pairs, kind: Kind) -> Array:
    images_IE, texts_JE, factor, bias = pairs
    if has_mesh():
        texts_JE = jax.reshard(texts_JE, jax.P(None, None))
    by_row = spec("batch", None, shape=(len(images_IE), len(texts_JE)))
    z_IJ = _dots(images_IE, texts_JE, by_row) * factor + bias
    own = _own_logits(pairs)
    if kind == "sigmoid":
        return jnp.sum(jax.nn.softplus(z_IJ)) - own
    both = [jnp.sum(jax.nn.logsumexp(z_IJ, axis=axis)) for axis in (0, 1)]
    return sum(both) / 2 - own


def _dots(x_IE: Array, y_JE: Array, sharding: Any = None) -> Array:
    # exact: a factor of 100 makes 0.2 of a bf16 product's rounding
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("IE,JE->IJ", x_IE, y_JE, precision=exact, out_sharding=sharding)


def _own_logits(pairs: Pairs) -> Array:
    """The sum of z_ii."""
    dots_I = jnp.sum(pairs.images * pairs.texts, axis=1)
    return jnp.sum(dots_I * pairs.factor + pairs.bias)


class Rule(NamedTuple):
    """A loss by pieces of pairs; both functions are of the logits [I, J] of one.

    Attributes:
      add: (z, what images have, what texts have) -> the same with these pairs counted.
      slope: (z, what images have, what texts have, at the end) -> d loss / d z but for own pairs.
      end: what images and texts have -> B times the loss but for own pairs.
    """

    add: Callable[[Array, Array, Array], tuple[Array, Array]]
    slope: Callable[[Array, Array, Array], Array]
    end: Callable[[Array, Array], Array]
    start: float


def _add_softmax(z_IJ, rows_I, columns_J):
    rows_I = jnp.logaddexp(rows_I, jax.nn.logsumexp(z_IJ, axis=1))
    return rows_I, jnp.logaddexp(columns_J, jax.nn.logsumexp(z_IJ, axis=0))


def _slope_softmax(z_IJ, rows_I, columns_J):
    return (jnp.exp(z_IJ - rows_I[:, None]) + jnp.exp(z_IJ - columns_J)) / 2


_RULES = {
    "softmax": Rule(
        _add_softmax, _slope_softmax, lambda rows, columns: jnp.sum(rows + columns) / 2, -math.inf
    ),
    "sigmoid": Rule(
        lambda z_IJ, rows_I, columns_J: (
            rows_I + jnp.sum(jax.nn.softplus(z_IJ), axis=1),
            columns_J,
        ),
        lambda z_IJ, rows_I, columns_J: jax.nn.sigmoid(z_IJ),
        lambda rows, columns: jnp.sum(rows),
        0.0,
    ),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _sum_ring(pairs: Pairs, kind: Kind, chunk: int | None) -> Array:
    return _ring_forward(pairs, kind, chunk)[0]


def _ring_forward(pairs, kind, chunk):
    rule = _RULES[kind]

    def run(pairs: Pairs, axes: Axes) -> tuple[Array, Array, Array]:
        start_I = jnp.full_like(pairs.images[:, 0], rule.start)

        def meet(rows_I, texts):
            y_JE, columns_J = texts
            z_IJ = _dots(pairs.images, y_JE) * pairs.factor + pairs.bias
            rows_I, columns_J = rule.add(z_IJ, rows_I, columns_J)
            return rows_I, (y_JE, columns_J)

        rows_I, (_, columns_I) = _go_round(meet, start_I, (pairs.texts, start_I), chunk, axes)
        total = rule.end(rows_I, columns_I) - _own_logits(pairs)
        return _sum_devices(total, axes), rows_I, columns_I

    total, rows_B, columns_B = _on_shards(run, (pairs,), (0, 1, 1))
    return total, (pairs, rows_B, columns_B)


def _ring_backward(kind, chunk, residuals, dtotal):
    rule = _RULES[kind]

    def run(pairs: Pairs, rows_I: Array, columns_I: Array, axes: Axes) -> tuple[Array, ...]:
        x_IE, factor = pairs.images, pairs.factor
        zero = jnp.zeros_like(x_IE[0, 0])

        def meet(sums, texts):
            dx_IE, dfactor, dbias = sums
            y_JE, columns_J, dy_JE = texts
            dots_IJ = _dots(x_IE, y_JE)
            dz_IJ = rule.slope(dots_IJ * factor + pairs.bias, rows_I, columns_J)
            dx_IE += factor * _dots(dz_IJ, y_JE.T)
            dy_JE += factor * _dots(dz_IJ.T, x_IE.T)
            sums = dx_IE, dfactor + jnp.sum(dz_IJ * dots_IJ), dbias + jnp.sum(dz_IJ)
            return sums, (y_JE, columns_J, dy_JE)

        texts = (pairs.texts, columns_I, jnp.zeros_like(pairs.texts))
        sums = (jnp.zeros_like(x_IE), zero, zero)
        (dx_IE, dfactor, dbias), (*_, dy_IE) = _go_round(meet, sums, texts, chunk, axes)
        # own pairs: z_ii counts once more, negatively
        dx_IE, dy_IE = dx_IE - factor * pairs.texts, dy_IE - factor * x_IE
        dfactor -= jnp.sum(x_IE * pairs.texts)
        dbias -= len(x_IE)
        return dx_IE, dy_IE, _sum_devices(dfactor, axes), _sum_devices(dbias, axes)

    pairs, rows_B, columns_B = residuals
    grads = _on_shards(run, (pairs, rows_B, columns_B), (1, 1, 0, 0))
    return (jax.tree.map(lambda grad: dtotal * grad, Pairs(*grads)),)


_sum_ring.defvjp(_ring_forward, _ring_backward)


def _on_shards(run: Callable, args: tuple, outs: tuple[int, ...]) -> Any:
    """`run(*args, axes)` on each device's rows; `outs` says which results are of rows."""
    pairs, *of_rows = args
    if not has_mesh():
        return run(*args, axes=())
    (axes,) = spec("batch", shape=pairs.images.shape[:1])
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    rows, all_same = jax.P(axes or None), jax.P()
    in_specs = Pairs(rows, rows, all_same, all_same), *[rows for _ in of_rows]
    placed = jax.tree.map(jax.reshard, args, in_specs)
    out_specs = tuple(rows if is_row else all_same for is_row in outs)
    run = functools.partial(run, axes=axes)
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs)(*placed)


def _go_round(meet: Callable, own: Any, texts: Any, chunk: int | None, axes: Axes) -> Any:
    """`own, texts = meet(own, texts)` with the texts of every device, which come home at the end.

    Args:
      own: what stays. texts: arrays of J rows, which travel. chunk: of them at a time.
    """
    num_texts = len(jax.tree.leaves(texts)[0])
    most = min(chunk or num_texts, num_texts)
    pieces = next(
        n for n in range(1, num_texts + 1) if n * most >= num_texts and num_texts % n == 0
    )

    def meet_all(own, texts):
        if pieces == 1:
            return meet(own, texts)
        cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), texts)
        own, cut = jax.lax.scan(meet, own, cut)
        return own, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), cut)

    num_devices = math.prod(jax.lax.axis_size(axis) for axis in axes)
    if num_devices == 1:
        return meet_all(own, texts)
    to_next = [(device, (device + 1) % num_devices) for device in range(num_devices)]

    def hop(both, _):
        own, texts = meet_all(*both)
        return (own, jax.tree.map(lambda x: jax.lax.ppermute(x, axes, to_next), texts)), None

    return jax.lax.scan(hop, (own, texts), length=num_devices)[0]


def _sum_devices(x: Array, axes: Axes) -> Array:
    return jax.lax.psum(x, axes) if axes else x


def all_but(*paths: str) -> Callable[[tuple, Any], bool]:
    """What is trained where towers are frozen (LiT: Zhai et al. 2022), for `Trainer(trainable=)`.

    Args:
      paths: of what is frozen, e.g. "vision".

    Returns:
      A filter: parameters that are not below these paths.
    """

    def trains(path: tuple, variable: Any) -> bool:
        name = ".".join(map(str, path))
        return not any(name == path or name.startswith(f"{path}.") for path in paths)

    return trains
