"""From a document to pieces: token ids, the token that follows each, and whether that one counts
for the loss.

A document of n tokens makes n - 1 pairs (token, next token); a document longer than the context is
split, cut, dropped or refused, as the policy says, and what was done is counted. Pairs are split,
not tokens: the last target of one piece is the first token of the next, and every target of a split
document counts exactly once.
"""

import dataclasses
import datetime
import functools
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int

from llmprep_jax.data.documents import Document, Messages
from llmprep_jax.data.images import ImageReader, Run, split_images
from llmprep_jax.text.chat import Edit, SpecialTokens, encode_chat, encode_completion
from llmprep_jax.text.messages import is_trained
from llmprep_jax.text.tokenizer import Tokenizer

Overlong = Literal["split", "truncate", "drop", "error"]
EncodeText = Callable[[str], Sequence[int]]
EncodeChat = Callable[..., tuple[Sequence[int], Sequence[bool]]]
EncodeCompletion = Callable[[str, int], tuple[Sequence[int], Sequence[bool]]]

# what `Batches.report` tells, in this order
COUNTS = ("documents", "tokens", "targets", "split", "truncated", "lost", "dropped", "empty")
# by how much of each conversation is learnt, how many there are, in this order
MARKS = ("none", "some", "all")

_MARK_PROBLEMS = {
    "none": "there is no token to learn; check that the assistant speaks in them, and their train"
    " and weight",
    "all": "every token is to be learnt, questions too; correct the template's {% generation %}"
    " blocks, or set data.mask=all if that is wanted",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Up to a row's length of one document; arrays [T].

    Attributes:
      doc_id: of the document.
      tokens, targets: ids, and the id that follows each.
      counts: whether the target counts for the loss.
      is_first: whether it is the first piece of its document.
      runs: of its images, in order; none is cut.
    """

    doc_id: int
    tokens: Int[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"]
    counts: Bool[np.ndarray, " T"]
    is_first: bool = True
    runs: tuple[Run, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "Piece":
        """A part of the piece; the one from its start on is the first if the piece is."""
        is_first = self.is_first and not part.start
        runs = self._runs_in(part) if self.runs else ()
        return Piece(
            self.doc_id, self.tokens[part], self.targets[part], self.counts[part], is_first, runs
        )

    def _runs_in(self, part: slice) -> tuple[Run, ...]:
        start, stop, _ = part.indices(len(self))
        inside = [run for run in self.runs if run.start < stop and run.stop > start]
        assert all(start <= run.start and run.stop <= stop for run in inside), "an image is cut"
        return tuple(run.moved(-start) for run in inside)

    @property
    def num_targets(self) -> int:
        """Words to be learnt, and codes of pictures that are drawn."""
        return int(self.counts.sum()) + sum(run.length for run in self.runs if run.drawn)

    @property
    def pictures(self) -> int:
        """That its images are."""
        return sum(run.pictures for run in self.runs)


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A document's pieces, what the report adds up, by the names of COUNTS, and its mark, by those
    of MARKS; none of plain text, or where all is to be learnt. `images_lost` are those that were
    cut off, or dropped with the document.
    """

    pieces: list[Piece]
    counts: tuple[int, ...]
    marks: tuple[int, ...] = (0,) * len(MARKS)
    images_lost: int = 0


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes pieces of documents.

    Attributes:
      encode: text to ids.
      encode_chat: messages and the fields of their record to ids and, for each, whether it is to be
        learnt; None where the tokenizer has no chat template.
      eos_id: appended to plain text that does not end in it; None: nothing is appended.
      encode_part: text that goes on with another, which has no BOS, to ids; None: `encode`.
      encode_completion: text and the character at which its completion begins to ids and, for each,
        whether it is of the completion.
      seq_len: most pairs of a piece; None: a document is one piece whatever its length, and the
        policy does not apply.
      overlong: what to do with a longer document; None: split plain text, truncate conversations.
      answers_only: only what the assistant says counts in conversations.
      images: reads those of conversations; None: there must be none.
      drop_prompts: how often a picture is drawn of no prompt, for guidance: all but its first and
        last token become padding.
    """

    encode: EncodeText
    encode_chat: EncodeChat | None
    eos_id: int | None
    seq_len: int | None
    overlong: Overlong | None = None
    answers_only: bool = True
    encode_part: EncodeText | None = None
    encode_completion: EncodeCompletion | None = None
    images: ImageReader | None = None
    drop_prompts: float = 0.0

    def __call__(
        self, numbered: tuple[int, Document], rng: np.random.Generator | None = None
    ) -> Encoded:
        """The pieces of document (id, document).

        Args:
          rng: draws which prompts are dropped; None: none is.

        Raises:
          ValueError: the tokenizer refuses the document, or it is too long and the policy is
            "error".
        """
        doc_id, document = numbered
        ids, counts, runs = self.tokenize(document)
        if rng is not None:
            ids, counts = self._without_prompt(ids, counts, runs, rng)
        counted = dict.fromkeys(COUNTS, 0) | {"documents": 1}
        whole = Piece(doc_id, ids[:-1], ids[1:], counts[1:], runs=runs)
        if runs and runs[-1].stop > len(whole):  # nothing follows the last image
            whole = whole[: runs[-1].start]
        fitting = self._fit(document, whole, counted)
        pieces = [piece for piece in fitting if piece.num_targets]
        if pieces:  # the first of those that are left
            pieces[0] = dataclasses.replace(pieces[0], is_first=True)
        counted["tokens"] = sum(map(len, pieces))
        counted["targets"] = sum(piece.num_targets for piece in pieces)
        counted["empty"] = int(not pieces and not counted["dropped"])
        mark = (
            _mark_of(counts, runs) if self.answers_only and document.messages is not None else None
        )
        marks = tuple(int(name == mark) for name in MARKS)
        lost = len(runs) - sum(len(piece.runs) for piece in fitting)
        return Encoded(pieces, tuple(counted.values()), marks, lost)

    def _without_prompt(
        self,
        ids: np.ndarray,
        counts: np.ndarray,
        runs: tuple[Run, ...],
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same, or with padding for the prompt of the one picture that is drawn."""
        is_drawn = rng.random() < self.drop_prompts
        if not is_drawn or [run.drawn for run in runs] != [True]:
            return ids, counts
        prompt, (ids, counts) = slice(1, runs[0].start - 1), (ids.copy(), counts.copy())
        ids[prompt], counts[prompt] = self.images.processor.pad_id, False
        return ids, counts

    def tokenize(self, document: Document) -> tuple[np.ndarray, np.ndarray, tuple[Run, ...]]:
        """The ids of a document and, for each, whether it is to be learnt; the runs of its images.

        Raises:
          ValueError: the tokenizer refuses it, or an image is not there or no picture, on one line
            with its name.
        """
        runs: tuple[Run, ...] = ()
        try:
            if document.messages is not None:
                ids, counts, runs = self._encode_messages(document)
            elif document.answer is not None and self.answers_only:
                if self.encode_completion is None:
                    raise ValueError(
                        "a prompt with its completion needs a tokenizer; none is given"
                    )
                ids, counts = self._end(
                    document, *self.encode_completion(document.text, document.answer)
                )
            else:
                encode = self.encode if document.is_start else self.encode_part or self.encode
                ids = encode(document.text)
                ids, counts = self._end(document, ids, [True] * len(ids))
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{document.name}: {' '.join(str(error).split())}") from error
        ids, counts = np.asarray(ids, np.int32), np.asarray(counts, bool)
        if self.images is not None and document.messages is None:
            self.images.refuse_marker(ids, document.name)
        assert ids.shape == counts.shape, "a chat encoder gives as many marks as ids"
        return ids, counts, runs

    def _end(
        self, document: Document, ids: Sequence[int], counts: Sequence[bool]
    ) -> tuple[list[int], list[bool]]:
        """With EOS where the text ends, and without where it was cut."""
        ids, counts = list(ids), list(counts)
        if self.eos_id is None:
            return ids, counts
        is_ended = ids[-1:] == [self.eos_id]
        if document.is_end and not is_ended:
            return [*ids, self.eos_id], [*counts, True]
        if is_ended and not document.is_end:  # the tokenizer's own
            return ids[:-1], counts[:-1]
        return ids, counts

    def _encode_messages(
        self, document: Document
    ) -> tuple[Sequence[int], Sequence[bool], tuple[Run, ...]]:
        if self.encode_chat is None:
            raise ValueError("a conversation needs a tokenizer with a chat template; none is given")
        if not self.answers_only:
            for i, message in enumerate(document.messages):
                if message.get("role") == "assistant" and not is_trained(i, message):
                    raise ValueError(
                        f"message {i} is not to be learnt, and data.mask=all learns all; set"
                        " data.mask=answers, or leave out its train and weight"
                    )
        messages, refs = split_images(document.messages, document.folder)
        if refs and self.images is None:
            raise ValueError(
                "the conversation has images, for a model that sees, and rows that are not cut"
                " anywhere: data.packing=packed or padded"
            )
        drawn = () if self.images is None else self.images.drawn(messages)
        edit = {} if self.images is None else {"edit": self.images.writer(refs, drawn)}
        ids, answers = self.encode_chat(messages, document.fields, **edit)
        counts = answers if self.answers_only else [True] * len(ids)
        if self.images is None:
            return ids, counts, ()
        return self.images.place(ids, counts, refs, drawn)

    def _fit(self, document: Document, whole: Piece, counted: dict[str, int]) -> list[Piece]:
        """The pieces of at most seq_len pairs, by the policy."""
        limit = self.seq_len
        if whole.runs:
            return self._fit_images(document, whole, counted)
        if limit is None or len(whole) <= limit:
            return [whole]
        policy = self.overlong or ("split" if document.messages is None else "truncate")
        if policy == "error":
            raise ValueError(
                f"{document.name}: the document has {len(whole) + 1} tokens and the context holds "
                f"{limit + 1}; raise data.seq_len, or set data.overlong=split, truncate or drop"
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

    def _fit_images(self, document: Document, whole: Piece, counted: dict[str, int]) -> list[Piece]:
        """The same where there are images, which no piece has parts of."""
        policy = self.overlong or "truncate"
        if len(whole) <= self.seq_len and whole.pictures <= self.images.max_images:
            return [whole]
        if policy == "error":
            raise ValueError(
                f"{document.name}: the document has {len(whole) + 1} tokens, "
                f"{sum(run.length for run in whole.runs)} of them of {len(whole.runs)} images of "
                f"{whole.pictures} pictures, and a row holds {self.seq_len + 1} and "
                f"{self.images.max_images}; raise data.seq_len or data.max_images, or set "
                "data.overlong=split, truncate or drop"
            )
        if policy == "drop":
            counted["dropped"] = 1
            return []
        cuts = [0]
        while cuts[-1] < len(whole):
            cuts.append(self._end_of_piece(document, whole, cuts[-1]))
        if policy == "truncate":
            counted["truncated"] = 1
            counted["lost"] = int(whole.counts[cuts[1] :].sum())
            return [whole[: cuts[1]]]
        counted["split"] = 1
        return [whole[start:stop] for start, stop in itertools.pairwise(cuts)]

    def _end_of_piece(self, document: Document, whole: Piece, start: int) -> int:
        """Where a piece that begins at `start` ends: before an image that it has no room for."""
        stop, pictures = min(start + self.seq_len, len(whole)), 0
        for run in whole.runs:
            if run.start < start or run.start >= stop:
                continue
            pictures += run.pictures
            if run.length > self.seq_len or run.pictures > self.images.max_images:
                raise ValueError(
                    f"{document.name}: image {run.ref.name} is {run.length} tokens of "
                    f"{run.pictures} pictures, and a row holds {self.seq_len} and "
                    f"{self.images.max_images}; raise data.seq_len or data.max_images"
                )
            if run.stop > stop or pictures > self.images.max_images:
                return run.start
        return stop


def _mark_of(counts: Bool[np.ndarray, " T"], runs: Sequence[Run] = ()) -> str:
    """How much of a conversation is learnt; the first token is no target."""
    targets = counts[1:]
    if any(run.drawn for run in runs):
        return "some"
    if not targets.any():
        return "none"
    return "all" if targets.all() else "some"


def refuse_marks(title: str, template: str, marks: Sequence[int]) -> None:
    """Refuses a whole data set of whose conversations nothing is learnt, or everything.

    Args:
      marks: how many there are, by MARKS.

    Raises:
      ValueError: it is one.
    """
    problem = _describe_marks(title, template, dict(zip(MARKS, marks, strict=True)))
    if problem is not None:
        raise ValueError(problem)


def _describe_marks(title: str, template: str, marks: Mapping[str, int]) -> str | None:
    number = sum(marks.values())
    problems = [_MARK_PROBLEMS[mark] for mark in _MARK_PROBLEMS if marks[mark] == number > 0]
    start = f"{title}: in {number} of {number} conversations, by the chat template of {template},"
    return f"{start} {problems[0]}" if problems else None


def check_answers(
    encoder: Encoder,
    documents: Iterable[tuple[int, Document]],
    title: str,
    template: str,
    seconds: float,
) -> None:
    """Looks for a conversation of which a part is learnt, for so long; mostly the first is one.

    Where time is up before all were looked at, it warns, and whoever has read all refuses
    (`refuse_marks`).

    Raises:
      ValueError: of all conversations nothing is learnt, or of all everything, though only answers
        are asked for.
    """
    if not encoder.answers_only:
        return
    end, marks, is_whole = time.monotonic() + seconds, dict.fromkeys(MARKS, 0), True
    for _, document in documents:
        if time.monotonic() > end:
            is_whole = False
            break
        if document.messages is not None:
            _, counts, runs = encoder.tokenize(document)
            marks[_mark_of(counts, runs)] += 1
            if marks["some"] or (marks["all"] and marks["none"]):
                return
    problem = _describe_marks(title, template, marks)
    if problem is not None and is_whole:
        raise ValueError(problem)
    if problem is not None:  # at an epoch's end it is an error
        warnings.warn(problem, stacklevel=2)


def text_encoders(
    tokenizer: Tokenizer,
    *,
    special_tokens: SpecialTokens = "chat",
    now: datetime.datetime | None = None,
) -> dict[str, Any]:
    """What `build` and `evaluation_batches` take of a tokenizer, as keywords.

    Args:
      special_tokens: where text that spells a special token becomes it.
      now: the time that chat templates write; None: the clock's.
    """
    parse = special_tokens == "everywhere"
    warned: set[str] = set()

    def chat(
        messages: Messages, fields: Mapping[str, Any], edit: Edit | None = None
    ) -> tuple[list[int], list[bool]]:
        known = tokenizer.chat.fields
        unread = sorted(fields.keys() - known - warned)
        if unread:
            warned.update(unread)
            warnings.warn(
                f"the records hold {', '.join(unread)}, which the chat template of"
                f" {tokenizer.source} does not read; they have no effect",
                stacklevel=2,
            )
        read = {key: fields[key] for key in fields.keys() & known}
        kind = dict(special_tokens=special_tokens, now=now, edit=edit)
        return encode_chat(tokenizer, messages, **kind, **read)

    return {
        "encode": functools.partial(tokenizer.encode, parse_special=parse),
        "encode_part": functools.partial(tokenizer.encode, add_special=False, parse_special=parse),
        "encode_completion": functools.partial(encode_completion, tokenizer, parse_special=parse),
        "encode_chat": chat,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id or 0,
        "template": tokenizer.source,
    }
