"""A picture of a prompt, drawn to a file while a bar shows how far it is."""

import pathlib
from collections.abc import Mapping
from typing import Any

import rich.progress
from PIL import Image

import llmprep_jax as lp


def check_ending(out: str) -> None:
    """Raises ValueError where no kind of picture is called so."""
    if pathlib.Path(out).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"out is {out}, and no kind of picture ends so; write out=picture.png")


def draw(
    model: Any, processor: Any, prompt: str, out: str, settings: Mapping[str, Any]
) -> pathlib.Path:
    """Writes the picture and returns its path.

    Args:
      out: a file with an ending that Pillow knows. settings: of `lp.generate_images`.
    """
    path = pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rich.progress.Progress(transient=True) as progress:
        task = progress.add_task("drawing", total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        (picture,) = lp.generate_images(model, processor, prompt, report=report, **settings)
    Image.fromarray(picture).save(path)
    return path
