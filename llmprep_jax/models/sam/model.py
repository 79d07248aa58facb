"""SAM's encoder of images (Kirillov et al. 2023): a ViT whose blocks attend within windows, but for
a few that attend to the whole image (Li et al. 2022, ViTDet), and a neck of convolutions.

Scores have decomposed relative positions (MViTv2, Li et al. 2022, eq. 4): q . R_rows[dy] + q .
R_columns[dx]. The things a reader would get wrong: q is not scaled in these, and the zeros that
fill up the windows at an image's edges take part as tokens, through the biases of k and v.

Letters of this file: Y and X rows and columns of patches, S sides of what is attended to, W windows
of an image, R entries of both tables for a query.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.models.sam.config import Config
from llmprep_jax.nn.attention import Tokens, attend
from llmprep_jax.nn.conv import Conv
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.media import merge_images, of_rows, split_rows
from llmprep_jax.nn.mlp import Mlp
from llmprep_jax.nn.norm import LayerNorm
from llmprep_jax.nn.param import add_bias, param
from llmprep_jax.nn.remat import BLOCK_IN, MLP_IN, keep
from llmprep_jax.nn.stack import scan, stack, take
from llmprep_jax.nn.vit import PatchEmbed
from llmprep_jax.nn.work import Work
from llmprep_jax.types import Array, Float


class Attention(nnx.Module):
    """All tokens of a square of S x S to each other, [B, S S, D]."""

    def __init__(self, cfg: Config, side: int, *, rngs: nnx.Rngs):
        head_dim = cfg.dim // cfg.num_heads
        self.side, kind = side, dict(compute=cfg.compute, rngs=rngs)
        shape, axes = (cfg.dim, cfg.num_heads, head_dim), ("embed", "heads", "head")
        project = functools.partial(
            Einsum,
            "BTD,DNH->BTNH",
            shape,
            axes,
            ("batch", None, "heads", None),
            bias=cfg.qkv_bias,
            **kind,
        )
        self.q, self.k, self.v = project(), project(), project()
        shape, axes = (cfg.num_heads, head_dim, cfg.dim), ("heads", "head", "embed")
        out_axes = ("batch", None, "act_embed")
        self.o = Einsum("BTNH,NHD->BTD", shape, axes, out_axes, bias=True, **kind)
        zeros, dtype = jax.nn.initializers.zeros, cfg.compute.param_dtype
        table = (2 * side - 1, head_dim)
        self.rows = param(rngs, table, (None, None), zeros, dtype)
        self.columns = param(rngs, table, (None, None), zeros, dtype)

    @jax.named_scope("attention")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        q_BTNH, k_BTNH, v_BTNH = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        columns_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1]), q_BTNH.shape[:2])
        tokens = Tokens(columns_BT, in_order=True, is_counted=True)
        options = dict(causal=False, bias=self.places(q_BTNH))
        return self.o(attend(q_BTNH, k_BTNH, v_BTNH, tokens, **options))

    def places(
        self, q_BTNH: Float[Array, "B T N H"]
    ) -> tuple[Float[Array, "B T N R"], Float[Array, "1 T 1 R"]]:
        """The relative positions as two factors: what a query says of each row and column of keys,
        and which row and column a key is in."""
        S = self.side
        # entry S - 1 + i - j is of a query in row i and a key in row j
        at_SS = S - 1 + np.arange(S)[:, None] - np.arange(S)
        q_BYXNH = of_rows(q_BTNH.astype(jnp.float32), (S, S, *q_BTNH.shape[2:]))
        rows_SSH, columns_SSH = [
            table[...].astype(jnp.float32)[at_SS] for table in (self.rows, self.columns)
        ]
        by_row = jnp.einsum("BYXNH,YRH->BYXNR", q_BYXNH, rows_SSH)
        by_column = jnp.einsum("BYXNH,XRH->BYXNR", q_BYXNH, columns_SSH)
        a_BYXNR = jnp.concatenate([by_row, by_column], axis=-1)
        rows, columns = np.divmod(np.arange(S * S), S)
        b_TR = np.concatenate([np.eye(S)[rows], np.eye(S)[columns]], axis=1, dtype=np.float32)
        a_BTNR = of_rows(a_BYXNR, (S * S, *a_BYXNR.shape[3:]))
        return a_BTNR, jnp.asarray(b_TR)[None, :, None]


class Block(nnx.Module):
    """x <- x + Attention(LayerNorm(x)), x <- x + Mlp(LayerNorm(x)) of patches [N, Y, X, D]."""

    def __init__(self, cfg: Config, is_global: bool, *, rngs: nnx.Rngs):
        self.window = None if is_global else cfg.window
        norm = functools.partial(
            LayerNorm, cfg.dim, eps=cfg.norm_eps, param_dtype=cfg.compute.param_dtype, rngs=rngs
        )
        self.attn_norm, self.mlp_norm = norm(), norm()
        self.attn = Attention(cfg, self.window or cfg.side, rngs=rngs)
        self.mlp = Mlp(cfg.dim, cfg.mlp_dim, act="gelu", compute=cfg.compute, rngs=rngs)

    @jax.named_scope("block")
    def __call__(self, x_NYXD: Float[Array, "N Y X D"]) -> Float[Array, "N Y X D"]:
        _, Y, X, D = x_NYXD.shape
        x_NYXD = keep(x_NYXD, BLOCK_IN)
        h_NYXD = self.attn_norm(x_NYXD)
        if self.window is None:
            h_NYXD = of_rows(self.attn(of_rows(h_NYXD, (Y * X, D))), (Y, X, D))
        else:
            h_NYXD = self._within_windows(h_NYXD)
        x_NYXD = keep(x_NYXD + h_NYXD, MLP_IN)
        h_NTD = of_rows(self.mlp_norm(x_NYXD), (Y * X, D))
        return x_NYXD + of_rows(self.mlp(h_NTD), (Y, X, D))

    def _within_windows(self, x_NYXD: Array) -> Array:
        N, Y, X, D = x_NYXD.shape
        side = self.window
        rows, columns = -(-Y // side), -(-X // side)
        below, right = rows * side - Y, columns * side - X
        x = jnp.pad(x_NYXD, ((0, 0), (0, below), (0, right), (0, 0)))
        x = of_rows(x, (rows, side, columns, side, D)).swapaxes(2, 3)
        x_BTD = merge_images(of_rows(x, (rows * columns, side * side, D)))
        x = split_rows(self.attn(x_BTD), N)
        x = of_rows(x, (rows, columns, side, side, D)).swapaxes(2, 3)
        return of_rows(x, (rows * side, columns * side, D))[:, :Y, :X]


class Neck(nnx.Module):
    """Two convolutions [N, Y, X, D] to [N, Y, X, C], each with a norm over channels behind."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        kind = dict(compute=cfg.compute, rngs=rngs)
        norm = functools.partial(
            LayerNorm, cfg.out_dim, eps=1e-6, param_dtype=cfg.compute.param_dtype, rngs=rngs
        )
        self.narrow, self.narrow_norm = Conv(cfg.dim, cfg.out_dim, 1, **kind), norm()
        self.smooth, self.smooth_norm = Conv(cfg.out_dim, cfg.out_dim, 3, **kind), norm()

    @jax.named_scope("neck")
    def __call__(self, x_NYXD: Float[Array, "N Y X D"]) -> Float[Array, "N Y X C"]:
        return self.smooth_norm(self.smooth(self.narrow_norm(self.narrow(x_NYXD))))


