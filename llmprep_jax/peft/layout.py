"""A linear layer as an adapter method sees it: its inputs and outputs, with us and in PEFT's files.

A layer is an einsum whose weight keeps its dimensions unmerged; PEFT's matrices are outputs by
inputs. `Layout` says which of the file's columns and rows are which of our dimensions, as a weight
table's pattern does for the weight itself. Letters of experts are neither inputs nor outputs.
"""

import dataclasses
import re

from llmprep_jax.nn.linear import Einsum, Embed
from llmprep_jax.peft.experts import letters


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a layer's inputs and outputs are laid out, as einops writes it: "(n h)" and "n h".

    Attributes:
      their_ins, their_outs: the columns and rows of Hugging Face's matrix.
      ins, outs: our dimensions.
      is_embedding: whether PEFT's names are those of an embedding.
    """

    their_ins: str
    their_outs: str
    ins: str
    outs: str

    is_embedding: bool = False

    @classmethod
    def of_layer(cls, base: Einsum, pattern: str) -> "Layout | None":
        """That of a layer; an embedding, [V, D] with us and with them, takes V and gives D."""
        layout = cls.of(pattern)
        if not isinstance(base, Embed):
            return layout
        theirs, ours = (layout.their_outs, layout.their_ins), (layout.outs, layout.ins)
        return cls(*theirs, *ours, is_embedding=True)

    @classmethod
    def of(cls, pattern: str) -> "Layout | None":
        """That of a weight table's pattern, "(n h) d -> d n h"; None for what is no matrix."""
        theirs, ours = (side.strip() for side in pattern.split("->"))
        groups = re.findall(r"\([^)]*\)|\S+", theirs)
        if len(groups) != 2:
            return None
        outs, ins = (group.strip("()").split() for group in groups)
        ordered = [" ".join(dim for dim in ours.split() if dim in side) for side in (ins, outs)]
        return cls(groups[1], groups[0], *ordered)


def dims(base: Einsum) -> tuple[str, str, str, str]:
    """(activation, weight's inputs, weight's outputs, result) of a layer's einsum, as letters.

    Letters of experts are neither inputs nor outputs.
    """
    x_dims, w_dims, y_dims = letters(base)
    ins = "".join(dim for dim in w_dims if dim not in y_dims)
    outs = "".join(dim for dim in w_dims if dim not in x_dims)
    return x_dims, ins, outs, y_dims


def shape_of(base: Einsum) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One layer's (input, output) sizes, unmerged; of one expert where there are many."""
    return _sides(base, base.layer_shape)


def axes_of(base: Einsum) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """The logical axes of a layer's (inputs, outputs)."""
    return _sides(base, base.axes)


def _sides(base: Einsum, values: tuple) -> tuple[tuple, tuple]:
    """What belongs to the (inputs, outputs), of values of the weight's dimensions."""
    _, ins, outs, _ = dims(base)
    by_letter = dict(zip(letters(base)[1], values, strict=True))
    return tuple(by_letter[dim] for dim in ins), tuple(by_letter[dim] for dim in outs)
