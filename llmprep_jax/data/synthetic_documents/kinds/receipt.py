"""Receipts: goods, amounts and what was paid, which add up."""

from llmprep_jax.data.synthetic_documents import facts, lexicon
from llmprep_jax.data.synthetic_documents.content import Asker, Content
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.facts import Fact
from llmprep_jax.data.synthetic_documents.lexicon import Language, say
from llmprep_jax.data.synthetic_documents.page import LINE, Number, Page
from llmprep_jax.data.synthetic_documents.style import Style

WIDTH, SIZE = 400, 15
PHRASES = {
    "shop": (
        "What is the name of the shop? | Which shop is this receipt from?",
        "这是哪家商店的小票？ | 商店叫什么名字？",
        "這是哪家商店的收據？ | 商店叫什麼名字？",
    ),
    "date": (
        "What is the date on the receipt? | On which day was this bought?",
        "小票上的日期是哪天？ | 这是哪天买的？",
        "收據上的日期是哪天？ | 這是哪天買的？",
    ),
    "number": (
        "What is the receipt number? | What number does the receipt have?",
        "小票号是多少？ | 这张小票的编号是什么？",
        "收據號碼是多少？ | 這張收據的編號是什麼？",
    ),
    "total": (
        "What is the total? | How much is the total amount? | How much was to be paid in all?",
        "合计是多少？ | 总金额是多少？ | 一共要付多少钱？",
        "合計是多少？ | 總金額是多少？ | 一共要付多少錢？",
    ),
    "subtotal": (
        "What is the subtotal? | How much is it before tax and discount?",
        "小计是多少？ | 优惠前的金额是多少？",
        "小計是多少？ | 折扣前的金額是多少？",
    ),
    "tax": (
        "How much is the tax? | What tax was charged?",
        "税额是多少？ | 收了多少税？",
        "稅額是多少？ | 收了多少稅？",
    ),
    "discount": (
        "How much is the discount? | How much was taken off?",
        "优惠了多少？ | 折扣金额是多少？",
        "折扣是多少？ | 折扣金額是多少？",
    ),
    "paid": (
        "How much cash was given? | How much did the customer hand over?",
        "收了多少现金？ | 顾客付了多少现金？",
        "收了多少現金？ | 顧客付了多少現金？",
    ),
    "change": (
        "How much change was given? | What is the change?",
        "找零多少？ | 找了多少钱？",
        "找零多少？ | 找了多少錢？",
    ),
    "price": (
        "How much is {item}? | What does {item} cost?",
        "{item}多少钱？ | {item}的价格是多少？",
        "{item}多少錢？ | {item}的價格是多少？",
    ),
    "amount": (
        "What is the amount for {item}? | How much was paid for {item} altogether?",
        "{item}的金额是多少？ | {item}一共多少钱？",
        "{item}的金額是多少？ | {item}一共多少錢？",
    ),
    "count": (
        "How many {item} were bought? | What is the quantity of {item}?",
        "{item}买了几件？ | {item}的数量是多少？",
        "{item}買了幾件？ | {item}的數量是多少？",
    ),
    "which": (
        "Which item comes to {amount}? | What was bought for {amount}?",
        "哪种商品的金额是{amount}？ | 金额为{amount}的是什么？",
        "哪種商品的金額是{amount}？ | 金額為{amount}的是什麼？",
    ),
}
LABELS = {
    "item": ("Item", "品名", "品名"),
    "qty": ("Qty", "数量", "數量"),
    "amount": ("Amount", "金额", "金額"),
    "subtotal": ("Subtotal", "小计", "小計"),
    "discount": ("Discount", "优惠", "折扣"),
    "tax": ("Sales tax", "税额", "稅額"),
    "total": ("TOTAL", "合计", "合計"),
    "paid": ("Cash", "现金", "現金"),
    "change": ("Change", "找零", "找零"),
    "number": ("Receipt no.", "小票号：", "收據號碼："),
    "thanks": ("Thank you for your visit!", "谢谢惠顾，欢迎再来！", "謝謝惠顧，歡迎再來！"),
}


