"""A model composed of towers, projectors and a language model that reads images among its words.

A family says what its images become (`image_features`) and which token stands for a feature; what
generates, trains and exports then sees the language model as `decoder`. Inside, images are those of
whole rows, [B, M, H, W, 3], real ones first; the call from outside takes them one after another.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmprep_jax.nn.base_model import BaseModel
from llmprep_jax.nn.language_model import LanguageModel, Output, SumLosses, Terms
from llmprep_jax.nn.media import count_tokens, place_features
from llmprep_jax.nn.work import Work
from llmprep_jax.sharding import on_own_mesh
from llmprep_jax.types import Array, Bool, Float, Int


class ComposedModel(BaseModel):
    """Tokens and images to logits; see `models.protocol.CausalModel`.

    Attributes:
      language: the language model.
      towers, projectors: paths of what images pass through, and of what makes features words.
    """

    language: LanguageModel
    towers: tuple[str, ...] = ("vision",)
    projectors: tuple[str, ...] = ("projector",)

    @on_own_mesh
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        cache: Any = None,
        in_order: bool = False,
        **media: Array,
    ) -> Output:
        """Logits of the token after each token.

        Args:
          tokens: ids, with as many `image_id` as the images have features.
          media: images by name, [N, H, W, 3] one after another in the order of their tokens, or of
            whole rows, [B, M, H, W, 3], which compiled code needs where there are several rows.

        The rest as of `nn.language_model.LanguageModel`.

        Raises:
          ValueError: the tokens are of other images than there are.
        """
        x_BTD = self.embed_inputs(tokens, **self.by_row(tokens, media))
        places = dict(positions=positions, segment_ids=segment_ids, mask=mask)
        places |= dict(spans=self.spans(tokens), cache=cache, in_order=in_order)
        x_BTD, cache = self.language.features(x_BTD, **places)
        return Output(self.language.unembed(x_BTD), cache)

    @property
    def decoder(self) -> LanguageModel:
        """The language model."""
        return self.language

    @property
    def dtype(self) -> jnp.dtype:
        return self.language.dtype

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """`vision` are all towers; the embedding and the head are in `language` too."""
        of_images = {"vision": self.towers, "projector": self.projectors}
        return {"language": ("language",), **of_images, **super().parts}

    @property
    def extras(self) -> tuple[str, ...]:
        return tuple(f"language.{name}" for name in self.language.extras)

    @property
    def image_id(self) -> int | None:
        """The token that stands for a feature of an image."""
        return self.cfg.image_id

    @property
    def tokens_per_image(self) -> int | None:
        """How many there are of each; None: that depends on the image."""
        return self.cfg.tokens_per_image

    @property
    def image_sizes(self) -> Mapping[str, int]:
        """Sides of images in pixels, by the names that the call has for them."""
        return {"images": self.cfg.vision.image_size}

    @property
    def image_work(self) -> dict[str, Work]:
        """Of a ViT without its pooling, and of what makes its features words."""
        vision, projected = self.cfg.vision, Work(self.tokens_per_image, behind=("vision",))
        attention = vision.num_layers * vision.num_tokens**2 * vision.dim
        work = {"vision": Work(vision.num_tokens, attention)}
        work |= dict.fromkeys(("vision.pool", "vision.positions"), Work(0))
        return work | dict.fromkeys(self.projectors, projected)

    def image_features(self, **media: Array) -> Float[Array, "B J D"]:
        """What the language model reads of each row's images, one after another."""
        raise AttributeError(f"{type(self).__name__} does not say what images become")

    def read_drawn(self, **media: Array) -> dict[str, Array]:
        """Media of a batch as they are embedded: families that draw replace pictures by codes."""
        return media

    def feature_index(self, tokens: Int[Array, "B T"], **media: Array) -> Int[Array, "B T"]:
        """Which of its row's features an image token takes; -1 of other tokens."""
        return count_tokens(tokens == self.image_id)

    def by_row(self, tokens: Int[Array, "B T"], media: dict[str, Any]) -> dict[str, Array]:
        """Media as given from outside, of whole rows.

        Raises:
          ValueError: other media than the model takes, or than the tokens are of.
        """
        given = {name: jnp.asarray(x) for name, x in media.items() if x is not None}
        each = self.tokens_per_image
        if each is None:
            return given
        if given and set(given) != set(self.image_sizes):
            raise ValueError(
                f"this model takes {' and '.join(self.image_sizes)}; it got {', '.join(given)}"
            )
        group = functools.partial(group_images, tokens, self.image_id, each)
        rows = {name: group(x) if x.ndim == 4 else x for name, x in given.items()}
        if not isinstance(tokens, jax.core.Tracer):
            for x in rows.values():
                check_rows(tokens, self.image_id, each, x.shape[1])
        return rows

    @on_own_mesh
    def embed_inputs(self, tokens: Int[Array, "B T"], **media: Array) -> Float[Array, "B T D"]:
        """What the decoder reads: embeddings, and features of images in the places of theirs."""
        x_BTD = self.language.embed_inputs(tokens)
        if not media:
            return x_BTD
        with jax.named_scope("images"):
            features_BJD = self.image_features(**media)
            return place_features(x_BTD, self.feature_index(tokens, **media), features_BJD)

    def spans(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
        """None: no token sees a later one."""
        return None

    def probe(self) -> dict[str, Array]:
        """Logits of a row with an image, and the image's features."""
        rng = np.random.default_rng(0)
        media = {
            name: jnp.asarray(rng.normal(size=(1, 1, size, size, 3)).astype(np.float32))
            for name, size in self.image_sizes.items()
        }
        words = rng.integers(0, min(self.language.cfg.vocab_size, self.image_id), (1, 24))
        run = np.full((1, self.tokens_per_image), self.image_id)
        tokens = np.concatenate([words[:, :8], run, words[:, 8:]], axis=1).astype(np.int32)
        features_BJD = self.image_features(**media)
        logits = self(jnp.asarray(tokens), **media).logits
        return {"logits": logits, "features": features_BJD}

    def init_cache(self, batch_size: int, max_len: int, dtype: Any = None, **pages: Any) -> Any:
        """The language model's."""
        return self.language.init_cache(batch_size, max_len, dtype, **pages)

    def next_token_terms(
        self, x_BTD: Float[Array, "B T D"], batch: Any, sum_losses: SumLosses
    ) -> Terms:
        """The language model's."""
        return self.language.next_token_terms(x_BTD, batch, sum_losses)

    def training_terms(
        self, x_BTD: Float[Array, "B T D"], batch: Any, sum_losses: SumLosses
    ) -> Terms:
        """The language model's, with the paths of its routers as they are here."""
        total, count, stats = self.language.training_terms(x_BTD, batch, sum_losses)
        if stats is not None:
            loads = {f"language.{path}": load for path, load in stats["loads"].items()}
            stats = {**stats, "loads": loads}
        return total, count, stats


def check_rows(tokens: Int[Array, "B T"], image_id: int, tokens_each: int, num_images: int) -> None:
    """Refuses rows whose image tokens are no whole images, or more than rows hold images."""
    counts_B = np.sum(np.asarray(tokens) == image_id, axis=1)
    wrong_B = (counts_B % tokens_each != 0) | (counts_B > num_images * tokens_each)
    if wrong_B.any():
        row = int(np.argmax(wrong_B))
        raise ValueError(
            f"row {row} has {counts_B[row]} image tokens (id {image_id}), {tokens_each} an image,"
            f" and rows hold {num_images} images at most"
        )


def group_images(
    tokens: Int[Array, "B T"], image_id: int, tokens_each: int, images: Float[Array, "N ..."]
) -> Float[Array, "B M ..."]:
    """Images one after another, [N, ...], as those of whole rows, padded with zeros.

    Args:
      tokens_each: tokens of one image.

    Raises:
      ValueError: a row's image tokens are no whole images, or there are more or fewer images.
    """
    if isinstance(tokens, jax.core.Tracer):
        if len(tokens) == 1:
            return images[None]
        raise ValueError(
            "in compiled code images of several rows are given by row, as [B, M, H, W, 3]"
        )
    counts_B, left_B = np.divmod(np.sum(np.asarray(tokens) == image_id, axis=1), tokens_each)
    if left_B.any() or counts_B.sum() != len(images):
        raise ValueError(
            f"{len(images)} images are {len(images) * tokens_each} image tokens (id {image_id}),"
            f" {tokens_each} each, and the rows have"
            f" {', '.join(map(str, counts_B * tokens_each + left_B))}"
        )
    starts_B = np.cumsum(counts_B) - counts_B
    at_BM = starts_B[:, None] + np.arange(max(counts_B.max(), 1))
    at_BM = np.where(np.arange(at_BM.shape[1]) < counts_B[:, None], at_BM, len(images))
    return jnp.pad(images, ((0, 1), *[(0, 0)] * (images.ndim - 1)))[at_BM]
