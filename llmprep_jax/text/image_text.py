"""Prompts with images in them, for the processors of all families that see.

A marker stands for an image, written by the chat template for an {"type": "image"} part or spelled
in a text. It is one token until the whole is tokenised, and then a run of as many as the image has:
the ids are those of a text with the run written out, and what is known of characters stays exact.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmprep_jax.text.chat import SpecialTokens
from llmprep_jax.text.processor import Processor
from llmprep_jax.text.tokenizer import Tokenizer

_SOURCES = ("image", "path")  # keys of a part that brings its image along


class Run(NamedTuple):
    """The tokens of an image in a row: the first, and how many."""

    start: int
    length: int


def expand_markers(
    ids: Sequence[int], marker: int, lengths: Sequence[int]
) -> tuple[list[int], list[Run]]:
    """Ids in which the i-th marker is repeated `lengths[i]` times, and where the runs are.

    Raises:
      ValueError: there are more or fewer markers than lengths.
    """
    count = list(ids).count(marker)
    if count != len(lengths):
        raise ValueError(
            f"there are {count} image tokens (id {marker}) and {len(lengths)} images; give an image"
            " for each"
        )
    expanded: list[int] = []
    runs: list[Run] = []
    left = iter(lengths)
    for i in ids:
        if i != marker:
            expanded.append(i)
            continue
        run = Run(len(expanded), next(left))
        expanded += [marker] * run.length
        runs.append(run)
    return expanded, runs


class ImageTextProcessor(Processor):
    """A tokenizer, its chat template, and an image processor.

    A family says what its files are (`from_path`), how many tokens an image has (`count_tokens`)
    and what the model is given (`media`).

    Attributes:
      draws: whether its model draws the images of the assistant, so that `for_drawing` makes
        prompts of pictures.

    Args:
      images: the image processor, see `vision.processor`.
      marker: what stands for an image in texts, a special token.
      image_token: which token is repeated for an image; None: the marker.
    """

    draws = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        images: Any,
        marker: str,
        padding_side: str = "left",
        image_token: str | None = None,
    ):
        super().__init__(tokenizer, padding_side)
        self.images, self.marker = images, marker
        self.image_id = tokenizer.id_of(image_token or marker)
        tokenizer.sees = True
        vars(tokenizer).pop("chat", None)  # compiled as that of a model of text

    def count_tokens(self, pixels: Any) -> list[int]:
        """Tokens of each image of a prompt."""
        return [int(pieces) * self.images.tokens for pieces in pixels.pieces]

    def media(self, pixels: Sequence[Any]) -> dict[str, np.ndarray]:
        """What the model is given beside tokens: of each row, None where it has no image."""
        return {"images": self.normalized([row and row.values for row in pixels])}

    def normalized(self, rows: Sequence[np.ndarray | None]) -> np.ndarray:
        """Pictures of whole rows, [B, M, H, W, 3], zeros where a row has fewer."""
        return stack_rows([None if row is None else self.images.normalize(row) for row in rows])

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files and the image processor's."""
        super().save(folder)
        self.images.save(folder)

    def _take_images(
        self, items: Sequence, images: Any, is_one: bool, special_tokens: SpecialTokens
    ) -> tuple[Sequence, list[list[Any]]]:
        given = [_listed(images)] if is_one else _by_item(images, len(items))
        taken = []
        for number, (item, own) in enumerate(zip(items, given, strict=True)):
            is_text = isinstance(item, str)
            spelled = special_tokens == "everywhere" or (special_tokens == "chat" and not is_text)
            marker = self.marker if spelled else None
            places = list(_places([{"content": item}] if is_text else item, marker))
            bare = sum(place is None for place in places)
            if bare != len(own):
                what = "text" if is_text else "conversation"
                raise ValueError(
                    f"{what} {number} has {bare} {self.marker} markers and {len(own)} images; give"
                    " an image for each"
                )
            left = iter(own)
            taken.append([next(left) if place is None else place[0] for place in places])
        return [item if isinstance(item, str) else _without_sources(item) for item in items], taken

    def _look_at(self, images: list[list[Any]], count: int) -> list[Any]:
        return [self.images(own) if own else None for own in images]

    def wrapped(self, pictures: Sequence[int]) -> list[str] | None:
        """What is written in place of each marker, with an image token for each run of them; None:
        the marker stands for itself.

        Args:
          pictures: how many the tower sees of each image.
        """
        return None

    def opened(self, text: str) -> tuple[str, int]:
        """(a text with what comes before all that is said, how long that is)."""
        return text, 0

    def _write_places(
        self, text: str, seen: Any, literals: Sequence[int] = ()
    ) -> tuple[str, list[int]]:
        written = None if seen is None else self.wrapped(seen.pieces.tolist())
        if written is None:
            return text, list(literals)
        text, moved = replace_markers(text, self.marker, written, literals)
        return text, list(map(moved, literals))

    def _place_images(
        self, rows: list[list[int]], seen: list[Any]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        expanded = []
        for row, pixels in zip(rows, seen, strict=True):
            lengths = [] if pixels is None else self.count_tokens(pixels)
            expanded.append(expand_markers(row, self.image_id, lengths)[0])
        return expanded, {} if all(x is None for x in seen) else self.media(seen)


def replace_markers(
    text: str,
    marker: str,
    pieces: Sequence[str],
    literals: Sequence[int] = (),
    joined: Sequence[bool] = (),
) -> tuple[str, Callable[[int], int]]:
    """A text with its i-th marker replaced by `pieces[i]`, and where a place of it is now.

    Args:
      literals: places at which what looks like a marker is none.
      joined: markers with which the spaces before them go; none of them: no spaces go.

    Raises:
      ValueError: there are more or fewer markers than pieces.
    """
    found = [match.start() for match in re.finditer(re.escape(marker), text)]
    starts = [start for start in found if start not in set(literals)]
    if len(starts) != len(pieces):
        raise ValueError(
            f"there are {len(starts)} {marker} markers and {len(pieces)} images; give an image for"
            " each"
        )
    spans = [(start, start + len(marker)) for start in starts]
    for number, joins in enumerate(joined):
        start, end = spans[number]
        spans[number] = (len(text[:start].rstrip(" ")) if joins else start), end
    parts, end = [], 0
    for (start, stop), piece in zip(spans, pieces, strict=True):
        parts += [text[end:start], piece]
        end = stop

    def moved(place: int) -> int:
        added = 0
        for (start, stop), piece in zip(spans, pieces, strict=True):
            if stop <= place:
                added += len(piece) - (stop - start)
            elif start < place:  # in the spaces that go, or where the marker began
                added += start - place
        return place + added

    return "".join([*parts, text[end:]]), moved


def stack_rows(rows: Sequence[np.ndarray | None]) -> np.ndarray:
    """Arrays [n, ...] of some rows as one, [B, M, ...], with zeros after each row's own."""
    some = next(row for row in rows if row is not None)
    most = max(len(row) for row in rows if row is not None)
    stacked = np.zeros((len(rows), most, *some.shape[1:]), some.dtype)
    for own, row in zip(stacked, rows, strict=True):
        if row is not None:
            own[: len(row)] = row
    return stacked


def _listed(images: Any) -> list[Any]:
    """The images of one prompt: none, one, or several."""
    if images is None:
        return []
    is_several = isinstance(images, list | tuple) or (
        isinstance(images, np.ndarray) and images.ndim == 4
    )
    return list(images) if is_several else [images]


def _by_item(images: Any, count: int) -> list[list[Any]]:
    """Images as given for several prompts, those of each in a list of its own."""
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, list | tuple) or len(images) != count:
        given = len(images) if isinstance(images, list | tuple) else type(images).__name__
        raise ValueError(
            f"images of {count} prompts are a list of {count}, the images of each (None: it has"
            f" none); got {given}"
        )
    return [_listed(own) for own in images]


def _places(messages: Any, marker: str | None) -> Iterator[tuple[Any] | None]:
    """What each marker of a conversation brings along, (image,); None of those that are bare.

    Messages of wrong shapes are passed over here: the template's check says what is wrong.
    """
    for message in messages if isinstance(messages, Sequence) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in [content] if isinstance(content, str) else content or ():
            if isinstance(part, Mapping) and part.get("type") == "image":
                yield next(((part[key],) for key in _SOURCES if key in part), None)
                continue
            text = part.get("text") if isinstance(part, Mapping) else part
            if marker is not None and isinstance(text, str):
                yield from [None] * text.count(marker)


def _without_sources(messages: Any) -> Any:
    """Messages whose image parts are bare, as templates take them."""

    def bare(part: Any) -> Any:
        is_image = isinstance(part, Mapping) and part.get("type") == "image"
        return {k: v for k, v in part.items() if k not in _SOURCES} if is_image else part

    def plain(message: Any) -> Any:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), list | tuple):
            return message
        return {**message, "content": [bare(part) for part in message["content"]]}

    if isinstance(messages, Mapping | str | bytes) or not isinstance(messages, Sequence):
        return messages
    return [plain(message) for message in messages]
