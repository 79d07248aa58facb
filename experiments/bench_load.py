"""Loading speed: us, transformers and safetensors, in turn in one run on the same float32 folder.

    python -m experiments.bench_load [model=FILE.gguf] [rounds=7] [out=FILE.json]

The folder is SmolLM2-135M-Instruct's, or that of `model=` any GGUF file, written for the run and
therefore in the page cache; each call loads all of it into arrays on the device. transformers keeps
the file mapped and reads it when it is used, so its weights are summed here, and those of
safetensors too; ours are, in their place, waited for.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_load:Settings", compile_cache=False)

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from configs.data.shipped import find_smollm2
from experiments.bench_generate import write_folder
from experiments.study import contest
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override


@dataclasses.dataclass(frozen=True)
class Settings:
    """`rounds` timed calls of each contender."""

    model: str | None = None  # None: SmolLM2-135M-Instruct
    rounds: int = 7  # timed calls of each contender
    out: pathlib.Path | None = None  # a JSON file for the numbers


def ours(folder: str) -> Callable[[], Any]:
    import jax

    import llmprep_jax as lp

    return lambda: jax.block_until_ready(jax.tree.leaves(lp.load_model(folder)))


def transformers(folder: str) -> Callable[[], Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def call():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return [parameter.sum() for parameter in loaded.parameters()]

    return call


def safetensors(folder: str) -> Callable[[], Any]:
    from safetensors.numpy import load_file

    path = pathlib.Path(folder) / "model.safetensors"
    return lambda: [array.sum() for array in load_file(path).values()]


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(settings.model or find_smollm2(), pathlib.Path(temporary) / "float32")
        size = sum(file.stat().st_size for file in pathlib.Path(folder).glob("*.safetensors")) / 1e6
        makers = {"ours": ours, "transformers": transformers, "safetensors": safetensors}
        contenders = {name: (make, dict(folder=folder)) for name, make in makers.items()}
        scores = contest.compete(contenders, rounds=settings.rounds)
    return contest.report(settings.out, f"loading {size:.0f} MB of float32", size, scores, "MB")


if __name__ == "__main__":
    cli.run(main)
