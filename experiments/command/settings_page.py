"""Writes docs/settings.md, the settings of all commands, from the source of their dataclasses.

python -m experiments.command.settings_page > docs/settings.md
"""

import re
from collections.abc import Iterator

from experiments.command.reference import Setting, settings_of
from experiments.command.source import ROOT

INTRODUCTION = """# Settings

What each command takes as `name=value`; `python -m experiments.COMMAND --help` prints the same.
Sections are written with dots (`optim.lr=1e-4`). A section that may be of several classes is chosen
by a name (`adapter=QLoRA`); what only some of them have is marked so. This page is made from the
code by `python -m experiments.command.settings_page`.
"""


def page() -> str:
    """The page, in Markdown."""
    parts = [INTRODUCTION]
    shown: dict[str, str] = {}
    for command, settings in commands():
        if settings in shown:
            parts.append(f"## {command}\n\nThe settings of `{shown[settings]}`.\n")
            continue
        shown[settings] = command
        rows = "\n".join(map(_row, settings_of(settings)))
        head = "| setting | type | default | meaning |\n|---|---|---|---|"
        parts.append(f"## {command}\n\n{head}\n{rows}\n")
    return "\n".join(parts)


def commands() -> Iterator[tuple[str, str]]:
    """Each command and the class of its settings; train first."""
    files = sorted((ROOT / "experiments").glob("[a-z]*.py"), key=lambda f: (f.stem != "train", f))
    for file in files:
        match = re.search(r'start\(__doc__, "([\w.:]+)"', file.read_text(encoding="utf-8"))
        if match:
            yield file.stem, match[1]


def _row(setting: Setting) -> str:
    cells = (f"`{setting.name}`", setting.kind, setting.default, setting.words)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(), end="")
