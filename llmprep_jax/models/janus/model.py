"""Janus (2410.13848) and Janus-Pro (2501.17811, section 2): SigLIP's patches among a Llama's words
to see, codes of a VQ autoencoder to draw.

A picture is drawn code by code, row by row: the language model's last hidden state goes through a
head for codes in place of that for words, and the code that is drawn comes back by a table and an
aligner of its own. The thing a reader would get wrong: the two ways share the language model alone,
so what is seen and what is drawn have embeddings that know nothing of each other.

Letters of this file: N images, I features or codes of one, J of a row, M images of a row, Z width
of a code.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.models import llama, siglip
from llmprep_jax.models.janus.config import Config
from llmprep_jax.models.janus.vq import VQ, encoder_work
from llmprep_jax.models.janus.weights import table
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.composed import ComposedModel
from llmprep_jax.nn.language_model import PLACES, SumLosses, Terms
from llmprep_jax.nn.linear import Einsum, Embed, check_ids
from llmprep_jax.nn.media import count_tokens, merge_images, split_rows
from llmprep_jax.nn.param import Frozen, idle
from llmprep_jax.nn.work import Work
from llmprep_jax.sharding import has_mesh, on_own_mesh
from llmprep_jax.types import Array, Bool, Float, Int
from llmprep_jax.weights.rows import Table


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


class Aligner(nnx.Module):
    """Features to the language model's width, by two layers."""

    def __init__(self, dim: int, cfg: Config, *, rngs: nnx.Rngs):
        width, out_axes = cfg.language.dim, ("batch", None, "act_embed")
        make = functools.partial(Einsum, bias=True, compute=cfg.compute, rngs=rngs)
        self.up = make("NID,DE->NIE", (dim, width), (None, "embed"), out_axes)
        self.down = make("NID,DE->NIE", (width, width), ("embed", None), out_axes)

    @jax.named_scope("aligner")
    def __call__(self, x_NID: Float[Array, "N I D"]) -> Float[Array, "N I E"]:
        return self.down(_gelu(self.up(x_NID)))


class Drawing(nnx.Module):
    """Codes to what the language model reads, and its final hidden states to logits of the next
    code, by two layers each; see `models.protocol.Drawing`."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        width, codes = cfg.language.dim, cfg.vq.num_codes
        kind = dict(compute=cfg.compute, rngs=rngs)
        self.codes = Embed(codes, cfg.vq.code_dim, std=1.0, **kind)
        self.aligner = Aligner(cfg.vq.code_dim, cfg, rngs=rngs)
        make = functools.partial(Einsum, bias=True, **kind)
        out_axes = ("batch", "seq", "act_embed")
        self.up = make("BTD,DE->BTE", (width, width), ("embed", None), out_axes)
        out_axes = ("batch", "seq", "vocab")
        self.down = make("BTD,DV->BTV", (width, codes), ("embed", "vocab"), out_axes)

    def embed(self, codes: Int[Array, "B I"]) -> Float[Array, "B I D"]:
        """What the language model reads of codes that were drawn."""
        return self.aligner(self.codes(codes))

    @jax.named_scope("code_head")
    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits, float32 for the softmax and the loss."""
        return self.down(_gelu(self.up(x_BTD)).astype(jnp.float32))

    def unembedding(self) -> None:
        """No one matrix."""


