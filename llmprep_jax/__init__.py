"""llmprep_jax: open language and vision-language models in JAX, exact to their references.

`import llmprep_jax as lp`; what is named here is the public surface, and stays.
"""

from llmprep_jax import peft, quant, train
from llmprep_jax.generate.decoding import generate_tokens, stream_tokens
from llmprep_jax.generate.images import generate_images
from llmprep_jax.generate.prompt_cache import PromptCache
from llmprep_jax.generate.text import Scored, generate
from llmprep_jax.pretrained import load_model, load_processor, save_model
from llmprep_jax.runs import load_data

__all__ = [
    "PromptCache",
    "Scored",
    "generate",
    "generate_images",
    "generate_tokens",
    "load_data",
    "load_model",
    "load_processor",
    "peft",
    "quant",
    "save_model",
    "stream_tokens",
    "train",
]
