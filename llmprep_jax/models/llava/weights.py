"""Names of LLaVA's tensors in Hugging Face checkpoints, as released.

The tower's last block and norm are stored, and nothing reads them: the block is in a stack of its
own here.
"""

import dataclasses

from llmprep_jax.models import clip, llama
from llmprep_jax.models.hf_names import IN_MEMORY, LANGUAGE, PROJECTOR, RENAMES, TOWER
from llmprep_jax.models.llava.config import Config
from llmprep_jax.weights.rows import Table

_PROJECTOR = Table(
    {
        "projector.up.w": (f"{PROJECTOR}linear_1.weight", "e d -> d e"),
        "projector.up.b": (f"{PROJECTOR}linear_1.bias", "e -> e"),
        "projector.down.w": (f"{PROJECTOR}linear_2.weight", "e d -> d e"),
        "projector.down.b": (f"{PROJECTOR}linear_2.bias", "e -> e"),
    }
)
_VISION = clip.VISION_WEIGHTS.below("vision", TOWER)


def table(cfg: Config) -> Table:
    """The table of a model with these blocks."""
    numbers = ",".join(map(str, range(cfg.num_blocks, cfg.vision.num_layers)))
    unused = {
        path.replace("vision.layers.", "unused."): row._replace(
            name=row.name.replace("{l}", f"{{l:{numbers}}}")
        )
        for path, row in _VISION.items()
        if path.startswith("vision.layers.") and numbers
    }
    rows = llama.WEIGHTS.below("language", LANGUAGE) | _VISION | Table(unused) | _PROJECTOR
    more = dict(renames=RENAMES, ignored=(r"\.position_ids$",), modules=IN_MEMORY)
    return dataclasses.replace(rows, **more)
