"""What the rest of the library may ask of a model, and of a family of models.

Generation, training, adapters and export are given a model and know no family; what they use is
here and nothing else is. A model of text is its own `decoder`; a composed one (a tower, a projector
and a language model) has it in `language`. `nn.language_model` and `nn.composed` have the defaults.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from llmprep_jax.models.model_config import ModelConfig
from llmprep_jax.nn.attention import Tokens
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.language_model import Output, SumLosses, Terms, Unembedding
from llmprep_jax.nn.work import Work
from llmprep_jax.types import Array, Bool, Float, Int


@runtime_checkable
class Weighted(Protocol):
    """What is loaded, saved, packed, adapted and trained.

    Attributes:
      cfg: its Config. source: of its weights.
    """

    cfg: Any
    source: Source

    @property
    def weights(self) -> Mapping[str, Any]:
        """The table of its tensors' names in checkpoints."""

    def weights_among(self, names: Sequence[str]) -> Mapping[str, Any]:
        """The table for files that hold tensors of these names, where there is another form."""

    def named_as(self, names: Sequence[str]) -> "Weighted":
        """The model with that table."""

    @property
    def stacks(self) -> tuple[str, ...]:
        """Paths of its stacks of layers, e.g. "layers" or "language.moe_layers"."""

    @property
    def extras(self) -> tuple[str, ...]:
        """Paths of what it has beside transformers' model."""

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Paths of what it is made of, by the names that a run freezes them by."""

    @property
    def image_work(self) -> Mapping[str, Work]:
        """What an image passes through, in that order, by paths: how its FLOPs are counted."""

    @property
    def dtype(self) -> jnp.dtype:
        """Of its weights, as config.json states it."""

    def probe(self) -> Mapping[str, Array]:
        """Outputs on fixed inputs, by name, in which every part has a share."""


@runtime_checkable
class Decoder(Weighted, Protocol):
    """Hidden states of tokens to those that the next tokens are read from."""

    def features(
        self,
        x_BTD: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        spans: Int[Array, "B T"] | None = None,
        cache: Any = None,
        in_order: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The final hidden states, after the last norm, and the cache if one was given."""

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Hidden states to logits, float32."""

    def unembedding(self) -> Unembedding | None:
        """The head as one matrix, None where it is none."""

    def init_cache(self, batch_size: int, max_len: int, dtype: Any = None, **pages: Any) -> Any:
        """An empty cache for `max_len` tokens a row."""

    @property
    def drafts(self) -> "Drafts | None":
        """Its modules that predict further tokens, None: it has none."""


@runtime_checkable
class Drafts(Protocol):
    """Modules that predict tokens beyond the next, one after the other."""

    def __len__(self) -> int:
        """How many there are."""

    def init_cache(self, batch_size: int, max_len: int, dtype: Any = None) -> Any:
        """An empty cache, a layer for each."""

    def begin(self, place: Tokens) -> Any:
        """What all of them need of the tokens' places."""

    def __call__(
        self,
        number: int,
        hidden_BTD: Float[Array, "B T D"],
        next_BTD: Float[Array, "B T D"],
        place: Tokens,
        begun: Any,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states of one token further than `next`, from those before and its embeddings."""


@runtime_checkable
class Drawing(Protocol):
    """What draws pictures with a decoder, code by code."""

    def embed(self, codes: Int[Array, "B I"]) -> Float[Array, "B I D"]:
        """What the decoder reads of codes that were drawn."""

    def unembed(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Hidden states to logits of the next code, float32."""


@runtime_checkable
class CausalModel(Weighted, Protocol):
    """What generates and is trained on tokens: a model of text, or a composed one."""

    @property
    def drawing(self) -> Drawing | None:
        """Of a model that draws, which then has `decode_codes` and `tokens_per_image`."""

    @property
    def decoder(self) -> Decoder:
        """Its language model; itself, if it is one."""

    def embed_inputs(self, tokens: Int[Array, "B T"], **media: Array) -> Float[Array, "B T D"]:
        """What the decoder reads: embeddings, and features of media in the places of theirs."""

    def by_row(self, tokens: Int[Array, "B T"], media: Mapping[str, Any]) -> dict[str, Array]:
        """Media as they are given from outside, as those of whole rows, [B, M, ...]."""

    def read_drawn(self, **media: Array) -> dict[str, Array]:
        """Media of whole rows as they are embedded, and targets where pictures are to be drawn."""

    def spans(self, tokens: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
        """Numbers of runs whose tokens see each other, 0 elsewhere; None: all is causal."""

    def __call__(self, tokens: Int[Array, "B T"], **inputs: Any) -> Output:
        """Logits of the token after each token."""

    def training_terms(self, batch: Mapping[str, Array], sum_losses: SumLosses) -> Terms:
        """(total, count, statistics) that it is trained by."""


@runtime_checkable
class Encoder(Weighted, Protocol):
    """Two towers: texts and images to unit vectors of one space."""

    def encode_text(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B E"]:
        """Unit vectors of texts."""

    def encode_image(self, images: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        """Unit vectors of images."""

    def similarity(self) -> tuple[Array, Array | None]:
        """The factor of dot products, and what is added to them."""


@runtime_checkable
class Family(Protocol):
    """A package of `models`.

    Attributes:
      Config, Model: `Model(cfg, rngs=...)` has random weights. PRESETS: released sizes by name.
      MODEL_TYPES: Hugging Face's names for it.
    """

    Config: type[ModelConfig]
    Model: Any
    PRESETS: Mapping[str, Any]
    MODEL_TYPES: tuple[str, ...]

    def from_hf(self, hf: Mapping[str, Any], names: Sequence[str] | None = None) -> Any:
        """A config.json, and the names of the tensors beside it, to a Config."""

    def to_hf(self, cfg: Any) -> dict[str, Any]:
        """The inverse; `registry.to_hf` checks it."""
