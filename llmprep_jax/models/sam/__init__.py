"""SAM's encoder of images, as DeepSeek-VL has it; without SAM's decoder of masks."""

from llmprep_jax.models.sam.config import Config, read, write
from llmprep_jax.models.sam.model import Neck, VisionTower
from llmprep_jax.models.sam.weights import neck_weights, tower_weights

__all__ = ["Config", "Neck", "VisionTower", "neck_weights", "read", "tower_weights", "write"]
