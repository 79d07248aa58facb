"""DeepSeek-VL (2403.05525, section 3): SigLIP's patches among a Llama's words, in 7B joined with
those of SAM's encoder at 1,024 pixels.

Of SAM's 64 x 64 places the last block's and the first global block's are resized to 96 x 96, and
two convolutions make them 24 x 24, as many as SigLIP's patches at 384 pixels. The thing a reader
would get wrong: the halves are joined before the activation, high resolution first.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.models import llama, sam, siglip
from llmprep_jax.models.deepseek_vl import released
from llmprep_jax.models.deepseek_vl.config import Config
from llmprep_jax.models.deepseek_vl.weights import table
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.composed import ComposedModel
from llmprep_jax.nn.conv import Conv
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.media import merge_images, of_rows, split_rows
from llmprep_jax.nn.param import idle, param
from llmprep_jax.nn.work import Work
from llmprep_jax.types import Array, Float
from llmprep_jax.weights.rows import Table

_OUT = ("batch", None, "act_embed")


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class Aligner(nnx.Module):
    """SigLIP's features to the language model's width, by two layers."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        width = cfg.language.dim
        make = functools.partial(Einsum, bias=True, compute=cfg.compute, rngs=rngs)
        self.up = make("NID,DE->NIE", (cfg.vision.dim, width), (None, "embed"), _OUT)
        self.down = make("NID,DE->NIE", (width, width), ("embed", None), _OUT)

    @jax.named_scope("aligner")
    def __call__(self, x_NID: Float[Array, "N I D"]) -> Float[Array, "N I E"]:
        return self.down(_gelu(self.up(x_NID)))


class HybridAligner(nnx.Module):
    """Both towers' features, each to half of the width, together through an activation and a
    layer."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        width = cfg.language.dim
        make = functools.partial(Einsum, bias=True, compute=cfg.compute, rngs=rngs)
        dims = (4 * cfg.high.out_dim, cfg.vision.dim)
        self.high, self.low = [
            make("NID,DE->NIE", (dim, width // 2), (None, "embed"), _OUT) for dim in dims
        ]
        self.down = make("NID,DE->NIE", (width, width), ("embed", None), _OUT)

    @jax.named_scope("aligner")
    def __call__(
        self, low_NID: Float[Array, "N I D"], high_NIC: Float[Array, "N I C"]
    ) -> Float[Array, "N I E"]:
        halves = [self.high(high_NIC), self.low(low_NID)]
        return self.down(_gelu(jnp.concatenate(halves, axis=-1)))


class HighTower(nnx.Module):
    """Images of high resolution to as many features as SigLIP has, [N, I, C] (section 3.1)."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        kind, width = dict(compute=cfg.compute, rngs=rngs), cfg.high.out_dim
        self.side = cfg.vision.image_size // cfg.vision.patch_size
        self.tower, self.neck = sam.VisionTower(cfg.high, rngs=rngs), sam.Neck(cfg.high, rngs=rngs)
        self.halve = Conv(width, 2 * width, 3, stride=2, **kind)
        self.quarter = Conv(2 * width, 4 * width, 3, stride=2, **kind)
        self.alpha = param(rngs, (), (), jax.nn.initializers.zeros, cfg.compute.param_dtype)

    @jax.named_scope("high_res")
    def __call__(self, images_NHWC: Float[Array, "N H W 3"]) -> Float[Array, "N I C"]:
        last, first = self.tower.features(images_NHWC)
        last, first = self._shrink(self.tower.neck(last)), self._shrink(self.neck(first))
        x_NVWC = last + (self.alpha[...].astype(jnp.float32) * first).astype(last.dtype)
        return of_rows(x_NVWC, (self.side**2, x_NVWC.shape[-1]))

    @property
    def work(self) -> dict[str, Work]:
        """By paths from the model's root."""
        below = functools.partial(Work, behind=("high",))
        places, shrunk = self.tower.cfg.side**2, self.side**2
        return {
            **{f"high.tower.{path}": one for path, one in self.tower.work.items()},
            "high.neck": below(places),
            "high.halve": below(2 * 4 * shrunk),  # of the last block's output and the first's
            "high.quarter": below(2 * shrunk),
        }

    def _shrink(self, x_NYXC: Array) -> Array:
        """To twice two halvings of what is wanted, then halved twice."""
        matrix_VY = jnp.asarray(bilinear(x_NYXC.shape[1], 4 * self.side))
        # float32, as released in bf16 too
        wide = jnp.einsum("NYXC,VY,WX->NVWC", x_NYXC.astype(jnp.float32), matrix_VY, matrix_VY)
        return self.quarter(self.halve(wide.astype(x_NYXC.dtype)))


