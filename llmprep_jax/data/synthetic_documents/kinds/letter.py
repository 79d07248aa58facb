"""Letters: head, date, addressee, subject, paragraphs and signature; tiny ones are notes."""

import datetime

from llmprep_jax.data.synthetic_documents import facts, lexicon
from llmprep_jax.data.synthetic_documents.content import Asker, Content, fill
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.facts import Fact
from llmprep_jax.data.synthetic_documents.kinds.letter_topics import TOPICS
from llmprep_jax.data.synthetic_documents.lexicon import Language, say
from llmprep_jax.data.synthetic_documents.page import LINE, Number, Page
from llmprep_jax.data.synthetic_documents.style import Style

WIDTH, SIZE = 827, 19  # A4 at 100 dots an inch
PHRASES = {
    "sender": (
        "Which organisation sent the letter? | Who is the letter from?",
        "这封信是哪个单位发的？ | 寄信单位是哪个？",
        "這封信是哪個單位寄的？ | 寄信單位是哪個？",
    ),
    "to": (
        "To whom is the letter addressed? | Who is the addressee?",
        "这封信是写给谁的？ | 收信人是谁？",
        "這封信是寫給誰的？ | 收信人是誰？",
    ),
    "signer": (
        "Who signed the letter? | Whose signature is below the letter?",
        "这封信是谁署名的？ | 落款人是谁？",
        "這封信是誰署名的？ | 署名的人是誰？",
    ),
    "date": (
        "What is the date of the letter? | On which day was the letter written?",
        "这封信的日期是哪天？ | 信是哪天写的？",
        "這封信的日期是哪天？ | 信是哪天寫的？",
    ),
    "note_name": ("Who is the note for?", "便条是给谁的？", "便條是給誰的？"),
    "note_room": ("Which room is it?", "哪个房间？", "哪個房間？"),
    "note_hour": ("At what time is it?", "几点？", "幾點？"),
}
DEAR = ("Dear {to},", "尊敬的{to}：", "親愛的{to}：")
CLOSING = ("Yours sincerely,", "此致敬礼", "敬祝 平安")
TITLES = (
    ("Head of {}", "{}经理", "{}經理"),
    ("{} Office", "{}主任", "{}主任"),
)


def compose(dice: Dice, language: Language, level: str) -> Content:
    asker = Asker(dice, language, level, PHRASES)
    if level == "tiny":
        names = [name for name in lexicon.GIVEN[language] if len(name) <= 6]
        values = {
            "note_name": Fact(dice.pick(names)),
            "note_hour": facts.clock(dice, language, 8, 19),
            "note_room": Fact(f"{dice.between(1, 9)}{dice.between(1, 40):02d}"),
        }
        for name in values:
            asker.add(name, values[name], name)
        return Content("letter", language, level, values, tuple(asker.asks))
    topic = dice.pick(TOPICS)
    addressee, signer, *others = facts.people(dice, language, 3)
    title = say(dice.pick(TITLES), language).format(say(dice.pick(lexicon.DEPARTMENTS), language))
    day, way = facts.day(dice), facts.date_way(dice, level)
    values = {
        "sender": Fact(dice.pick(lexicon.COMPANIES[language])),
        "address": Fact(facts.address(dice, language)),
        "sender_phone": Fact(facts.phone(dice, language)),
        "date": facts.write_date(day, language, way),
        "to": Fact(addressee),
        "to_address": Fact(facts.address(dice, language)),
        "signer": Fact(signer),
        "title": Fact(title),
    }
    for name, make in topic.fields.items():
        if isinstance(make, tuple):
            later = day + datetime.timedelta(days=dice.between(*make))
            values[name] = facts.write_date(later, language, way)
        else:
            values[name] = make(dice, language, level)
    for name in ("clerk", "speaker", "chief", "driver"):
        if name in values:  # nobody plays two parts
            values[name] = Fact(others[0])
    asker = Asker(dice, language, level, PHRASES | topic.asks)
    for name in ("sender", "to", "signer", "date", *topic.asks):
        asker.add(name, values[name], name)
    more = {"topic": TOPICS.index(topic)}
    return Content("letter", language, level, values, tuple(asker.asks), more)


