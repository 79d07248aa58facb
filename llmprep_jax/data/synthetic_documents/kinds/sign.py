"""Signs: opening hours, parking, ways, doors, limits, notices, platforms and shops."""

import dataclasses
from collections.abc import Callable

from llmprep_jax.data.synthetic_documents import facts, lexicon
from llmprep_jax.data.synthetic_documents.content import Ask, Asker, Content
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.facts import Fact
from llmprep_jax.data.synthetic_documents.kinds import sign_boards
from llmprep_jax.data.synthetic_documents.lexicon import Language, Trio, say
from llmprep_jax.data.synthetic_documents.page import Number, Page
from llmprep_jax.data.synthetic_documents.style import Style

WIDTH, SIZE = 640, 26
WAYS = {  # of an arrow
    "left": ("left", "左", "左"),
    "ahead": ("straight ahead", "直行", "直行"),
    "right": ("right", "右", "右"),
}
DAYS = (
    ("Monday to Friday", "周一至周五", "週一至週五"),
    ("Saturday", "周六", "週六"),
    ("Sunday", "周日", "週日"),
)
PHRASES: dict[str, Trio] = {
    "opens": (
        "When does it open on {day}? | What is the opening time on {day}?",
        "{day}几点开门？ | {day}的开门时间是几点？",
        "{day}幾點開門？ | {day}的開門時間是幾點？",
    ),
    "closes": (
        "When does it close on {day}? | What is the closing time on {day}?",
        "{day}几点关门？ | {day}的关门时间是几点？",
        "{day}幾點關門？ | {day}的關門時間是幾點？",
    ),
    "shop": (
        "What is the name on the sign? | Whose sign is this?",
        "招牌上的名字是什么？ | 这是谁家的招牌？",
        "招牌上的名字是什麼？ | 這是誰家的招牌？",
    ),
    "phone": (
        "What phone number is on the sign? | Which number can one call?",
        "牌子上的电话是多少？ | 可以打什么电话？",
        "牌子上的電話是多少？ | 可以打什麼電話？",
    ),
    "year": (
        "Since which year has the shop existed? | When was it founded?",
        "这家店是哪年创立的？ | 创立于哪一年？",
        "這家店是哪年創立的？ | 創立於哪一年？",
    ),
    "fee": (
        "How much is parking per hour? | What does an hour of parking cost?",
        "停车每小时多少钱？ | 停一小时车收多少钱？",
        "停車每小時多少錢？ | 停一小時車收多少錢？",
    ),
    "stay": (
        "How long may one park at most? | What is the longest stay?",
        "最多可以停多久？ | 最长停车时间是多久？",
        "最多可以停多久？ | 最長停車時間是多久？",
    ),
    "spaces": (
        "How many spaces are there? | What is the number of parking spaces?",
        "有多少个车位？ | 车位数是多少？",
        "有多少個車位？ | 車位數是多少？",
    ),
    "distance": (
        "How far is it to {place}? | What is the distance to {place}?",
        "到{place}有多远？ | {place}离这里多远？",
        "到{place}有多遠？ | {place}離這裡多遠？",
    ),
    "which": (
        "What is {distance} away? | Which place is at {distance}?",
        "什么地方在{distance}之外？ | {distance}外是哪里？",
        "什麼地方在{distance}之外？ | {distance}外是哪裡？",
    ),
    "way": (
        "Which way is {place}, {distance} away? | Where does the arrow to {place}, {distance},"
        " point?",
        "{place}（{distance}）往哪个方向走？ | 到{place}（{distance}）的箭头指向哪边？",
        "{place}（{distance}）往哪個方向走？ | 到{place}（{distance}）的箭頭指向哪邊？",
    ),
    "room": (
        "What is the room number? | Which room is this?",
        "房间号是多少？ | 这是几号房间？",
        "房間號碼是多少？ | 這是幾號房間？",
    ),
    "person": (
        "Whose room is this? | Which name is on the door?",
        "这是谁的房间？ | 门上写的是谁的名字？",
        "這是誰的房間？ | 門上寫的是誰的名字？",
    ),
    "speed": (
        "What is the speed limit? | How fast may one drive?",
        "限速是多少？ | 最高时速是多少？",
        "速限是多少？ | 最高時速是多少？",
    ),
    "tall": (
        "How high may vehicles be? | What is the height limit?",
        "限高是多少？ | 车辆最高可以多高？",
        "限高是多少？ | 車輛最高可以多高？",
    ),
    "until": (
        "Until when is it out of order? | What is the last day without the lift?",
        "哪一天恢复使用？ | 电梯哪天恢复使用？",
        "哪一天恢復使用？ | 電梯哪天恢復使用？",
    ),
    "platform": (
        "Which platform is it? | What is the number of the platform?",
        "这是几号站台？ | 站台号是多少？",
        "這是第幾月台？ | 月台號碼是多少？",
    ),
    "city": (
        "Where does the train from platform {platform} at {time} go? | What is the destination of"
        " the {time} train from platform {platform}?",
        "{platform}号站台{time}的车开往哪里？ | {time}从{platform}号站台出发的车去哪里？",
        "第{platform}月台{time}的車開往哪裡？ | {time}從第{platform}月台出發的車去哪裡？",
    ),
    "time": (
        "When does the train to {city} leave? | What time does the train for {city} go?",
        "去{city}的车几点发车？ | 开往{city}的车几点走？",
        "去{city}的車幾點發車？ | 開往{city}的車幾點走？",
    ),
}


@dataclasses.dataclass(frozen=True)
class Topic:
    """A sign's facts and questions, and the board that shows them."""

    name: str
    make: Callable[[Dice, Asker, Language, str], dict[str, Fact]]
    small: bool = False


