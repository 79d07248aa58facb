"""A page as a list of what is drawn on it, and the boxes of its words.

Kinds lay out in pixels of a page of their own width; `draw` scales to the width asked for. Nothing
is drawn before the height is known, and all at twice the size, so that edges are smooth. `y` is the
top of a line's box, whose height is `LINE` of the text's size.
"""

import dataclasses
import re
from collections.abc import Sequence

from PIL import Image, ImageDraw

from llmprep_jax.data.synthetic_documents.content import Parts
from llmprep_jax.data.synthetic_documents.fonts import ASCENT, Face

LINE = 1.36
OVERSAMPLE = 2
Number = int | float
Box = tuple[Number, Number, Number, Number]  # left, top, right, bottom
Color = tuple[int, int, int]

_HAN = "\u2e80-\u9fff\uff00-\uffef"  # with the punctuation that is as wide
_TOKEN = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+")
_UNIT = re.compile(rf"[{_HAN}]|[^\s{_HAN}]+\s*|\s+")  # lines break between units
_NO_BREAK_BEFORE = "，。、：；！？）」』》%℃"
_NO_BREAK_AFTER = "（「『《"


@dataclasses.dataclass(frozen=True)
class Text:
    """A line of text on the page; `fields` are (first, last, name) of the characters of each.

    One that `joins` goes on where the text before it ended: the next character of a column.
    """

    x: Number
    baseline: Number
    text: str
    face: Face
    size: Number
    color: Color
    fields: tuple[tuple[int, int, str], ...] = ()
    joins: bool = False

    def box(self, first: int, last: int) -> Box:
        """The ink of characters [first, last)."""
        x = self.x + self.face.advance(self.text[:first]) * self.size
        left, top, right, bottom = self.face.ink(self.text[first:last].rstrip() or " ")
        size = self.size
        return (
            x + left * size,
            self.baseline + top * size,
            x + right * size,
            (self.baseline + bottom * size),
        )

    def moved(self, across: Number, down: Number) -> "Text":
        return dataclasses.replace(self, x=self.x + across, baseline=self.baseline + down)

    def tokens(self) -> list[tuple[int, int]]:
        """Words, Chinese characters one by one: what is drawn, and has a box, by itself."""
        return [match.span() for match in _TOKEN.finditer(self.text)]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A call of ImageDraw: rectangle, line, ellipse, polygon or pieslice."""

    name: str
    points: tuple[Number, ...]
    fill: Color | None = None
    outline: Color | None = None
    width: Number = 0
    more: tuple[tuple[str, Number], ...] = ()

    def moved(self, across: Number, down: Number) -> "Shape":
        steps = (across, down) * (len(self.points) // 2)
        points = tuple(value + step for value, step in zip(self.points, steps, strict=True))
        return dataclasses.replace(self, points=points)


class Page:
    """What a kind draws on.

    Args:
      width: of the page in its own pixels.
      face, bold: what text is written with unless told otherwise.
      ink, paper: colours.
    """

    def __init__(self, width: Number, face: Face, bold: Face, ink: Color, paper: Color):
        self.width, self.height = width, 0.0
        self.face, self.bold, self.ink, self.paper = face, bold, ink, paper
        self.items: list[Text | Shape] = []

    def text(
        self,
        x: Number,
        y: Number,
        parts: Parts,
        size: Number,
        *,
        bold: bool = False,
        face: Face | None = None,
        color: Color | None = None,
        align: str = "left",
        room: Number | None = None,
    ) -> Number:
        """Writes one line and returns its width.

        Args:
          x: of its left end, its right end or its middle, by `align`.
          room: a width that it must not exceed: the text is made smaller.
        """
        text, fields = _join(parts)
        face = face or (self.bold if bold else self.face)
        width = face.advance(text) * size
        top = y
        if room is not None and width > room:
            top += size * (1 - room / width) * LINE / 2
            size, width = size * room / width, room
        left = x - width * {"left": 0, "center": 0.5, "right": 1}[align]
        color = self.ink if color is None else color
        self.items.append(Text(left, top + ASCENT * size, text, face, size, color, fields))
        return width

    def paragraph(
        self,
        x: Number,
        y: Number,
        width: Number,
        parts: Parts,
        size: Number,
        *,
        leading: Number = LINE,
        align: str = "left",
        **style,
    ) -> Number:
        """Writes lines broken at `width`, and returns the y below them."""
        text, fields = _join(parts)
        face = style.get("face") or (self.bold if style.get("bold") else self.face)
        for first, last in _break(text, face, width / size):
            inside = _cut(text, fields, first, last)
            at = x if align == "left" else x + width / 2
            self.text(at, y, inside, size, align=align, **style)
            y += leading * size
        return y

    def vertical(self, x: Number, y: Number, parts: Parts, size: Number, **style) -> Number:
        """Writes a column of characters, as on Chinese signs; returns the y below it."""
        first = len(self.items)
        for text, field in [(parts, None)] if isinstance(parts, str) else parts:
            for character in text:
                self.text(x, y, [(character, field)], size, align="center", **style)
                y += size * 1.12
        self.items[first + 1 :] = [
            dataclasses.replace(item, joins=True) for item in self.items[first + 1 :]
        ]
        return y

    def rectangle(self, box: Box, fill=None, outline=None, width=1.0, radius=0.0) -> None:
        more = (("radius", radius),) if radius else ()
        name = "rounded_rectangle" if radius else "rectangle"
        self.items.append(Shape(name, tuple(box), fill, outline, width if outline else 0, more))

    def line(self, points: Sequence[Number], color: Color | None = None, width=1.0) -> None:
        color = self.ink if color is None else color
        self.items.append(Shape("line", tuple(points), color, None, width))

    def dashes(self, x0: Number, y: Number, x1: Number, color=None, dash=4.0, width=1.0) -> None:
        while x0 < x1:
            self.line((x0, y, min(x0 + dash, x1), y), color, width)
            x0 += 2 * dash

    def ellipse(self, box: Box, fill=None, outline=None, width=1.0) -> None:
        self.items.append(Shape("ellipse", tuple(box), fill, outline, width if outline else 0))

    def polygon(self, points: Sequence[Number], fill: Color) -> None:
        self.items.append(Shape("polygon", tuple(points), fill))

    def slice(self, box: Box, start: Number, end: Number, fill: Color) -> None:
        """A slice of a pie between two angles in degrees, clockwise from three o'clock."""
        more = (("start", start), ("end", end))
        self.items.append(Shape("pieslice", tuple(box), fill, self.paper, 1.5, more))

    def make_square(self) -> None:
        """Makes the page as wide as it is high, its content in the middle."""
        missing = self.width - self.height
        across, down = max(0.0, -missing) / 2, max(0.0, missing) / 2
        self.items = [item.moved(across, down) for item in self.items]
        self.width = self.height = max(self.width, self.height)

    def texts(self) -> list[Text]:
        return [item for item in self.items if isinstance(item, Text) and item.text.strip()]

    def words(self) -> list[tuple[str, Box]]:
        """Words in the order in which they were written, with the boxes of their ink."""
        return [
            (text.text[first:last], text.box(first, last))
            for text in self.texts()
            for first, last in text.tokens()
        ]

    def lines(self) -> str:
        """The text of the page; what was written one after another on one height is a line."""
        lines: list[str] = []
        above = None
        for text in self.texts():
            if text.joins:
                lines[-1] += text.text
            elif above is not None and abs(text.baseline - above.baseline) < 0.3 * text.size:
                lines[-1] += f" {text.text.strip()}"
            else:
                lines.append(text.text.strip())
            above = text
        return "\n".join(lines)

    def field_boxes(self) -> dict[str, list[Box]]:
        """By field, the boxes of its text, one a place or line where it stands."""
        boxes: dict[str, list[Box]] = {}
        for text in self.texts():
            for first, last, name in text.fields:
                box, places = text.box(first, last), boxes.setdefault(name, [])
                if text.joins and places:
                    box = hull(places.pop(), box)
                places.append(box)
        return boxes

    def draw(self, scale: Number) -> Image.Image:
        """The page, `scale` times its own size."""
        width, height = round(self.width * scale), round(self.height * scale)
        size = (OVERSAMPLE * width, OVERSAMPLE * height)
        image = Image.new("RGB", size, self.paper)
        canvas = ImageDraw.Draw(image)
        for item in self.items:
            if isinstance(item, Text):
                _draw_text(canvas, item, scale * OVERSAMPLE)
            else:
                _draw_shape(canvas, item, scale * OVERSAMPLE)
        return image.reduce(OVERSAMPLE)