def draw(content: Content, page: Page, style: Style, unit: Number) -> None:
    """From the head to the signature, on a sheet as high as A4 or as the letter needs."""
    if content.is_tiny:
        _draw_note(content, page, unit)
        return
    topic = TOPICS[content.more["topic"]]
    language, margin = content.language, 4.2 * unit
    width = page.width - 2 * margin
    y = _draw_head(content, page, style, unit, margin)
    right = style.variant % 3 != 0
    page.text(page.width - margin if right else margin, y, content.part("date"), unit,
              align="right" if right else "left")  # fmt: skip
    y += 1.9 * unit
    for name in ("to", "to_address"):
        page.text(margin, y, content.part(name), unit, room=width)
        y += LINE * unit
    y += 1.4 * unit
    subject = fill(say(topic.subject, language), content.values)
    y = page.paragraph(margin, y, width, subject, 1.12 * unit, bold=True) + 0.9 * unit
    dear = fill(say(DEAR, language), content.values)
    y = page.paragraph(margin, y, width, dear, unit) + 0.6 * unit
    for template in say(topic.body, language).split("\n\n"):
        parts = fill(template, content.values)
        if language != "en":
            parts = [("\u3000\u3000", None), *parts]
        y = page.paragraph(margin, y, width, parts, unit, leading=1.6) + 0.7 * unit
    y += 0.8 * unit
    page.text(margin, y, say(CLOSING, language), unit)
    y += 2.2 * unit
    sign_face = style.heading.regular
    page.text(margin, y, content.part("signer"), 1.5 * unit, color=(28, 44, 120)
              if style.accent != style.ink else None, face=sign_face)  # fmt: skip
    y += 2.3 * unit
    page.line((margin, y, margin + 9 * unit, y), style.soft, 1)
    page.text(margin, y + 0.3 * unit, content.part("title"), 0.9 * unit)
    page.height = max(y + 4 * unit, page.width * 2**0.5 if style.variant % 2 else 0)


def _draw_head(content: Content, page: Page, style: Style, unit: Number, margin: Number) -> Number:
    """The sender's name and address, in one of three layouts; returns the y below."""
    look = style.variant % 3
    if look == 1:
        page.rectangle((0, 0, page.width, 0.9 * unit), style.accent)
    x, align = {0: (margin, "left"), 1: (page.width / 2, "center"), 2: (margin, "left")}[look]
    y = 2.4 * unit
    room = page.width - 2 * margin
    page.text(x, y, content.part("sender"), 1.7 * unit, align=align, room=room,
              color=style.accent, face=style.heading.bold)  # fmt: skip
    y += 2.5 * unit
    contact = [*content.part("address"), ("  ·  ", None), *content.part("sender_phone")]
    page.text(x, y, contact, 0.85 * unit, align=align, color=style.soft, room=room)
    y += 1.5 * unit
    page.line((margin, y, page.width - margin, y), style.accent, 0.1 * unit)
    return y + 1.6 * unit


def _draw_note(content: Content, page: Page, unit: Number) -> None:
    y, margin = 0.5 * unit, 0.45 * unit
    room = page.width - 2 * margin
    values = content.values
    template = say(("To {note_name}:", "给{note_name}：", "給{note_name}："), content.language)
    page.text(margin, y, fill(template, values), unit, room=room)
    y += 1.3 * LINE * unit
    place = say(("Room {note_room}", "{note_room}房间", "{note_room}房間"), content.language)
    hour = say(("at {note_hour}", "{note_hour}", "{note_hour}"), content.language)
    for template in (place, hour):
        page.text(margin, y, fill(template, values), 1.15 * unit, bold=True, room=room)
        y += LINE * 1.2 * unit
    page.height = y + margin
