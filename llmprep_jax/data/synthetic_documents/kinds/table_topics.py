"""What tables are about: their columns, how each is asked about, and rows of facts."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from llmprep_jax.data.synthetic_documents import facts, lexicon
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.facts import Fact
from llmprep_jax.data.synthetic_documents.lexicon import Language, Trio, say


@dataclasses.dataclass(frozen=True)
class Column:
    """A column but the first is asked about.

    Attributes:
      head: its heading.
      ask: for the cell of {row}.
      which: for the row of {value}; None: is not asked.
      most, least: for the row of the largest and smallest number; None: is not asked.
      is_number: is set to the right.
    """

    head: Trio
    ask: Trio | None = None
    which: Trio | None = None
    most: Trio | None = None
    least: Trio | None = None
    is_number: bool = False

    @property
    def is_compared(self) -> bool:
        return self.most is not None or self.least is not None


@dataclasses.dataclass(frozen=True)
class Made:
    """A table's title, its cells, their numbers where they are such, and the sum of the last."""

    title: str
    rows: list[list[Fact]]
    numbers: list[list[int]]
    total: Fact | None = None


@dataclasses.dataclass(frozen=True)
class Topic:
    """What a table is about.

    Attributes:
      things: what its rows are, in the plural, with the measure word in Chinese.
      make: draws of a number of rows.
      small: the column beside the first on a tiny page; None: not on one.
    """

    things: Trio
    columns: tuple[Column, ...]
    make: Callable[[Dice, Language, str, int], Made]
    small: int | None = None

    def phrases(self) -> dict[str, Trio]:
        found: dict[str, Trio] = {}
        kinds: tuple[Literal["ask", "which", "most", "least"], ...]
        kinds = ("ask", "which", "most", "least")
        for c, column in enumerate(self.columns):
            for kind in kinds:
                trio = getattr(column, kind)
                if trio is not None:
                    found["cell" * (kind == "ask") + kind * (kind != "ask") + str(c)] = trio
        return found


def _number(value: int) -> Fact:
    return Fact(f"{value:,}", (str(value),))


def _trains(dice: Dice, language: Language, level: str, count: int) -> Made:
    letters = say(("IC ", "G", "次"), language)
    numbers = dice.sample(range(101, 999), count)
    cities = dice.sample(lexicon.CITIES[language], count + 1)
    minutes = sorted(dice.sample(range(72, 276), count))  # of five
    rows = []
    for number, city, slot in zip(numbers, cities[1:], minutes, strict=True):
        name = f"{number}{letters}" if language == "zh-Hant" else f"{letters}{number}"
        hour, minute = divmod(slot * 5, 60)
        time = Fact(f"{hour}:{minute:02d}", (f"{hour:02d}:{minute:02d}",))
        rows.append([Fact(name, (str(number),)), Fact(city), time, Fact(str(dice.between(1, 14)))])
    title = say(("Departures from {}", "{}站发车时刻表", "{}站發車時刻表"), language)
    return Made(title.format(cities[0]), rows, [[0] * 4 for _ in rows])


def _stock(dice: Dice, language: Language, level: str, count: int) -> Made:
    money = facts.currency(dice, language, level)
    rows, numbers, total = [], [], 0
    goods = lexicon.GOODS
    if level == "tiny":
        longest = 7 if language == "en" else 3
        goods = [row for row in goods if len(say(row[0], language)) <= longest]
    for trio, cents in dice.sample(goods, count):
        name, amount, price = say(trio, language), dice.between(3, 60), money.price(cents, dice)
        worth = amount * price
        total += worth
        fact = Fact(name if level == "tiny" else name.capitalize(), (name,))
        rows.append([fact, _number(amount), money.write(price), money.write(worth)])
        numbers.append([0, amount, price, worth])
    shop = dice.pick(lexicon.SHOPS[language])
    title = say(("Stock list, {}", "{}库存清单", "{}庫存清單"), language).format(shop)
    return Made(title, rows, numbers, money.write(total))


