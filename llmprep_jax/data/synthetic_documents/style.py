"""How a document looks, apart from what it says: faces, colours, and what befell the paper."""

import dataclasses
from collections.abc import Sequence

from llmprep_jax.data.synthetic_documents.dice import Dice
from llmprep_jax.data.synthetic_documents.fonts import Family
from llmprep_jax.data.synthetic_documents.page import Color
from llmprep_jax.data.synthetic_documents.settings import Settings

BLACK: Color = (20, 20, 20)
WHITE: Color = (255, 255, 255)
# dark enough for white text on them, and for them on white
ACCENTS: tuple[Color, ...] = (
    (24, 78, 142),
    (150, 36, 44),
    (24, 104, 70),
    (92, 52, 128),
    (168, 84, 18),
    (36, 104, 118),
    (60, 64, 72),
)
INKS: tuple[Color, ...] = (BLACK, (16, 24, 60), (50, 40, 34), (40, 40, 44))
PAPERS: tuple[Color, ...] = (
    WHITE,
    (252, 250, 244),
    (247, 241, 226),
    (242, 244, 248),
    (240, 247, 240),
)
CONDITIONS = {  # rotation in degrees, noise of 255, blur in pixels
    "tiny": (0.0, 0.0, 0.0),
    "plain": (0.0, 0.0, 0.0),
    "varied": (2.5, 7.0, 0.7),
}


@dataclasses.dataclass(frozen=True)
class Style:
    """A document's look.

    Attributes:
      body, heading: families.
      ink, paper, accent: colours.
      tint: a pale form of the accent, for bands.
      size: of body text in the page's pixels, relative to the kind's own.
      variant: which of a kind's layouts, where it has several.
      rotation, noise, blur: what befell the paper; `tilt` is perspective.
      is_photo: lies on a desk, or hangs on a wall, in uneven light.
    """

    body: Family
    heading: Family
    ink: Color = BLACK
    paper: Color = WHITE
    accent: Color = ACCENTS[0]
    size: float = 1.0
    variant: int = 0
    rotation: float = 0.0
    noise: float = 0.0
    blur: float = 0.0
    tilt: float = 0.0
    is_photo: bool = False

    @property
    def tint(self) -> Color:
        return mix(self.accent, self.paper, 0.88)

    @property
    def soft(self) -> Color:
        """Of thin rules and of what is less important."""
        return mix(self.ink, self.paper, 0.42)


def mix(a: Color, b: Color, share: float) -> Color:
    """Colour `a` with a share of `b`."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def choose_style(settings: Settings, families: Sequence[Family], dice: Dice, kind: str) -> Style:
    """A look for a document; plain ones take the first fonts, black and white."""
    varied = settings.level == "varied"
    colored = settings.level != "tiny" if settings.color is None else settings.color
    rotation, noise, blur = (
        own if given is None else given
        for own, given in zip(
            CONDITIONS[settings.level],
            (settings.rotation, settings.noise, settings.blur),
            strict=True,
        )
    )
    body, heading = _choose_families(families, dice, kind, varied)
    style = Style(
        body,
        heading,
        accent=dice.pick(ACCENTS) if colored else BLACK,
        rotation=dice.uniform(-rotation, rotation),
        noise=noise * (dice.uniform(0.2, 1.0) if settings.noise is None else 1),
        blur=blur * dice.uniform(0.0, 1.0),
        variant=dice.below(12) if settings.level != "tiny" else 0,
    )
    if not varied:
        return style
    return dataclasses.replace(
        style,
        ink=dice.pick(INKS) if colored else BLACK,
        paper=dice.pick(PAPERS) if colored else WHITE,
        size=dice.uniform(0.92, 1.12),
        tilt=dice.uniform(0.0, 0.02) if settings.rotation is None else 0.0,
        is_photo=settings.noise is None and dice.chance(0.5),
    )


def _choose_families(
    families: Sequence[Family], dice: Dice, kind: str, varied: bool
) -> tuple[Family, Family]:
    """Of the body and of headings: receipts are printed by machines, letters seldom are."""
    if not varied:
        return families[0], families[0]
    mono = [family for family in families if family.style == "mono"]
    prose = [family for family in families if family.style != "mono"]
    if kind == "receipt" and mono and dice.chance(0.5):
        family = dice.pick(mono)
        return family, family
    body = dice.pick(prose or families)
    return body, dice.pick(prose or families) if dice.chance(0.3) else body