def compose(dice: Dice, language: Language, level: str) -> Content:
    money = facts.currency(dice, language, level)
    is_tiny = level == "tiny"
    goods = lexicon.GOODS
    if is_tiny:
        goods = [row for row in goods if len(say(row[0], language)) <= (6, 2, 2)[
            lexicon.LANGUAGES.index(language)]]  # fmt: skip
    chosen = dice.sample(goods, 2 if is_tiny else dice.between(3, 8))
    values: dict[str, Fact] = {}
    rows, subtotal = [], 0
    for i, (trio, cents) in enumerate(chosen):
        count = 1 if is_tiny or dice.chance(0.5) else dice.between(2, 9)
        price = money.price(cents, dice)
        name = say(trio, language)
        values |= {
            f"item{i}": Fact(name, (name.lower(),)),
            f"count{i}": Fact(str(count)),
            f"price{i}": money.write(price),
            f"amount{i}": money.write(price * count),
        }
        subtotal += price * count
        rows.append((i, count))
    more = {"rows": rows, "barcode": [dice.between(1, 4) for _ in range(44)]}
    values |= {"total": money.write(subtotal)}
    if not is_tiny:
        values |= _head(dice, language, level) | _sums(dice, money, subtotal, language)
    return Content(
        "receipt", language, level, values, tuple(_asks(dice, language, level, values, rows)), more
    )


def _head(dice: Dice, language: Language, level: str) -> dict[str, Fact]:
    way = facts.date_way(dice, level)
    return {
        "shop": Fact(dice.pick(lexicon.SHOPS[language])),
        "address": Fact(facts.address(dice, language)),
        "phone": Fact(facts.phone(dice, language)),
        "date": facts.write_date(facts.day(dice), language, way),
        "time": facts.clock(dice, language),
        "number": Fact(str(dice.between(100_000, 999_999))),
    }


