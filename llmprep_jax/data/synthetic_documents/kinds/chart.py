"""Charts: bars upright and lying, lines, and pies whose shares add up to 100 %."""

import dataclasses
import math
from collections.abc import Callable

from llmprep_jax.data.synthetic_documents import lexicon
from llmprep_jax.data.synthetic_documents.content import Asker, Content
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.facts import Fact
from llmprep_jax.data.synthetic_documents.lexicon import Language, Trio, say
from llmprep_jax.data.synthetic_documents.page import LINE, Color, Number, Page
from llmprep_jax.data.synthetic_documents.style import Style, mix

WIDTH, SIZE = 760, 19
FORMS = ("bars", "lying bars", "line", "pie")
COLORS: tuple[Color, ...] = (
    (66, 118, 182),
    (226, 142, 60),
    (86, 158, 98),
    (196, 78, 82),
    (136, 110, 178),
    (140, 112, 92),
    (78, 164, 180),
    (120, 120, 124),
)
GREYS = (90, 140, 180, 115, 160, 70)  # of charts without colours


@dataclasses.dataclass(frozen=True)
class Topic:
    """What a chart shows: of `things` by category, in a unit, between two values."""

    title: Trio
    unit: Trio
    ask: Trio
    categories: Callable[[Dice, Language, int], list[str]]
    low: int
    high: int


def _months(dice: Dice, language: Language, count: int) -> list[str]:
    first = dice.below(12 - count + 1)
    names = [say(trio, language) for trio in lexicon.MONTHS[first : first + count]]
    return [name[:3] if language == "en" else name for name in names]


def _fruit(dice: Dice, language: Language, count: int) -> list[str]:
    kinds = ("apples", "bananas", "grapes", "lemons", "peaches", "watermelon", "strawberries")
    trios = [trio for trio, _ in lexicon.GOODS if trio[0] in kinds]
    return [say(trio, language).capitalize() for trio in dice.sample(trios, count)]


def _departments(dice: Dice, language: Language, count: int) -> list[str]:
    return [say(trio, language) for trio in dice.sample(lexicon.DEPARTMENTS, count)]


def _cities(dice: Dice, language: Language, count: int) -> list[str]:
    return dice.sample(lexicon.CITIES[language], count)


def _names(dice: Dice, language: Language, count: int) -> list[str]:
    return dice.sample([name for name in lexicon.GIVEN[language] if len(name) <= 5], count)