def _hours(dice: Dice, asker: Asker, language: Language, level: str) -> dict[str, Fact]:
    values = {"shop": Fact(dice.pick(lexicon.SHOPS[language]))}
    num_days = dice.between(2, 3)
    for i in range(num_days):
        values[f"opens{i}"] = facts.clock(dice, language, 7, 11)
        values[f"closes{i}"] = facts.clock(dice, language, 14, 22)
        day = say(DAYS[i], language)
        values[f"day{i}"] = Fact(day)
        asked = "weekdays" if (i, language) == (0, "en") else day
        for phrase in ("opens", "closes"):
            asker.add(phrase, values[f"{phrase}{i}"], f"{phrase}{i}", category="lookup", day=asked)
    asker.add("shop", values["shop"], "shop")
    return values


def _parking(dice: Dice, asker: Asker, language: Language, level: str) -> dict[str, Fact]:
    money = facts.currency(dice, language, level)
    values = {
        "fee": money.write(money.price(dice.pick((150, 220, 300, 400)), dice)),
        "stay": facts.quantity(dice.between(2, 12), ("hours", "小时", "小時"), language),
        "spaces": Fact(str(dice.between(20, 480))),
    }
    for name in values:
        asker.add(name, values[name], name)
    return values


def _ways(dice: Dice, asker: Asker, language: Language, level: str) -> dict[str, Fact]:
    values = {}
    count = 1 if level == "tiny" else dice.between(2, 4)
    distances = dice.sample(range(2, 99), count)
    places = lexicon.PLACES
    if level == "tiny":
        places = [trio for trio in places if len(trio[0]) <= 8]
    for i, trio in enumerate(dice.sample(places, count)):
        way, place = dice.pick(list(WAYS)), say(trio, language)
        distance = facts.quantity(distances[i], ("km", "公里", "公里"), language)
        values |= {f"place{i}": Fact(place), f"distance{i}": distance, f"way{i}": Fact(way)}
        the = f"the {place}" if language == "en" else place
        asker.add("distance", distance, f"distance{i}", category="lookup", place=the)
        asker.add("which", values[f"place{i}"], f"place{i}", category="lookup",
                  distance=distance.text)  # fmt: skip
        seen = Fact(say(WAYS[way], language))
        asker.add("way", seen, category="see", place=the, distance=distance.text)
    return values


def _door(dice: Dice, asker: Asker, language: Language, level: str) -> dict[str, Fact]:
    values = {"room": Fact(f"{dice.between(1, 9)}{dice.between(1, 60):02d}")}
    if level != "tiny":
        values |= {"person": Fact(facts.person(dice, language)),
                   "department": Fact(say(dice.pick(lexicon.DEPARTMENTS), language))}  # fmt: skip
        asker.add("person", values["person"], "person")
    asker.add("room", values["room"], "room")
    return values


def _speed(dice: Dice, asker: Asker, language: Language, level: str) -> dict[str, Fact]:
    number = dice.between(1, 24) * 5
    values = {"speed": Fact(str(number), (f"{number} km/h",))}
    asker.add("speed", values["speed"], "speed")
    return values


def _height(dice: Dice, asker: Asker, language: Language, level: str) -> dict[str, Fact]:
    metres = dice.between(18, 59) / 10
    text = say((f"{metres} m", f"{metres}米", f"{metres}公尺"), language)
    values = {"tall": Fact(text, (str(metres),))}
    asker.add("tall", values["tall"], "tall")
    return values


def _notice(dice: Dice, asker: Asker, language: Language, level: str) -> dict[str, Fact]:
    day = facts.write_date(facts.day(dice), language, facts.date_way(dice, level))
    values = {"until": day, "phone": Fact(facts.phone(dice, language))}
    asker.add("until", day, "until")
    asker.add("phone", values["phone"], "phone")
    return values


def _platform(dice: Dice, asker: Asker, language: Language, level: str) -> dict[str, Fact]:
    values = {"platform": Fact(str(dice.between(1, 40)))}
    asker.add("platform", values["platform"], "platform")
    if level != "tiny":
        city, time = Fact(dice.pick(lexicon.CITIES[language])), facts.clock(dice, language)
        values |= {"city": city, "time": time}
        asker.add("time", time, "time", category="lookup", city=city.text)
        asker.add("city", city, "city", category="lookup", time=time.text,
                  platform=values["platform"].text)  # fmt: skip
    return values


def _shop(dice: Dice, asker: Asker, language: Language, level: str) -> dict[str, Fact]:
    names = (*lexicon.SHOPS[language], *lexicon.RESTAURANTS[language])
    values = {
        "shop": Fact(dice.pick(names)),
        "year": Fact(str(dice.between(1890, 2024))),
        "phone": Fact(facts.phone(dice, language)),
    }
    for name in values:
        asker.add(name, values[name], name)
    return values


TOPICS = (
    Topic("hours", _hours),
    Topic("parking", _parking),
    Topic("ways", _ways, True),
    Topic("door", _door, True),
    Topic("speed", _speed, True),
    Topic("height", _height, True),
    Topic("notice", _notice),
    Topic("platform", _platform, True),
    Topic("shop", _shop),
)


def compose(dice: Dice, language: Language, level: str) -> Content:
    topic = dice.pick([topic for topic in TOPICS if topic.small or level != "tiny"])
    asker = Asker(dice, language, level, PHRASES)
    values = topic.make(dice, asker, language, level)
    asks: list[Ask] = asker.asks
    # no text states where an arrow points
    ways = {name: values.pop(name).text for name in [*values] if name.startswith("way")}
    more = {"board": topic.name, "ways": ways}
    return Content("sign", language, level, values, tuple(asks), more)


def draw(content: Content, page: Page, style: Style, unit: Number) -> None:
    sign_boards.draw(content, page, style, unit)
