"""Convert a GGUF file, a run, a packed folder or a model with an adapter to a Hugging Face folder.

    python -m experiments.convert MODEL FOLDER [dtype=bfloat16] [adapter=PEFT_FOLDER] [mesh=NAME]

MODEL is a Hugging Face folder, a .gguf file, a run folder of ours or a hub id. FOLDER is new, or
empty, or one that this wrote before. What is written is re-opened and its logits compared before it
is put in place; llmprep_receipt.json says how they agreed.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.convert:Settings")

import dataclasses
import pathlib
from typing import Literal

import rich.console

import llmprep_jax as lp
from configs.meshes import get_mesh
from llmprep_jax import cli, processes
from llmprep_jax.config import UsageError, override, split_arguments
from llmprep_jax.pretrained import adapter_of_run
from llmprep_jax.processes import Processes
from llmprep_jax.sharding import MeshSizes
from llmprep_jax.weights.receipt import RECEIPT

FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is written.

    Attributes:
      dtype: of the weights; None: as stored. The last four pack linear layers, an adapter's once it
        is merged.
      adapter: a PEFT folder that is merged into the model.
      ema: of a run that kept one, the running average in place of the weights.
      mesh: a name in configs/meshes.py, or sizes, as `mesh.fsdp=4 mesh.tensor=2`: for a model that
        one device does not hold.
      processes: where this process stands among several, which convert together on a mesh.
    """

    dtype: Literal["float32", "bfloat16", "float16", "nf4", "fp4", "int8", "fp8"] | None = None
    adapter: str | None = None
    ema: bool = False
    mesh: str | MeshSizes | None = None
    processes: Processes = dataclasses.field(default_factory=Processes)


def main(arguments: list[str]) -> cli.Outputs:
    positional, overrides = split_arguments(arguments)
    if len(positional) != 2:
        raise UsageError("give a model and the folder to write")
    source, folder = positional
    settings = override(Settings(), overrides)
    processes.start(settings.processes)
    processes.refuse_apart(settings.mesh)
    processes.by_one(lambda: check_output(folder))
    # an adapter is merged before its base is packed, so that it is rounded once
    adapted = settings.adapter is not None or adapter_of_run(source) is not None
    packs = adapted and settings.dtype in lp.quant.KINDS
    dtype = "bfloat16" if packs else settings.dtype
    console = rich.console.Console(quiet=not processes.is_writer())
    mesh = get_mesh(settings.mesh)
    with console.status(f"loading {source}"):
        model = lp.load_model(source, dtype=dtype, mesh=mesh, ema=settings.ema)
        processor = lp.load_processor(source)
        if settings.adapter is not None:
            model = lp.peft.load(model, settings.adapter)
    with console.status(f"writing {folder}"):
        if adapted:
            model = lp.peft.merge(model)
        if packs:
            model = lp.quant.quantize_model(model, settings.dtype)
        written = lp.save_model(model, folder, processor=processor)
    return {"Hugging Face folder": written}


def check_output(folder: str) -> None:
    """Refuses what is no folder to write a model into.

    Raises:
      UsageError: no name, or that of a file.
      ValueError: a folder with files that this command did not write.
    """
    path = pathlib.Path(folder)
    if not folder.strip():
        raise UsageError("the folder to write has no name")
    if path.suffix.lower() in FILES:
        raise UsageError(
            f"{folder} is the name of a file, and a Hugging Face folder is written; give the name"
            " of a folder"
        )
    if path.is_dir() and not (path / RECEIPT).is_file():
        names = sorted(entry.name for entry in path.iterdir())
        if names:
            raise ValueError(
                f"{folder} holds files that are no model of ours ({', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}); give a new or an empty folder"
            )


if __name__ == "__main__":
    cli.run(main)
