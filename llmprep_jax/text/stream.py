"""Incremental detokenisation: text as tokens arrive, such that the pieces join to the decoding of
the whole.

Decoding tokens one by one is not decoding their sequence. A character may span tokens,
SentencePiece drops the first space of whatever it is given, and a run of byte-fallback tokens is
one unit (a later bad byte turns the whole run into replacement characters).
"""

import re
from collections.abc import Callable, Iterable, Sequence

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>\Z")


class StreamDecoder:
    """Turns token ids into pieces of text.

    `decode` maps ids to text, `ignores` says which ids have none in it (special tokens that are
    skipped), `is_byte` which are byte-fallback pieces. `push` returns the text that is now certain,
    often ""; `flush` the rest. For all ids, "".join(pushes) + flush() == decode(ids), and no piece
    ends within a character.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        ignores: Callable[[int], bool] = lambda token_id: False,
        is_byte: Callable[[int], bool] = lambda token_id: False,
    ):
        self._decode = decode
        self._ignores = ignores
        self._is_byte = is_byte
        self._ids: list[int] = []  # the last piece's tokens, for context, then those not yet shown
        self._shown = 0  # how many of them are context

    def push(self, token_id: int) -> str:
        """Takes one token and returns the text that it completes."""
        token_id = int(token_id)
        if self._ignores(token_id):
            return ""
        self._ids.append(token_id)
        if self._is_byte(token_id):
            return ""
        piece = self._pending()
        if not piece or piece.endswith(_REPLACEMENT):
            return ""
        return self._show(piece)

    def flush(self) -> str:
        """Returns what was held back, at the end of the text."""
        return self._show(self._pending())

    def _pending(self) -> str:
        context = self._decode(self._ids[: self._shown])
        return self._decode(self._ids)[len(context) :]

    def _show(self, piece: str) -> str:
        if piece:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
        return piece


def is_byte_piece(token: str | None) -> bool:
    """Whether a token is a byte-fallback piece such as <0xE4>."""
    return token is not None and _BYTE.match(token) is not None


def overlap(text: str, marks: Iterable[str]) -> int:
    """Length of the longest end of `text` that begins one of `marks` without being the whole."""
    longest = 0
    for mark in marks:
        for size in range(1, len(mark)):
            if text.endswith(mark[:size]):
                longest = max(longest, size)
    return longest
