"""Pre-norm encoders of images and texts (Dosovitskiy et al. 2021): patches, positions, blocks, and
attention pooling (Lee et al. 2019, section 3.2, as SigLIP has it).

A patch embedding is a convolution whose stride is its width, so one product of flattened patches;
pixels beyond the last whole patch are dropped. A class token is the first row of the positions'
table with that row's own vector added: what is added to all images is added in float32, and summed
so in the backward pass.

Letters of this file: I tokens of an image, S tokens with the class token, P and Q rows and columns
of a patch, C colours.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.kernels.flash_attention import attention
from llmprep_jax.nn.attention import Attention, Tokens
from llmprep_jax.nn.linear import Init, Projection, fan_in_normal
from llmprep_jax.nn.media import of_rows
from llmprep_jax.nn.mlp import Mlp
from llmprep_jax.nn.norm import LayerNorm
from llmprep_jax.nn.param import Compute, add_bias, param
from llmprep_jax.nn.remat import BLOCK_IN, MLP_IN, keep
from llmprep_jax.nn.stack import depth, scan, take
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Bool, Float, Int


class Inits(NamedTuple):
    """Of a block's weights: queries, keys and values; attention's output; the MLP's two."""

    qkv: Init = fan_in_normal
    out: Init = fan_in_normal
    up: Init = fan_in_normal
    down: Init = fan_in_normal


PLAIN = Inits()


def normal(std: float) -> Init:
    """Normal weights, whatever their sizes are."""
    return lambda **_: jax.nn.initializers.normal(std)


class Block(nnx.Module):
    """x <- x + Attention(LayerNorm(x)); x <- x + Mlp(LayerNorm(x)), with biases throughout."""

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        num_heads: int,
        *,
        act: str,
        norm_eps: float,
        causal: bool = False,
        inits: Inits = PLAIN,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        kind = dict(compute=compute, rngs=rngs)
        norm = functools.partial(
            LayerNorm, dim, eps=norm_eps, param_dtype=compute.param_dtype, rngs=rngs
        )
        self.attn_norm = norm()
        self.attn = Attention(
            dim,
            num_heads,
            num_heads,
            dim // num_heads,
            qkv_bias=True,
            out_bias=True,
            causal=causal,
            inits=(inits.qkv, inits.out),
            **kind,
        )
        self.mlp_norm = norm()
        self.mlp = Mlp(dim, mlp_dim, act=act, inits=(inits.up, inits.down), **kind)

    @jax.named_scope("block")
    def __call__(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens, keys: Tokens | None = None
    ) -> Float[Array, "B T D"]:
        x_BTD = keep(x_BTD, BLOCK_IN)
        x_BTD = keep(x_BTD + self.attn(self.attn_norm(x_BTD), tokens, keys=keys)[0], MLP_IN)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


def run_blocks(
    layers: nnx.Module | nnx.List,
    x_BTD: Float[Array, "B T D"],
    compute: Compute,
    mask_BT: Bool[Array, "B T"] | None = None,
    stop: int | None = None,
) -> Float[Array, "B T D"]:
    """What a stack of blocks makes of tokens.

    Args:
      mask_BT: True where a token may be seen; those that may not see as others do.
      stop: blocks that are run, from the end if negative; None: all.
    """
    if stop is not None:
        layers = take(layers, 0, slice(stop).indices(depth(layers))[1])
    columns_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
    tokens, keys = Tokens(columns_BT, in_order=True, is_counted=True), None
    if mask_BT is not None:
        keys = Tokens(columns_BT, mask_BT.astype(jnp.int32), in_order=True, is_counted=True)
    return scan(lambda block, x_BTD: block(x_BTD, tokens, keys), layers, x_BTD, compute=compute)


