"""Linear maps as einsums, and the embedding table.

Every dense layer of a transformer is one einsum of an activation with a weight whose dimensions
stay unmerged: `"BTD,DNH->BTNH"` for a query projection. `contract` is its matrix product: operands
in one dtype, accumulation in float32 on each device, forward and backward. Autodiff of a bf16
product with a float32 result multiplies a float32 cotangent with bf16 operands, which runs at half
speed; hence the custom rule, which rounds the cotangent to the operands' dtype first.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmprep_jax.nn.param import Compute, add_bias, param
from llmprep_jax.sharding import has_mesh, sharding_of, spec, without_axes
from llmprep_jax.types import Array, Float, Int

fan_in_normal = jax.nn.initializers.lecun_normal
Init = Callable[..., jax.nn.initializers.Initializer]  # (in_axis, out_axis) -> an initialiser
_HIDDEN = ("batch", "seq", "act_embed")
NARROW = 4  # times as many inputs as outputs, and more
FEW = 16  # rows, below which a product of matrices takes as long as reading the weight
PRODUCT = "product"  # name of a `contract`'s result, for what the backward pass keeps


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5))
def contract(
    eqn: str,
    x: Array,
    w: Array,
    dtype: jnp.dtype,
    axes: tuple[str | None, ...],
    out_dtype: str | None = None,
) -> Array:
    """Einsum of `x` and `w` with operands in `dtype`, a float32 sum, and the result in x's dtype.

    On a mesh each device sums in float32 and devices add up their sums in the result's dtype, so
    that bf16 activations cross the network in bf16; the weight's gradient is float32 throughout.

    Args:
      eqn: the einsum, e.g. "BTD,DNH->BTNH"; each input dimension is in the other input or in the
        output.
      axes: logical axes of the result, for its sharding.
      out_dtype: of the result; None: x's.
    """
    return _product(eqn, x, w, dtype, jnp.dtype(out_dtype or x.dtype), axes)


def _product(eqn, x, w, dtype, out_dtype, axes=None, sharding=None, sum_dtype=None):
    x, w = x.astype(dtype), w.astype(dtype)
    matrices = None if has_mesh() else _matrices(eqn)
    # float32 sums whatever the operands are; on TPU and GPU the cast fuses into the product
    if matrices is not None:
        num_in, w_axis, out_axis = matrices
        x_shape, ins = x.shape, math.prod(x.shape[x.ndim - num_in :])
        outs = w.shape[num_in:] if w_axis == 0 else w.shape[: w.ndim - num_in]
        w_matrix = w.reshape(ins, -1) if w_axis == 0 else w.reshape(-1, ins)
        y = multiply(x.reshape(-1, ins), w_matrix, w_axis)
        return y.reshape(*x_shape[:out_axis], *outs).astype(out_dtype)
    if axes is not None:
        inputs, out = eqn.split("->")
        sizes = dict(zip(inputs.replace(",", ""), (*x.shape, *w.shape), strict=True))
        sharding = spec(*axes, shape=[sizes[dim] for dim in out])
    sum_dtype = (sum_dtype or out_dtype) if has_mesh() else jnp.float32
    y = jnp.einsum(eqn, x, w, preferred_element_type=sum_dtype, out_sharding=sharding)
    return y.astype(out_dtype)


def multiply(x: Array, w: Array, w_axis: int) -> Array:
    """Product of two matrices over x's columns and the `w_axis` of w, in float32.

    XLA's CPU compiler multiplies bf16 with w's columns on float32 copies of both (180 GFLOP/s; 90
    with the copying), unless it is written as the transpose of w x^T: then as bf16 (370). In
    float32 that form is the slower one (50 rows, 768 inputs, 3,072 outputs: 116 GFLOP/s, and 190
    as it stands), but for few rows of many inputs. For one row it is a matrix-vector product, in
    bf16 if w's transpose is written out.
    """
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    if w_axis == 0 or len(x) == 1:
        return dot(x, w if w_axis == 0 else w.T, (((1,), (0,)), ((), ())))
    if x.dtype == jnp.float32 and len(x) >= FEW:
        return dot(x, w, (((1,), (1,)), ((), ())))
    return dot(w, x, (((1,), (1,)), ((), ()))).T


@functools.cache
def _matrices(eqn: str) -> tuple[int, int, int] | None:
    """How an einsum is one product of two matrices, None if it is not.

    Several contracted dimensions at once cost XLA's CPU backend a third of its speed at one token
    (7.6 against 25 GB/s for SmolLM2's attention output).

    Returns:
      the number of contracted dimensions, which end x; the axis of w, as a matrix, that they are;
      and the number of x's other dimensions.
    """
    inputs, y_dims = eqn.split("->")
    x_dims, w_dims = inputs.split(",")
    ins = "".join(dim for dim in x_dims if dim not in y_dims)
    rows, outs = x_dims.removesuffix(ins), "".join(dim for dim in w_dims if dim in y_dims)
    if not ins or rows + ins != x_dims or y_dims != rows + outs:
        return None
    if w_dims not in (ins + outs, outs + ins):
        return None
    return len(ins), 0 if w_dims == ins + outs else 1, len(rows)


def _contract_forward(eqn, x, w, dtype, axes, out_dtype):
    # named after its cast: under remat "dots" this is kept, in x's dtype, and not the float32 sum
    y = _product(eqn, x, w, dtype, jnp.dtype(out_dtype or x.dtype), axes)
    return checkpoint_name(y, PRODUCT), (x, w)


def _contract_backward(eqn, dtype, axes, out_dtype, residuals, dy):
    x, w = residuals
    (x_dims, w_dims), y_dims = eqn.split("->")[0].split(","), eqn.split("->")[1]
    dy = dy.astype(dtype)
    dx = _product(f"{y_dims},{w_dims}->{x_dims}", dy, w, dtype, x.dtype, sharding=sharding_of(x))
    dw_eqn, place = f"{x_dims},{y_dims}->{w_dims}", sharding_of(w)
    if not has_mesh() and _is_narrow(eqn, w):
        return dx, _outer(dw_eqn, x.astype(dtype), dy).astype(w.dtype)
    return dx, _product(dw_eqn, x, dy, dtype, w.dtype, sharding=place, sum_dtype=jnp.float32)


def _is_narrow(eqn: str, w: Array) -> bool:
    """Whether a weight has few outputs beside its inputs, as an adapter's first factor."""
    w_dims, y_dims = eqn.split("->")[0].split(",")[1], eqn.split("->")[1]
    outs = math.prod(n for dim, n in zip(w_dims, w.shape, strict=True) if dim in y_dims)
    return NARROW * outs**2 <= w.size


def _outer(eqn: str, x: Array, dy: Array) -> Array:
    """The gradient of a narrow weight, as the transpose of dy^T x.

    XLA's CPU compiler lays the first operand of x^T dy out anew, and takes longer over it than over
    the product (1.8 ms against 0.6 for 512 tokens, 1,536 inputs and 16 outputs).
    """
    (x_dims, y_dims), w_dims = eqn.split("->")[0].split(","), eqn.split("->")[1]
    turned = "".join(sorted(w_dims, key=lambda dim: dim not in y_dims))
    dw = jnp.einsum(f"{y_dims},{x_dims}->{turned}", dy, x, preferred_element_type=jnp.float32)
    # or the compiler takes the transpose back
    return jnp.einsum(f"{turned}->{w_dims}", jax.lax.optimization_barrier(dw))


contract.defvjp(_contract_forward, _contract_backward)


class Projection(nnx.Module):
    """y = einsum(eqn, x, w) + b, for a weight with unmerged dimensions.

    As it is, adapters and packing leave it alone: of what is no nn.Linear in the released model, a
    convolution or attention in one piece. All else is an `Einsum`.

    Args:
      eqn: einsum of the activation and the weight.
      shape: shape of the weight.
      axes: logical axes of the weight.
      out_axes: logical axes of the result.
      bias: whether a bias over the weight's output dimensions is added.
      init: gives the weight's initialiser, by its input and output dimensions.
    """

    def __init__(
        self,
        eqn: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        out_axes: tuple[str | None, ...],
        *,
        bias: bool = False,
        init: Init = fan_in_normal,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.eqn, self.axes, self.out_axes = eqn, axes, out_axes
        self.dtype, self.layer_shape = compute.operand_dtype, tuple(shape)
        w_dims, y_dims = eqn.split("->")[0].split(",")[1], eqn.split("->")[1]
        outputs = [i for i, dim in enumerate(w_dims) if dim in y_dims]
        inputs = [i for i, dim in enumerate(w_dims) if dim not in y_dims]
        initializer = init(in_axis=inputs, out_axis=outputs)
        self.w = param(rngs, shape, axes, initializer, compute.param_dtype)
        # replicated: it is small, and may be added to whatever layout the result has
        b_shape, b_axes = tuple(shape[i] for i in outputs), (None,) * len(outputs)
        zeros = jax.nn.initializers.zeros
        self.b = param(rngs, b_shape, b_axes, zeros, compute.param_dtype) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = contract(self.eqn, x, self.w[...], self.dtype, self.out_axes)
        return y if self.b is None else add_bias(y, self.b[...])


class Einsum(Projection):
    """A linear layer: what adapters go around, and what is packed."""

    is_by_row = False  # whether each row of a batch has a weight of its own, so that there is none
    is_packed = False  # whether the weight is in few bits, see `quant`

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, with a leading axis for a stack of layers."""
        return tuple(self.w.shape)

    def weight(self) -> Float[Array, "..."]:
        """The weight; layers on packed weights unpack it."""
        return self.w[...]

    def with_weight(self, w: Float[Array, "..."]) -> "Einsum":
        """The same layer with another weight, in the dtype of this one."""
        graph, state = nnx.split(self)
        state["w"] = state["w"].replace(w.astype(self.w.dtype))
        return nnx.merge(graph, state)

    def by_output(self) -> "Einsum":
        """The same layer with its weight's output dimensions first.

        XLA's CPU compiler multiplies a few dozen rows by such a weight faster: 50 rows, 768 inputs
        and 3,072 outputs take 1.2 ms of two cores, else 2.1.
        """
        x_dims, w_dims, y_dims = self.eqn.replace("->", ",").split(",")
        order = sorted(range(len(w_dims)), key=lambda i: w_dims[i] not in y_dims)
        turned = self.with_weight(jnp.transpose(self.w[...], order))
        turned.eqn = f"{x_dims},{''.join(w_dims[i] for i in order)}->{y_dims}"
        turned.axes = tuple(self.axes[i] for i in order)
        turned.layer_shape = tuple(self.layer_shape[i] for i in order)
        return turned


class Embed(Einsum):
    """A table of token embeddings, [V, D], and the output head of models that tie it.

    As an einsum it is that of tokens as one-hot vectors.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        std: float = 0.02,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.eqn, self.axes, self.out_axes = "BTV,VD->BTD", ("vocab", "embed"), _HIDDEN
        self.dtype, self.layer_shape, self.b = compute.operand_dtype, (vocab_size, dim), None
        self.compute = compute
        init = jax.nn.initializers.normal(std)
        self.w = param(rngs, self.layer_shape, self.axes, init, compute.param_dtype)

    @property
    def table_dtype(self) -> jnp.dtype:
        """dtype of the table."""
        return self.w.dtype

    @jax.named_scope("embed")
    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks tokens up.

        Raises:
          ValueError: ids outside the vocabulary, where they are known; in compiled code they are
            not, and give the nearest row (XLA clamps).
        """
        check_ids(tokens_BT, self.layer_shape[0])
        return look_up(self.w[...], tokens_BT, self.compute.dtype, _HIDDEN)

    @jax.named_scope("head")
    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits against the same table, float32."""
        return contract_logits("BTD,VD->BTV", x_BTD, self.w[...], self.compute.operand_dtype)


def check_ids(tokens: Array, vocab_size: int) -> None:
    """Raises ValueError for ids outside the vocabulary; traced ones are not known, and pass."""
    if isinstance(tokens, jax.core.Tracer) or not getattr(tokens, "is_fully_addressable", True):
        return
    ids = np.asarray(tokens)
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise ValueError(
            f"token {outside.flat[0]} is outside the vocabulary of {vocab_size}, whose ids are 0 to"
            f" {vocab_size - 1}; use the tokenizer that belongs to the model"
        )


def look_up(
    table: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    dtype: str | jnp.dtype,
    axes: tuple[str | None, ...],
) -> Float[Array, "B T D"]:
    """Rows of a table in `dtype`; `axes` are the logical axes of the result.

    On a mesh the table stays where it is. A device looks up, in its part of the table, the tokens
    of all devices that hold other parts; what crosses the network is tokens there and activations,
    in `dtype`, back. The gradient goes the same way; a device sums it in float32.
    """
    if not has_mesh():
        return _rows(table, tokens_BT).astype(dtype)
    vocab, width = (*jax.typeof(table).sharding.spec, None, None)[:2]
    with without_axes(tuple(jax.tree.leaves((vocab, width)))):
        (rows,) = spec("batch", shape=tokens_BT.shape[:1])

    def run(table_VD: Array, tokens_BT: Array) -> Array:
        if vocab is None:
            return _rows(table_VD, tokens_BT).astype(dtype)
        num_rows = len(table_VD)
        at_BT = _in_range(tokens_BT, table.shape[0]) - jax.lax.axis_index(vocab) * num_rows
        is_here_BT1 = ((at_BT >= 0) & (at_BT < num_rows))[..., None]
        found_BTD = _rows(table_VD, jnp.clip(at_BT, 0, num_rows - 1))
        return jax.lax.psum(jnp.where(is_here_BT1, found_BTD, 0).astype(dtype), vocab)

    in_specs, out_specs = (jax.P(vocab, width), jax.P(rows, None)), jax.P(rows, None, width)
    tokens_BT = jax.reshard(tokens_BT, in_specs[1])
    x_BTD = jax.shard_map(run, in_specs=in_specs, out_specs=out_specs)(table, tokens_BT)
    return jax.reshard(x_BTD, spec(*axes, shape=x_BTD.shape))


def _rows(table_VD: Array, ids_BT: Array) -> Float[Array, "B T D"]:
    # in `jax.shard_map` both vary over the same devices, as the custom rule wants it
    varying = [jax.typeof(x).manual_axis_type.varying for x in (table_VD, ids_BT)]
    missing = tuple(varying[1] - varying[0])
    table_VD = jax.lax.pcast(table_VD, missing, to="varying") if missing else table_VD
    return _gather(table_VD, ids_BT)


@jax.custom_vjp
def _gather(table_VD: Array, ids_BT: Array) -> Array:
    """Rows of a table, whose gradient is summed in float32 whatever the table is."""
    return table_VD.at[ids_BT].get()


def _gather_forward(table_VD, ids_BT):
    return _gather(table_VD, ids_BT), (table_VD, ids_BT)


def _gather_backward(residuals, dx_BTD):
    table_VD, ids_BT = residuals
    sums_VD = jnp.zeros_like(table_VD, jnp.float32).at[ids_BT].add(dx_BTD.astype(jnp.float32))
    return sums_VD.astype(table_VD.dtype), None


_gather.defvjp(_gather_forward, _gather_backward)


def _in_range(ids: Int[Array, "..."], size: int) -> Int[Array, "..."]:
    """Indices as indexing takes them: from the end where negative, and the nearest one outside."""
    return jnp.clip(jnp.where(ids < 0, ids + size, ids), 0, size - 1)


def contract_logits(
    eqn: str, x_BTD: Float[Array, "B T D"], w: Float[Array, "..."], dtype: jnp.dtype
) -> Float[Array, "B T V"]:
    """The output head: `contract` whose result stays in float32, for the softmax and the loss."""
    return contract(eqn, x_BTD, w, dtype, ("batch", "seq", "vocab"), "float32")


class Head(Einsum):
    """An output head of its own, [D, V], for models whose embeddings are not tied."""

    def __init__(self, dim: int, vocab_size: int, *, compute: Compute, rngs: nnx.Rngs):
        shape, axes, kind = (dim, vocab_size), ("embed", "vocab"), dict(compute=compute, rngs=rngs)
        super().__init__("BTD,DV->BTV", shape, axes, ("batch", "seq", "vocab"), **kind)

    @jax.named_scope("head")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return contract_logits(self.eqn, x_BTD, self.w[...], self.dtype)
