"""Janus' VQ autoencoder (LlamaGen, Sun et al. 2024; after VQGAN, Esser et al. 2021): pictures to
codes, and codes to pictures.

Convolutions at several resolutions, with attention over all places at the lowest. The thing a
reader would get wrong: codes are looked up by direction. Rows of the codebook, and what is
quantised, are of unit length, so the nearest code is the one with the largest dot product; the
decoder reads unit rows too.

Letters of this file: N pictures, Y and X rows and columns, C channels, I codes of a picture, Z
width of a code.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.models.janus.config import GROUPS, VQConfig
from llmprep_jax.nn.attention import Tokens, attend
from llmprep_jax.nn.conv import WideConv
from llmprep_jax.nn.linear import look_up
from llmprep_jax.nn.media import of_rows
from llmprep_jax.nn.norm import GroupNorm
from llmprep_jax.nn.param import param
from llmprep_jax.nn.work import Work
from llmprep_jax.types import Array, Float, Int


def unit(x: Float[Array, "*B Z"]) -> Float[Array, "*B Z"]:
    """Rows of length 1, in float32."""
    x = x.astype(jnp.float32)
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(length, 1e-12)


def _norm(channels: int, cfg: VQConfig, rngs: nnx.Rngs) -> GroupNorm:
    return GroupNorm(channels, GROUPS, eps=1e-6, param_dtype=cfg.compute.param_dtype, rngs=rngs)


def _conv(channels: int, out: int, cfg: VQConfig, rngs: nnx.Rngs, **kind: int) -> WideConv:
    width = kind.pop("width", 3)
    return WideConv(channels, out, width, bias=True, compute=cfg.compute, rngs=rngs, **kind)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _make(kind: type[nnx.Module], sizes: tuple, key: Array) -> nnx.Module:
    """One of many modules alike, traced once: each key that is drawn in a trace looks through what
    was traced before it."""
    return kind(*sizes, rngs=nnx.Rngs(params=key))


class Block(nnx.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))); where channels change, x by a product."""

    def __init__(self, channels: int, out: int, cfg: VQConfig, *, rngs: nnx.Rngs):
        self.norm1, self.conv1 = _norm(channels, cfg, rngs), _conv(channels, out, cfg, rngs)
        self.norm2, self.conv2 = _norm(out, cfg, rngs), _conv(out, out, cfg, rngs)
        is_same = channels == out
        self.short = None if is_same else _conv(channels, out, cfg, rngs, width=1)

    def __call__(self, x_NYXC: Float[Array, "N Y X C"]) -> Float[Array, "N Y X D"]:
        h_NYXC = self.conv1(jax.nn.silu(self.norm1(x_NYXC)))
        h_NYXC = self.conv2(jax.nn.silu(self.norm2(h_NYXC)))
        return h_NYXC + (x_NYXC if self.short is None else self.short(x_NYXC))


class Attention(nnx.Module):
    """x + what each place gathers from all, by one head."""

    def __init__(self, channels: int, cfg: VQConfig, *, rngs: nnx.Rngs):
        make = functools.partial(_conv, channels, channels, cfg, rngs, width=1)
        self.norm = _norm(channels, cfg, rngs)
        self.q, self.k, self.v, self.o = make(), make(), make(), make()

    def __call__(self, x_NYXC: Float[Array, "N Y X C"]) -> Float[Array, "N Y X C"]:
        _, Y, X, C = x_NYXC.shape
        h_NYXC = self.norm(x_NYXC)
        qkv = [of_rows(project(h_NYXC), (Y * X, 1, C)) for project in (self.q, self.k, self.v)]
        places_NT = jnp.broadcast_to(jnp.arange(Y * X), (len(x_NYXC), Y * X))
        places = Tokens(places_NT, in_order=True, is_counted=True)
        return x_NYXC + self.o(of_rows(attend(*qkv, places, causal=False), (Y, X, C)))


class Middle(nnx.Module):
    """A block, attention, a block."""

    def __init__(self, channels: int, cfg: VQConfig, *, rngs: nnx.Rngs):
        sizes = (channels, channels, cfg)
        self.first = _make(Block, sizes, rngs.params())
        self.attn = _make(Attention, sizes[1:], rngs.params())
        self.second = _make(Block, sizes, rngs.params())

    def __call__(self, x_NYXC: Float[Array, "N Y X C"]) -> Float[Array, "N Y X C"]:
        return self.second(self.attn(self.first(x_NYXC)))


