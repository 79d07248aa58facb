"""What parts of a model compute from their parameters alone, computed once where these stand still.

A part that has such things is `Settling`; a model that is about to read and write many tokens is
`settle`d first, and not while it is trained.
"""

from typing import Any

from flax import nnx


class Settling(nnx.Module):
    """A part that `settle` may replace."""

    def settled(self) -> nnx.Module:
        """The same part, which computes less for each token."""
        return self


def settle(model: nnx.Module) -> nnx.Module:
    """The same model with its parts settled; the given one is unchanged, arrays are shared."""

    def visit(_: tuple, node: Any) -> Any:
        return node.settled() if isinstance(node, Settling) else node

    return nnx.recursive_map(visit, model)
