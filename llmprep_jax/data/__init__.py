"""Data: documents from files to batches of packed token rows, on Grain."""

from llmprep_jax.data.config import DataConfig
from llmprep_jax.data.pipeline import (
    Batches,
    EvaluationBatches,
    build,
    evaluation_batches,
)
from llmprep_jax.data.sources import SourceOptions, open_source

__all__ = [
    "Batches",
    "DataConfig",
    "EvaluationBatches",
    "SourceOptions",
    "build",
    "evaluation_batches",
    "open_source",
]
