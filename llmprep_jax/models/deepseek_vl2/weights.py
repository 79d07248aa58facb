"""Names of DeepSeek-VL2's tensors in the released files: timm's of the tower, and DeepSeek's.

The tower's pooling is in the files and does nothing. Experts are modules of their own here, in
memory too, so adapters name each (`...experts.3.gate_proj`).
"""

from llmprep_jax.models import siglip
from llmprep_jax.weights.rows import Table

_OWN = {
    "projector.up.w": ("projector.layers.0.weight", "f d -> d f"),
    "projector.up.b": ("projector.layers.0.bias", "f -> f"),
    "projector.down.w": ("projector.layers.2.weight", "f d -> d f"),
    "projector.down.b": ("projector.layers.2.bias", "f -> f"),
    "newline": ("image_newline", "d -> d"),
    "separator": ("view_seperator", "d -> d"),  # as released
}


def table(language: Table) -> Table:
    """The table of a model with this language model."""
    rows = {path: row._replace(module=None) for path, row in language.items()}
    tower = siglip.TIMM_VISION_WEIGHTS.below("vision", "vision.")
    return tower | Table(_OWN) | _plain(rows, language)


def _plain(rows: dict, language: Table) -> Table:
    whole = Table(rows, copies=language.copies, embed=language.embed, head=language.head)
    return whole.below("language", "language.")
