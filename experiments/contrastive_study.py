"""A small CLIP and a small SigLIP, trained on real photographs: do held-out pairs find each other?

    python -m experiments.contrastive_study [steps=200] [seeds=3] [out=runs/contrastive]

Pairs are crops of seventeen photographs that scikit-image and scikit-learn ship, and captions that
say which photograph it is, which part of it, whether mirrored, in which colours and how near. A
fifth of all such combinations are never trained on; on these, each crop is to find its caption
among all of theirs, and each caption its crop. Ends with a table (contrastive.md), all numbers
(contrastive.json), the curves, and what the first seed's models find (clip.png, siglip.png).
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.contrastive_study:Settings")

import dataclasses
import pathlib
import time
from typing import Any

import numpy as np
import rich

from experiments.seeing.photographs import find_photographs, scenes_of
from experiments.seeing.pictures import retrieval_sheet
from experiments.seeing.towers import Album, Kind, Words, make_model, meet, train
from experiments.study.report import draw_curves, spread, table, write_numbers
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override

TITLES = {"clip": "A small CLIP", "siglip": "A small SigLIP"}
WAYS = {"image_to_text": "crop to caption", "text_to_image": "caption to crop"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Attributes:
      kinds: the models. steps: of training each. rows: pairs of a batch. seeds: runs of each kind.
      least: R@1 that each run must reach both ways, as a multiple of chance; 0: none.
    """

    kinds: tuple[Kind, ...] = ("clip", "siglip")
    steps: int = 200
    rows: int = 128
    seeds: int = 3
    least: float = 20.0
    out: pathlib.Path = pathlib.Path("runs/contrastive")  # a folder


def main(arguments: list[str]) -> cli.Outputs:
    return study_all(override(Settings(), only_overrides(arguments)))


def study_all(cfg: Settings) -> cli.Outputs:
    """All kinds and seeds."""
    cfg.out.mkdir(parents=True, exist_ok=True)
    album = open_album()
    results: dict[str, Any] = {"scenes": len(album.scenes), "held_out": len(album.held_out)}
    for kind in cfg.kinds:
        results[kind] = [study(cfg, kind, album, seed) for seed in range(cfg.seeds)]
    return write_report(cfg, results)


def open_album() -> Album:
    """All photographs, scenes and words."""
    photographs = find_photographs()
    scenes = scenes_of(photographs)
    return Album(photographs, scenes, Words([scene.caption for scene in scenes]))


def study(cfg: Settings, kind: Kind, album: Album, seed: int) -> dict[str, Any]:
    """Trains a model and tests it on held-out scenes before and after."""
    began = time.process_time()
    model = make_model(kind, album.words.size, seed)
    before = meet(model, album)
    model, losses = train(model, kind, album, cfg.steps, cfg.rows, seed)
    after = meet(model, album)
    if seed == 0:
        retrieval_sheet(before, after, title=TITLES[kind]).drawn().save(cfg.out / f"{kind}.png")
    result = {"losses": losses, "cpu_seconds": time.process_time() - began}
    for name, tested in (("before", before), ("after", after)):
        result[name] = {way: getattr(tested.recall, way) for way in WAYS}
    found = {words: result["after"][way][1] for way, words in WAYS.items()}
    rich.print(f"{kind}, seed {seed}: " + ", ".join(f"{w}: R@1 {r:.3f}" for w, r in found.items()))
    least = cfg.least / len(album.held_out)
    if min(found.values()) < least:
        raise RuntimeError(f"{kind}, seed {seed}: R@1 of {found}, and it must be {least:.3f}")
    return result


def write_report(cfg: Settings, results: dict[str, Any]) -> cli.Outputs:
    """Writes the table, the numbers and the curves."""
    count, rows = results["held_out"], []
    for kind in cfg.kinds:
        for way, words in WAYS.items():
            cells = [
                spread([run[when][way][k] for run in results[kind]])
                for k in (1, 5)
                for when in ("before", "after")
            ]
            rows.append([kind, words, *cells])
    names = ["R@1 before", "R@1 after", "R@5 before", "R@5 after"]
    chance = f"By chance R@1 is {1 / count:.3f} and R@5 {5 / count:.3f}: {count} held-out pairs."
    text = f"{table(['model', 'from', *names], rows)}\n{chance}\n"
    (cfg.out / "contrastive.md").write_text(text)
    write_numbers(cfg.out / "contrastive.json", cfg, results)
    losses = {kind: [np.array(run["losses"]) for run in results[kind]] for kind in cfg.kinds}
    draw_curves(cfg.out / "curves.png", losses, "loss")
    outputs = {"table": "contrastive.md", "numbers": "contrastive.json", "curves": "curves.png"}
    outputs |= {f"what {kind} finds": f"{kind}.png" for kind in cfg.kinds}
    return {name: cfg.out / file for name, file in outputs.items()}


if __name__ == "__main__":
    cli.run(main)
