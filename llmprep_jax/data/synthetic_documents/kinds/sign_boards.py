"""The boards of signs: enamel, plates, rings, arrows, columns of Chinese characters."""

import dataclasses
from collections.abc import Callable

from llmprep_jax.data.synthetic_documents.content import Content, Parts
from llmprep_jax.data.synthetic_documents.lexicon import say
from llmprep_jax.data.synthetic_documents.page import LINE, Box, Color, Number, Page
from llmprep_jax.data.synthetic_documents.style import BLACK, WHITE, Style

BLUE, GREEN, RED, YELLOW = (20, 76, 150), (12, 98, 66), (184, 28, 36), (250, 204, 40)
WALLS: tuple[Color, ...] = (
    (214, 208, 198),
    (176, 190, 204),
    (198, 200, 202),
    (188, 170, 152),
    (170, 186, 170),
)


@dataclasses.dataclass(frozen=True)
class Board:
    """A board on its wall: where to draw, in which colours."""

    page: Page
    content: Content
    style: Style
    unit: Number
    box: Box
    ink: Color
    fill: Color

    @property
    def middle(self) -> Number:
        return (self.box[0] + self.box[2]) / 2

    @property
    def room(self) -> Number:
        return self.box[2] - self.box[0] - 1.6 * self.unit * (not self.content.is_tiny)

    def line(self, y: Number, parts: Parts, size: Number, bold: bool = True, **style) -> Number:
        """A line in the middle; `size` and what is returned, the y below it, by the unit."""
        size *= self.unit
        style = {"color": self.ink, "room": self.room, **style}
        self.page.text(self.middle, y, parts, size, bold=bold, align="center", **style)
        return y + LINE * size

    def say(self, en: str, hans: str, hant: str) -> str:
        return say((en, hans, hant), self.content.language)


def draw(content: Content, page: Page, style: Style, unit: Number) -> None:
    """Draws a board, as high as its content needs, in the middle of a wall."""
    name = content.more["board"]
    colors = {"parking": (WHITE, BLUE), "ways": (WHITE, GREEN if style.variant % 2 else BLUE),
              "notice": (BLACK, YELLOW), "platform": (WHITE, BLUE),
              "shop": (WHITE, style.accent)}  # fmt: skip
    ink, fill = colors.get(name, (BLACK, WHITE))
    is_black_and_white = style.accent == style.ink
    if is_black_and_white:
        ink, fill = BLACK, style.paper
    edge = 0.0 if content.is_tiny else 2.2 * unit
    if not content.is_tiny and not is_black_and_white:
        page.paper = WALLS[style.variant % len(WALLS)]
    box = (edge, edge, page.width - edge, edge)
    board = Board(page, content, style, unit, box, ink, fill)
    at = len(page.items)
    bottom = _LAYOUTS[name](board, edge + (0.3 if content.is_tiny else 1.2) * unit)
    bottom += (0.3 if content.is_tiny else 1.2) * unit
    page.height = bottom + edge
    above = len(page.items)  # the board lies under what stands on it
    if not content.is_tiny and name not in ("speed", "height"):
        shadow = tuple(value + 0.25 * unit for value in (edge, edge, box[2], bottom))
        if not is_black_and_white:
            page.rectangle(shadow, tuple(round(0.8 * v) for v in page.paper), radius=unit * 0.6)
        page.rectangle((edge, edge, box[2], bottom), fill, None, radius=0.6 * unit)
        inner = 0.35 * unit
        page.rectangle((edge + inner, edge + inner, box[2] - inner, bottom - inner), None, ink,
                       0.14 * unit, 0.4 * unit)  # fmt: skip
    page.items[at:] = page.items[above:] + page.items[at:above]


