"""Byte-level BPE (GPT-2 and after): how each published tokenizer cuts text before its merges apply.

A GGUF names that cut only by a word (`tokenizer.ggml.pre`), so the patterns are listed here as the
models' own tokenizer.json files and llama.cpp (src/llama-vocab.cpp) have them. The one thing a
reader would get wrong: the cut decides ids even where the merges are right. SmolLM2 isolates every
digit first, so in "x =  5" both spaces are one token; with GPT-2's pattern alone they would be two.
"""

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = rf"{_WORD}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_WORD}|\p{{N}}|{_TAIL}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# name -> (patterns, each isolated in turn; digits one by one; GPT-2's own pattern last)
_CUTS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "gpt-2": ((), False, True),
    "smollm": ((), True, True),
    "llama-bpe": ((_LLAMA3,), False, False),
    "qwen2": ((_QWEN2,), False, False),
    "deepseek-v3": (_DEEPSEEK3, False, False),
}
_ALIASES = {
    "gpt-2": ("default", "mpt", "olmo"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3"),
    "qwen2": ("deepseek-r1-qwen",),
    "deepseek-v3": (),
}
_NAMES = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases)}


def resolve_cut(name: str) -> str:
    """The name of the cut that `tokenizer.ggml.pre` asks for; ValueError lists those known."""
    if name not in _NAMES:
        raise ValueError(f"unknown pre-tokenizer {name!r} (known: {', '.join(sorted(_NAMES))})")
    return _NAMES[name]


def build_core(
    vocab: dict[str, int], merges: list[tuple[str, str]], cut: str
) -> tokenizers.Tokenizer:
    """A byte-level BPE with the ids of `vocab`, cut as `cut` (see `resolve_cut`) has it.

    Llama 3 takes a whole word that is in the vocabulary before it tries merges; Qwen2 composes its
    text (NFC) first. Both are in their tokenizer.json and neither is written in a GGUF.
    """
    patterns, digits, gpt2 = _CUTS[cut]
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == "llama-bpe")
    )
    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2))
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        core.normalizer = normalizers.NFC()
    return core
