"""A tiny Janus learns from nothing to draw a few shapes from captions.

    python -m experiments.drawing_study [steps=200] [vq_steps=300] [out=runs/drawing]

First the VQ autoencoder, which released models come with: on the pictures of training alone, by
their squared error. Then one picture is learnt by heart and drawn back, code by code. Then a model
learns all captions of training, a tenth of the time with none, and draws some of them, with
guidance and without; what it drew is compared, in pixels, with all pictures. Captions of new
combinations are drawn too, to see how far a hundred pictures carry. Ends with a table (drawing.md),
all numbers (drawing.json), what was drawn (drawing.png), and the model as a folder from which
`experiments.generate` draws.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.drawing_study:Settings")

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
import rich
from flax import nnx

import llmprep_jax as lp
from experiments.drawing import report
from experiments.drawing.autoencoder import train_vq
from experiments.drawing.drawer import make_drawer, train
from experiments.drawing.gallery import Gallery, captions, write_gallery
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override
from llmprep_jax.generate.images import decode, generate_codes


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the study.

    Attributes:
      vq_steps, vq_rows, vq_lr: of training the autoencoder. codes: of its codebook.
      one_steps: of learning one picture. most_loss: of its last steps, nats a code.
      steps, rows, lr: of learning all captions. guidance: that is drawn with.
      least: of captions that were learnt, the share whose own picture must be the nearest to what
        is drawn, with guidance and without. seed: of weights, rows and what is drawn.
    """

    vq_steps: int = 300
    vq_rows: int = 8
    vq_lr: float = 2e-2
    codes: int = 128
    one_steps: int = 40
    most_loss: float = 0.05
    steps: int = 200
    rows: int = 24
    lr: float = 2e-3
    guidance: float = 3.0
    seed: int = 0
    least: float = 0.7
    out: pathlib.Path = pathlib.Path("runs/drawing")  # a folder


def main(arguments: list[str]) -> cli.Outputs:
    return study(override(Settings(), only_overrides(arguments)))


def study(cfg: Settings) -> cli.Outputs:
    """Trains, draws, compares."""
    began = time.process_time()
    gallery = write_gallery(cfg.out / "pictures")
    learnt, held_out = (gallery.numbers(held_out=held) for held in (False, True))
    rich.print(f"[bold]Pictures to codes[/]: {len(learnt)} pictures, {cfg.vq_steps} steps")
    model = make_drawer(gallery.processor, cfg.seed, codes=cfg.codes)
    run = dict(steps=cfg.vq_steps, rows=cfg.vq_rows, lr=cfg.vq_lr, seed=cfg.seed)
    model.vq, errors = train_vq(model.vq, gallery.values(learnt), **run)
    results: dict[str, Any] = {"vq_errors": errors, "one": learn_one(cfg, model, gallery)}
    rich.print(f"[bold]All captions[/]: {cfg.steps} steps")
    batches = gallery.batches("train.jsonl", cfg.rows, cfg.seed, drop_prompts=0.1)
    model, results["code_losses"] = train(model, gallery.processor, batches, cfg.steps, cfg.lr)
    asked = {report.LEARNT: learnt[:: len(learnt) // len(held_out)], report.NEW: held_out}
    drawn = {which: draw(cfg, model, gallery, numbers) for which, numbers in asked.items()}
    results |= {"asked": asked, "nearest": {}, "scores": {}}
    for which, ways in drawn.items():
        nearest = {way: gallery.nearest(pictures) for way, pictures in ways.items()}
        results["nearest"][which] = nearest
        scores = {way: gallery.score(asked[which], found) for way, found in nearest.items()}
        results["scores"][which] = scores
    lp.save_model(model, cfg.out / "model", processor=gallery.processor)
    results["cpu_seconds"] = time.process_time() - began
    outputs = report.write_report(cfg, gallery, drawn[report.LEARNT], results)
    check(cfg, results)
    return {**outputs, "the model, a folder": cfg.out / "model"}


def learn_one(cfg: Settings, model: nnx.Module, gallery: Gallery) -> dict[str, Any]:
    """What comes of one picture alone: losses, and how many of its codes are drawn."""
    rich.print(f"[bold]One picture[/] by heart: {cfg.one_steps} steps")
    number = gallery.numbers(held_out=False)[0]
    model = jax.tree.map(lambda x: x.copy(), model)  # a trainer takes its model's arrays over
    batches = gallery.batches("one.jsonl", 1, cfg.seed)
    model, losses = train(model, gallery.processor, batches, cfg.one_steps, cfg.lr)
    inputs = gallery.processor.for_drawing(captions(gallery.kinds[number])[0])
    settings = dict(pad_id=gallery.processor.pad_id, guidance=1.0, temperature=0.0)
    drawn = np.asarray(generate_codes(model, **inputs, **settings))
    same = int((drawn == np.asarray(model.encode_codes(gallery.values([number])))).sum())
    rich.print(f"code_loss {losses[-1]:.4f}, {same} of {drawn.size} codes drawn back")
    return {"code_losses": losses, "same_codes": same, "codes": drawn.size}


def draw(cfg: Settings, model: nnx.Module, gallery: Gallery, numbers: list[int]) -> report.Drawn:
    """What is drawn of captions, with guidance and without, and what the codes can show at best."""
    prompts = [gallery.caption(number) for number in numbers]
    codes = model.encode_codes(gallery.values(numbers))
    drawn = {report.BEST: decode(model, codes)}
    for guidance in (1.0, cfg.guidance):
        settings = dict(guidance=guidance, seed=cfg.seed)
        pictures = lp.generate_images(model, gallery.processor, prompts, **settings)
        drawn[report.way(guidance)] = pictures
    return drawn


def check(cfg: Settings, results: dict[str, Any]) -> None:
    """That one picture is learnt by heart, and captions that were learnt are drawn."""
    one, scores = results["one"], results["scores"][report.LEARNT]
    if one["code_losses"][-1] > cfg.most_loss or one["same_codes"] < one["codes"]:
        raise RuntimeError(
            f"one picture: code_loss is {one['code_losses'][-1]}, and {one['same_codes']} of"
            f" {one['codes']} codes are drawn back; it must be {cfg.most_loss}, and all of them"
        )
    shares = {way: score["all"] for way, score in scores.items() if way != report.BEST}
    if min(shares.values()) < cfg.least:
        raise RuntimeError(f"of the captions {shares} are drawn as they say, not {cfg.least}")


if __name__ == "__main__":
    cli.run(main)