def _marks(dice: Dice, language: Language, level: str, count: int) -> Made:
    if level == "tiny":
        names = dice.sample([n for n in lexicon.GIVEN[language] if len(n) <= 5], count)
    else:
        names = facts.people(dice, language, count)
    rows, numbers = [], []
    for name in names:
        marks = [dice.between(41, 99) for _ in range(3)]
        rows.append([Fact(name), *(Fact(str(mark)) for mark in (*marks, sum(marks)))])
        numbers.append([0, *marks, sum(marks)])
    form = dice.between(1, 6)
    title = say(("Marks of class {}", "{}班成绩单", "{}班成績單"), language).format(form)
    return Made(title, rows, numbers)


def _staff(dice: Dice, language: Language, level: str, count: int) -> Made:
    extensions = dice.sample(range(2000, 8999), count)
    rooms = dice.sample([f"{f}{n:02d}" for f in range(1, 9) for n in range(1, 30)], count)
    rows = []
    for name, room, extension in zip(facts.people(dice, language, count), rooms, extensions,
                                     strict=True):  # fmt: skip
        department = say(dice.pick(lexicon.DEPARTMENTS), language)
        rows.append([Fact(name), Fact(department), Fact(room), Fact(str(extension))])
    company = dice.pick(lexicon.COMPANIES[language])
    title = say(("Staff of {}", "{}通讯录", "{}通訊錄"), language).format(company)
    return Made(title, rows, [[0] * 4 for _ in rows])


def _weather(dice: Dice, language: Language, level: str, count: int) -> Made:
    cities = dice.sample([c for c in lexicon.CITIES[language] if level != "tiny" or len(c) <= 6],
                         count)  # fmt: skip
    rows, numbers = [], []
    for city in cities:
        high = dice.between(4, 36)
        low, rain = high - dice.between(3, 12), dice.between(0, 95)
        rows.append([Fact(city), *(Fact(f"{t}°C", (str(t), f"{t}°")) for t in (high, low)),
                     Fact(f"{rain}%", (str(rain),))])  # fmt: skip
        numbers.append([0, high, low, rain])
    day = facts.write_date(facts.day(dice), language)
    title = say(("Weather on {}", "{}天气预报", "{}天氣預報"), language).format(day.text)
    return Made(title, rows, numbers)


def _mark_column(trio: Trio) -> Column:
    en, hans, hant = trio
    return Column(
        trio,
        (
            f"What is {{row}}'s mark in {en}? | How many marks did {{row}} get in {en}?",
            f"{{row}}的{hans}是多少分？ | {{row}}{hans}考了多少分？",
            f"{{row}}的{hant}是多少分？ | {{row}}{hant}考了多少分？",
        ),
        None,
        (
            f"Who has the highest mark in {en}? | Who is best in {en}?",
            f"谁的{hans}分数最高？ | {hans}最高分是谁？",
            f"誰的{hant}分數最高？ | {hant}最高分是誰？",
        ),
        (
            f"Who has the lowest mark in {en}? | Who is last in {en}?",
            f"谁的{hans}分数最低？ | {hans}最低分是谁？",
            f"誰的{hant}分數最低？ | {hant}最低分是誰？",
        ),
        True,
    )


