"""What models of two towers have in common: texts and images to unit vectors of one space.

A family gives `text_features` and `image_features`; vectors are normalised in float32 here. Calls
from outside are compiled once a shape, whatever they are made from.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.nn.base_model import BaseModel
from llmprep_jax.nn.linear import Einsum, check_ids
from llmprep_jax.nn.stack import unstack
from llmprep_jax.sharding import has_mesh, mesh_of, on_own_mesh, spec, use_mesh
from llmprep_jax.types import Array, Bool, Float, Int

_TOWERS = ("text", "vision")
SHORTEST = 3  # tokens of a text that starts and ends


class Similarities(NamedTuple):
    """Logits [images, texts] in float32, and the unit vectors [texts, E] and [images, E]."""

    logits_per_image: Array
    text_embeds: Array
    image_embeds: Array


class TwoTowers(BaseModel):
    """See `models.protocol.Encoder`.

    Attributes:
      text, vision: the towers.
      logit_scale: log of the factor of dot products; logit_bias: what is added, None for none.
    """

    stacks = ("text.layers", "vision.layers")

    text: Any
    vision: Any
    logit_scale: nnx.Variable
    logit_bias: nnx.Variable | None = None

    @on_own_mesh
    def __call__(
        self,
        tokens: Int[Array, "T_texts T"],
        images: Float[Array, "N_images H W C"],
        mask: Bool[Array, "T_texts T"] | None = None,
    ) -> Similarities:
        """How well each image goes with each text.

        Args:
          tokens, mask: as of `encode_text`. images: as of `encode_image`; as many as there are.
        """
        text_TE, image_NE = self.encode_text(tokens, mask), self.encode_image(images)
        return Similarities(_compare(self, text_TE, image_NE), text_TE, image_NE)

    @on_own_mesh
    def encode_text(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B E"]:
        """Unit vectors of texts, float32.

        Args:
          tokens: ids, padded on the right.
          mask: True for real tokens; None: all may be seen.

        Raises:
          ValueError: ids outside the vocabulary, or more tokens than there are positions.
        """
        check_ids(tokens, self.text.cfg.vocab_size)
        return _encode_text(self, tokens, mask)

    @on_own_mesh
    def encode_image(self, images: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        """Unit vectors of images, float32.

        Args:
          images: normalised, channels last.

        Raises:
          ValueError: images of another size than the tower's.
        """
        return _encode_image(self, images)

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The towers with what makes their features vectors of one space."""
        projections = [name for name in vars(self) if name.endswith("_projection")]
        own = {tower: [p for p in projections if p.startswith(tower)] for tower in _TOWERS}
        return {tower: (tower, *own[tower]) for tower in _TOWERS}

    def frozen(self) -> "Frozen":
        """What encodes as the model does now, in less time."""
        return Frozen(self)

    def text_features(
        self, tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None
    ) -> Float[Array, "B E"]:
        """What is normalised."""
        raise AttributeError(f"{type(self).__name__} does not say what texts become")

    def image_features(self, images_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        """What is normalised."""
        raise AttributeError(f"{type(self).__name__} does not say what images become")

    def similarity(self) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
        """The factor of dot products, and what is added to them; float32."""
        bias = self.logit_bias
        factor = jnp.exp(self.logit_scale[...].astype(jnp.float32))
        return factor.reshape(()), None if bias is None else bias[...].astype("float32").reshape(())

    @property
    def dtype(self) -> jnp.dtype:
        return self.text.embed.w.dtype

    def probe(self) -> dict[str, Array]:
        """Logits and unit vectors of two texts and two images, of fixed random values."""
        rng, cfg = np.random.default_rng(0), self.text.cfg
        length = min(max(SHORTEST, cfg.max_seq_len), 24)
        tokens = rng.integers(0, cfg.vocab_size, (2, length), dtype=np.int32)
        size = self.vision.cfg.image_size
        images = rng.normal(0, 1, (2, size, size, 3)).astype(np.float32)
        return self(jnp.asarray(tokens), jnp.asarray(images))._asdict()


class Frozen:
    """Encodes as a model did when this was made, in less time; for calls in a row.

    The modules are walked once, not at every call. On a CPU layers are in a list, since a loop over
    a stack copies each layer's weights before it multiplies by them, and weights lie by output;
    while the model is kept too, they are held twice there.
    """

    def __init__(self, model: TwoTowers):
        self._mesh = mesh_of(model)
        if self._mesh is None and jax.default_backend() == "cpu":
            model = _in_lists(model)
        self._vocab_size = model.text.cfg.vocab_size
        self._leaves, structure = jax.tree.flatten(model)

        def compiled(encode: Callable[..., Array]) -> Callable[..., Array]:
            def run(leaves, *inputs):
                return encode(jax.tree.unflatten(structure, leaves), *inputs)

            return jax.jit(run)

        self._text, self._image = compiled(_encode_text), compiled(_encode_image)

    def encode_text(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B E"]:
        """As `TwoTowers.encode_text`."""
        check_ids(tokens, self._vocab_size)
        with self._place():
            return self._text(self._leaves, tokens, mask)

    def encode_image(self, images: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        """As `TwoTowers.encode_image`."""
        with self._place():
            return self._image(self._leaves, images)

    def _place(self) -> contextlib.AbstractContextManager:
        keep = self._mesh is None or has_mesh()
        return contextlib.nullcontext() if keep else use_mesh(self._mesh)


def _in_lists(model: TwoTowers) -> TwoTowers:
    """The model with its layers in lists, their weights by output."""

    def turn(_: tuple, node: Any) -> Any:
        return node.by_output() if type(node) is Einsum else node

    turn_layer = jax.jit(functools.partial(nnx.recursive_map, turn))  # one program for all layers
    graph, state = nnx.split(model)
    listed = nnx.merge(graph, state)
    for tower in (listed.text, listed.vision):
        tower.layers = unstack(tower.layers, turn_layer)
    return listed


def normalize(x_BE: Float[Array, "B E"]) -> Float[Array, "B E"]:
    """Rows of length 1, in float32, as released: without an epsilon."""
    x_BE = x_BE.astype(jnp.float32)
    return x_BE * jax.lax.rsqrt(jnp.sum(jnp.square(x_BE), axis=-1, keepdims=True))


@jax.jit
def _encode_text(model: TwoTowers, tokens: Array, mask: Array | None) -> Array:
    with jax.named_scope("text"):
        return normalize(model.text_features(tokens, mask))


@jax.jit
def _encode_image(model: TwoTowers, images: Array) -> Array:
    with jax.named_scope("images"):
        return normalize(model.image_features(images))


@jax.jit
def _compare(model: TwoTowers, text_TE: Array, image_NE: Array) -> Array:
    factor, bias = model.similarity()
    if has_mesh():  # each image against every text
        text_TE = jax.reshard(text_TE, jax.P(None, None))
    sharding = spec("batch", None, shape=(len(image_NE), len(text_TE)))
    dots_NT = jnp.einsum("NE,TE->NT", image_NE, text_TE, out_sharding=sharding)
    return dots_NT * factor + (0.0 if bias is None else bias)
