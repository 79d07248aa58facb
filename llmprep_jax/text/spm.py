"""SentencePiece models (Kudo and Richardson 2018), read from tokenizer.model and built as a
tokenizers object.

The file is one protocol-buffer message of which a dozen fields matter, so it is read here, with
bounds checked, rather than through generated classes that tie us to a version of protobuf. A
SentencePiece BPE holds no merges. They are implied by the vocabulary: two adjacent pieces merge
when their concatenation is a piece, and pieces of lower id merge first.
"""

import dataclasses
import struct
from collections.abc import Container, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
_UNIGRAM, _BPE = 1, 2


@dataclasses.dataclass
class SpmModel:
    """The fields of a SentencePiece ModelProto that change ids."""

    pieces: list[tuple[str, float, int]]
    model_type: int = _UNIGRAM
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def special_tokens(self) -> dict[str, str]:
        """Token texts by role, of the roles whose id is a piece."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        ids |= {"unk_token": self.unk_id, "pad_token": self.pad_id}
        return {role: self.pieces[i][0] for role, i in ids.items() if 0 <= i < len(self.pieces)}


def read_spm(path: Path) -> SpmModel:
    """Reads a tokenizer.model. Raises ValueError when it is not a whole SentencePiece model."""
    try:
        model = _parse_model(path.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError, struct.error):
        model = None
    if model is None or not model.pieces:
        raise ValueError(
            f"{path}: not a whole SentencePiece model; download it again, or, if it is a tiktoken"
            " file such as Llama 3's, put the model's tokenizer.json beside it"
        )
    if model.model_type not in (_UNIGRAM, _BPE):
        raise ValueError(
            f"{path}: a SentencePiece model of words or characters; use one of type unigram or bpe"
        )
    return model


def _parse_model(data: bytes) -> SpmModel:
    model = SpmModel([])
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            model.pieces.append(
                (piece[1].decode(), _float(piece.get(2, b"\0" * 4)), piece.get(3, NORMAL))
            )
        elif number == 2:
            trainer = dict(_fields(value))
            model.model_type = trainer.get(3, _UNIGRAM)
            for role, field, default in (
                ("unk", 40, 0),
                ("bos", 41, 1),
                ("eos", 42, 2),
                ("pad", 43, -1),
            ):
                setattr(model, f"{role}_id", _signed(trainer.get(field, default)))
        elif number == 3:
            normalizer = dict(_fields(value))
            model.charsmap = normalizer.get(2, b"")
            model.add_dummy_prefix = bool(normalizer.get(3, True))
            model.remove_extra_whitespaces = bool(normalizer.get(4, True))
    return model


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (field number, value) pairs of a protobuf message: ints, or bytes of any length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            size, at = _varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError("not a protobuf message")
        if at > len(data) or key >> 3 == 0:
            raise ValueError("truncated protobuf message")
        yield key >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("not a protobuf message")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _float(value: bytes) -> float:
    return struct.unpack("<f", value)[0]


def merges_of(
    vocab: dict[str, int],
    order: Sequence[float] | range,
    descending: bool = False,
    skip: Container[str] = frozenset(),
) -> list[tuple[str, str]]:
    """The merges that a vocabulary implies, best first.

    `order[id]` ranks a piece: lowest first, or highest first when `descending` (scores). Among the
    splits of one piece the order is by the length of the left part, as transformers has it;
    SentencePiece itself takes the leftmost in the text, which no list of merges can express.
    """
    parts = {piece: i for piece, i in vocab.items() if piece not in skip}
    ranked = []
    for piece, piece_id in parts.items():
        splits = []
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in parts and right in parts:
                splits.append((parts[left], parts[right], left, right))
        splits.sort()
        score = order[piece_id]
        ranked.extend((score, len(left), len(right), left, right) for *_, left, right in splits)
    ranked.sort(key=itemgetter(0, 1, 2), reverse=descending)
    return [(left, right) for *_, left, right in ranked]


def build_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], unk: str | None, prefix: str
) -> tokenizers.Tokenizer:
    """A SentencePiece BPE with byte fallback.

    `prefix` says where a space is put before the text: "first" (at its start), "always" (also after
    each special token: what transformers calls legacy) or "never" (Gemma).
    """
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True)
    core = tokenizers.Tokenizer(model)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "never":
        core.normalizer = normalizers.Replace(" ", SPACE)
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prefix, split=False)
        steps.append(decoders.Strip(content=" ", left=1))
    core.decoder = decoders.Sequence(steps)
    return core


def build_core(model: SpmModel, prefix: str | None = None) -> tokenizers.Tokenizer:
    """A tokenizers object with the ids of `model`; `prefix` as in `build_bpe`, None the model's."""
    if prefix is None and model.add_dummy_prefix:
        # Where spaces are stripped first, the library cannot tell the start of the text.
        prefix = "always" if model.remove_extra_whitespaces else "first"
    prefix = prefix or "never"
    vocab: dict[str, int] = {}
    for i, (text, _, _) in enumerate(model.pieces):
        vocab.setdefault(text, i)
    if model.model_type == _BPE:
        skip = {text for text, _, kind in model.pieces if kind in (UNKNOWN, CONTROL, BYTE)}
        unk = model.pieces[model.unk_id][0] if 0 <= model.unk_id < len(model.pieces) else None
        core = build_bpe(vocab, merges_of(vocab, range(len(model.pieces)), skip=skip), unk, prefix)
    else:
        core = _build_unigram(model, prefix)
    _add_normalizer(core, model)
    add_pieces(core, [(text, kind) for text, _, kind in model.pieces])
    return core


def _build_unigram(model: SpmModel, prefix: str) -> tokenizers.Tokenizer:
    scores = [(text, score) for text, score, _ in model.pieces]
    has_bytes = any(kind == BYTE for _, _, kind in model.pieces)
    core = tokenizers.Tokenizer(models.Unigram(scores, model.unk_id, has_bytes))
    core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prefix, split=True)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE, prefix)])
    return core


def _add_normalizer(core: tokenizers.Tokenizer, model: SpmModel) -> None:
    """The model's own normalisation (Llama and Gemma have none), before spaces are replaced."""
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        last = [core.normalizer] if core.normalizer is not None else []
        core.normalizer = normalizers.Sequence([*steps, *last])


def add_pieces(core: tokenizers.Tokenizer, pieces: Sequence[tuple[str, int]]) -> None:
    """Makes control pieces special tokens and user-defined ones added tokens."""
    control = [text for text, kind in pieces if kind == CONTROL]
    user = [text for text, kind in pieces if kind == USER_DEFINED]
    core.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in control])
    core.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in user])
