"""What a document says before it is drawn: facts, and questions with their answers.

The side of a page, training or held out, is decided by a hash of what it states, and that of a
question by a hash of its text and answer, as in `data/documents.py`: sets of other seeds, counts
and kinds share neither between their sides.
"""

import dataclasses
import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.facts import Fact
from llmprep_jax.data.synthetic_documents.lexicon import Language, Trio, say

Part = tuple[str, str | None]  # a text and the name of the field that it states
Parts = str | Sequence[Part]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A question to a document.

    Attributes:
      text: the question.
      answers: those that are right, the first as it stands on the page.
      fields: names of the fields that state the answer; none where it is worked out.
      category: "extract", "lookup", "compare", "count" or "compute".
    """

    text: str
    answers: tuple[str, ...]
    fields: tuple[str, ...]
    category: str


@dataclasses.dataclass(frozen=True)
class Content:
    """What a kind composes: `values` by field name, rows, whatever else it draws, and questions."""

    kind: str
    language: Language
    level: str
    values: Mapping[str, Fact]
    asks: tuple[Ask, ...]
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def part(self, name: str) -> list[Part]:
        """The text of a field, marked as such."""
        return [(self.values[name].text, name)]

    @property
    def is_tiny(self) -> bool:
        return self.level == "tiny"


def fill(template: str, values: Mapping[str, Fact]) -> list[Part]:
    """A template's text with its fields filled and marked: "Pay {amount}." """
    parts: list[Part] = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts += [(literal, None)] if literal else []
        parts += [(values[name].text, name)] if name else []
    return parts


class Asker:
    """Collects the questions of a document.

    Args:
      dice: chooses among the ways of asking.
      language: of the questions.
      level: "tiny" pages are always asked in the first way.
      phrases: by name, trios of ways of asking, parted by bars.
    """

    def __init__(self, dice: Dice, language: Language, level: str, phrases: Mapping[str, Trio]):
        self._dice, self._language, self._level = dice, language, level
        self._phrases = phrases
        self.asks: list[Ask] = []

    def add(
        self,
        phrase: str,
        answer: Fact | str,
        *fields: str,
        category: str = "extract",
        **words: str,
    ) -> None:
        ways = [way.strip() for way in say(self._phrases[phrase], self._language).split("|")]
        way = ways[0] if self._level == "tiny" else self._dice.pick(ways)
        answers = answer.answers if isinstance(answer, Fact) else (answer,)
        self.asks.append(Ask(way.format(**words), answers, fields, category))


def is_held_out(text: str, share: float) -> bool:
    """Whether a text lies on the held-out side: its hash is among the lowest `share` of all."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
    return number < int(share * 2.0**64)


def asks_of_side(content: Content, split: str, share: float) -> list[Ask]:
    """The questions that lie on a side, none where the page itself does not.

    Where nothing is held out, all lie on every side.
    """
    if not share:
        return list(content.asks)
    texts = {name: fact.text for name, fact in content.values.items()}
    page = json.dumps([content.kind, content.language, texts])
    if is_held_out(page, share) != (split == "heldout"):
        return []
    return [
        ask
        for ask in content.asks
        if is_held_out(f"{ask.text}\n{ask.answers[0]}", share) == (split == "heldout")
    ]
