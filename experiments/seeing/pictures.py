"""Pictures of what models find and answer: crops in a grid, pages beside their questions."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from experiments.seeing.towers import Meeting
from llmprep_jax.data.synthetic_documents.fonts import find_families
from llmprep_jax.data.synthetic_documents.lexicon import Language
from llmprep_jax.data.synthetic_documents.page import Page
from llmprep_jax.vision.grounding import Box

INK, SOFT, PAPER = (34, 38, 46), (110, 116, 128), (255, 255, 255)
RIGHT, WRONG = (22, 130, 60), (178, 38, 30)
MARGIN, GAP, COLUMN = 24, 8, 250  # pixels
CROP = 96  # pixels across a crop
SIZE = 15.0  # of text, pixels


class Sheet(Page):
    """A page with pictures on it; `pictures` are (picture, left, top)."""

    def __init__(self, width: int, language: Language = "en"):
        family = find_families(language)[0]
        super().__init__(width, family.face(), family.face(bold=True), INK, PAPER)
        self.pictures: list[tuple[Image.Image, int, int]] = []

    def picture(self, x: int, y: int, image: Image.Image, frame: Any = None) -> None:
        """Puts a picture down, in a frame of this colour."""
        self.pictures.append((image, x, y))
        if frame is not None:
            box = (x - 4, y - 4, x + image.width + 3, y + image.height + 3)
            self.rectangle(box, None, frame, 3)

    def cut(self, text: str, width: float, most: int = 60) -> str:
        """A text of at most so many characters, whose words are each at most as wide as a line."""
        words = []
        for word in textwrap.shorten(text, most, placeholder=" …").split():
            fits = len(word)
            while self.face.advance(word[:fits]) * SIZE > width - SIZE:
                fits -= 1
            words.append(word if fits == len(word) else f"{word[:fits]}…")
        return " ".join(words)

    def drawn(self) -> Image.Image:
        sheet = self.draw(1.0)
        for image, x, y in self.pictures:
            sheet.paste(image, (x, y))
        return sheet


def retrieval_sheet(
    before: Meeting, after: Meeting, *, title: str, captions: int = 6, crops: int = 3, best: int = 4
) -> Sheet:
    """What some captions and some crops find, before and after training; the right one is green.

    Args:
      captions, crops: how many ask. best: how many of what each finds are shown.
    """
    half = best * (CROP + GAP)
    lefts = MARGIN + COLUMN, MARGIN + COLUMN + half + 3 * GAP
    sheet = Sheet(lefts[1] + half + MARGIN)
    y = MARGIN
    sheet.text(MARGIN, y, title, 22, bold=True, room=sheet.width - 2 * MARGIN)
    y += 38
    asking = choose(after, captions + crops)
    y = _headings(sheet, y, "caption", lefts, "crops it finds")
    for i in asking[:captions]:
        sheet.paragraph(MARGIN, y + 8, COLUMN - 2 * GAP, after.scenes[i].caption, SIZE)
        for left, meeting in zip(lefts, (before, after), strict=True):
            order = ranking(meeting.text_vectors[i], meeting.image_vectors)[:best]
            for place, found in enumerate(order):
                x, frame = left + place * (CROP + GAP), RIGHT if found == i else None
                sheet.picture(x, y, enlarged(meeting.images[found]), frame)
        y += CROP + 2 * GAP
    y = _headings(sheet, y + GAP, "crop", lefts, "captions it finds")
    for i in asking[captions:]:
        sheet.picture(MARGIN, y, enlarged(after.images[i]))
        for left, meeting in zip(lefts, (before, after), strict=True):
            order = ranking(meeting.image_vectors[i], meeting.text_vectors)[:best]
            for place, found in enumerate(order):
                is_right, caption = found == i, meeting.scenes[found].caption
                color = RIGHT if is_right else SOFT
                sheet.text(left, y + place * CROP / best, caption, SIZE - 2, bold=is_right,
                           color=color, room=half - GAP)  # fmt: skip
        y += CROP + 2 * GAP
    sheet.height = y + MARGIN - 2 * GAP
    return sheet


def _headings(sheet: Sheet, y: float, asks: str, lefts: Sequence[int], finds: str) -> float:
    for x, text in zip((MARGIN, *lefts), (asks, f"{finds} before", f"{finds} after"), strict=True):
        sheet.text(x, y, text, SIZE, bold=True, color=SOFT)
    return y + 32


def choose(meeting: Meeting, count: int) -> list[int]:
    """Numbers of scenes: one of each photograph first, in colour where it has such a one."""
    order = sorted(range(len(meeting.scenes)), key=lambda i: meeting.scenes[i].tone != "in colour")
    first = {meeting.scenes[i].what: i for i in reversed(order)}
    return sorted(order, key=lambda i: first[meeting.scenes[i].what] != i)[:count]


def ranking(vector: np.ndarray, others: np.ndarray) -> list[int]:
    """Numbers of the others, the most alike first."""
    return np.argsort(-(others @ vector), kind="stable").tolist()


def enlarged(pixels: np.ndarray, side: int = CROP) -> Image.Image:
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question to a page, and what was said to it, by name: (text, whether it is right)."""

    question: str
    answer: str
    said: dict[str, tuple[str, bool]]
    boxes: Sequence[Box] = ()


def answer_sheet(
    pages: Sequence[tuple[Image.Image, Sequence[Answered]]],
    *,
    title: str,
    language: Language = "en",
    side: int = 132,
) -> Sheet:
    """Pages, where their answers stand marked, and beside each its questions and answers."""
    names = list(pages[0][1][0].said)
    widths = [300, *[170] * (1 + len(names))]
    left = MARGIN + side + 2 * GAP
    sheet = Sheet(left + sum(widths) + MARGIN, language)
    y = MARGIN
    sheet.text(MARGIN, y, title, 22, bold=True, room=sheet.width - 2 * MARGIN)
    y += 44
    starts = [left + sum(widths[:i]) for i in range(len(widths))]
    for x, name in zip(starts, ("question", "on the page", *names), strict=True):
        sheet.text(x, y, name, SIZE, bold=True, color=SOFT)
    y += 30
    for image, answered in pages:
        _put_page(sheet, MARGIN, y, image, side, answered)
        row = y
        for one in answered:
            bottoms = [sheet.paragraph(starts[0], row, widths[0] - 2 * GAP, one.question, SIZE)]
            cells = [(one.answer, INK)]
            cells += [(text, RIGHT if right else WRONG) for text, right in one.said.values()]
            for x, width, (text, color) in zip(starts[1:], widths[1:], cells, strict=True):
                lines = sheet.cut(" / ".join(text.split("\n")) or "(nothing)", width - 2 * GAP)
                bottoms.append(sheet.paragraph(x, row, width - 2 * GAP, lines, SIZE, color=color))
            row = max(bottoms) + GAP
        y = max(y + side, row) + 3 * GAP
    sheet.height = y + MARGIN - 3 * GAP
    return sheet


def _put_page(
    sheet: Sheet, x: int, y: int, image: Image.Image, side: int, answered: Sequence[Answered]
) -> None:
    """The page, and frames around what answers its questions."""
    scale = side / max(image.size)
    size = [round(edge * scale) for edge in image.size]
    big = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    canvas = ImageDraw.Draw(big)
    for box in {box for one in answered for box in one.boxes}:
        left, top, right, bottom = (value * scale for value in box)
        canvas.rectangle((left - 2, top - 2, right + 2, bottom + 2), None, WRONG, 2)
    sheet.rectangle((x - 1, y - 1, x + big.width, y + big.height), None, SOFT, 1)
    sheet.picture(x, y, big)
