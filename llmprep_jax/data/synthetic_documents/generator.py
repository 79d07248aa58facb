"""`generate`: document `index` of a setting, from facts to a picture.

Facts, look and wear are drawn from three streams, so that the same documents can be had clean and
worn. Facts are drawn again until page and questions lie on the document's side of the split.
"""

import dataclasses

import numpy as np
from PIL import Image

from llmprep_jax.data.synthetic_documents import effects
from llmprep_jax.data.synthetic_documents.content import Ask, Content, asks_of_side
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.fonts import find_families
from llmprep_jax.data.synthetic_documents.kinds import MODULES
from llmprep_jax.data.synthetic_documents.lexicon import Language
from llmprep_jax.data.synthetic_documents.page import Number, Page, Text
from llmprep_jax.data.synthetic_documents.settings import Kind, Level, Settings
from llmprep_jax.data.synthetic_documents.style import Style, choose_style, mix
from llmprep_jax.vision.grounding import Place, format_place

TINY_WIDTH = 112
TINY_SIZES = {"en": 15.0, "zh-Hans": 17.0, "zh-Hant": 17.0}
MAX_TRIES = 10_000
TRANSCRIBE = {
    "en": "Write out all the text in the picture.",
    "zh-Hans": "写出图片中的所有文字。",
    "zh-Hant": "寫出圖片中的所有文字。",
}
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclasses.dataclass(frozen=True)
class Word:
    """A word, or a Chinese character, and the box of its ink."""

    text: str
    box: Box


@dataclasses.dataclass(frozen=True)
class Run:
    """A word with the blanks behind it, from `start` to `end` on its baseline, in pixels."""

    text: str
    start: tuple[Number, float]
    end: tuple[Number, float]
    size: Number


@dataclasses.dataclass(frozen=True)
class Question:
    """A question to a document.

    Attributes:
      text: the question.
      answers: all that are right, the first as it stands on the page.
      boxes: where that stands, one a line or place; none where it is seen, counted or worked out.
      category: "extract", "lookup", "compare", "count", "compute", "see" or "text".
      response: what the model is to say: the first answer, or that with its boxes.
    """

    text: str
    answers: tuple[str, ...]
    boxes: tuple[Box, ...]
    category: str
    response: str


@dataclasses.dataclass(frozen=True)
class Document:
    """A picture of a page and what is true of it; `text` is its words, line by line."""

    index: int
    kind: Kind
    language: Language
    level: Level
    split: str
    image: Image.Image
    text: str
    words: tuple[Word, ...]
    runs: tuple[Run, ...]
    questions: tuple[Question, ...]


def generate(settings: Settings, index: int) -> Document:
    """Document `index`, the same on every machine but for the shading of pixels.

    Text, questions and boxes follow from the settings, the index and the fonts that are found.

    Raises:
      ValueError: a font is missing (says which package has it), a negative index.
    """
    if index < 0:
        raise ValueError(f"index={index}; documents are counted from 0")
    kind, language = settings.kind_of(index), settings.language_of(index)
    families = find_families(language, settings.fonts)
    content, asks = _compose(settings, index)
    style = choose_style(settings, families, Dice("style", settings.seed, index), kind)
    page = _lay_out(content, style)
    width = settings.width or _own_width(settings, page, index)
    scale = width / page.width
    wear = Dice("wear", settings.seed, index)
    drawing = page.draw(scale)
    warp = effects.plan_warp(style, drawing.size, scale, wear)
    image = drawing
    if warp.size != drawing.size or style.rotation or style.tilt:
        image = warp.image(drawing, _around(style, page, kind, wear))
    image = effects.age(image, style, wear)
    words = tuple(Word(text, warp.box(box)) for text, box in page.words())
    runs = tuple(run for item in page.texts() for run in _runs(item, warp, scale))
    text = page.lines()
    places = {name: [warp.box(box) for box in boxes] for name, boxes in page.field_boxes().items()}
    questions = [_question(ask, places, settings, image.size) for ask in asks]
    if settings.transcribe:
        asked = TRANSCRIBE[language]
        questions.append(Question(asked, (text,), (), "text", text))
    return Document(
        index, kind, language, settings.level, settings.split_of(index), image, text, words,
        runs, tuple(questions),
    )  # fmt: skip


def _compose(settings: Settings, index: int) -> tuple[Content, list[Ask]]:
    """Facts whose page and at least one question lie on the document's side."""
    kind, language = settings.kind_of(index), settings.language_of(index)
    split, share = settings.split_of(index), settings.holdout
    dice = Dice("facts", settings.seed, index, settings.level)
    for _ in range(MAX_TRIES):
        content = MODULES[kind].compose(dice, language, settings.level)
        asks = asks_of_side(content, split, share)
        if asks:
            return content, dice.sample(asks, settings.questions)
    raise ValueError(
        f"no {kind} of {MAX_TRIES} has its page and a question on the {split} side; give a larger"
        " holdout"
    )


def _lay_out(content: Content, style: Style) -> Page:
    module = MODULES[content.kind]
    width, unit = module.WIDTH, module.SIZE * style.size
    if content.is_tiny:
        width, unit = TINY_WIDTH, TINY_SIZES[content.language]
    page = Page(width, style.body.face(), style.body.face(bold=True), style.ink, style.paper)
    module.draw(content, page, style, unit)
    if content.is_tiny:
        page.make_square()
    return page


def _own_width(settings: Settings, page: Page, index: int) -> int:
    """A page's own width; where pages vary, so do their scans."""
    if settings.level != "varied":
        return round(page.width)
    return round(page.width * Dice("scale", settings.seed, index).uniform(0.8, 1.3))


def _around(style: Style, page: Page, kind: Kind, dice: Dice) -> tuple[int, int, int]:
    """The colour around a page: a desk, the wall behind a sign, the lid of a scanner."""
    if kind == "sign":
        return page.paper
    if style.is_photo:
        return dice.pick(effects.DESKS)
    return mix(page.paper, (0, 0, 0), 0.06)


def _runs(item: Text, warp: effects.Warp, scale: float) -> list[Run]:
    starts = [first for first, _ in item.tokens()]
    pens = [item.x + item.face.advance(item.text[:at]) * item.size for at in starts]
    pens.append(item.x + item.face.advance(item.text) * item.size)
    stops = warp.points(np.array([(pen, item.baseline) for pen in pens])).tolist()
    return [
        Run(item.text[at:after], tuple(stops[i]), tuple(stops[i + 1]), item.size * scale)
        for i, (at, after) in enumerate(zip(starts, [*starts[1:], None], strict=True))
    ]


def _question(ask: Ask, places: dict, settings: Settings, size: tuple[int, int]) -> Question:
    boxes = tuple(box for name in ask.fields for box in places[name])
    answer, text = ask.answers[0], ask.text
    if settings.grounding and boxes:
        answer = format_place(Place(answer, tuple(boxes)), size)
        text = f"<|grounding|>{text}"
    return Question(text, ask.answers, boxes, ask.category, answer)