class Model(ComposedModel):
    """Tokens and images [N, H, W, 3] to logits, and codes [B, I] to those of further codes."""

    stacks, projectors = ("language.layers", "vision.layers"), ("aligner",)

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg, self.source = cfg, Source()
        self.language = llama.Model(cfg.language, rngs=rngs)
        self.vision = siglip.VisionTower(cfg.vision, rngs=rngs)
        self.aligner = Aligner(cfg.vision.dim, cfg, rngs=rngs)
        self.vq = idle(VQ(cfg.vq, rngs=rngs), Frozen)
        self.drawing = Drawing(cfg, rngs=rngs)

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        return {**super().parts, "drawing": ("drawing",)}

    @property
    def weights(self) -> Table:
        """The table of tensor names."""
        return table(self.cfg)

    @property
    def image_work(self) -> dict[str, Work]:
        """And of pictures that are drawn the codes, and what reads and foretells them."""
        cfg = self.cfg
        vq = {
            f"vq.{path}": one for path, one in encoder_work(cfg.vq, cfg.vision.image_size).items()
        }
        codes = Work(self.tokens_per_image, is_drawn=True)
        return {
            **super().image_work,
            **vq,
            "drawing.aligner": codes._replace(behind=("drawing.codes",)),
            **dict.fromkeys(("drawing.up", "drawing.down"), codes._replace(behind=("",))),
        }

    def image_features(
        self,
        images: Float[Array, "B M H W 3"],
        codes: Int[Array, "B J"] | None = None,
    ) -> Float[Array, "B J D"]:
        """Of normalised images, in the order of their tokens.

        Args:
          codes: of pictures that are drawn, in place of what is seen; -1 of those that are not.
        """
        x_BJD = split_rows(self.aligner(self.vision.features(merge_images(images))), len(images))
        if codes is None:
            return x_BJD
        drawn_BJD = self.drawing.embed(jnp.maximum(codes, 0))
        return jnp.where(codes[..., None] >= 0, drawn_BJD, x_BJD)

    def by_row(self, tokens: Int[Array, "B T"], media: dict[str, Any]) -> dict[str, Array]:
        drawn = media.get("drawn")
        rows = super().by_row(tokens, {name: x for name, x in media.items() if name != "drawn"})
        return rows if drawn is None else {**rows, "drawn": jnp.asarray(drawn)}

    def read_drawn(
        self, images: Float[Array, "B M H W 3"], drawn: Bool[Array, "B M"] | None = None
    ) -> dict[str, Array]:
        """What embeds images of whole rows, those that are drawn by their codes.

        Args:
          images: of values from -1 to 1 where drawn.
        """
        if drawn is None:
            return {"images": images}
        codes_NI = _encode_any(self.vq, merge_images(images), jnp.any(drawn))
        codes_NI = jnp.where(merge_images(drawn)[:, None], codes_NI, -1)
        return {"images": images, "codes": split_rows(codes_NI[..., None], len(images))[..., 0]}

    @on_own_mesh
    def image_logits(self, codes: Int[Array, "B I"]) -> Float[Array, "B I V"]:
        """Logits of the code after each, given those before it and no text before them; float32.

        Raises:
          ValueError: codes that the codebook has not.
        """
        check_ids(codes, self.cfg.vq.num_codes)
        x_BID, _ = self.language.features(self.drawing.embed(codes))
        return self.drawing.unembed(x_BID)

    @on_own_mesh
    def encode_codes(self, images: Float[Array, "B H W 3"]) -> Int[Array, "B I"]:
        """Codes of pictures of values from -1 to 1, row by row.

        Raises:
          ValueError: pictures of another size than the model's.
        """
        size = self.cfg.vision.image_size
        if images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"pictures {tuple(images.shape)}; this model has codes of [B, {size}, {size}, 3]"
            )
        return _encode(self.vq, images)

    @on_own_mesh
    def decode_codes(self, codes: Int[Array, "B I"]) -> Float[Array, "B H W 3"]:
        """Pictures of codes: values of [-1, 1], and a little beyond.

        Raises:
          ValueError: more or fewer codes than a picture has, or such as the codebook has not.
        """
        if codes.ndim != 2 or codes.shape[1] != self.tokens_per_image:
            raise ValueError(
                f"codes {tuple(codes.shape)}; a picture has {self.tokens_per_image} of them"
            )
        check_ids(codes, self.cfg.vq.num_codes)
        return _decode(self.vq, codes)

    def probe(self) -> dict[str, Array]:
        """Both ways: what is said and drawn, and both halves of the VQ."""
        rng, cfg = np.random.default_rng(1), self.cfg
        size, count = cfg.vision.image_size, self.tokens_per_image
        images = jnp.asarray(rng.uniform(-1, 1, (1, size, size, 3)).astype(np.float32))
        codes = jnp.asarray(rng.integers(0, cfg.vq.num_codes, (1, count), dtype=np.int32))
        return {
            **super().probe(),
            "image_logits": self.image_logits(codes),
            "latents": _latents(self.vq, images),
            "pictures": self.decode_codes(codes),
        }

    def next_token_terms(
        self, x_BTD: Float[Array, "B T D"], batch: Any, sum_losses: SumLosses
    ) -> Terms:
        """Of words, and of codes where pictures are drawn: a code weighs as much as a word, as
        released. The metrics have the means of both too, text_loss and code_loss."""
        if "codes" not in batch:
            return self.language.next_token_terms(x_BTD, batch, sum_losses)
        places = {name: batch[name] for name in PLACES if name in batch}
        x_BTD, _ = self.language.features(x_BTD, **places, in_order=True)
        words_BT = batch["loss_mask"].astype(jnp.float32)
        codes_BT = next_codes(batch, self.image_id)
        is_code_BT = (codes_BT >= 0).astype(jnp.float32)
        of_words = sum_losses(x_BTD, batch["targets"], words_BT)
        of_codes = sum_losses(x_BTD, jnp.maximum(codes_BT, 0), is_code_BT, head=self.drawing)
        counts = jnp.sum(words_BT), jnp.sum(is_code_BT)
        means = {"text_loss": (of_words, counts[0]), "code_loss": (of_codes, counts[1])}
        total = of_words + of_codes
        stats = dict(parts={"next_token_loss": total}, means=means, loads={})
        return total, sum(counts), {**stats, "dropped": jnp.zeros(())}

    def training_terms(
        self, x_BTD: Float[Array, "B T D"], batch: Any, sum_losses: SumLosses
    ) -> Terms:
        """Those of the next token: nothing else is learnt."""
        return self.next_token_terms(x_BTD, batch, sum_losses)


