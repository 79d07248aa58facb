"""Menus: a restaurant, its dishes by section, and their prices."""

from llmprep_jax.data.synthetic_documents import facts, lexicon
from llmprep_jax.data.synthetic_documents.content import Asker, Content
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.facts import Fact
from llmprep_jax.data.synthetic_documents.lexicon import Language, say
from llmprep_jax.data.synthetic_documents.page import LINE, Number, Page
from llmprep_jax.data.synthetic_documents.style import Style

WIDTH, SIZE = 760, 20
TITLE = ("Menu", "菜单", "菜單")
CENTS = (650, 1480, 620, 340)  # a dish of each section
PHRASES = {
    "name": (
        "What is the restaurant called? | Which restaurant's menu is this?",
        "这家餐厅叫什么名字？ | 这是哪家餐厅的菜单？",
        "這家餐廳叫什麼名字？ | 這是哪家餐廳的菜單？",
    ),
    "price": (
        "How much is {dish}? | What does {dish} cost? | What is the price of {dish}?",
        "{dish}多少钱？ | {dish}的价格是多少？ | 点一份{dish}要多少钱？",
        "{dish}多少錢？ | {dish}的價格是多少？ | 點一份{dish}要多少錢？",
    ),
    "which": (
        "Which dish costs {price}? | What can be had for {price}?",
        "哪道菜的价格是{price}？ | 价格为{price}的是什么？",
        "哪道菜的價格是{price}？ | 價格為{price}的是什麼？",
    ),
    "dearest": (
        "What is the most expensive of the {section}? | Which of the {section} costs most?",
        "{section}里最贵的是什么？ | 哪道{section}最贵？",
        "{section}裡最貴的是什麼？ | 哪道{section}最貴？",
    ),
    "cheapest": (
        "What is the cheapest of the {section}? | Which of the {section} costs least?",
        "{section}里最便宜的是什么？ | 哪道{section}最便宜？",
        "{section}裡最便宜的是什麼？ | 哪道{section}最便宜？",
    ),
    "both": (
        "How much are {dish} and {other} together? | What do {dish} and {other} come to?",
        "{dish}和{other}一共多少钱？ | {dish}加{other}要多少钱？",
        "{dish}和{other}一共多少錢？ | {dish}加{other}要多少錢？",
    ),
    "phone": (
        "What number can one book a table at? | What is the restaurant's phone number?",
        "订位电话是多少？ | 餐厅的电话是多少？",
        "訂位電話是多少？ | 餐廳的電話是多少？",
    ),
}


def compose(dice: Dice, language: Language, level: str) -> Content:
    money = facts.currency(dice, language, level)
    is_tiny = level == "tiny"
    names = [text.split(", ") for text in lexicon.DISHES[language]]
    sections = sorted(dice.sample(range(4), 1 if is_tiny else dice.between(2, 4)))
    values = {
        "name": Fact(dice.pick(lexicon.RESTAURANTS[language])),
        "phone": Fact(facts.phone(dice, language)),
    }
    rows, prices = [], {}
    for section in sections:
        dishes = names[section]
        if is_tiny:
            dishes = [dish for dish in dishes if len(dish) <= (10 if language == "en" else 3)]
        for dish in dice.sample(dishes, 3 if is_tiny else dice.between(3, 6)):
            i = len(rows)
            prices[i] = money.price(CENTS[section], dice)
            values |= {f"dish{i}": Fact(dish, (dish.lower(),)), f"price{i}": money.write(prices[i])}
            rows.append((i, section))
    if is_tiny:
        values = {name: fact for name, fact in values.items() if name not in ("name", "phone")}
    asks = _asks(dice, language, level, values, rows, prices, money)
    more = {"rows": rows, "sections": sections}
    return Content("menu", language, level, values, tuple(asks), more)


def _asks(dice, language, level, values, rows, prices, money):
    asker = Asker(dice, language, level, PHRASES)
    for name in ("name", "phone"):
        if name in values:
            asker.add(name, values[name], name)
    for i, _ in rows:
        dish, price = values[f"dish{i}"].text, values[f"price{i}"].text
        asker.add("price", values[f"price{i}"], f"price{i}", category="lookup", dish=dish)
        if list(prices.values()).count(prices[i]) == 1:
            asker.add("which", values[f"dish{i}"], f"dish{i}", category="lookup", price=price)
    if level == "tiny":
        return asker.asks
    for section in sorted({section for _, section in rows}):
        own = sorted((prices[i], i) for i, at in rows if at == section)
        title = lexicon.SECTIONS[language][section]
        title = title.lower() if language == "en" else title
        for phrase, best, next_best in (("dearest", own[-1], own[-2]), ("cheapest", *own[:2])):
            if best[0] != next_best[0]:
                field = f"dish{best[1]}"
                asker.add(phrase, values[field], field, category="compare", section=title)
    (i, _), (j, _) = dice.sample(rows, 2)
    names = {"dish": values[f"dish{i}"].text, "other": values[f"dish{j}"].text}
    asker.add("both", money.write(prices[i] + prices[j]), category="compute", **names)
    return asker.asks


