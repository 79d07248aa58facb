"""`Document`, one text or one conversation as every source yields it, and its side of a hold-out.

The one thing a reader would get wrong: the side is decided by a hash of the content alone, not by
seed, order, file or format, so it stays when the data are shuffled, converted or added to, and two
copies of a document are always on the same side.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
      name: where it comes from ("poems.jsonl:12"), for error messages.
      text: plain text, or None where it is a conversation.
      messages: [{"role": ..., "content": ...}, ...], or None where it is plain text.
    """

    name: str
    text: str | None = None
    messages: Messages | None = None


@runtime_checkable
class Source(Protocol):
    """A sequence of documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def name(self, index: int) -> str:
        """Where document `index` is, without reading it."""
        ...


def digest(document: Document) -> int:
    """A hash of the content, in [0, 2^64)."""
    if document.messages is None:
        content = document.text
    else:
        content = json.dumps(document.messages, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest())


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document is in the held-out `fraction`; a larger fraction holds a smaller one."""
    return digest(document) < fraction * 2.0**64


def to_document(record: Any, field: str | None, name: str) -> Document:
    """The document that a record (a JSON object or a row) holds.

    Args:
      record: decoded.
      field: the key that holds the document; None: "text" or "messages".
      name: of the document.

    Raises:
      ValueError: the record has no such field, or something else in it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{name}: found {_kind(record)}; a record is an object with 'text' or 'messages'"
        )
    keys = ("text", "messages") if field is None else (field,)
    given = [key for key in keys if record.get(key) is not None]
    if len(given) != 1:
        wanted = " or ".join(map(repr, keys))
        held = ", ".join(map(repr, list(record)[:8])) or "no fields"
        remedy = "choose one by field=" if given else f"it has {held}; name the right one by field="
        raise ValueError(f"{name}: a record has {wanted}, one of them; {remedy}")
    value = record[given[0]]
    try:
        return _of_value(value, {"text": (str,), "messages": (list,)}.get(given[0]), name)
    except ValueError as error:
        raise ValueError(f"{name}: {given[0]!r} {error}") from None


def _of_value(value: Any, kinds: tuple[type, ...] | None, name: str) -> Document:
    if not isinstance(value, kinds or (str, list)):
        wanted = {(str,): "a string", (list,): "a list of messages"}.get(kinds)
        raise ValueError(f"is {_kind(value)}; give {wanted or 'a string, or a list of messages'}")
    if isinstance(value, str):
        _check_text(value)
        return Document(name, text=value)
    if not value:
        raise ValueError("is empty; a conversation needs a message")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'has a message {i} that is no {{"role": ..., "content": ...}}; correct it'
            )
    _check_text(json.dumps(value, ensure_ascii=False))
    return Document(name, messages=value)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" in JSON is a half of a character
        raise ValueError("holds half a surrogate pair; correct the \\ud... escape") from None


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