def next_codes(batch: Any, image_id: int) -> Int[Array, "B T"]:
    """The code after each token of a batch, -1 where what follows is none."""
    targets_BT, codes_BJ = batch["targets"], batch["codes"]
    is_image_BT = jnp.concatenate([batch["tokens"], targets_BT[:, -1:]], axis=1) == image_id
    index_BT = count_tokens(is_image_BT)[:, 1:]
    follows_BT = (index_BT >= 0) & (targets_BT == image_id)
    if "segment_ids" in batch:  # nothing foretells another document's first token
        segments_BT = batch["segment_ids"]
        later_BT = jnp.concatenate([segments_BT[:, 1:], segments_BT[:, -1:]], axis=1)
        follows_BT &= (segments_BT == later_BT) & (segments_BT > 0)
    taken_BT = jnp.take_along_axis(codes_BJ, jnp.maximum(index_BT, 0), axis=1, mode="clip")
    return jnp.where(follows_BT, taken_BT, -1)


def _encode_any(vq: VQ, images_NHWC: Array, is_asked: Array) -> Int[Array, "N I"]:
    """Codes of images, zeros where none is asked for: a batch that only sees encodes nothing."""
    found = jax.eval_shape(vq.encode, images_NHWC)
    sharding = found.sharding.spec if has_mesh() else None

    def none(images_NHWC: Array) -> Array:
        return jnp.zeros(found.shape, found.dtype, out_sharding=sharding)

    return jax.lax.cond(is_asked, vq.encode, none, jax.lax.stop_gradient(images_NHWC))


@jax.jit
def _encode(vq: VQ, images: Array) -> Array:
    return vq.encode(images)


@jax.jit
def _decode(vq: VQ, codes: Array) -> Array:
    return vq.decode(codes).astype(jnp.float32)


@jax.jit
def _latents(vq: VQ, images: Array) -> Array:
    return vq.latents(images)
