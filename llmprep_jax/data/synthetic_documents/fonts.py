"""Fonts by name, as Debian packages and others' installers put them in the folders of fontconfig.

Nothing is shipped here. Pillow carries one Latin font (Aileron), so that English runs anywhere.

Widths are measured at 1,000 pixels and scaled: at the size of a page's text FreeType rounds each
advance, differently by version, and boxes would move by a pixel from one machine to another.
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Sequence

from PIL import ImageFont

from llmprep_jax.data.synthetic_documents.lexicon import LANGUAGES, Language

MEASURED, INKED = 1000.0, 256.0  # pixels; the latter is drawn
ASCENT = 0.92  # from the top of a line's box to its baseline, of the text's size
SHIPPED = "Aileron"  # in Pillow itself


@dataclasses.dataclass(frozen=True)
class Face:
    """One face of a font file; no path: the one that Pillow ships."""

    path: str
    index: int = 0

    def at(self, size: float) -> ImageFont.FreeTypeFont:
        return _load(self, round(size, 2))

    def advance(self, text: str) -> float:
        """The width of a text at size 1."""
        return _advance(self, text)

    def ink(self, text: str) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a text's ink at size 1, from the pen on the baseline."""
        return _ink(self, text)


@dataclasses.dataclass(frozen=True)
class Family:
    """A regular and a bold face.

    Attributes:
      name: as fontconfig has it.
      style: "sans", "serif", "mono" or "script".
    """

    name: str
    style: str
    regular: Face
    bold: Face

    def face(self, bold: bool = False) -> Face:
        return self.bold if bold else self.regular


@dataclasses.dataclass(frozen=True)
class Known:
    """A family that is looked for: its files, which face of them each language takes."""

    name: str
    style: str
    regular: str
    bold: str
    faces: tuple[tuple[Language, int], ...]
    package: str


_LATIN, _HAN = (("en", 0),), (("zh-Hans", 2), ("zh-Hant", 3))
KNOWN = (
    Known("DejaVu Sans", "sans", "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", _LATIN,
          "fonts-dejavu-core"),
    Known("DejaVu Serif", "serif", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", _LATIN,
          "fonts-dejavu-core"),
    Known("DejaVu Sans Mono", "mono", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", _LATIN,
          "fonts-dejavu-core"),
    Known("Liberation Sans", "sans", "LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf",
          _LATIN, "fonts-liberation"),
    Known("Liberation Serif", "serif", "LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf",
          _LATIN, "fonts-liberation"),
    Known("Liberation Mono", "mono", "LiberationMono-Regular.ttf", "LiberationMono-Bold.ttf",
          _LATIN, "fonts-liberation"),
    Known("Lato", "sans", "Lato-Regular.ttf", "Lato-Bold.ttf", _LATIN, "fonts-lato"),
    Known("Noto Sans CJK", "sans", "NotoSansCJK-Regular.ttc", "NotoSansCJK-Bold.ttc", _HAN,
          "fonts-noto-cjk"),
    Known("Noto Serif CJK", "serif", "NotoSerifCJK-Regular.ttc", "NotoSerifCJK-Bold.ttc", _HAN,
          "fonts-noto-cjk"),
    Known("WenQuanYi Micro Hei", "sans", "wqy-microhei.ttc", "wqy-microhei.ttc",
          (("zh-Hans", 0), ("zh-Hant", 0)), "fonts-wqy-microhei"),
    Known("AR PL UKai", "script", "ukai.ttc", "ukai.ttc", (("zh-Hans", 0), ("zh-Hant", 2)),
          "fonts-arphic-ukai"),
)  # fmt: skip


def find_families(language: Language, wanted: Sequence[str] = ()) -> tuple[Family, ...]:
    """The families to write a language with, in the order of `KNOWN`.

    Args:
      wanted: names or files in place of all that are found; a face of a collection is FILE.ttc:2.

    Raises:
      ValueError: there is none; says which package has one.
    """
    if wanted:
        families = [_wanted(language, name) for name in wanted]
        return tuple(family for family in families if family is not None) or _none(language)
    found = (_find(known, language) for known in KNOWN)
    families = [family for family in found if family is not None]
    if language == "en":
        families.append(_shipped())
    return tuple(families) or _none(language)


