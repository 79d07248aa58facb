"""What an adapter method is: its settings, three functions of one layer, and its form in PEFT.

A method is a frozen dataclass in one file. It must state `peft_type`, `tensors`, `init`, `forward`,
`merge`, `from_peft` and `to_peft`; everything else that inject, train, save and load ask of it has
a default here. `inject` resolves the settings for each layer, so a method in a model has neither
targets nor patterns left, and layers alike share one.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.moe import ExpertWeights
from llmprep_jax.peft.layout import Layout
from llmprep_jax.peft.targets import Pattern, Targets, check_layers
from llmprep_jax.types import Array

Params = Mapping[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """Settings that every method has.

    Attributes:
      targets: which layers, see `injection.inject`: "all-linear", "language", "vision", names or a
        regex.
      exclude_modules: of the targets, those that are none, matched alike.
      layers_to_transform: numbers of the only layers that are adapted; None: all. layers_pattern:
        regexes of what the layers are numbered in; (): anything.
      modules_to_save: modules that are trained whole beside the adapters (embeddings, norms, the
        head), matched as targets are; see `tuned`.
      dtype: of the adapter's parameters.
    """

    targets: Targets = "all-linear"
    exclude_modules: Targets = ()
    layers_to_transform: int | tuple[int, ...] | list[int] | None = None
    layers_pattern: Targets = ()
    modules_to_save: Targets = ()
    dtype: str = "float32"

    # what a method has a field or a line for where it differs
    rank_pattern: ClassVar[Pattern] = ()
    alpha_pattern: ClassVar[Pattern] = ()
    bias: ClassVar[str] = "none"  # which biases are trained too, see `biases`
    dropout: ClassVar[float] = 0.0  # the share of inputs that is dropped in training
    trainable_token_indices: ClassVar[tuple[int, ...]] = ()  # rows of the embedding, see `tokens`
    groups: ClassVar[int | None] = None  # into which attention is cut in training, see `longlora`
    base_dtype: ClassVar[str | None] = None  # what `load_model` reads the base as; None: as stored
    frozen: ClassVar[tuple[str, ...]] = ()  # parameters that are not trained
    takes_part: ClassVar[bool] = False  # whether a part of the weight is taken out, and trained
    reads_weight: ClassVar[bool] = False  # whether the weight is looked at where it is put around
    decayed: ClassVar[tuple[str, ...]] = ()  # those that weight decay moves towards the identity
    shared: ClassVar[Mapping[str, str]] = {}  # PEFT's names of arrays that all layers share
    adds_product: ClassVar[bool] = False  # s B A is added, of lora_a and lora_b, and nothing else
    pads: ClassVar[bool] = False  # zeros of a higher rank change nothing and get no gradient
    adapts_embeddings: ClassVar[bool] = False
    ties_tables: ClassVar[bool] = False  # whether PEFT has ensure_weight_tying for it
    scaled: ClassVar[str | None] = None  # the parameter that a layer's own scale may go into
    peft_type: ClassVar[str]
    peft_fields: ClassVar[tuple[str, ...]] = ()  # of adapter_config.json, that `from_peft` reads

    readers: ClassVar[dict[str, list[type["Method"]]]] = {}  # the classes of each peft_type

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "peft_type" in vars(cls):
            Method.readers.setdefault(cls.peft_type, []).append(cls)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(getattr(self, field.name), list):  # of a config file; fields are hashed
                object.__setattr__(self, field.name, tuple(getattr(self, field.name)))
        numbers, pattern = self.layers_to_transform, self.layers_pattern
        if isinstance(numbers, int):
            object.__setattr__(self, "layers_to_transform", (numbers,))
        if isinstance(pattern, str):
            object.__setattr__(self, "layers_pattern", (pattern,))
        check_layers(self.targets, self.layers_to_transform, self.layers_pattern)

    # of a model

    def prepare(self, model: nnx.Module) -> nnx.Module:
        """The base as the method takes it."""
        return model

    def resolve(self, names: Sequence[str]) -> "Method":
        """The settings for one layer, which goes by `names`; without targets and patterns."""
        unset = {"layers_to_transform": None, "layers_pattern": ()}
        unset |= dict.fromkeys(("targets", "exclude_modules", "modules_to_save"), ())
        return dataclasses.replace(self, **unset)

    def shared_shapes(self, bases: Iterable[Einsum]) -> dict[str, tuple[int, ...]]:
        """Of the arrays that these layers share, by our names."""
        return {}

    def draw_shared(self, bases: Iterable[Einsum]) -> dict[str, np.ndarray]:
        """The arrays that these layers share."""
        return {}

    # of a layer

    def check(self, base: Einsum) -> None:
        """Refuses a layer that the method does not go around.

        Raises:
          ValueError: it is one; of experts, which are used by their weights, one with dropout.
        """
        if self.dropout and isinstance(base, ExpertWeights):
            raise ValueError(
                f"dropout is {self.dropout}, but the layer holds routed experts, which are used by"
                " their weights; set it to 0, or leave them out"
            )

    @abc.abstractmethod
    def init(self, base: Einsum, rngs: nnx.Rngs) -> Params:
        """Parameters by name, such that `forward` equals the base."""

    def derived(self, base: Einsum) -> Params:
        """What follows from the base's weight and is kept beside the parameters; see `frozen`."""
        return {}

    def settled(self, params: Params, base: Einsum) -> Params:
        """What `forward` computes from parameters alone, and takes from them where it is there."""
        return {}

    @abc.abstractmethod
    def forward(self, params: Params, base: Einsum, x: Array) -> Array:
        """The layer's result; a method with `dropout` takes the inputs after it as well."""

    @abc.abstractmethod
    def merge(self, params: Params, base: Einsum) -> Array:
        """The base's weight with the adapter in it, in float32."""

    def merge_bias(self, params: Params, base: Einsum) -> Array:
        """The base's bias with the adapter in it."""
        return base.b[...]

    @property
    def leaves_layers(self) -> bool:
        """Whether it can be trained on some layers of a stack, zeros in the others."""
        return self.pads

    @property
    def wide(self) -> "Method":
        """The settings of what `widen` makes."""
        return self

    def widen(self, params: Params) -> Params:
        """The parameters as those of an adapter on the whole weight, where a part was taken out."""
        return params

    # of training

    def of_run(self, num_steps: int) -> "Method":
        """The settings for a run of so many steps, where they leave that open."""
        return self

    def hastened(self, base: Einsum) -> tuple[str, ...]:
        """The parameters that LoRA+ gives a higher rate: the factor that is zero at first."""
        return ()

    def wrap_optimizer(
        self, tx: optax.GradientTransformation, params: Any, num_steps: int
    ) -> optax.GradientTransformation:
        """The optimizer with what the method does after its updates of the tree `params`."""
        return tx

    def extra_loss(self, layers: Sequence[Any]) -> Array | None:
        """What is added to the mean loss, for the layers (`Adapted`) of the method."""
        return None

    # of PEFT's folders

    @abc.abstractmethod
    def tensors(self, layout: Layout) -> Mapping[str, tuple[str, str]]:
        """PEFT's name of each parameter and einops pattern theirs -> ours, for one layer."""

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Whether a config of the `peft_type` is of this class."""
        return True

    @classmethod
    @abc.abstractmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "Method":
        """The settings that a config holds, patterns included."""

    @classmethod
    def emptied(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Modules that a config says nothing is left of."""
        return ()

    @classmethod
    def draws_shared(cls, config: Mapping[str, Any]) -> bool:
        """Whether shared arrays that a folder lacks are drawn anew."""
        return False

    @classmethod
    @abc.abstractmethod
    def to_peft(cls, by_name: Mapping[str, "Method"]) -> dict[str, Any]:
        """The method's own fields of the config, of methods by module."""


def float32(params: Params, *names: str) -> tuple[Array, ...]:
    """Some of the parameters, in float32."""
    return tuple(params[name].astype(jnp.float32) for name in names)