def bilinear(size: int, new_size: int) -> np.ndarray:
    """The matrix [new, old] that resizes by linear interpolation, edges continued (torch's
    `align_corners=False`)."""
    at = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    before = np.minimum(np.floor(at).astype(int), size - 1)
    after, share = np.minimum(before + 1, size - 1), at - before
    matrix = np.zeros((new_size, size), np.float32)
    np.add.at(matrix, (np.arange(new_size), before), 1 - share)
    np.add.at(matrix, (np.arange(new_size), after), share)
    return matrix


class Model(ComposedModel):
    """Tokens and images [N, 384, 384, 3], in 7B also [N, 1024, 1024, 3], to logits."""

    towers, projectors = ("vision", "high"), ("aligner",)
    is_released = False  # whether its tensors go by the names of DeepSeek's own code

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.language = llama.Model(cfg.language, rngs=rngs)
        self.vision = siglip.VisionTower(cfg.vision, rngs=rngs)
        if self.vision.pool is not None:
            idle(self.vision.pool)  # read and saved, as some files have it
        is_hybrid = cfg.high is not None
        self.high = HighTower(cfg, rngs=rngs) if is_hybrid else None
        self.aligner = (HybridAligner if is_hybrid else Aligner)(cfg, rngs=rngs)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Of all towers, and of the language model."""
        both = ("language.layers", "vision.layers")
        if self.high is None:
            return both
        names = ("window_layers", "global_layers")
        tower = [name for name in names if getattr(self.high.tower, name) is not None]
        return (*both, *(f"high.tower.{name}" for name in tower))

    @property
    def weights(self) -> Table:
        """The table of tensor names."""
        own = table(self.cfg)
        is_hybrid = self.cfg.high is not None
        return released.table_of_released(own, is_hybrid) if self.is_released else own

    def weights_among(self, names: Sequence[str]) -> Table:
        """The table for files of these tensors; DeepSeek's own have other names."""
        return self.named_as(names).weights

    def named_as(self, names: Sequence[str]) -> "Model":
        """The model with the names of DeepSeek's own modules, where these are such."""
        is_released = released.is_released(names)
        if is_released == self.is_released:
            return self
        changed = nnx.merge(*nnx.split(self))
        changed.is_released = is_released
        return changed

    @property
    def image_sizes(self) -> dict[str, int]:
        sizes = {"images": self.cfg.vision.image_size}
        return sizes if self.high is None else {**sizes, "images_high": self.cfg.high.image_size}

    @property
    def image_work(self) -> dict[str, Work]:
        """Of both towers, where there are two."""
        work = super().image_work
        if self.high is None:
            return work
        aligner = Work(self.tokens_per_image, behind=("vision", "high"))
        return {**work, **self.high.work, "aligner": aligner}

    def image_features(
        self,
        images: Float[Array, "B M H W 3"],
        images_high: Float[Array, "B M P Q 3"] | None = None,
    ) -> Float[Array, "B J D"]:
        """Of normalised images, in the order of their tokens."""
        low_NID = self.vision.features(merge_images(images))
        if self.high is None:
            return split_rows(self.aligner(low_NID), len(images))
        high_NIC = self.high(merge_images(images_high))
        return split_rows(self.aligner(low_NID, high_NIC), len(images))
