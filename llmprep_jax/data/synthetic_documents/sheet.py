"""A contact sheet: the first documents of a setting, a question below each, its answer marked."""

import textwrap

from PIL import Image, ImageDraw

from llmprep_jax.data.synthetic_documents.fonts import find_families
from llmprep_jax.data.synthetic_documents.generator import Document, generate
from llmprep_jax.data.synthetic_documents.page import LINE, Page
from llmprep_jax.data.synthetic_documents.settings import Settings

CELL, PICTURE, CAPTION, MARGIN = 320, 330, 86, 12  # width, heights, and the space between, pixels
SIZE = 13.0
MARK = (214, 30, 40)
GROUND = (232, 234, 238)


def contact_sheet(settings: Settings, count: int | None = None, columns: int | None = None):
    """The first `count` documents side by side, a row a language where there are several.

    Args:
      count: None: one of each kind and language, 12 at least.
      columns: None: one a kind where there are four or more.

    Returns:
      An RGB PIL image.
    """
    kinds, pairs = len(settings.kind), len(settings.kind) * len(settings.language)
    if count is None:
        count = -(-12 // pairs) * pairs
    if columns is None:
        columns = kinds if kinds >= 4 else min(count, 4)
    rows = -(-count // columns)
    size = (columns * (CELL + MARGIN) + MARGIN, rows * (PICTURE + CAPTION + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, GROUND)
    for i in range(count):
        row, column = divmod(i, columns)
        at = (MARGIN + column * (CELL + MARGIN), MARGIN + row * (PICTURE + CAPTION + MARGIN))
        sheet.paste(_cell(generate(settings, i), settings), at)
    return sheet


def _cell(document: Document, settings: Settings) -> Image.Image:
    """The picture, the first question that has a place in it, and the answer."""
    cell = Image.new("RGB", (CELL, PICTURE + CAPTION), GROUND)
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
    cell.paste(picture, ((CELL - small[0]) // 2, PICTURE - small[1]))
    cell.paste(_caption(document, question, settings), (0, PICTURE))
    return cell


def _caption(document: Document, question, settings: Settings) -> Image.Image:
    family = find_families(document.language, settings.fonts)[0]
    page = Page(CELL, family.face(), family.face(bold=True), (40, 44, 52), GROUND)
    page.height = CAPTION
    asked = question.text.removeprefix("<|grounding|>")
    y = page.paragraph(2, 6, CELL - 4, textwrap.shorten(asked, 120), SIZE)
    answer = textwrap.shorten(question.answers[0].replace("\n", " / "), 60)
    page.text(2, min(y, CAPTION - LINE * SIZE - 2), answer, SIZE, bold=True, color=MARK,
              room=CELL - 4)  # fmt: skip
    return page.draw(1.0)