TRAINS = Topic(
    ("trains", "趟列车", "班列車"),
    (
        Column(("Train", "车次", "車次")),
        Column(
            ("To", "终点", "終點"),
            (
                "Where does train {row} go? | What is the destination of {row}?",
                "{row}开往哪里？ | {row}的终点是哪里？",
                "{row}開往哪裡？ | {row}的終點是哪裡？",
            ),
            (
                "Which train goes to {value}? | What is the train to {value}?",
                "哪趟车开往{value}？ | 去{value}坐哪趟车？",
                "哪班車開往{value}？ | 去{value}坐哪班車？",
            ),
        ),
        Column(
            ("Departs", "发车", "發車"),
            (
                "When does train {row} leave? | At what time does {row} depart?",
                "{row}几点发车？ | {row}的发车时间是几点？",
                "{row}幾點發車？ | {row}的發車時間是幾點？",
            ),
            (
                "Which train leaves at {value}? | What departs at {value}?",
                "{value}发车的是哪趟车？ | 哪趟车{value}出发？",
                "{value}發車的是哪班車？ | 哪班車{value}出發？",
            ),
            is_number=True,
        ),
        Column(
            ("Platform", "站台", "月台"),
            (
                "Which platform does train {row} leave from? | What is the platform of {row}?",
                "{row}在几号站台？ | {row}从哪个站台发车？",
                "{row}在幾號月台？ | {row}從哪個月台發車？",
            ),
            is_number=True,
        ),
    ),
    _trains,
    2,
)
STOCK = Topic(
    ("items", "种商品", "種商品"),
    (
        Column(("Item", "商品", "商品")),
        Column(
            ("Quantity", "数量", "數量"),
            (
                "What is the quantity of {row}? | How many units of {row} are there?",
                "{row}有多少？ | {row}的数量是多少？",
                "{row}有多少？ | {row}的數量是多少？",
            ),
            (
                "Which item has the quantity {value}? | Of what are there {value}?",
                "哪种商品的数量是{value}？ | 数量为{value}的是什么？",
                "哪種商品的數量是{value}？ | 數量為{value}的是什麼？",
            ),
            (
                "Which item has the largest quantity? | Of which item is there most?",
                "哪种商品数量最多？ | 什么商品最多？",
                "哪種商品數量最多？ | 什麼商品最多？",
            ),
            (
                "Which item has the smallest quantity? | Of which item is there least?",
                "哪种商品数量最少？ | 什么商品最少？",
                "哪種商品數量最少？ | 什麼商品最少？",
            ),
            True,
        ),
        Column(
            ("Unit price", "单价", "單價"),
            (
                "What is the unit price of {row}? | How much is one unit of {row}?",
                "{row}的单价是多少？ | {row}单价多少钱？",
                "{row}的單價是多少？ | {row}單價多少錢？",
            ),
            None,
            (
                "Which item has the highest unit price? | Which item is dearest?",
                "哪种商品单价最高？ | 单价最高的是什么？",
                "哪種商品單價最高？ | 單價最高的是什麼？",
            ),
            (
                "Which item has the lowest unit price? | Which item is cheapest?",
                "哪种商品单价最低？ | 单价最低的是什么？",
                "哪種商品單價最低？ | 單價最低的是什麼？",
            ),
            True,
        ),
        Column(
            ("Amount", "金额", "金額"),
            (
                "What is the amount for {row}? | What is all of the {row} worth?",
                "{row}的金额是多少？ | {row}总共值多少钱？",
                "{row}的金額是多少？ | {row}總共值多少錢？",
            ),
            (
                "Which item has the amount {value}? | What is worth {value}?",
                "哪种商品的金额是{value}？ | 金额为{value}的是什么？",
                "哪種商品的金額是{value}？ | 金額為{value}的是什麼？",
            ),
            is_number=True,
        ),
    ),
    _stock,
    1,
)
MARKS = Topic(
    ("students", "名学生", "名學生"),
    (
        Column(("Student", "学生", "學生")),
        *map(_mark_column, lexicon.SUBJECTS[:3]),
        Column(
            ("Total", "总分", "總分"),
            (
                "What is the total of {row}? | How many marks did {row} get altogether?",
                "{row}的总分是多少？ | {row}一共得了多少分？",
                "{row}的總分是多少？ | {row}一共得了多少分？",
            ),
            (
                "Who has the total {value}? | Whose marks come to {value}?",
                "谁的总分是{value}？ | 总分{value}的是谁？",
                "誰的總分是{value}？ | 總分{value}的是誰？",
            ),
            (
                "Who has the highest total? | Who is first in the class?",
                "谁的总分最高？ | 谁是第一名？",
                "誰的總分最高？ | 誰是第一名？",
            ),
            is_number=True,
        ),
    ),
    _marks,
    1,
)
STAFF = Topic(
    ("people", "个人", "個人"),
    (
        Column(("Name", "姓名", "姓名")),
        Column(
            ("Department", "部门", "部門"),
            (
                "Which department does {row} work in? | What is {row}'s department?",
                "{row}在哪个部门？ | {row}是哪个部门的？",
                "{row}在哪個部門？ | {row}是哪個部門的？",
            ),
        ),
        Column(
            ("Office", "办公室", "辦公室"),
            (
                "What is {row}'s office? | In which office does {row} sit?",
                "{row}在哪间办公室？ | {row}的办公室是几号？",
                "{row}在哪間辦公室？ | {row}的辦公室是幾號？",
            ),
            (
                "Who is in office {value}? | Whose office is {value}?",
                "{value}办公室是谁的？ | 谁在{value}办公室？",
                "{value}辦公室是誰的？ | 誰在{value}辦公室？",
            ),
            is_number=True,
        ),
        Column(
            ("Extension", "分机", "分機"),
            (
                "What is {row}'s extension? | Which number does one dial for {row}?",
                "{row}的分机号是多少？ | 找{row}打哪个分机？",
                "{row}的分機號碼是多少？ | 找{row}打哪個分機？",
            ),
            (
                "Who has the extension {value}? | Whom does one reach at {value}?",
                "分机{value}是谁的？ | 打{value}能找到谁？",
                "分機{value}是誰的？ | 打{value}能找到誰？",
            ),
            is_number=True,
        ),
    ),
    _staff,
)
WEATHER = Topic(
    ("cities", "个城市", "個城市"),
    (
        Column(("City", "城市", "城市")),
        Column(
            ("High", "最高", "最高"),
            (
                "What is the high in {row}? | How warm does it get in {row}?",
                "{row}最高多少度？ | {row}的最高气温是多少？",
                "{row}最高幾度？ | {row}的最高氣溫是多少？",
            ),
            None,
            (
                "Which city has the highest high? | Where is it warmest?",
                "哪个城市最高气温最高？ | 哪里最热？",
                "哪個城市最高氣溫最高？ | 哪裡最熱？",
            ),
            is_number=True,
        ),
        Column(
            ("Low", "最低", "最低"),
            (
                "What is the low in {row}? | How cold does it get in {row}?",
                "{row}最低多少度？ | {row}的最低气温是多少？",
                "{row}最低幾度？ | {row}的最低氣溫是多少？",
            ),
            None,
            None,
            (
                "Which city has the lowest low? | Where is it coldest?",
                "哪个城市最低气温最低？ | 哪里最冷？",
                "哪個城市最低氣溫最低？ | 哪裡最冷？",
            ),
            True,
        ),
        Column(
            ("Rain", "降雨概率", "降雨機率"),
            (
                "What is the chance of rain in {row}? | How likely is rain in {row}?",
                "{row}的降雨概率是多少？ | {row}下雨的可能性有多大？",
                "{row}的降雨機率是多少？ | {row}下雨的機會有多大？",
            ),
            (
                "Where is the chance of rain {value}? | Which city has a {value} chance of rain?",
                "哪个城市的降雨概率是{value}？ | 降雨概率为{value}的是哪里？",
                "哪個城市的降雨機率是{value}？ | 降雨機率為{value}的是哪裡？",
            ),
            (
                "Where is rain most likely? | Which city has the highest chance of rain?",
                "哪里最可能下雨？ | 哪个城市降雨概率最高？",
                "哪裡最可能下雨？ | 哪個城市降雨機率最高？",
            ),
            is_number=True,
        ),
    ),
    _weather,
    1,
)
TOPICS = (TRAINS, STOCK, MARKS, STAFF, WEATHER)
