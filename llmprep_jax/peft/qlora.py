"""QLoRA (Dettmers et al. 2023): LoRA on a base of packed linear layers, 4 bits by default.

What is trained is LoRA's A and B in float32; products with the packed weight make it dense tile by
tile, and its backward goes to the activations alone. The method of a layer is plain LoRA, and so is
the saved folder, which PEFT loads onto a dense base too.
"""

import dataclasses
import warnings
from collections.abc import Sequence

from flax import nnx

from llmprep_jax.peft.lora import LoRA
from llmprep_jax.quant.kinds import check_kind
from llmprep_jax.quant.linear import packed_layers, quantize_model


@dataclasses.dataclass(frozen=True)
class QLoRA(LoRA):
    """Settings of QLoRA: those of LoRA, and the base's format.

    Attributes:
      kind: one of `quant.KINDS`; "nf4" is with double quantisation.
    """

    _: dataclasses.KW_ONLY
    kind: str = "nf4"

    def __post_init__(self):
        super().__post_init__()
        check_kind(self.kind)

    @property
    def base_dtype(self) -> str:
        """What `load_model` packs while it reads."""
        return self.kind

    def prepare(self, model: nnx.Module) -> nnx.Module:
        """The model with its linear layers packed; as it is, where some are packed already, with a
        warning where they are so in another format.
        """
        packed = packed_layers(model)
        if not packed:
            return quantize_model(model, self.kind)
        kinds = sorted({layer.kind for layer in packed.values()} - {self.kind})
        if kinds:
            warnings.warn(
                f"the base is packed as {', '.join(kinds)} and stays so; kind={self.kind!r} is for"
                ' a dense one, which load_model(..., dtype="bfloat16") makes of a packed folder',
                stacklevel=4,
            )
        return model

    def resolve(self, names: Sequence[str]) -> LoRA:
        resolved = super().resolve(names)
        own = (field.name for field in dataclasses.fields(LoRA))
        return LoRA(**{name: getattr(resolved, name) for name in own})
