"""Makers of what documents state: people, addresses, codes, dates, hours and sums of money.

Sums are whole numbers of the currency's smallest unit until they are written, so that rows add up
to their totals to the cent. Each way of writing knows what else counts as the same answer.
"""

import dataclasses
import datetime

from llmprep_jax.data.synthetic_documents import lexicon
from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.lexicon import Language, say


@dataclasses.dataclass(frozen=True)
class Fact:
    """A text as it stands on a page, and the other texts that are right answers too."""

    text: str
    others: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.text, *self.others)))


@dataclasses.dataclass(frozen=True)
class Currency:
    """How sums are written.

    Attributes:
      sign: before the number.
      suffix: after it.
      decimals: digits after the point.
      rate: smallest units for a US cent.
      step: prices are multiples of so many smallest units.
    """

    sign: str
    suffix: str
    decimals: int
    rate: float
    step: int

    def price(self, cents: int, dice: Dice) -> int:
        """A price near so many US cents, in smallest units."""
        amount = cents * self.rate * dice.uniform(0.6, 1.5)
        return max(1, round(amount / self.step)) * self.step

    def write(self, amount: int) -> Fact:
        """A sum: `$1,240.50`."""
        value = f"{amount / 10**self.decimals:,.{self.decimals}f}"
        plain = value.replace(",", "")
        other = (f"{plain}元", f"{self.sign}{plain}{self.suffix}") if self.is_chinese else ()
        return Fact(f"{self.sign}{value}{self.suffix}", (value, plain, *other))

    @property
    def is_chinese(self) -> bool:
        return self.suffix == "元" or self.sign in ("¥", "NT$", "HK$")


CURRENCIES: dict[Language, tuple[Currency, ...]] = {
    "en": (
        Currency("$", "", 2, 1.0, 5),
        Currency("GBP ", "", 2, 0.8, 5),
        Currency("EUR ", "", 2, 0.9, 5),
    ),
    "zh-Hans": (Currency("¥", "", 2, 7.0, 50), Currency("", "元", 2, 7.0, 50)),
    "zh-Hant": (Currency("NT$", "", 0, 0.3, 5), Currency("HK$", "", 2, 7.8, 50)),
}
# whole numbers, which small pages have room for
SMALL_CURRENCIES = {
    "en": Currency("$", "", 0, 0.02, 1),
    "zh-Hans": Currency("¥", "", 0, 0.07, 1),
    "zh-Hant": Currency("$", "", 0, 0.3, 5),
}


def currency(dice: Dice, language: Language, level: str) -> Currency:
    """The usual one of a language, or one of several where pages vary."""
    if level == "tiny":
        return SMALL_CURRENCIES[language]
    usual = CURRENCIES[language]
    return dice.pick(usual) if level == "varied" else usual[0]


def person(dice: Dice, language: Language) -> str:
    given, surname = dice.pick(lexicon.GIVEN[language]), dice.pick(lexicon.SURNAMES[language])
    return f"{given} {surname}" if language == "en" else surname + given


def people(dice: Dice, language: Language, count: int) -> list[str]:
    """`count` unlike names; no given name and no surname occurs twice."""
    given = dice.sample(lexicon.GIVEN[language], count)
    surnames = dice.sample(lexicon.SURNAMES[language], count)
    if language == "en":
        return [f"{g} {s}" for g, s in zip(given, surnames, strict=True)]
    return [s + g for g, s in zip(given, surnames, strict=True)]


def address(dice: Dice, language: Language) -> str:
    street, city = dice.pick(lexicon.STREETS[language]), dice.pick(lexicon.CITIES[language])
    number = dice.between(1, 280)
    if language == "en":
        return f"{number} {street}, {city}"
    town = "" if city in ("香港", "澳門") else "市"
    return f"{city}{town}{street}{number}{say(('', '号', '號'), language)}"


def phone(dice: Dice, language: Language) -> str:
    """A number that nobody has: 555 in English, codes that are not given out in Chinese."""
    last = f"{dice.below(10_000):04d}"
    if language == "en":
        return f"({dice.between(201, 989)}) 555-{last}"
    if language == "zh-Hans":
        return f"0{dice.between(10, 99)}0-555{dice.below(10)}-{last}"
    return f"0{dice.between(2, 8)}-555{dice.below(10)}-{last}"


def code(dice: Dice, letters: str) -> str:
    """A number of an invoice or a parcel: `INV-20417`."""
    return f"{letters}-{dice.between(10_000, 99_999)}"


def day(dice: Dice) -> datetime.date:
    """A day of the years 2021 to 2026."""
    return datetime.date(dice.between(2021, 2026), dice.between(1, 12), dice.between(1, 28))


def date_way(dice: Dice, level: str) -> int:
    """Which way of writing days a document follows: the usual one, or any where pages vary."""
    return dice.below(4) if level == "varied" else 0


def write_date(date: datetime.date, language: Language, way: int = 0) -> Fact:
    """A day: `March 14, 2026`, `2026年3月14日`, `民國115年3月14日`."""
    year, month, number = date.year, date.month, date.day
    if language == "en":
        name = lexicon.MONTHS[month - 1][0]
        ways = (f"{name} {number}, {year}", f"{number} {name} {year}",
                f"{month:02d}/{number:02d}/{year}")  # fmt: skip
    else:
        ways = (f"{year}年{month}月{number}日", f"{year}年{month:02d}月{number:02d}日",
                date.isoformat())  # fmt: skip
        if language == "zh-Hant":
            ways += (f"民國{year - 1911}年{month}月{number}日",)
    return Fact(ways[way % len(ways)], (*ways[:2], date.isoformat()))


def clock(dice: Dice, language: Language, first: int = 8, last: int = 20) -> Fact:
    """An hour of the day at a multiple of five minutes."""
    hour, minute = dice.between(first, last), 5 * dice.below(12)
    return Fact(f"{hour}:{minute:02d}", (f"{hour:02d}:{minute:02d}",))


def quantity(value: int, trio: tuple[str, str, str], language: Language) -> Fact:
    """A number with its unit: `34 km`."""
    unit = say(trio, language)
    return Fact(f"{value:,} {unit}".rstrip(), (f"{value:,}", str(value), f"{value}{unit}"))
