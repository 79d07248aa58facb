"""From a document to pieces: token ids, the token that follows each, and whether that one counts
for the loss.

A document of n tokens makes n - 1 pairs (token, next token); a document longer than the context is
split, cut, dropped or refused, as the policy says, and what was done is counted. The one thing a
reader would get wrong: pairs are split, not tokens, so that the last token of one piece is the
first target's input of the next and every target of a split document counts exactly once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from llmprep_jax.data.documents import Document, Messages

Overlong = Literal["split", "truncate", "drop", "error"]
EncodeText = Callable[[str], Sequence[int]]
EncodeChat = Callable[[Messages], tuple[Sequence[int], Sequence[bool]]]

# what `Batches.report` tells, in this order
COUNTS = ("documents", "tokens", "targets", "split", "truncated", "lost", "dropped", "empty")


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Up to a row's length of one document; arrays [T].

    Attributes:
      doc_id: of the document.
      tokens, targets: ids, and the id that follows each.
      counts: whether the target counts for the loss.
    """

    doc_id: int
    tokens: Int[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"]
    counts: Bool[np.ndarray, " T"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "Piece":
        return Piece(self.doc_id, self.tokens[part], self.targets[part], self.counts[part])


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A document's pieces, and what the report adds up, by the names of COUNTS."""

    pieces: list[Piece]
    counts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes pieces of documents.

    Attributes:
      encode: text to ids.
      encode_chat: messages to ids and, for each, whether the assistant says it; None where the
        tokenizer has no chat template.
      eos_id: appended to plain text that does not end in it; None: nothing is appended.
      seq_len: most pairs of a piece; None: a document is one piece whatever its length, and the
        policy does not apply.
      overlong: what to do with a longer document; None: split plain text, truncate conversations.
      answers_only: only what the assistant says counts in conversations.
    """

    encode: EncodeText
    encode_chat: EncodeChat | None
    eos_id: int | None
    seq_len: int | None
    overlong: Overlong | None = None
    answers_only: bool = True

    def __call__(self, numbered: tuple[int, Document]) -> Encoded:
        """The pieces of document (id, document).

        Raises:
          ValueError: the tokenizer refuses the document, or it is too long and the policy is
            "error".
        """
        doc_id, document = numbered
        ids, counts = self._tokenize(document)
        counted = dict.fromkeys(COUNTS, 0) | {"documents": 1}
        whole = Piece(doc_id, ids[:-1], ids[1:], counts[1:])
        pieces = [piece for piece in self._fit(document, whole, counted) if piece.counts.any()]
        counted["tokens"] = sum(map(len, pieces))
        counted["targets"] = sum(int(piece.counts.sum()) for piece in pieces)
        counted["empty"] = int(not pieces and not counted["dropped"])
        return Encoded(pieces, tuple(counted.values()))

    def _tokenize(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        try:
            if document.messages is None:
                ids = list(self.encode(document.text))
                if self.eos_id is not None and ids[-1:] != [self.eos_id]:
                    ids.append(self.eos_id)
                return np.asarray(ids, np.int32), np.ones(len(ids), bool)
            if self.encode_chat is None:
                raise ValueError(
                    "a conversation needs a tokenizer with a chat template; none is given"
                )
            ids, answers = self.encode_chat(document.messages)
        except ValueError as error:
            raise ValueError(f"{document.name}: {' '.join(str(error).split())}") from error
        ids, answers = np.asarray(ids, np.int32), np.asarray(answers, bool)
        assert ids.shape == answers.shape, "a chat encoder gives as many marks as ids"
        return ids, answers if self.answers_only else np.ones(len(ids), bool)

    def _fit(self, document: Document, whole: Piece, counted: dict[str, int]) -> list[Piece]:
        """The pieces of at most seq_len pairs, by the policy."""
        limit = self.seq_len
        if limit is None or len(whole) <= limit:
            return [whole]
        policy = self.overlong or ("split" if document.messages is None else "truncate")
        if policy == "error":
            raise ValueError(
                f"{document.name}: the document has {len(whole) + 1} tokens and the context holds "
                f"{limit + 1}; raise seq_len, or set overlong=split, truncate or drop"
            )
        if policy == "drop":
            counted["dropped"] = 1
            return []
        if policy == "truncate":
            counted["truncated"] = 1
            counted["lost"] = int(whole.counts[limit:].sum())
            return [whole[:limit]]
        counted["split"] = 1
        return [whole[i : i + limit] for i in range(0, len(whole), limit)]
