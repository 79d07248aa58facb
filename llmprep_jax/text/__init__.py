"""Text in and out of models: tokenizers, chat templates, and the processor that joins them."""

from llmprep_jax.text.chat import ChatTemplate, encode_chat
from llmprep_jax.text.processor import Processor
from llmprep_jax.text.stream import StreamDecoder
from llmprep_jax.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "Processor", "StreamDecoder", "Tokenizer", "encode_chat"]
