"""Tables: timetables, stock lists, marks, staff lists and weather, with totals that add up."""

import dataclasses

from llmprep_jax.data.synthetic_documents.content import Asker, Content
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.facts import Fact
from llmprep_jax.data.synthetic_documents.kinds.table_topics import TOPICS, Topic
from llmprep_jax.data.synthetic_documents.lexicon import Language, say
from llmprep_jax.data.synthetic_documents.page import LINE, Number, Page
from llmprep_jax.data.synthetic_documents.style import WHITE, Style, mix

WIDTH, SIZE = 840, 19
PHRASES = {
    "rows": (
        "How many {things} are listed? | How many {things} does the table have?",
        "表中一共有几{things}？ | 表里列了几{things}？",
        "表中一共有幾{things}？ | 表裡列了幾{things}？",
    ),
    "title": (
        "What is the title of the table? | What is the table called?",
        "表格的标题是什么？ | 这张表叫什么？",
        "表格的標題是什麼？ | 這張表叫什麼？",
    ),
    "sum": (
        "What is the total amount? | What do all amounts add up to?",
        "总金额是多少？ | 金额合计多少？",
        "總金額是多少？ | 金額合計多少？",
    ),
}
TOTAL = ("Total", "合计", "合計")


def compose(dice: Dice, language: Language, level: str) -> Content:
    topic = dice.pick([t for t in TOPICS if t.small is not None] if level == "tiny" else TOPICS)
    count = 3 if level == "tiny" else dice.between(4, 9)
    made = topic.make(dice, language, level, count)
    columns = list(range(len(topic.columns)))
    if level == "tiny":
        columns = [0, topic.small]
    cells = [[row[c] for c in columns] for row in made.rows]
    values = {f"r{r}c{c}": fact for r, row in enumerate(cells) for c, fact in enumerate(row)}
    heads = [say(topic.columns[c].head, language) for c in columns]
    values |= {f"head{c}": Fact(head) for c, head in enumerate(heads)}
    if level != "tiny":
        values["title"] = Fact(made.title)
    if made.total is not None and level != "tiny":
        values["sum"] = made.total
    asks = _asks(dice, language, level, topic, columns, values, made.numbers)
    more = {"rows": len(cells), "columns": columns, "numeric": [
        topic.columns[c].is_number for c in columns]}  # fmt: skip
    return Content("table", language, level, values, tuple(asks), more)


def _asks(dice, language, level, topic: Topic, columns, values, numbers):
    asker = Asker(dice, language, level, PHRASES | topic.phrases())
    num_rows = len(numbers)
    for at, c in enumerate(columns):
        if at == 0:
            continue
        texts = [values[f"r{r}c{at}"].text for r in range(num_rows)]
        for r, text in enumerate(texts):
            row = values[f"r{r}c0"]
            asker.add(f"cell{c}", values[f"r{r}c{at}"], f"r{r}c{at}", category="lookup",
                      row=row.text)  # fmt: skip
            if texts.count(text) == 1 and topic.columns[c].which is not None:
                asker.add(f"which{c}", row, f"r{r}c0", category="lookup", value=text)
        if not topic.columns[c].is_compared or level == "tiny":
            continue
        order = sorted(range(num_rows), key=lambda r, c=c: numbers[r][c])
        for phrase, best, second in (("most", order[-1], order[-2]), ("least", *order[:2])):
            is_asked = getattr(topic.columns[c], phrase) is not None
            if is_asked and numbers[best][c] != numbers[second][c]:
                asker.add(f"{phrase}{c}", values[f"r{best}c0"], f"r{best}c0", category="compare")
    if level != "tiny":
        asker.add("title", values["title"], "title")
        things = say(topic.things, language)
        asker.add("rows", str(num_rows), category="count", things=things)
    if "sum" in values:
        asker.add("sum", values["sum"], "sum")
    return asker.asks


