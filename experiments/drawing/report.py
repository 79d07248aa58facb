"""What `drawing_study` ends with: a table, numbers, and pictures of what was drawn."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.drawing.gallery import ASPECTS, CHOICES, Gallery
from experiments.seeing.pictures import (
    CROP,
    GAP,
    INK,
    MARGIN,
    RIGHT,
    SIZE,
    SOFT,
    WRONG,
    Sheet,
    enlarged,
)
from experiments.study.report import table, write_numbers
from llmprep_jax import cli

Drawn = Mapping[str, np.ndarray]  # pictures [B, H, W, 3] by how they came about
BEST = "its codes"
LEARNT, NEW = "learnt", "new combinations"
PLAIN = (214, 218, 224)  # the frame of what is no answer
COLUMN, STEP = 190, CROP + 3 * GAP  # pixels across a caption, and from a picture to the next


def way(guidance: float) -> str:
    return f"guidance {guidance:g}"


def write_report(
    cfg: Any, gallery: Gallery, drawn: Drawn, results: Mapping[str, Any]
) -> cli.Outputs:
    """Writes drawing.json, drawing.md and drawing.png."""
    chance = {aspect: 1 / len(kinds) for aspect, kinds in zip(ASPECTS, CHOICES, strict=True)}
    scores = {
        (which, way): score
        for which, ways in results["scores"].items()
        for way, score in ways.items()
    }
    scores["any", "by chance"] = {"all": 1 / len(gallery.kinds), **chance}
    rows = [
        [*names, *(f"{score[aspect]:.3f}" for aspect in ("all", *ASPECTS))]
        for names, score in scores.items()
    ]
    columns = ["captions", "pictures", "nearest is the caption's", *(f"its {x}" for x in ASPECTS)]
    text, one, count = table(columns, rows), results["one"], len(results["asked"][NEW])
    text += (
        f"\n{count} captions of each kind, {len(gallery.kinds)} pictures to be the nearest. One"
        f" picture by heart: code_loss {one['code_losses'][-1]:.4f}, {one['same_codes']} of"
        f" {one['codes']} codes drawn back. {results['cpu_seconds']:.0f} CPU-seconds.\n"
    )
    (cfg.out / "drawing.md").write_text(text)
    write_numbers(cfg.out / "drawing.json", cfg, results)
    sheet = drawing_sheet(gallery, results["asked"][LEARNT], drawn, results["nearest"][LEARNT])
    sheet.drawn().save(cfg.out / "drawing.png", optimize=True)
    names = {"table": "drawing.md", "numbers": "drawing.json", "pictures": "drawing.png"}
    return {name: cfg.out / file for name, file in names.items()}


def drawing_sheet(
    gallery: Gallery,
    numbers: Sequence[int],
    drawn: Drawn,
    nearest: Mapping[str, Sequence[int]],
    *,
    count: int = 12,
) -> Sheet:
    """Captions, their true pictures and what was drawn of them, in two halves side by side; frames
    are green where the nearest picture is the caption's, red where it is another."""
    names = ("the picture", *drawn)
    half = COLUMN + len(names) * STEP
    sheet = Sheet(2 * MARGIN + 2 * half + 2 * MARGIN)
    sheet.text(MARGIN, MARGIN, "Captions, their pictures, and what is drawn of them", 22, bold=True)
    chosen = choose(gallery, numbers, count)
    lines = -(-len(chosen) // 2)
    top = MARGIN + 44
    for side in range(2):
        left = MARGIN + side * (half + 2 * MARGIN)
        sheet.text(left, top, "caption", SIZE, bold=True, color=SOFT)
        for place, name in enumerate(names):
            x = left + COLUMN + place * STEP
            sheet.text(x, top, name, SIZE - 2, bold=True, color=SOFT, room=STEP - GAP)
        for line, i in enumerate(chosen[side * lines : (side + 1) * lines]):
            number, y = numbers[i], top + 34 + line * STEP
            room = COLUMN - 2 * GAP
            sheet.paragraph(left, y + 8, room, gallery.caption(number), SIZE, color=INK)
            sheet.picture(left + COLUMN, y, enlarged(gallery.pictures[number]), PLAIN)
            for place, (name, pictures) in enumerate(drawn.items(), start=1):
                frame = RIGHT if nearest[name][i] == number else WRONG
                x = left + COLUMN + place * STEP
                sheet.picture(x, y, enlarged(pictures[i]), frame)
    sheet.height = top + 34 + lines * STEP + MARGIN - 3 * GAP
    return sheet


def choose(gallery: Gallery, numbers: Sequence[int], count: int) -> list[int]:
    """Places of so many numbers, from all over: shapes come one after another."""
    places = np.linspace(0, len(numbers) - 1, min(count, len(numbers)))
    return [int(place) for place in places.round()]
