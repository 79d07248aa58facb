"""Pictures into models: opening them, and the image processors of the families; numpy and Pillow.

`open_image` reads anything as RGB; an `ImageProcessor` makes of it what a tower takes, and says
how many tokens that will be.
"""

from llmprep_jax.vision.kinds import KINDS
from llmprep_jax.vision.open import image_size, open_image
from llmprep_jax.vision.pdf import count_pages
from llmprep_jax.vision.processor import ImageProcessor, Pixels

__all__ = ["KINDS", "ImageProcessor", "Pixels", "count_pages", "image_size", "open_image"]