class VisionTower(nnx.Module):
    """Normalised images [N, H, W, 3] to [N, Y, X, C]."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, kind = cfg, dict(compute=cfg.compute, rngs=rngs)
        self.patches = PatchEmbed(cfg.image_size, cfg.patch_size, cfg.dim, bias=True, **kind)
        shape, init = (cfg.side, cfg.side, cfg.dim), jax.nn.initializers.normal(0.02)
        self.positions = param(rngs, shape, (None,) * 3, init, cfg.compute.param_dtype)
        num_global = len(cfg.global_layers)

        def blocks(is_global: bool, number: int) -> nnx.Module | None:
            make = functools.partial(Block, cfg, is_global)
            return stack(make, number, rngs=rngs) if number else None

        self.window_layers = blocks(False, cfg.num_layers - num_global)
        self.global_layers = blocks(True, num_global)
        self.neck = Neck(cfg, rngs=rngs)

    @property
    def work(self) -> dict[str, Work]:
        """By paths below this; relative positions are left out, a few hundredths."""
        cfg, places = self.cfg, self.cfg.side**2
        num_global, in_window = len(cfg.global_layers), cfg.window**2
        padded = (-(-cfg.side // cfg.window)) ** 2 * in_window
        windows = (cfg.num_layers - num_global) * padded * in_window * cfg.dim
        return {
            "patches": Work(places),
            "window_layers": Work(places),
            "window_layers.attn": Work(padded, windows),
            "global_layers": Work(places, num_global * places**2 * cfg.dim),
            "neck": Work(places),
        }

    def features(
        self, images_NHWC: Float[Array, "N H W 3"]
    ) -> tuple[Float[Array, "N Y X D"], Float[Array, "N Y X D"]]:
        """(the last block's output, the first global block's)."""
        cfg = self.cfg
        x = of_rows(self.patches(images_NHWC), (cfg.side, cfg.side, cfg.dim))
        x, first, done = add_bias(x, self.positions[...]), None, 0
        run = functools.partial(scan, lambda block, x: block(x), compute=cfg.compute)
        for number, layer in enumerate(cfg.global_layers):
            windows = layer - done - number
            if windows:
                x = run(take(self.window_layers, done, done + windows), x)
            done += windows
            x = run(take(self.global_layers, number, number + 1), x)
            first = x if first is None else first
        left = cfg.num_layers - len(cfg.global_layers) - done
        return (run(take(self.window_layers, done, done + left), x) if left else x), first

    def __call__(self, images_NHWC: Float[Array, "N H W 3"]) -> Float[Array, "N Y X C"]:
        return self.neck(self.features(images_NHWC)[0])