TOPICS = (
    Topic(
        ("Sales {year} (thousand)", "{year}年销售额（万元）", "{year}年銷售額（萬元）"),
        ("", "", ""),
        (
            "What were the sales in {item}? | How much was sold in {item}?",
            "{item}的销售额是多少？ | {item}卖了多少？",
            "{item}的銷售額是多少？ | {item}賣了多少？",
        ),
        _months, 12, 480,
    ),
    Topic(
        ("Rainfall {year} (mm)", "{year}年降水量（毫米）", "{year}年降雨量（毫米）"),
        ("", "", ""),
        (
            "How much rain fell in {item}? | What was the rainfall in {item}?",
            "{item}的降水量是多少？ | {item}下了多少雨？",
            "{item}的降雨量是多少？ | {item}下了多少雨？",
        ),
        _months, 5, 240,
    ),
    Topic(
        ("Visitors by city, {year}", "{year}年各城市游客数", "{year}年各城市遊客數"),
        ("", "", ""),
        (
            "How many visitors came to {item}? | What is the number of visitors of {item}?",
            "{item}有多少游客？ | {item}的游客数是多少？",
            "{item}有多少遊客？ | {item}的遊客數是多少？",
        ),
        _cities, 110, 990,
    ),
    Topic(
        ("Favourite fruit, votes", "最喜欢的水果（票数）", "最喜歡的水果（票數）"),
        ("", "", ""),
        (
            "How many votes did {item} get? | What is the number of votes for {item}?",
            "{item}得了多少票？ | {item}的票数是多少？",
            "{item}得了多少票？ | {item}的票數是多少？",
        ),
        _fruit, 3, 60,
    ),
    Topic(
        ("Books read in {year}", "{year}年读书数量", "{year}年讀書數量"),
        ("", "", ""),
        (
            "How many books did {item} read? | What is the number of books of {item}?",
            "{item}读了多少本书？ | {item}的读书数量是多少？",
            "{item}讀了多少本書？ | {item}的讀書數量是多少？",
        ),
        _names, 2, 48,
    ),
)  # fmt: skip
SHARES = Topic(
    ("Budget {year} by department", "{year}年各部门预算", "{year}年各部門預算"),
    ("%", "%", "%"),
    (
        "What share of the budget goes to {item}? | What is the share of {item}?",
        "{item}占预算的百分之几？ | {item}的预算占比是多少？",
        "{item}佔預算的百分之幾？ | {item}的預算佔比是多少？",
    ),
    _departments, 0, 100,
)  # fmt: skip
PHRASES = {
    "title": (
        "What is the title of the chart? | What does the chart show?",
        "图表的标题是什么？ | 这张图的标题是什么？",
        "圖表的標題是什麼？ | 這張圖的標題是什麼？",
    ),
    "which": (
        "Which category has the value {value}? | What stands at {value}?",
        "数值为{value}的是哪一项？ | 哪一项是{value}？",
        "數值為{value}的是哪一項？ | 哪一項是{value}？",
    ),
    "most": (
        "Which category has the highest value? | What is highest in the chart?",
        "哪一项的数值最大？ | 图中最高的是哪一项？",
        "哪一項的數值最大？ | 圖中最高的是哪一項？",
    ),
    "least": (
        "Which category has the lowest value? | What is lowest in the chart?",
        "哪一项的数值最小？ | 图中最低的是哪一项？",
        "哪一項的數值最小？ | 圖中最低的是哪一項？",
    ),
    "difference": (
        "By how much do {a} and {b} differ? | What is the difference between {a} and {b}?",
        "{a}和{b}相差多少？ | {a}与{b}的差是多少？",
        "{a}和{b}相差多少？ | {a}與{b}的差是多少？",
    ),
    "sum": (
        "What do {a} and {b} come to together? | What is the sum of {a} and {b}?",
        "{a}和{b}一共多少？ | {a}与{b}之和是多少？",
        "{a}和{b}一共多少？ | {a}與{b}之和是多少？",
    ),
}


def compose(dice: Dice, language: Language, level: str) -> Content:
    is_tiny = level == "tiny"
    form = "bars" if is_tiny else dice.pick(FORMS)
    follows = (_months,) if form == "line" else (_months, _names) if is_tiny else None
    topics = [topic for topic in TOPICS if follows is None or topic.categories in follows]
    topic = SHARES if form == "pie" else dice.pick(topics)
    count = 3 if is_tiny else dice.between(4, 7 if form != "pie" else 6)
    names = topic.categories(dice, language, count)
    if is_tiny:
        topic = dataclasses.replace(topic, low=10, high=99)
    numbers = _shares(dice, count) if form == "pie" else _spread(dice, topic, count)
    unit = say(topic.unit, language)
    values = {f"name{i}": Fact(name, (name.lower(),)) for i, name in enumerate(names)}
    values |= {f"value{i}": Fact(f"{n}{unit}", (str(n),)) for i, n in enumerate(numbers)}
    if not is_tiny:
        title = say(topic.title, language).format(year=dice.between(2018, 2026))
        values["title"] = Fact(title)
    asks = _asks(dice, language, level, topic, values, numbers)
    more = {"form": form, "numbers": numbers}
    return Content("chart", language, level, values, tuple(asks), more)


