"""A contact sheet: the first documents of a setting, a question below each, its answer marked."""

import textwrap

from PIL import Image, ImageDraw

from llmprep_jax.data.synthetic_documents.fonts import find_families
from llmprep_jax.data.synthetic_documents.generator import Document, Question, generate
from llmprep_jax.data.synthetic_documents.page import LINE, Page
from llmprep_jax.data.synthetic_documents.settings import Settings

CELL, PICTURE, CAPTION, MARGIN = 320, 330, 64, 12  # width, heights, space between, pixels
SIZE = 13.0
MARK = (214, 30, 40)
GROUND = (232, 234, 238)


def contact_sheet(
    settings: Settings, count: int | None = None, columns: int | None = None
) -> Image.Image:
    """The first `count` documents side by side, a row a language where there are several.

    Args:
      count: None: one of each kind and language, 12 at least.
      columns: None: one a kind where there are four or more.
    """
    kinds, pairs = len(settings.kind), len(settings.kind) * len(settings.language)
    if count is None:
        count = -(-12 // pairs) * pairs
    if columns is None:
        columns = kinds if kinds >= 4 else min(count, 4)
    cells = [_cell(generate(settings, i), settings) for i in range(count)]
    rows = [cells[first : first + columns] for first in range(0, count, columns)]
    heights = [max(picture.height for picture, _ in row) for row in rows]
    height = sum(heights) + len(rows) * (CAPTION + MARGIN) + MARGIN
    sheet = Image.new("RGB", (columns * (CELL + MARGIN) + MARGIN, height), GROUND)
    y = MARGIN
    for row, tallest in zip(rows, heights, strict=True):
        for column, (picture, caption) in enumerate(row):
            x = MARGIN + column * (CELL + MARGIN)
            sheet.paste(picture, (x + (CELL - picture.width) // 2, y + tallest - picture.height))
            sheet.paste(caption, (x, y + tallest))
        y += tallest + CAPTION + MARGIN
    return sheet


def _cell(document: Document, settings: Settings) -> tuple[Image.Image, Image.Image]:
    """The picture, and below it the first question that has a place in it, and the answer."""
    question = next((q for q in document.questions if q.boxes), document.questions[0])
    width, height = document.image.size
    scale = min(CELL / width, PICTURE / height)
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    picture = document.image.resize(small, way)
    canvas = ImageDraw.Draw(picture)
    for box in question.boxes:
        left, top, right, bottom = (value * scale for value in box)
        canvas.rectangle((left - 2, top - 2, right + 1, bottom + 1), None, MARK, 2)
    return picture, _caption(document, question, settings)


def _caption(document: Document, question: Question, settings: Settings) -> Image.Image:
    family = find_families(document.language, settings.fonts)[0]
    page = Page(CELL, family.face(), family.face(bold=True), (40, 44, 52), GROUND)
    page.height = CAPTION
    asked = question.text.removeprefix("<|grounding|>")
    y = page.paragraph(2, 6, CELL - 4, textwrap.shorten(asked, 84), SIZE)
    answer = textwrap.shorten(question.answers[0].replace("\n", " / "), 60)
    page.text(2, min(y, CAPTION - LINE * SIZE - 2), answer, SIZE, bold=True, color=MARK,
              room=CELL - 4)  # fmt: skip
    return page.draw(1.0)