def _wanted(language: Language, name: str) -> Family | None:
    """A family by its name or file; None where it is one of another language."""
    if name == SHIPPED:
        return _shipped() if language == "en" else None
    named = [known for known in KNOWN if known.name == name]
    if named:
        if language not in dict(named[0].faces):
            return None
        family = _find(named[0], language)
        if family is None:
            raise ValueError(f"no font {name} is installed; apt-get install {named[0].package}")
        return family
    path, _, index = name.rpartition(":")
    if not (path and index.isdecimal()):
        path, index = name, "0"
    if not pathlib.Path(path).expanduser().is_file():
        names = ", ".join([*(known.name for known in KNOWN), SHIPPED])
        raise ValueError(f"no font {name}; give a file, or one of {names}")
    face = Face(str(pathlib.Path(path).expanduser()), int(index))
    try:
        face.at(MEASURED)
    except OSError as error:
        raise ValueError(f"{name} is no font that can be read: {error}") from None
    return Family(pathlib.Path(path).stem, "sans", face, face)


def _none(language: Language) -> tuple[Family, ...]:
    package = "fonts-dejavu-core" if language == "en" else "fonts-noto-cjk"
    raise ValueError(
        f"no font for language {language} is installed; apt-get install {package}, or give"
        " fonts=FILE"
    )


def _shipped() -> Family:
    return Family(SHIPPED, "sans", Face(""), Face(""))


def _find(known: Known, language: Language) -> Family | None:
    index = dict(known.faces).get(language)
    paths = [_files().get(name) for name in (known.regular, known.bold)]
    if index is None or paths[0] is None:
        return None
    regular = Face(paths[0], index)
    return Family(known.name, known.style, regular, Face(paths[1], index) if paths[1] else regular)


@functools.cache
def _files() -> dict[str, str]:
    """All font files by name; of several the one whose folder comes first."""
    found: dict[str, str] = {}
    for folder in _folders():
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.suffix.lower() in (".ttf", ".ttc", ".otf"):
                found.setdefault(path.name, str(path))
    return found


def _folders() -> list[pathlib.Path]:
    """Where fontconfig looks, macOS's folders, and what matplotlib ships (DejaVu)."""
    home = pathlib.Path.home()
    data = os.environ.get("XDG_DATA_HOME") or home / ".local" / "share"
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    folders = [pathlib.Path(data) / "fonts", home / ".fonts", home / "Library" / "Fonts"]
    folders += [pathlib.Path(folder) / "fonts" for folder in shared.split(":")]
    folders += [pathlib.Path("/Library/Fonts")]
    folders += [pathlib.Path(entry) / "matplotlib/mpl-data/fonts/ttf" for entry in sys.path]
    return folders


@functools.lru_cache(maxsize=256)
def _load(face: Face, size: float) -> ImageFont.FreeTypeFont:
    if not face.path:
        return ImageFont.load_default(size).font_variant(layout_engine=ImageFont.Layout.BASIC)
    return ImageFont.truetype(
        face.path, size, index=face.index, layout_engine=ImageFont.Layout.BASIC
    )


@functools.lru_cache(maxsize=65536)
def _advance(face: Face, text: str) -> float:
    return face.at(MEASURED).getlength(text) / MEASURED


@functools.lru_cache(maxsize=65536)
def _ink(face: Face, text: str) -> tuple[float, float, float, float]:
    # `getbbox` takes in the blank that the last letter has to its right
    mask, (x, y) = face.at(INKED).getmask2(text, "L", anchor="ls")
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    return (x + left) / INKED, (y + top) / INKED, (x + right) / INKED, (y + bottom) / INKED


def families_by_language(wanted: Sequence[str]) -> dict[Language, tuple[Family, ...]]:
    """The families of every language that can be written, for a record of the font set."""
    found = {}
    for language in LANGUAGES:
        try:
            found[language] = find_families(language, wanted)
        except ValueError:
            continue
    return found
