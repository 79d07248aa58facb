"""Convert a GGUF file, a run, a packed folder or a model with an adapter to a Hugging Face folder.

    python -m experiments.convert MODEL FOLDER [dtype=bfloat16] [adapter=PEFT_FOLDER] [mesh=NAME]

MODEL is a Hugging Face folder, a .gguf file, a run folder of ours or a hub id. What is written is
re-opened and its logits compared before it is put in place; llmprep_receipt.json says how they
agreed.
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
from llmprep_jax import cli
from llmprep_jax.config import UsageError, override, split_arguments
from llmprep_jax.sharding import MeshSizes


@dataclasses.dataclass(frozen=True)
class Settings:
    """dtype None keeps the stored one; the last four pack linear layers.

    mesh is a name in configs/meshes.py, or sizes, as `mesh.fsdp=4 mesh.tensor=2`: for a model that
    one device does not hold.
    """

    dtype: Literal["float32", "bfloat16", "float16", "nf4", "fp4", "int8", "fp8"] | None = None
    adapter: str | None = None
    mesh: str | MeshSizes | None = None


def main(arguments: list[str]) -> cli.Outputs:
    positional, overrides = split_arguments(arguments)
    if len(positional) != 2:
        raise UsageError("give a model and the folder to write")
    source, folder = positional
    settings = override(Settings(), overrides)
    console = rich.console.Console()
    mesh = get_mesh(settings.mesh)
    with console.status(f"loading {source}"):
        # an adapter is merged before its base is packed, so that it is rounded once
        packs = settings.adapter is not None and settings.dtype in lp.quant.KINDS
        model = lp.load_model(source, "bfloat16" if packs else settings.dtype, mesh)
        processor = lp.load_processor(source)
        if settings.adapter is not None:
            model = lp.peft.load(model, settings.adapter)
    with console.status(f"writing {folder}"):
        if lp.peft.is_adapted(model):
            model = lp.peft.merge(model)
        if packs:
            model = lp.quant.quantize_model(model, settings.dtype)
        written = lp.save_model(model, folder, processor=processor)
    return {"Hugging Face folder": pathlib.Path(written)}


if __name__ == "__main__":
    cli.run(main)