def _hours(board: Board, y: Number) -> Number:
    content, unit, page = board.content, board.unit, board.page
    y = board.line(y, content.part("shop"), 1.7, face=board.style.heading.bold,
                   color=board.style.accent)  # fmt: skip
    y = board.line(y, board.say("Opening hours", "营业时间", "營業時間"), 1.0, bold=False)
    y += 0.5 * unit
    left, right = board.box[0] + 1.8 * unit, board.box[2] - 1.8 * unit
    for i in range(3):
        if f"day{i}" not in content.values:
            continue
        half = (right - left) / 2 - 0.4 * unit
        page.text(left, y, content.part(f"day{i}"), 1.1 * unit, color=board.ink, room=half)
        span = [*content.part(f"opens{i}"), (" – ", None), *content.part(f"closes{i}")]
        page.text(right, y, span, 1.1 * unit, bold=True, color=board.ink, align="right", room=half)
        y += 1.9 * unit
    return y


def _parking(board: Board, y: Number) -> Number:
    content, unit, page = board.content, board.unit, board.page
    side, x = 4.6 * unit, board.middle
    page.rectangle((x - side / 2, y, x + side / 2, y + side), board.ink, radius=0.5 * unit)
    page.text(x, y + 0.02 * side, "P", 0.72 * side, bold=True, color=board.fill, align="center")
    y += side + 0.7 * unit
    hour = board.say(" per hour", "/小时", "/小時")
    y = board.line(y, [*content.part("fee"), (hour, None)], 1.6)
    stay = board.say("Maximum stay ", "最长停车 ", "最長停車 ")
    y = board.line(y, [(stay, None), *content.part("stay")], 1.0, bold=False)
    spaces = board.say(" spaces", "个车位", "個車位")
    return board.line(y, [*content.part("spaces"), (spaces, None)], 1.0, bold=False)


def _ways(board: Board, y: Number) -> Number:
    content, unit, page = board.content, board.unit, board.page
    if content.is_tiny:
        y = board.line(y, content.part("place0"), 1.15)
        y = board.line(y, content.part("distance0"), 1.15)
        _arrow(board, board.middle, y + 1.1 * unit, content.more["ways"]["way0"], 2.0 * unit)
        return y + 2.1 * unit
    left, right = board.box[0] + 1.3 * unit, board.box[2] - 1.3 * unit
    for i in range(4):
        if f"place{i}" not in content.values:
            continue
        _arrow(
            board, left + 0.9 * unit, y + 0.9 * unit, content.more["ways"][f"way{i}"], 1.7 * unit
        )
        far = page.text(right, y, content.part(f"distance{i}"), 1.35 * unit, bold=True,
                        color=board.ink, align="right")  # fmt: skip
        page.text(left + 2.6 * unit, y, content.part(f"place{i}"), 1.35 * unit, bold=True,
                  color=board.ink, room=right - left - far - 3.4 * unit)  # fmt: skip
        y += 2.5 * unit
    return y - 0.4 * unit


def _arrow(board: Board, x: Number, y: Number, way: str, size: Number) -> None:
    """An arrow around a point."""
    half, head = size / 2, size * 0.34
    turn = {"left": (-1, 0), "right": (1, 0), "ahead": (0, -1)}[way]

    def place(along: Number, across: Number) -> tuple[Number, float]:
        return x + along * turn[0] - across * turn[1], y + along * turn[1] + across * turn[0]

    outline = [(-half, -0.09 * size), (half - head, -0.09 * size), (half - head, -head), (half, 0),
               (half - head, head), (half - head, 0.09 * size), (-half, 0.09 * size)]  # fmt: skip
    board.page.polygon([value for point in outline for value in place(*point)], board.ink)


def _door(board: Board, y: Number) -> Number:
    content = board.content
    if content.is_tiny:
        y = board.line(y, board.say("Room", "房间", "房間"), 1.4)
        return board.line(y, content.part("room"), 2.4)
    label = board.say("Room ", "房间 ", "房間 ")
    y = board.line(y, [(label, None), *content.part("room")], 2.4, color=board.style.accent)
    y = board.line(y + 0.4 * board.unit, content.part("person"), 1.5)
    return board.line(y, content.part("department"), 1.0, bold=False)


