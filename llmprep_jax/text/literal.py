"""Encoding text in which only chosen spellings of special tokens are those tokens.

The `tokenizers` library can read all spellings of a text as tokens or none (its
`encode_special_tokens`). Here those that are chosen are swapped for aliases, added tokens that only
a copy of the tokenizer knows, and the copy reads no special token. An alias must be beyond
guessing, else a text could spell it; so it is drawn anew in each process.
"""

import itertools
import re
import secrets
from collections.abc import Sequence

import tokenizers

_SIZE = 6  # characters of an alias, out of 6,400 each
_PRIVATE = range(0xE000, 0xF900)


class LiteralEncoder:
    """A copy of a tokenizer's core that reads special tokens only where it is told."""

    def __init__(self, core: tokenizers.Tokenizer):
        self._core = tokenizers.Tokenizer.from_str(core.to_str())
        self._core.encode_special_tokens = True
        specials = {i: t for i, t in core.get_added_tokens_decoder().items() if t.special}
        self._aliases = {token.content: _draw_alias() for token in specials.values()}
        self._core.add_tokens(
            [
                tokenizers.AddedToken(
                    self._aliases[token.content],
                    normalized=False,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                )
                for token in specials.values()
            ]
        )
        self._ids = {
            self._core.token_to_id(self._aliases[token.content]): i for i, token in specials.items()
        }

    def encode(
        self, text: str, specials: Sequence[re.Match[str]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets; `specials` are matches that are special tokens, in order."""
        pieces, origin, at = [], [], 0  # origin: for each character of the swapped text, the text's
        for match in specials:
            alias = self._aliases[match[0]]
            pieces += [text[at : match.start()], alias]
            origin += [*range(at, match.start()), *itertools.repeat(match.start(), len(alias))]
            at = match.end()
        pieces.append(text[at:])
        origin += range(at, len(text) + 1)
        encoding = self._core.encode("".join(pieces), add_special_tokens=False)
        ids = [self._ids.get(i, i) for i in encoding.ids]
        return ids, [(origin[start], origin[end]) for start, end in encoding.offsets]


def _draw_alias() -> str:
    return "".join(chr(secrets.choice(_PRIVATE)) for _ in range(_SIZE))


def spellings_of(specials: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern of the longest special token at a place; None where there is none."""
    longest_first = sorted(filter(None, specials), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