def hull(a: Box, b: Box) -> Box:
    """The smallest box around two."""
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _draw_text(canvas: ImageDraw.ImageDraw, item: Text, scale: Number) -> None:
    """Letter by letter: FreeType rounds advances at the size drawn, and words would grow."""
    face, font = item.face, item.face.at(item.size * scale)
    for first, last in item.tokens():
        token, start = item.text[first:last], face.advance(item.text[:first])
        for i, letter in enumerate(token):
            pen = start + face.advance(token[: i + 1]) - face.advance(letter)  # kerned
            point = ((item.x + pen * item.size) * scale, item.baseline * scale)
            canvas.text(point, letter, item.color, font, anchor="ls")


def _draw_shape(canvas: ImageDraw.ImageDraw, item: Shape, scale: Number) -> None:
    points = [value * scale for value in item.points]
    more = {name: value * scale if name == "radius" else value for name, value in item.more}
    if item.outline is not None:
        more |= {"outline": item.outline, "width": max(1, round(item.width * scale))}
    if item.name == "line":
        more = {"width": max(1, round(item.width * scale)), "joint": "curve"}
    getattr(canvas, item.name)(points, fill=item.fill, **more)


def _join(parts: Parts) -> tuple[str, tuple[tuple[int, int, str], ...]]:
    """The text of parts and where their fields are in it."""
    if isinstance(parts, str):
        return parts, ()
    text, fields = "", []
    for part, name in parts:
        if name is not None:
            fields.append((len(text), len(text) + len(part), name))
        text += part
    return text, tuple(fields)


