"""Tokenizers of CLIP and SigLIP where a folder has no tokenizer.json.

CLIP (Radford et al. 2021): byte-level BPE of lower-cased words, each with "</w>" at its end.
SigLIP (Zhai et al. 2023): SentencePiece of text in lower case without ASCII punctuation, which its
tokenizer.model knows nothing of.
"""

import re
import string
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from llmprep_jax.text.vocab import one_line

CLIP_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
SIGLIP_SPECIAL = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
WORD_END = "</w>"
# special tokens, ends of words, letters, single digits, and runs of what is left
_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonical(text: str) -> str:
    """Lower case, without ASCII punctuation, one space for any white space and none at the ends."""
    return " ".join(text.lower().translate(_DROP_PUNCTUATION).split())


def canonical_normalizer() -> normalizers.Normalizer:
    """`canonical` as a tokenizer.json has it, for readers other than us."""
    return normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )


def read_clip(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """Reads vocab.json and merges.txt. Raises ValueError when they are no tokenizer."""
    try:
        words, pairs = models.BPE.read_file(str(vocab), str(merges))
        unk = CLIP_SPECIAL["unk_token"]
        model = models.BPE(words, pairs, unk_token=unk, end_of_word_suffix=WORD_END)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"{vocab}: no tokenizer with {merges.name} ({one_line(error)}); download both again"
        ) from None
    core = tokenizers.Tokenizer(model)
    core.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, by_byte])
    core.decoder = decoders.ByteLevel()
    return core