def _spread(dice: Dice, topic: Topic, count: int) -> list[int]:
    """Unlike values, none so small beside the largest that its bar is not seen."""
    high = dice.between((topic.low + topic.high) // 2, topic.high)
    low = max(topic.low, high // 8)
    return dice.sample(range(low, high + 1), count)


def _shares(dice: Dice, count: int) -> list[int]:
    """Unlike whole percentages of 100, none below 5."""
    while True:
        cuts = sorted(dice.sample(range(5, 96), count - 1))
        shares = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
        if min(shares) >= 5 and len(set(shares)) == count:
            return shares


def _asks(dice, language, level, topic: Topic, values, numbers):
    asker = Asker(dice, language, level, PHRASES | {"value": topic.ask})
    for i in range(len(numbers)):
        name, value = values[f"name{i}"], values[f"value{i}"]
        asker.add("value", value, f"value{i}", category="lookup", item=name.text)
        asker.add("which", name, f"name{i}", category="lookup", value=value.text)
    if level == "tiny":
        return asker.asks
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    asker.add("most", values[f"name{order[-1]}"], f"name{order[-1]}", category="compare")
    asker.add("least", values[f"name{order[0]}"], f"name{order[0]}", category="compare")
    asker.add("title", values["title"], "title")
    unit = say(topic.unit, language)
    for phrase in ("difference", "sum"):
        i, j = dice.sample(range(len(numbers)), 2)
        result = abs(numbers[i] - numbers[j]) if phrase == "difference" else numbers[i] + numbers[j]
        names = {"a": values[f"name{i}"].text, "b": values[f"name{j}"].text}
        answer = Fact(f"{result}{unit}", (str(result),))
        asker.add(phrase, answer, category="compute", **names)
    return asker.asks


def draw(content: Content, page: Page, style: Style, unit: Number) -> None:
    """A title above the plot; every value stands at its bar, point or slice."""
    margin = (0.3 if content.is_tiny else 1.6) * unit
    y = margin
    if "title" in content.values:
        page.text(page.width / 2, y, content.part("title"), 1.4 * unit, align="center",
                  face=style.heading.bold, room=page.width - 2 * margin)  # fmt: skip
        y += 2.6 * unit
    form = content.more["form"]
    height = page.width - 2 * margin if content.is_tiny else page.width * 0.56
    box = (margin, y, page.width - margin, y + height)
    {"bars": _draw_bars, "lying bars": _draw_lying, "line": _draw_line, "pie": _draw_pie}[form](
        content, page, style, unit, box
    )
    page.height = y + height + margin


def color_of(style: Style, content: Content, i: int) -> Color:
    """Of a bar or slice: one colour for all bars of some charts, one each in others."""
    if style.accent == style.ink:
        return (GREYS[i % len(GREYS)],) * 3
    if content.more["form"] != "pie" and style.variant % 2:
        return style.accent
    return COLORS[(i + style.variant) % len(COLORS)]


def nice_step(high: Number, count: int = 5) -> int:
    """A round step with which `count` or so reach a value: 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(max(high / count, 1)))
    return int(next(f * power for f in (1, 2, 5, 10) if f * power * count >= high))


def _axis(content: Content, page: Page, style: Style, unit: Number, box, levels: bool):
    """Ticks and rules of the values' axis; returns the plot's box and the value at its end."""
    left, top, right, bottom = box
    step = nice_step(max(content.more["numbers"]))
    last = step * math.ceil(max(content.more["numbers"]) / step)
    wide = page.face.advance(str(last)) * 0.8 * unit
    left, bottom = left + (wide + 0.6 * unit if levels else 0), bottom - 1.7 * unit
    top += 1.3 * unit
    for tick in range(0, last + 1, step):
        y = bottom - (bottom - top) * tick / last
        page.line((left, y, right, y), mix(page.ink, page.paper, 0.82), 1)
        if levels:
            page.text(left - 0.4 * unit, y - 0.55 * unit, str(tick), 0.8 * unit, align="right",
                      color=style.soft)  # fmt: skip
    return (left, top, right, bottom), last


def _draw_bars(content: Content, page: Page, style: Style, unit: Number, box) -> None:
    numbers = content.more["numbers"]
    if content.is_tiny:
        left, top, right, bottom = box
        plot, last = (left, top + LINE * unit, right, bottom - LINE * unit), max(numbers)
    else:
        plot, last = _axis(content, page, style, unit, box, True)
    left, top, right, bottom = plot
    slot = (right - left) / len(numbers)
    for i, number in enumerate(numbers):
        middle, y = left + (i + 0.5) * slot, bottom - (bottom - top) * number / last
        page.rectangle((middle - 0.3 * slot, y, middle + 0.3 * slot, bottom),
                       color_of(style, content, i))  # fmt: skip
        page.text(middle, y - LINE * 0.95 * unit, content.part(f"value{i}"), 0.9 * unit
                  if not content.is_tiny else unit, align="center", room=0.95 * slot)  # fmt: skip
    page.line((left, bottom, right, bottom), page.ink, max(1, 0.08 * unit))
    _names_below(content, page, unit, left, bottom, slot)


def _names_below(content: Content, page: Page, unit: Number, left, y, slot) -> None:
    names = [f"name{i}" for i in range(len(content.more["numbers"]))]
    widest = max(page.face.advance(content.values[name].text) for name in names)
    size = min(unit, 0.94 * slot / widest)  # one for all
    for i, name in enumerate(names):
        x, top = left + (i + 0.5) * slot, y + 0.15 * unit + (unit - size) / 2
        page.text(x, top, content.part(name), size, align="center")


def _draw_line(content: Content, page: Page, style: Style, unit: Number, box) -> None:
    numbers = content.more["numbers"]
    (left, top, right, bottom), last = _axis(content, page, style, unit, box, True)
    slot = (right - left) / len(numbers)
    points = [
        (left + (i + 0.5) * slot, bottom - (bottom - top) * number / last)
        for i, number in enumerate(numbers)
    ]
    page.line([value for point in points for value in point], style.accent, 0.16 * unit)
    for i, (x, y) in enumerate(points):
        r = 0.28 * unit
        page.ellipse((x - r, y - r, x + r, y + r), page.paper, style.accent, 0.14 * unit)
        beside = numbers[max(i - 1, 0) : i + 2]
        below = numbers[i] == min(beside) and numbers[i] > 0.15 * last  # lines rise on both sides
        at = y + 0.2 * unit if below else y - (LINE + 0.35) * unit
        page.text(x, at, content.part(f"value{i}"), 0.9 * unit, align="center")
    page.line((left, bottom, right, bottom), page.ink, max(1, 0.08 * unit))
    _names_below(content, page, unit, left, bottom, slot)


def _draw_lying(content: Content, page: Page, style: Style, unit: Number, box) -> None:
    left, top, right, bottom = box
    numbers = content.more["numbers"]
    names = [content.values[f"name{i}"].text for i in range(len(numbers))]
    left += max(map(page.face.advance, names)) * unit + 0.6 * unit
    right -= page.face.advance("9999%") * unit
    slot = (bottom - top) / len(numbers)
    for i, number in enumerate(numbers):
        y = top + (i + 0.5) * slot
        end = left + (right - left) * number / max(numbers)
        text_y = y - LINE * unit / 2
        page.text(left - 0.5 * unit, text_y, content.part(f"name{i}"), unit, align="right")
        page.rectangle((left, y - 0.3 * slot, end, y + 0.3 * slot), color_of(style, content, i))
        page.text(end + 0.4 * unit, text_y, content.part(f"value{i}"), 0.95 * unit)
    page.line((left, top, left, bottom), page.ink, max(1, 0.08 * unit))


def _draw_pie(content: Content, page: Page, style: Style, unit: Number, box) -> None:
    """Slices from twelve o'clock; values inside, or beside where a slice is thin; a legend."""
    left, top, right, bottom = box
    radius = (bottom - top) / 2 - 1.3 * unit
    x, y = left + (right - left) * 0.33, (top + bottom) / 2
    circle, start = (x - radius, y - radius, x + radius, y + radius), -90.0
    legend_x, legend_y = x + radius + 3.6 * unit, y - 0.9 * unit * len(content.more["numbers"])
    for i, number in enumerate(content.more["numbers"]):
        end, color = start + 3.6 * number, color_of(style, content, i)
        page.slice(circle, start, end, color)
        middle = math.radians((start + end) / 2)
        away = radius * 0.66 if number >= 9 else radius + 1.1 * unit
        at = (x + away * math.cos(middle), y + away * math.sin(middle) - LINE * 0.47 * unit)
        page.text(*at, content.part(f"value{i}"), 0.95 * unit, align="center",
                  color=(255, 255, 255) if number >= 9 and sum(color) < 420 else None)  # fmt: skip
        row = legend_y + 1.8 * unit * i
        page.rectangle((legend_x, row + 0.2 * unit, legend_x + unit, row + 1.2 * unit), color)
        page.text(legend_x + 1.6 * unit, row, content.part(f"name{i}"), unit,
                  room=right - legend_x - 1.6 * unit)  # fmt: skip
        start = end
