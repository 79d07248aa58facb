"""Text in and out of models: tokenizers, chat templates, and the processor that joins them."""

from llmprep_jax.text.chat import ChatTemplate, encode_chat
from llmprep_jax.text.processor import Processor
from llmprep_jax.text.stream import StreamDecoder
from llmprep_jax.text.thinking import Reply, ThoughtSplitter, split_thoughts
from llmprep_jax.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Processor",
    "Reply",
    "StreamDecoder",
    "ThoughtSplitter",
    "Tokenizer",
    "encode_chat",
    "split_thoughts",
]