class Level(nnx.Module):
    """Blocks of one resolution, at the lowest with attention behind each, and the way to the next.

    Args:
      scaling: "down" halves the sides at the end, "up" doubles them; None: they stay.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        num_blocks: int,
        has_attention: bool,
        scaling: str | None,
        cfg: VQConfig,
        *,
        rngs: nnx.Rngs,
    ):
        dims = [channels] + [out] * num_blocks
        self.blocks = nnx.List(
            [_make(Block, (*pair, cfg), rngs.params()) for pair in itertools.pairwise(dims)]
        )
        number = num_blocks if has_attention else 0
        self.attns = nnx.List([_make(Attention, (out, cfg), rngs.params()) for _ in range(number)])
        self.scaling = scaling
        stride = 2 if scaling == "down" else 1
        self.scale = scaling and _conv(out, out, cfg, rngs, stride=stride)

    def __call__(self, x_NYXC: Float[Array, "N Y X C"]) -> Float[Array, "N V W D"]:
        for number, block in enumerate(self.blocks):
            x_NYXC = block(x_NYXC)
            if self.attns:
                x_NYXC = self.attns[number](x_NYXC)
        if self.scaling is None:
            return x_NYXC
        if self.scaling == "up":  # the nearest pixel
            x_NYXC = jnp.repeat(jnp.repeat(x_NYXC, 2, axis=1), 2, axis=2)
        return self.scale(x_NYXC)


class Encoder(nnx.Module):
    """Pictures [N, H, W, 3] to [N, Y, X, C]."""

    def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
        dims = [cfg.base_dim * n for n in (1, *cfg.multipliers)]
        last = len(cfg.multipliers) - 1
        self.first = _conv(3, cfg.base_dim, cfg, rngs)
        self.levels = nnx.List(
            [
                Level(
                    *dims[i : i + 2],
                    cfg.num_blocks,
                    i == last,
                    None if i == last else "down",
                    cfg,
                    rngs=rngs,
                )
                for i in range(last + 1)
            ]
        )
        self.middle = Middle(dims[-1], cfg, rngs=rngs)
        self.norm, self.last = (
            _norm(dims[-1], cfg, rngs),
            _conv(dims[-1], cfg.latent_dim, cfg, rngs),
        )

    @jax.named_scope("vq_encoder")
    def __call__(self, images_NHWC: Float[Array, "N H W 3"]) -> Float[Array, "N Y X C"]:
        x = self.first(images_NHWC)
        for level in self.levels:
            x = level(x)
        return self.last(jax.nn.silu(self.norm(self.middle(x))))


class Decoder(nnx.Module):
    """[N, Y, X, C] to pictures [N, H, W, 3]; the first level is that of the lowest resolution."""

    def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
        last = len(cfg.multipliers) - 1
        dims = [cfg.base_dim * n for n in (*cfg.multipliers, cfg.multipliers[-1])][::-1]
        self.first = _conv(cfg.latent_dim, dims[0], cfg, rngs)
        self.middle = Middle(dims[0], cfg, rngs=rngs)
        self.levels = nnx.List(
            [
                Level(
                    *dims[i : i + 2],
                    cfg.num_blocks + 1,
                    i == 0,
                    None if i == last else "up",
                    cfg,
                    rngs=rngs,
                )
                for i in range(last + 1)
            ]
        )
        self.norm, self.last = _norm(dims[-1], cfg, rngs), _conv(dims[-1], 3, cfg, rngs)

    @jax.named_scope("vq_decoder")
    def __call__(self, x_NYXC: Float[Array, "N Y X C"]) -> Float[Array, "N H W 3"]:
        x = self.middle(self.first(x_NYXC))
        for level in self.levels:
            x = level(x)
        return self.last(jax.nn.silu(self.norm(x)))


def encoder_work(cfg: VQConfig, size: int) -> dict[str, Work]:
    """Of `VQ.encode` on a picture of so many pixels a side, by paths below a VQ."""
    last, made = len(cfg.multipliers) - 1, functools.partial(Work, is_drawn=True)
    codes = (size >> last) ** 2
    attention = (cfg.num_blocks + 1) * codes**2 * cfg.base_dim * cfg.multipliers[-1]
    levels = {f"encoder.levels.{i}": made((size >> i) ** 2) for i in range(last + 1)}
    scales = {f"encoder.levels.{i}.scale": made((size >> i + 1) ** 2) for i in range(last)}
    lowest = {"encoder.middle": made(codes, attention)}
    lowest |= dict.fromkeys(("encoder.last", "narrow", "codebook"), made(codes))
    return {"encoder.first": made(size**2), **levels, **scales, **lowest}


class VQ(nnx.Module):
    """Pictures to codes and back; a picture's codes are those of its rows, one after another."""

    def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg, rngs=rngs), Decoder(cfg, rngs=rngs)
        self.narrow = _conv(cfg.latent_dim, cfg.code_dim, cfg, rngs, width=1)
        self.widen = _conv(cfg.code_dim, cfg.latent_dim, cfg, rngs, width=1)
        shape, init = (cfg.num_codes, cfg.code_dim), jax.nn.initializers.normal(1.0)
        self.codebook = param(rngs, shape, (None, None), init, cfg.compute.param_dtype)

    def latents(self, images_NHWC: Float[Array, "N H W 3"]) -> Float[Array, "N I Z"]:
        """What is quantised: unit vectors, float32."""
        x_NYXZ = self.narrow(self.encoder(images_NHWC))
        return unit(of_rows(x_NYXZ, (x_NYXZ.shape[1] * x_NYXZ.shape[2], x_NYXZ.shape[3])))

    def quantize(self, latents_NIZ: Float[Array, "N I Z"]) -> Int[Array, "N I"]:
        """The nearest codes."""
        dots = jnp.einsum("NIZ,VZ->NIV", latents_NIZ, unit(self.codebook[...]))
        return jnp.argmax(dots, axis=-1).astype(jnp.int32)

    def look_up(self, codes_NI: Int[Array, "N I"]) -> Float[Array, "N I Z"]:
        """Unit rows of the codebook, float32."""
        axes = ("batch", None, None)
        return look_up(unit(self.codebook[...]), codes_NI, "float32", axes)

    def draw(self, latents_NIZ: Float[Array, "N I Z"]) -> Float[Array, "N H W 3"]:
        """Pictures of square grids of unit vectors; values of [-1, 1] and a little beyond."""
        _, I, Z = latents_NIZ.shape
        side = round(I**0.5)
        x = of_rows(latents_NIZ, (side, side, Z)).astype(self.cfg.compute.dtype)
        return self.decoder(self.widen(x))

    def encode(self, images_NHWC: Float[Array, "N H W 3"]) -> Int[Array, "N I"]:
        """Codes of pictures of values from -1 to 1."""
        return self.quantize(self.latents(images_NHWC))

    def decode(self, codes_NI: Int[Array, "N I"]) -> Float[Array, "N H W 3"]:
        """Pictures of codes."""
        return self.draw(self.look_up(codes_NI))
