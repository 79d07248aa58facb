"""Data: documents from files to batches of packed token rows, on Grain.

Grain is imported when a pipeline is asked for: models load, generate and train on arrays without.
"""

import importlib
from typing import Any

from llmprep_jax.data.config import DataConfig
from llmprep_jax.data.sources import SourceOptions, open_source

__all__ = [
    "Batches",
    "DataConfig",
    "EvaluationBatches",
    "HeldOutPairs",
    "Pairing",
    "SourceOptions",
    "build",
    "build_pairs",
    "evaluation_batches",
    "open_source",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "pairs" if name in ("HeldOutPairs", "Pairing", "build_pairs") else "pipeline"
    return getattr(importlib.import_module(f"llmprep_jax.data.{module}"), name)
