"""The tokenizer that a GGUF file's metadata describes.

A GGUF has no pre-tokenizer and, for SentencePiece vocabularies, no merges. Both are implied: the
first by the name in `tokenizer.ggml.pre`, the second by the order of the pieces.
"""

import warnings
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from llmprep_jax.text import byte_level, spm
from llmprep_jax.text.vocab import Parts, add_special, one_line, set_template
from llmprep_jax.weights.gguf_file import read_metadata


def read_tokenizer(path: str | Path) -> Parts:
    """The tokenizer of a GGUF file of type `gpt2` (byte-level BPE) or `llama` (SentencePiece).

    Raises ValueError when the file has no tokenizer, or one of another type or pre-tokenizer.
    """
    path = Path(path)
    meta = read_metadata(path)
    fields = {
        k.removeprefix("tokenizer.ggml."): v
        for k, v in meta.items()
        if k.startswith("tokenizer.ggml.")
    }
    kind, tokens = fields.get("model"), fields.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise ValueError(f"{path}: no tokenizer in this GGUF; use the model's tokenizer.json")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise ValueError(
            f"{path}: GGUF tokenizer type {kind!r} (known: gpt2, llama);"
            " use the model's tokenizer.json"
        )
    try:
        core = builders[kind](fields, str(meta.get("general.architecture", "")))
        parts = _finish(core, fields, meta)
    except (
        Exception
    ) as error:  # the tokenizers library raises bare Exception on a vocabulary it refuses
        raise ValueError(
            f"{path}: the GGUF tokenizer cannot be built: {one_line(error)};"
            " use the model's tokenizer.json"
        ) from error
    parts.source = str(path)
    return parts


def _kinds(fields: dict[str, Any]) -> list[int]:
    kinds = fields.get("token_type") or []
    return [*kinds, *[spm.NORMAL] * (len(fields["tokens"]) - len(kinds))]


def _vocab(tokens: list[str]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocab.setdefault(token, i)
    return vocab


def _byte_level(fields: dict[str, Any], architecture: str) -> tokenizers.Tokenizer:
    """Normal tokens are spelled in GPT-2's byte alphabet, added ones as plain text."""
    cut = _cut_of(fields, architecture)
    merges = [tuple(merge.split(" ")) for merge in fields.get("merges", [])]
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    tokens, kinds = list(fields["tokens"]), _kinds(fields)
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == spm.NORMAL and not alphabet.issuperset(token):
            kinds[i] = spm.USER_DEFINED  # older converters wrote added tokens as normal ones
    core = byte_level.build_core(_vocab(tokens), merges, cut)
    spm.add_pieces(core, list(zip(tokens, kinds, strict=True)))
    fields.setdefault("add_bos_token", byte_level.adds_bos(cut))  # as llama.cpp does for old files
    return core


def _cut_of(fields: dict[str, Any], architecture: str) -> str:
    """The cut that the file names, or else that of its architecture, or GPT-2's with a warning."""
    if fields.get("pre"):
        return byte_level.resolve_cut(fields["pre"])
    cut = byte_level.infer_cut(architecture, fields["tokens"])
    if cut is None:
        warnings.warn(
            f"the GGUF does not say how its {architecture or 'unnamed'} tokenizer cuts text"
            " (tokenizer.ggml.pre); it is cut as GPT-2 does, which may give other tokens than the"
            " model was trained on; use the model's tokenizer.json by tokenizer=FOLDER",
            stacklevel=2,
        )
    return cut or "gpt-2"


def _sentencepiece(fields: dict[str, Any], architecture: str) -> tokenizers.Tokenizer:
    """Merges rank by score; Gemma's, whose scores do not follow their order, by id."""
    gemma = architecture.startswith("gemma")
    tokens, kinds = fields["tokens"], _kinds(fields)
    if gemma:  # a GGUF writes runs of spaces with real spaces; merges, not matches, make them
        blank = [" " in token and not token.strip() for token in tokens]
        tokens = [spm.SPACE * len(t) if b else t for t, b in zip(tokens, blank, strict=True)]
        kinds = [spm.NORMAL if b else kind for kind, b in zip(kinds, blank, strict=True)]
    scores = fields.get("scores") or []
    by_id = gemma or len(scores) < len(tokens)
    vocab = _vocab(tokens)
    order = range(0, -len(tokens), -1) if by_id else scores
    unk = fields.get("unknown_token_id")
    prefix = "first" if fields.get("add_space_prefix", not gemma) else "never"
    core = spm.build_bpe(
        vocab,
        spm.merges_of(vocab, order, descending=True),
        None if unk is None else tokens[unk],
        prefix,
    )
    spm.add_pieces(core, list(zip(tokens, kinds, strict=True)))
    fields.setdefault("add_bos_token", True)  # as llama.cpp does for old files
    return core


def _finish(core: tokenizers.Tokenizer, fields: dict[str, Any], meta: dict[str, Any]) -> Parts:
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: fields.get(f"{name}_token_id") for role, name in roles.items()}
    special = {role: core.id_to_token(i) for role, i in ids.items() if i is not None}
    special = {role: text for role, text in special.items() if text is not None}
    add_special(core, special.values())
    bos = special.get("bos_token") if fields.get("add_bos_token") else None
    eos = special.get("eos_token") if fields.get("add_eos_token") else None
    set_template(core, bos, eos)
    template = meta.get("tokenizer.chat_template")
    ends = (fields.get("eos_token_id"), fields.get("eot_token_id"), fields.get("eom_token_id"))
    return Parts(
        core=core,
        special_tokens=special,
        eos_ids=tuple(i for i in ends if i is not None),
        chat_template=template if isinstance(template, str) else None,
    )