def _sums(dice: Dice, money: facts.Currency, subtotal: int, language: Language) -> dict[str, Fact]:
    """What stands below the goods: it adds up in the smallest units."""
    sums, total = {}, subtotal
    if dice.chance(0.4):
        discount = max(1, round(subtotal * dice.pick((5, 10, 15, 20)) / 100))
        sums["discount"], total = money.write(discount), total - discount
    if language == "en" and dice.chance(0.7):
        tax = round(total * dice.pick((5, 7, 8, 10)) / 100)
        sums["tax"], total = money.write(tax), total + tax
    if sums:
        sums["subtotal"] = money.write(subtotal)
    sums["total"] = money.write(total)
    if dice.chance(0.6):
        note = 10**money.decimals * dice.pick((5, 10, 50))
        paid = (total // note + 1) * note
        sums |= {"paid": money.write(paid), "change": money.write(paid - total)}
    return sums


def _asks(dice: Dice, language: Language, level: str, values: dict[str, Fact], rows: list):
    asker = Asker(dice, language, level, PHRASES)
    for name in ("total", "shop", "date", "number", "subtotal", "discount", "tax", "paid",
                 "change"):  # fmt: skip
        if name in values:
            asker.add(name, values[name], name)
    amounts = [values[f"amount{i}"].text for i, _ in rows]
    for i, count in rows:
        item = values[f"item{i}"].text
        if count == 1:
            asker.add("price", values[f"amount{i}"], f"amount{i}", category="lookup", item=item)
        else:
            asker.add("amount", values[f"amount{i}"], f"amount{i}", category="lookup", item=item)
            asker.add("count", values[f"count{i}"], f"count{i}", category="lookup", item=item)
        amount = amounts[i]
        if amounts.count(amount) == 1 and len(rows) > 1:
            asker.add("which", values[f"item{i}"], f"item{i}", category="lookup", amount=amount)
    return asker.asks


def draw(content: Content, page: Page, style: Style, unit: Number) -> None:
    """Goods to the left, amounts to the right, sums below a rule."""
    step, margin = LINE * unit, (0.5 if content.is_tiny else 1.6) * unit
    right = page.width - margin
    y = margin
    if not content.is_tiny:
        y = _draw_head(content, page, style, unit, y)
    for i, count in content.more["rows"]:
        room = right - margin
        amount = page.face.advance(content.values[f"amount{i}"].text) * unit
        item_room = room - amount - 0.6 * unit
        if not content.is_tiny:
            item_room = 0.46 * room
        page.text(margin, y, content.part(f"item{i}"), unit, room=item_room)
        if not content.is_tiny:
            page.text(margin + 0.62 * room, y, content.part(f"count{i}"), unit, align="right")
            room = 0.36 * room
        page.text(right, y, content.part(f"amount{i}"), unit, align="right", room=room)
        y += step
        if count > 1:
            each = [("  ", None), (f"{count} × ", None), *content.part(f"price{i}")]
            page.text(margin, y, each, 0.86 * unit, color=style.soft)
            y += step
    y = _draw_sums(content, page, style, unit, y + 0.2 * unit)
    if not content.is_tiny:
        y = _draw_foot(content, page, style, unit, y)
    page.height = y + margin


def _draw_head(content: Content, page: Page, style: Style, unit: Number, y: Number) -> Number:
    middle, margin = page.width / 2, 1.6 * unit
    language, room = content.language, page.width - 3.2 * unit
    page.text(middle, y, content.part("shop"), 1.7 * unit, align="center", room=room,
              face=style.heading.bold)  # fmt: skip
    y += LINE * 1.75 * unit
    for name in ("address", "phone"):
        page.text(middle, y, content.part(name), 0.9 * unit, align="center", room=room)
        y += LINE * 0.9 * unit
    y += 0.5 * unit
    when = [*content.part("date"), ("  ", None), *content.part("time")]
    page.text(margin, y, when, 0.92 * unit)
    y += LINE * unit
    label = say(LABELS["number"], language)
    gap = " " if language == "en" else ""
    page.text(margin, y, [(label + gap, None), *content.part("number")], 0.92 * unit)
    y += LINE * unit + 0.3 * unit
    y = _rule(page, style, y, unit)
    right, wide = page.width - margin, page.width - 2 * margin
    page.text(margin, y, say(LABELS["item"], language), 0.9 * unit, bold=True)
    page.text(margin + 0.62 * wide, y, say(LABELS["qty"], language), 0.9 * unit, bold=True,
              align="right")  # fmt: skip
    page.text(right, y, say(LABELS["amount"], language), 0.9 * unit, bold=True, align="right")
    return y + LINE * unit


def _rule(page: Page, style: Style, y: Number, unit: Number) -> Number:
    margin = 1.6 * unit
    if style.variant % 2:
        page.dashes(margin, y, page.width - margin, style.soft, 0.4 * unit, 1)
    else:
        page.line((margin, y, page.width - margin, y), style.soft, 1)
    return y + 0.5 * unit


def _draw_sums(content: Content, page: Page, style: Style, unit: Number, y: Number) -> Number:
    margin = (0.5 if content.is_tiny else 1.6) * unit
    right = page.width - margin
    if content.is_tiny:
        page.line((margin, y, right, y), page.ink, 1)
        y += 0.2 * unit
    else:
        y = _rule(page, style, y, unit)
    for name in ("subtotal", "discount", "tax", "total", "paid", "change"):
        if name not in content.values:
            continue
        is_total = name == "total"
        size = unit * (1.25 if is_total and not content.is_tiny else 1)
        label = say(LABELS[name], content.language)
        label = label.capitalize() if content.is_tiny else label
        page.text(margin, y, label, size, bold=is_total)
        amount = content.part(name)
        if name == "discount":
            amount = [("-", None), *amount]
        room = right - margin - page.bold.advance(label) * size - 0.4 * unit
        page.text(right, y, amount, size, bold=is_total, align="right", room=room)
        y += LINE * size
    return y


def _draw_foot(content: Content, page: Page, style: Style, unit: Number, y: Number) -> Number:
    y = _rule(page, style, y + 0.3 * unit, unit)
    thanks = say(LABELS["thanks"], content.language)
    page.text(page.width / 2, y, thanks, 0.95 * unit, align="center")
    y += LINE * unit
    if style.variant % 3 == 0:
        return y
    bars = content.more["barcode"]
    width = page.width * 0.6 / sum(bars)
    x, y = page.width * 0.2, y + 0.6 * unit
    for i, bar in enumerate(bars):
        if i % 2 == 0:
            page.rectangle((x, y, x + bar * width, y + 2.6 * unit), page.ink)
        x += bar * width
    return y + 2.8 * unit