def _ring(board: Board, y: Number, name: str, below: str) -> Number:
    """A red ring with a number, and a plate below it."""
    unit, page, tiny = board.unit, board.page, board.content.is_tiny
    radius = (2.15 if tiny else 6.0) * unit
    x, middle = board.middle, y + radius
    red = BLACK if board.style.accent == board.style.ink else RED
    page.ellipse((x - radius, y, x + radius, y + 2 * radius), red)
    inner = radius * 0.8
    page.ellipse((x - inner, middle - inner, x + inner, middle + inner), WHITE)
    size = radius * (0.9 if name == "speed" else 0.62)
    page.text(x, middle - size * LINE * 0.47, board.content.part(name), size, bold=True,
              color=BLACK, align="center", room=1.36 * radius)  # fmt: skip
    y += 2 * radius + (0.15 if tiny else 0.8) * unit
    size = (0.95 if tiny else 1.3) * unit
    if not tiny:
        width = page.bold.advance(below) * size + 2 * unit
        page.rectangle((x - width / 2, y, x + width / 2, y + 1.9 * size), WHITE, BLACK, 2,
                       0.3 * unit)  # fmt: skip
        y += 0.26 * size
    page.text(x, y, below, size, bold=True, color=BLACK, align="center", room=board.room)
    return y + LINE * size


def _speed(board: Board, y: Number) -> Number:
    return _ring(board, y, "speed", board.say("km/h", "公里/小时", "公里/小時"))


def _height(board: Board, y: Number) -> Number:
    return _ring(board, y, "tall", board.say("Max. height", "限高", "限高"))


def _notice(board: Board, y: Number) -> Number:
    content, unit = board.content, board.unit
    y = board.line(y, board.say("NOTICE", "通知", "通知"), 2.0)
    y = board.line(y + 0.2 * unit, board.say("Lift out of order", "电梯停用", "電梯停用"), 1.6)
    until = board.say("until {}", "恢复使用：{}", "恢復使用：{}").split("{}")[0]
    y = board.line(y, [(until, None), *content.part("until")], 1.2)
    y = board.line(y + 0.3 * unit, board.say("Please use the stairs.", "请走楼梯。", "請走樓梯。"),
                   1.0, bold=False)  # fmt: skip
    call = board.say("Questions: ", "咨询电话：", "諮詢電話：")
    return board.line(y, [(call, None), *content.part("phone")], 1.0, bold=False)


def _platform(board: Board, y: Number) -> Number:
    content = board.content
    if content.is_tiny:
        y = board.line(y, board.say("Platform", "站台", "月台"), 1.2)
        return board.line(y, content.part("platform"), 2.6)
    y = board.line(y, board.say("Platform", "站台", "月台"), 1.4, bold=False)
    y = board.line(y - 0.5 * board.unit, content.part("platform"), 5.0)
    train = [(board.say("to ", "开往", "開往"), None), *content.part("city"), ("   ", None)]
    return board.line(y, [*train, *content.part("time")], 1.5)


def _shop(board: Board, y: Number) -> Number:
    content, unit, page = board.content, board.unit, board.page
    since = [(board.say("since ", "创立于", "創立於"), None), *content.part("year"),
             (board.say("", "年", "年"), None)]  # fmt: skip
    call = [(board.say("Tel. ", "电话 ", "電話 "), None), *content.part("phone")]
    face = board.style.heading.bold
    if content.language == "en" or board.style.variant % 2 == 0:
        y = board.line(y + 0.5 * unit, content.part("shop"), 3.0, face=face)
        y = board.line(y + 0.2 * unit, since, 1.0, bold=False)
        return board.line(y, call, 1.0, bold=False)
    name = content.values["shop"].text
    size = min(3.2, 17 / len(name)) * unit
    bottom = page.vertical(board.middle, y, content.part("shop"), size, face=face, color=board.ink)
    y = board.line(bottom + 0.5 * unit, since, 0.9, bold=False)
    return board.line(y, call, 0.9, bold=False)


_LAYOUTS: dict[str, Callable[[Board, float], float]] = {
    "hours": _hours,
    "parking": _parking,
    "ways": _ways,
    "door": _door,
    "speed": _speed,
    "height": _height,
    "notice": _notice,
    "platform": _platform,
    "shop": _shop,
}