@dataclasses.dataclass(frozen=True)
class Look:
    """How a table is ruled, by the variant of a style."""

    grid: bool
    bands: bool
    filled_head: bool

    @classmethod
    def of(cls, style: Style) -> "Look":
        looks = ((True, False, True), (False, True, True), (False, False, False),
                 (True, True, False), (True, False, False), (False, True, False))  # fmt: skip
        return cls(*looks[style.variant % len(looks)])


def draw(content: Content, page: Page, style: Style, unit: Number) -> None:
    """A title above a grid whose columns are as wide as their texts need."""
    margin = (0.35 if content.is_tiny else 2) * unit
    y = margin if content.is_tiny else 1.6 * unit
    if "title" in content.values:
        y = page.paragraph(margin, y, page.width - 2 * margin, content.part("title"), 1.5 * unit,
                           align="center" if style.variant % 2 else "left",
                           face=style.heading.bold)  # fmt: skip
        y += 0.6 * unit
    columns = range(len(content.more["columns"]))
    widths = _widths(content, page, unit, page.width - 2 * margin)
    edges = [margin + sum(widths[:c]) for c in [*columns, len(widths)]]
    look = Look(True, False, False) if content.is_tiny else Look.of(style)
    height = (1.42 if content.is_tiny else 1.85) * unit
    top = y

    def row(y: Number, names: list[str | None], bold: bool, color=None) -> None:
        for c, name in enumerate(names):
            if name is None:
                continue
            parts = content.part(name) if name in content.values else say(TOTAL, content.language)
            pad, is_number = 0.35 * unit, content.more["numeric"][c]
            x = edges[c + 1] - pad if is_number else edges[c] + pad
            place = y + (height - LINE * unit) / 2
            page.text(x, place, parts, unit, bold=bold, color=color, room=widths[c] - 2 * pad,
                      align="right" if is_number else "left")  # fmt: skip

    if look.filled_head:
        page.rectangle((edges[0], y, edges[-1], y + height), style.accent)
    row(y, [f"head{c}" for c in columns], True, WHITE if look.filled_head else None)
    y += height
    if not look.grid and not look.filled_head:
        page.line((edges[0], y, edges[-1], y), page.ink, 0.1 * unit)
    for r in range(content.more["rows"]):
        if look.bands and r % 2:
            page.rectangle((edges[0], y, edges[-1], y + height), style.tint)
        row(y, [f"r{r}c{c}" for c in columns], False)
        y += height
    if "sum" in content.values:
        page.line((edges[0], y, edges[-1], y), page.ink, 0.1 * unit)
        row(y, ["total", *[None] * (len(widths) - 2), "sum"], True)
        y += height
    rules = mix(page.ink, page.paper, 0.5)
    _draw_rules(page, look, (top, y), edges, height, rules, unit)
    page.height = y + (0.4 if content.is_tiny else 2) * unit


def _draw_rules(page: Page, look: Look, span, edges, height: Number, color, unit: Number) -> None:
    top, bottom = span
    width = 0.06 * unit
    if not look.grid:
        page.line((edges[0], bottom, edges[-1], bottom), color, width)
        return
    for x in edges:
        page.line((x, top, x, bottom), color, width)
    for r in range(round((bottom - top) / height) + 1):
        page.line((edges[0], top + r * height, edges[-1], top + r * height), color, width)


def _widths(content: Content, page: Page, unit: Number, room: Number) -> list[Number]:
    """Widths in proportion to the longest text of each column; texts that are too long shrink."""
    needs: list[Number] = []

    def width(name: str, bold: bool) -> Number:
        face = page.bold if bold else page.face
        return face.advance(content.values[name].text) * unit

    for c in range(len(content.more["columns"])):
        texts = [width(f"head{c}", True)]
        texts += [width(f"r{r}c{c}", False) for r in range(content.more["rows"])]
        needs.append(max(texts) + (0.8 if content.is_tiny else 1.6) * unit)
    if "sum" in content.values:
        needs[-1] = max(needs[-1], width("sum", True) + 1.6 * unit)
    return [need * room / sum(needs) for need in needs]
