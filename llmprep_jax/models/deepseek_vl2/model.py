"""DeepSeek-VL2 (2412.10302): tiles of pictures through SigLIP and a projector into a DeepSeek MoE.

Of each tile's 27 x 27 patches 2 x 2 become one token (section 2.2; a row and a column of zeros make
28), so a tile is 14 x 14 tokens. Rows of tokens end in a learned newline, the view of the whole and
the tiles are held apart by a learned separator, and all of these stand where <image> tokens are.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.models import deepseek, siglip
from llmprep_jax.models.deepseek_vl2 import weights
from llmprep_jax.models.deepseek_vl2.config import Config
from llmprep_jax.models.deepseek_vl2.layout import count_tiles, count_tokens, index_features
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.composed import ComposedModel
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.media import count_tokens as number_tokens
from llmprep_jax.nn.media import merge_images, of_rows, place_features, split_rows
from llmprep_jax.nn.param import Compute, add_bias, idle, param
from llmprep_jax.nn.work import Work
from llmprep_jax.sharding import has_mesh, on_own_mesh, spec
from llmprep_jax.types import Array, Float, Int
from llmprep_jax.weights.rows import Table


class Projector(nnx.Module):
    """Patches of a tile, 2 x 2 of them joined, to the language model's width."""

    def __init__(self, dim: int, out_dim: int, *, compute: Compute, rngs: nnx.Rngs):
        def linear(eqn: str, width: int, axes: tuple[str | None, str | None]) -> Einsum:
            out_axes = ("batch", None, "act_embed")
            kind = dict(bias=True, compute=compute, rngs=rngs)
            return Einsum(eqn, (width, out_dim), axes, out_axes, **kind)

        self.up = linear("BIF,FD->BID", 4 * dim, (None, "embed"))
        self.down = linear("BID,DE->BIE", out_dim, (None, "embed"))

    @jax.named_scope("projector")
    def __call__(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B I E"]:
        # tanh in the tower, erf here
        return self.down(jax.nn.gelu(self.up(join_patches(x_BPD)), approximate=False))


def join_patches(x_BPD: Float[Array, "B P D"]) -> Float[Array, "B I F"]:
    """Squares of 2 x 2 patches as one vector each, number c 4 + row 2 + column; an odd side is
    continued by zeros."""
    P, D = x_BPD.shape[1:]
    side = round(P**0.5)
    half, odd = -(-side // 2), side % 2
    x = of_rows(x_BPD, (side, side, D))
    x = jnp.pad(x, ((0, 0), (0, odd), (0, odd), (0, 0)))
    x = of_rows(x, (half, 2, half, 2, D)).transpose(0, 1, 3, 5, 2, 4)
    return of_rows(x, (half * half, 4 * D))


class Model(ComposedModel):
    """Tokens and tiles of pictures to logits: `model(tokens, images=tiles, grids=grids)`.

    images: [B, M, H, W, 3], normalised; of each picture of a row the whole first and then its tiles
    row by row, one picture after another. grids: [B, N, 2], (width, height) of each in tiles, zeros
    where a row has fewer pictures.
    """

    projectors = ("projector", "newline", "separator")

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        vision, compute = cfg.vision, cfg.vision.compute
        self.vision = siglip.VisionTower(vision, rngs=rngs)
        if vision.has_pool:
            idle(self.vision.pool)
        dim = cfg.language.dim
        self.projector = Projector(vision.dim, dim, compute=compute, rngs=rngs)

        def vector() -> nnx.Variable:
            init = jax.nn.initializers.normal(dim**-0.5)
            return param(rngs, (dim,), (None,), init, compute.param_dtype)

        self.newline, self.separator = vector(), vector()
        self.language = deepseek.Model(cfg.language, rngs=rngs)

    @property
    def tokens_per_image(self) -> None:
        """That depends on its tiles."""
        return None

    @property
    def stacks(self) -> tuple[str, ...]:
        """Of the tower, and those of the language model that there are."""
        return ("vision.layers", *(f"language.{name}" for name in self.language.stacks))

    @property
    def weights(self) -> Table:
        """The table of tensor names."""
        return weights.table(self.language.weights)

    @property
    def image_work(self) -> dict[str, Work]:
        """Of a tile."""
        projected = Work(self.cfg.side**2, behind=("vision",))
        return {
            **super().image_work,
            "projector": projected,
            "newline": Work(0),
            "separator": Work(0),
        }

    def image_features(
        self, images: Float[Array, "B M H W C"], grids: Int[Array, "B N 2"]
    ) -> Float[Array, "B J D"]:
        """Of each row the features of its tiles, the newline and the separator, in float32.

        A row has one newline for hundreds of tokens; their gradients are summed as wide as this.
        """
        tiles = self.projector(self.vision.features(merge_images(images)))
        tiles_BJD = split_rows(tiles.astype(jnp.float32), len(images))
        learned = jnp.stack([self.newline[...], self.separator[...]]).astype(jnp.float32)
        zeros_BJD = jnp.zeros_like(tiles_BJD, shape=(len(images), 2, tiles_BJD.shape[2]))
        if has_mesh():
            zeros_BJD = jax.reshard(zeros_BJD, jax.typeof(tiles_BJD).sharding.spec)
        return jnp.concatenate([tiles_BJD, add_bias(zeros_BJD, learned)], axis=1)

    def feature_index(
        self,
        tokens: Int[Array, "B T"],
        images: Float[Array, "B M H W C"],
        grids: Int[Array, "B N 2"],
    ) -> Int[Array, "B T"]:
        """Which of its row's features a token takes, see `layout`."""
        if has_mesh():
            tokens = jax.reshard(tokens, spec("batch", None, shape=tokens.shape))
            grids = jax.reshard(grids, spec("batch", None, None, shape=grids.shape))
        numbers_BT = number_tokens(tokens == self.image_id)
        return index_features(
            numbers_BT, grids, images.shape[1], self.cfg.side, self.cfg.view_order
        )

    def by_row(self, tokens: Int[Array, "B T"], media: dict) -> dict[str, Array]:
        """Tiles and grids, which are of whole rows as they are given.

        Raises:
          ValueError: one without the other, other shapes, or tokens of other pictures.
        """
        given = {name: x for name, x in media.items() if x is not None}
        if not given:
            return {}
        if set(given) != {"images", "grids"}:
            raise ValueError(
                f"this model takes images and grids together; it got {', '.join(sorted(given))}"
            )
        if self.image_id is None:
            raise ValueError(
                "config.json does not say which token stands for images; write image_token_id, the"
                " id of <image> in its tokenizer, into it"
            )
        images, grids = given["images"], given["grids"]
        rows = len(tokens)
        if (
            images.ndim != 5
            or grids.shape[:1] + grids.shape[2:] != (rows, 2)
            or len(images) != rows
        ):
            raise ValueError(
                f"images {tuple(images.shape)} and grids {tuple(grids.shape)} of {rows} rows; give"
                " tiles [B, M, H, W, 3] and grids [B, N, 2]"
            )
        if not any(isinstance(x, jax.core.Tracer) for x in (tokens, grids)):
            self._check_counts(np.asarray(tokens), images.shape[1], np.asarray(grids))
        return {"images": jnp.asarray(images), "grids": jnp.asarray(grids)}

    def _check_counts(self, tokens_BT: np.ndarray, num_tiles: int, grids_BN2: np.ndarray) -> None:
        found_B = np.sum(tokens_BT == self.image_id, axis=1)
        needed_B = np.sum(count_tokens(grids_BN2, self.cfg.side), axis=1)
        for row, (found, needed) in enumerate(zip(found_B, needed_B, strict=True)):
            if found != needed:
                sizes = ", ".join(f"{w} x {h}" for w, h in grids_BN2[row] if w * h)
                raise ValueError(
                    f"row {row} has {found} image tokens (id {self.image_id}), and its pictures of"
                    f" {sizes or 'no'} tiles are {needed}"
                )
        most = int(np.sum(count_tiles(grids_BN2), axis=1).max())
        if most > num_tiles:
            raise ValueError(f"the grids are of {most} tiles a row, and images hold {num_tiles}")

    @on_own_mesh
    def probe(self) -> dict[str, Array]:
        """Logits of random words, and of a picture of one tile."""
        size, grids = self.cfg.vision.image_size, np.ones((1, 1, 2), np.int32)
        images = np.random.default_rng(0).normal(size=(1, 2, size, size, 3)).astype(np.float32)
        count = int(count_tokens(grids, self.cfg.side)[0, 0])
        numbers_BT = np.arange(count, dtype=np.int32)[None]
        index_BT = index_features(numbers_BT, grids, 2, self.cfg.side, self.cfg.view_order)
        return {**self.language.probe(), "images": _read_picture(self, images, grids, index_BT)}


@jax.jit
def _read_picture(model: Model, images: Array, grids: Array, index_BT: Array) -> Array:
    """Logits of a prompt that is one picture."""
    features_BJD = model.image_features(images, grids)
    shape = (*index_BT.shape, features_BJD.shape[2])
    zeros_BTD = jnp.zeros(shape, model.language.cfg.compute.dtype)
    hidden_BTD, _ = model.language.features(place_features(zeros_BTD, index_BT, features_BJD))
    return model.language.unembed(hidden_BTD)