def draw(content: Content, page: Page, style: Style, unit: Number) -> None:
    """Title, then sections one below another; wide pages may have two columns."""
    if content.is_tiny:
        page.height = _draw_tiny(content, page, unit)
        return
    y = _draw_title(content, page, style, unit)
    margin, sections = 2.4 * unit, content.more["sections"]
    two = style.variant % 3 == 0 and len(sections) > 1
    gap = 2.4 * unit
    width = (page.width - 2 * margin - gap) / 2 if two else page.width - 2 * margin
    half = (len(sections) + 1) // 2 if two else len(sections)
    bottoms = []
    for column, group in enumerate((sections[:half], sections[half:])):
        x, at = margin + column * (width + gap), y
        for section in group:
            at = _draw_section(content, page, style, unit, (x, at, width), section)
        bottoms.append(at)
    foot = max(bottoms) + 0.4 * unit
    page.line((margin, foot, page.width - margin, foot), style.soft, 1)
    label = say(("Reservations: ", "订位电话：", "訂位電話："), content.language)
    page.text(page.width / 2, foot + 0.5 * unit, [(label, None), *content.part("phone")],
              0.85 * unit, align="center")  # fmt: skip
    page.height = foot + 3.4 * unit
    if style.variant % 4 == 1:
        edge = 0.7 * unit
        box = (edge, edge, page.width - edge, page.height - edge)
        page.rectangle(box, None, style.accent, 0.12 * unit)


def _draw_title(content: Content, page: Page, style: Style, unit: Number) -> Number:
    room = page.width - 5 * unit
    color = style.accent
    top = 1.8 * unit
    if style.variant % 2:
        page.rectangle((0, 0, page.width, 6.2 * unit), style.accent)
        color = (255, 255, 255)
    page.text(page.width / 2, top, content.part("name"), 2.2 * unit, align="center", room=room,
              color=color, face=style.heading.bold)  # fmt: skip
    page.text(page.width / 2, top + 2.9 * unit, say(TITLE, content.language), unit,
              align="center", color=color)  # fmt: skip
    return top + 5.4 * unit


def _draw_section(content, page, style, unit, place, section: int) -> Number:
    x, y, width = place
    title = lexicon.SECTIONS[content.language][section]
    page.text(x, y, title, 1.25 * unit, color=style.accent, face=style.heading.bold)
    y += LINE * 1.3 * unit
    page.line((x, y, x + width, y), style.accent, 0.08 * unit)
    y += 0.45 * unit
    for i, at in content.more["rows"]:
        if at != section:
            continue
        price = content.values[f"price{i}"].text
        taken = page.face.advance(price) * unit
        left = page.text(x, y, content.part(f"dish{i}"), unit, room=width - taken - unit)
        if style.variant % 4 != 2:
            start, end = x + left + 0.5 * unit, x + width - taken - 0.5 * unit
            page.dashes(start, y + 1.0 * unit, end, style.soft, 0.12 * unit, 0.08 * unit)
        page.text(x + width, y, content.part(f"price{i}"), unit, align="right")
        y += 1.25 * LINE * unit
    return y + 0.9 * unit


def _draw_tiny(content: Content, page: Page, unit: Number) -> Number:
    y, margin = 0.4 * unit, 0.4 * unit
    title = lexicon.SECTIONS[content.language][content.more["sections"][0]]
    page.text(page.width / 2, y, title, unit, bold=True, align="center")
    y += LINE * unit
    for i, _ in content.more["rows"]:
        taken = page.face.advance(content.values[f"price{i}"].text) * unit
        room = page.width - 2 * margin
        page.text(margin, y, content.part(f"dish{i}"), unit, room=room - taken - 0.5 * unit)
        page.text(page.width - margin, y, content.part(f"price{i}"), unit, align="right")
        y += LINE * unit
    return y + margin