class PatchEmbed(Projection):
    """Square patches of an image, row by row, each as a vector.

    Args:
      image_size, patch_size: sides, in pixels.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        dim: int,
        *,
        bias: bool,
        init: Init = fan_in_normal,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.image_size, self.patch_size, self.compute = image_size, patch_size, compute
        shape, axes = (patch_size, patch_size, 3, dim), (None, None, None, "embed")
        kind = dict(bias=bias, init=init, compute=compute, rngs=rngs)
        super().__init__("BIPQC,PQCD->BID", shape, axes, ("batch", None, "act_embed"), **kind)

    @jax.named_scope("patches")
    def __call__(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B I D"]:
        """Raises ValueError for images of another size."""
        size = self.image_size
        if images_BHWC.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images {tuple(images_BHWC.shape)}; this tower takes [B, {size}, {size}, 3]:"
                " normalised, channels last, as its processor gives them"
            )
        side, width = size // self.patch_size, self.patch_size
        x = _by_row(images_BHWC)[:, : side * width, : side * width].astype(self.compute.dtype)
        x = of_rows(x, (side, width, side, width, 3)).swapaxes(2, 3)
        return super().__call__(of_rows(x, (side * side, width, width, 3)))


class Positions(nnx.Module):
    """A table of learned positions, [T, D], the first of them a class token's where there is one.

    Args:
      std: of the table's random values. class_std: of the class token's; None: there is none.
    """

    def __init__(
        self,
        num_positions: int,
        dim: int,
        *,
        std: float,
        class_std: float | None = None,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        def make(shape: tuple[int, ...], std: float) -> nnx.Variable:
            init = jax.nn.initializers.normal(std)
            return param(rngs, shape, (None,) * len(shape), init, compute.param_dtype)

        self.table = make((num_positions, dim), std)
        self.class_token = None if class_std is None else make((dim,), class_std)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B S D"]:
        """Adds the positions; before that, puts the class token before the others.

        Raises:
          ValueError: there are more tokens than positions.
        """
        table_TD, most = self.table[...].astype(jnp.float32), self.table.shape[0]
        if self.class_token is not None:
            table_TD = table_TD.at[0].add(self.class_token[...].astype(jnp.float32))
            x_BTD = jnp.pad(x_BTD, ((0, 0), (1, 0), (0, 0)))
        num_tokens = x_BTD.shape[1]
        if num_tokens > most:
            raise ValueError(f"{num_tokens} tokens; there are positions for {most}, so cut them")
        # the sum over rows is float32, and so is what is added to a class token
        return add_bias(x_BTD, table_TD[:num_tokens])


class AttentionPool(nnx.Module):
    """One learned query over all tokens, then x + Mlp(LayerNorm(x)), [B, D]; "MAP" in SigLIP.

    The query itself is not added to what it gathers.
    """

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        num_heads: int,
        *,
        act: str,
        norm_eps: float,
        inits: Inits = PLAIN,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        kind, head_dim = dict(compute=compute, rngs=rngs), dim // num_heads
        probe_init = jax.nn.initializers.glorot_uniform()  # of [1, D]
        self.probe = param(rngs, (1, dim), (None, None), probe_init, compute.param_dtype)
        self.dtype = compute.dtype

        def project() -> Projection:
            shape, axes = (dim, num_heads, head_dim), ("embed", "heads", "head")
            out_axes = ("batch", None, "heads", None)
            return Projection(
                "BTD,DNH->BTNH", shape, axes, out_axes, bias=True, init=inits.qkv, **kind
            )

        self.q, self.k, self.v = project(), project(), project()
        shape, axes = (num_heads, head_dim, dim), ("heads", "head", "embed")
        out_axes = ("batch", None, "act_embed")
        self.o = Projection("BTNH,NHD->BTD", shape, axes, out_axes, bias=True, **kind)
        self.norm = LayerNorm(dim, eps=norm_eps, param_dtype=compute.param_dtype, rngs=rngs)
        self.mlp = Mlp(dim, mlp_dim, act=act, inits=(inits.up, inits.down), **kind)

    @jax.named_scope("pool")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        zeros_BTD = jnp.zeros_like(x_BTD, shape=(len(x_BTD), 1, x_BTD.shape[2]))
        probe_BTD = add_bias(_by_row(zeros_BTD), self.probe[...])
        o_BTNH = attention(self.q(probe_BTD), self.k(x_BTD), self.v(x_BTD), causal=False)
        x_BTD = self.o(o_BTNH)
        return (x_BTD + self.mlp(self.norm(x_BTD)))[:, 0]


def pick_tokens(x_BTD: Float[Array, "B T D"], columns_B: Int[Array, "B"]) -> Float[Array, "B D"]:
    """One token of each row. A masked sum: what is local on a mesh, and has no scatter backward."""
    hit_BT = jnp.arange(x_BTD.shape[1]) == columns_B[:, None]
    return jnp.sum(jnp.where(hit_BT[..., None], x_BTD, 0), axis=1)


def _by_row(x: Array) -> Array:
    if not has_mesh():
        return x
    return jax.reshard(x, spec("batch", *[None] * (x.ndim - 1), shape=x.shape))
