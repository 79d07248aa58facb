"""What the Configs of all families have in common.

A model is a language model, an encoder, or composed of both; `decoder` is the Config of its
language model, which is what generation and training of text ask for. Fields that no config.json
holds say so in their metadata.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from llmprep_jax.nn.param import Compute

# of a field that no config.json holds: it changes how a model computes, not what
UNSAVED = {"is_saved": False}
# of one that a run goes by, whose checkpoints keep it
TRAINED_BY = {"is_saved": False, "is_trained_by": True}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of a model, and how it computes."""

    @property
    def decoder(self) -> "LanguageConfig | None":
        """Of the language model that is in the model; None: there is none."""
        return None

    def with_decoder(self, **changes: Any) -> "ModelConfig":
        """The Config with other fields of its language model."""
        raise ValueError(f"{type(self).__module__}.Config has no language model")

    def with_compute(self, compute: Compute) -> "ModelConfig":
        """The Config with other dtypes, of all its parts."""
        changes: dict[str, Any] = {}
        for name, value in _values(self):
            if isinstance(value, Compute):
                changes[name] = compute
            elif isinstance(value, ModelConfig):
                changes[name] = value.with_compute(compute)
        return dataclasses.replace(self, **changes)

    def with_token_ids(self, find: Callable[[str], int | None]) -> "ModelConfig":
        """The Config with ids that a family's config.json may leave to the tokenizer's file; `find`
        gives those of special tokens by their texts."""
        return self

    def check_platform(self, platform: str) -> None:
        """Raises ValueError where a platform ("cpu", "gpu", "tpu") lacks what the model needs."""
        for _, value in _values(self):
            if isinstance(value, ModelConfig):
                value.check_platform(platform)


@dataclasses.dataclass(frozen=True)
class LanguageConfig(ModelConfig):
    """A language model's."""

    @property
    def decoder(self) -> "LanguageConfig":
        return self

    def with_decoder(self, **changes: Any) -> "ModelConfig":
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class ComposedConfig(ModelConfig):
    """Of a model with a language model in it: a field `language` has its Config."""

    @property
    def decoder(self) -> LanguageConfig:
        return self.language

    def with_decoder(self, **changes: Any) -> "ModelConfig":
        return dataclasses.replace(self, language=self.language.with_decoder(**changes))


def lost(cfg: Any, again: Any, path: str = "") -> Iterator[str]:
    """Fields that a Config read back has other values of, as `language.window=5`."""
    scaling = getattr(cfg, "rope_scaling", None)
    # written as the base that it amounts to
    is_ntk = scaling is not None and scaling.kind == "ntk" and not scaling.mscale_all_dim
    for field in dataclasses.fields(cfg):
        value, other = getattr(cfg, field.name), getattr(again, field.name)
        if value == other or not field.metadata.get("is_saved", True):
            continue
        if is_ntk and field.name in ("rope_base", "rope_scaling"):
            continue
        if isinstance(value, ModelConfig) and type(value) is type(other):
            yield from lost(value, other, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}={value!r}"


def _values(cfg: Any) -> Iterator[tuple[str, Any]]:
    yield from ((field.name, getattr(cfg, field.name)) for field in dataclasses.fields(cfg))