def _cut(text: str, fields: Sequence[tuple[int, int, str]], first: int, last: int) -> Parts:
    """Characters [first, last) as parts again."""
    parts, at = [], first
    for start, end, name in fields:
        start, end = max(start, first), min(end, last)
        if start < end:
            parts += [(text[at:start], None), (text[start:end], name)]
            at = end
    return [part for part in [*parts, (text[at:last], None)] if part[0]]


def _break(text: str, face: Face, width: Number) -> list[tuple[int, int]]:
    """Where lines of at most `width`, of size 1, begin and end; blanks at ends are left out."""
    lines, start, end, used = [], 0, 0, 0.0
    for first, last in _units(text):
        unit = text[first:last]
        if used + face.advance(unit.rstrip()) > width and end > start:
            lines.append((start, end))
            start, used = first, 0.0
        used += face.advance(unit)
        end = last
    lines.append((start, end))
    return [(a, a + len(text[a:b].rstrip())) for a, b in lines if text[a:b].strip()]


def _units(text: str) -> list[tuple[int, int]]:
    """What is never broken: words with the blanks after them, characters with their stops."""
    units: list[tuple[int, int]] = []
    for match in _UNIT.finditer(text):
        first, last = match.span()
        joins = units and (
            match[0][0] in _NO_BREAK_BEFORE or text[units[-1][1] - 1] in _NO_BREAK_AFTER
        )
        if joins:
            units[-1] = (units[-1][0], last)
        else:
            units.append((first, last))
    return units
