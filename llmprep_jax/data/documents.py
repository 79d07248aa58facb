"""`Document`, one text or one conversation as every source yields it, and its side of a hold-out.

The side is decided by a hash of the content alone, not by seed, order, file or format, so it stays
when the data are shuffled, converted or added to, and two copies of a document are always on the
same side.
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
      fields: what else the record of a conversation holds, for the chat template (tools, ...).
      answer: the character of the text at which what is learnt begins; None: all is.
      captions: what is said of its one image, where it is an image with captions.
      folder: what its images' paths are relative to; None: it can have none.
      is_start, is_end: whether the text begins and ends here, or was cut from a longer one.
    """

    name: str
    text: str | None = None
    messages: Messages | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    answer: int | None = None
    captions: tuple[str, ...] = ()
    folder: str | None = None
    is_start: bool = True
    is_end: bool = True


@runtime_checkable
class Source(Protocol):
    """A sequence of documents."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def name(self, index: int) -> str:
        """Where document `index` is, without reading it."""
        ...


def digest(document: Document) -> int:
    """A hash of the text or the messages, in [0, 2^64)."""
    if document.messages is None:
        content = document.text
    else:
        messages = _without_places(document.messages)
        content = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest())


def _without_places(value: Any) -> Any:
    """Messages whose images are their names alone where they have any: shards are written anew."""
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if not isinstance(value, dict):
        return value
    place = value.get("image")
    if isinstance(place, Mapping) and isinstance(place.get("name"), str):
        return {**value, "image": place["name"]}
    return {key: _without_places(item) for key, item in value.items()}
