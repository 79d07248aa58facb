"""Byte-level BPE (GPT-2 and after): how each published tokenizer cuts text before its merges apply.

A GGUF names that cut only by a word (`tokenizer.ggml.pre`), so the patterns are listed here as the
models' own tokenizer.json files and llama.cpp (src/llama-vocab.cpp) have them. The cut decides ids
even where the merges are right. SmolLM2 isolates every digit first, so in "x =  5" both spaces are
one token; with GPT-2's pattern alone they would be two.
"""

from collections.abc import Iterable

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
_HAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CASED = (  # letters of scripts that have capitals
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_MARKS = r"!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_MARKS}]+", r"\s+$", _HAN)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# name -> (patterns, each isolated in turn; digits one by one; GPT-2's own pattern last)
_CUTS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "gpt-2": ((), False, True),
    "smollm": ((), True, True),
    "llama-bpe": ((_LLAMA3,), False, False),
    "smaug-bpe": ((_LLAMA3,), False, False),
    "qwen2": ((_QWEN2,), False, False),
    "deepseek-llm": (_DEEPSEEK_LLM, True, False),
    "deepseek-coder": (_DEEPSEEK_CODER, True, False),
    "deepseek-v3": (_DEEPSEEK3, False, False),
    "tekken": ((_TEKKEN,), False, False),
}
_ALIASES = {
    "gpt-2": (
        *("default", "mpt", "olmo", "phi-2", "gigachat", "a.x-4.0", "mellum", "trillion"),
        *("exaone4", "granite-docling", "jais", "modern-bert"),
    ),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "smaug-bpe": ("dbrx", "glm4", "chatglm-bpe"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "megrez", "f2llmv2", "stablelm2", "hunyuan"),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
}
# llama.cpp puts BOS first for these, and takes whole words of the vocabulary before merges
_WHOLE_WORDS = ("llama-bpe", "tekken")
_NAMES = {name: name for name in _CUTS}
_NAMES |= {alias: name for name, aliases in _ALIASES.items() for alias in aliases}


def resolve_cut(name: str) -> str:
    """The name of the cut that `tokenizer.ggml.pre` asks for; ValueError lists those known."""
    if name not in _NAMES:
        raise ValueError(f"unknown pre-tokenizer {name!r} (known: {', '.join(sorted(_NAMES))})")
    return _NAMES[name]


def infer_cut(architecture: str, tokens: Iterable[str]) -> str | None:
    """The cut of a GGUF that names none: by its architecture and, where several families share
    one, by the tokens and the size of its vocabulary; None where neither tells.
    """
    tokens = set(tokens)
    if architecture.startswith(("qwen2", "qwen3")):
        return "qwen2"
    if "<|begin_of_text|>" in tokens or "<|eot_id|>" in tokens:
        return "llama-bpe"
    if "<\uff5cbegin\u2581of\u2581sentence\uff5c>" in tokens:
        if (
            len(tokens) < 50_000
        ):  # 32,256 of DeepSeek-Coder, 102,400 of DeepSeek LLM and V2, 129,280 of V3
            return "deepseek-coder"
        return "deepseek-llm" if len(tokens) < 110_000 else "deepseek-v3"
    is_smollm = len(tokens) == 49152 and "<|im_start|>" in tokens
    return "smollm" if is_smollm else None


def adds_bos(cut: str) -> bool:
    """Whether llama.cpp begins texts with BOS where a file of this cut does not say."""
    return cut in _WHOLE_WORDS


def build_core(
    vocab: dict[str, int], merges: list[tuple[str, str]], cut: str
) -> tokenizers.Tokenizer:
    """A byte-level BPE with the ids of `vocab`, cut as `cut` (see `resolve_cut`) has it.

    Llama 3 and Tekken take a whole word that is in the vocabulary before they try merges; Qwen2
    composes its text (NFC) first. Both are in their tokenizer.json and in no GGUF.
    """
    patterns, digits, gpt2 = _CUTS[cut]
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=cut in _WHOLE_WORDS)
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
