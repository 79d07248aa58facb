"""What documents are made, and how hard they are to read."""

import dataclasses
import math
from typing import Literal

from llmprep_jax.config import settle
from llmprep_jax.data.synthetic_documents.lexicon import Language

Kind = Literal["letter", "table", "chart", "receipt", "sign", "menu"]
KINDS = ("letter", "table", "chart", "receipt", "sign", "menu")
Level = Literal["tiny", "plain", "varied"]
MIN_WIDTH, MAX_WIDTH = 48, 8192


@dataclasses.dataclass(frozen=True)
class Settings:
    """What documents are made.

    Attributes:
      kind: the kinds, in turn.
      language: the languages, in turn.
      level: "tiny": few large words in black on small square pages, asked in one way; "plain":
        whole pages, clean; "varied": fonts, colours, paper, light, slant, blur and noise differ.
      seed: other seeds, other documents.
      width: of the pictures in pixels; None: as the kind and the level have it.
      questions: at most so many a document.
      holdout: the share of documents on the held-out side, which share no question of one text and
        answer, and no page, with the others; the share of what can be asked that is theirs too.
      transcribe: also ask for all the text.
      grounding: answers name their boxes as DeepSeek-VL2 does.
      fonts: families or files in place of those found; a face of a collection is FILE.ttc:2.
      rotation: degrees of slant at most; None: the level's own, as in all that follow.
      noise: standard deviation of the grain, of 255.
      blur: radius at most, in pixels.
      color: whether there are other colours than black on white.
    """

    kind: tuple[Kind, ...] = KINDS
    language: tuple[Language, ...] = ("en", "zh-Hans", "zh-Hant")
    level: Level = "plain"
    seed: int = 0
    width: int | None = None
    questions: int = 4
    holdout: float = 0.1
    transcribe: bool = False
    grounding: bool = False
    fonts: tuple[str, ...] = ()
    rotation: float | None = None
    noise: float | None = None
    blur: float | None = None
    color: bool | None = None

    def __post_init__(self):
        settle(self)
        for name in ("kind", "language"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name one at least")
        if self.width is not None and not MIN_WIDTH <= self.width <= MAX_WIDTH:
            raise ValueError(f"width={self.width}; give {MIN_WIDTH} to {MAX_WIDTH} pixels")
        if self.questions < 1:
            raise ValueError(f"questions={self.questions}; give 1 or more")
        if not 0 <= self.holdout <= 0.5:
            raise ValueError(f"holdout={self.holdout}; give a share from 0 to 0.5")
        for name, most in (("rotation", 45), ("noise", 100), ("blur", 20)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{name}={value}; give a number from 0 to {most}")

    def kind_of(self, index: int) -> Kind:
        """Kinds come in turn, so that a small set has all of them."""
        return self.kind[index % len(self.kind)]

    def language_of(self, index: int) -> Language:
        return self.language[index // len(self.kind) % len(self.language)]

    def split_of(self, index: int) -> Literal["train", "heldout"]:
        """The side of a document: held-out ones lie evenly among the others, whatever the count."""
        return "heldout" if self._held_before(index + 1) > self._held_before(index) else "train"

    def _held_before(self, count: int) -> int:
        return math.floor(count * self.holdout + 1e-9)
