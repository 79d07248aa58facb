"""Measure the perplexity of a model on a text.

    python -m experiments.evaluate MODEL DATA [a.b=c ...]
    python -m experiments.evaluate runs/mine/merged held_out.jsonl data.seq_len=512 dtype=bfloat16
    python -m experiments.evaluate MODEL DATA adapter=runs/mine/adapter out=after.json

MODEL is a folder, a .gguf file, a run of ours or a hub id; DATA a file, a folder or a pattern.
Prints nats a token and perplexity, and writes them with the settings to the JSON file `out`; where
none is given, to perplexity-DATA.json beside the model, or in the working folder where the model is
no folder. A result under other settings stays: the new one gets a number.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.evaluate:EvaluateConfig")

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Literal

import rich.console

import llmprep_jax as lp
from configs.meshes import get_mesh
from llmprep_jax import data, processes
from llmprep_jax.cli import Outputs, run
from llmprep_jax.config import UsageError, override, print_config, split_arguments, to_dict
from llmprep_jax.evaluate.perplexity import perplexity
from llmprep_jax.pretrained import Dtype
from llmprep_jax.processes import Processes
from llmprep_jax.remote import AnyPath, as_path, write_text
from llmprep_jax.runs import pixels_of
from llmprep_jax.sharding import MeshSizes, use_mesh
from llmprep_jax.train.batches import own_rows

console = rich.console.Console()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on what.

    Attributes:
      model: given as MODEL. data: data.paths is given as DATA; data.mask chooses what counts in
        conversations.
      split: which part, where data.holdout is set.
      adapter: a PEFT folder put on the model.
      ema: of a run that kept one, the running average in place of the weights.
      tokenizer: where the tokenizer comes from; None: from where the model does.
      dtype: of weights and activations, or a packed kind, as of `load_model`; None: as stored.
      mesh: a name in configs/meshes.py, or sizes, as `mesh.fsdp=4 mesh.tensor=2`.
      max_batches: at most so many; None: all.
      processes: where this process stands among several; as of experiments.train.
      out: the JSON file; None: beside the model.
    """

    model: str
    data: data.DataConfig
    split: Literal["train", "heldout", "all"] = "all"
    adapter: str | None = None
    ema: bool = False
    tokenizer: str | None = None
    dtype: Dtype | None = None
    mesh: str | MeshSizes | None = None
    max_batches: int | None = None
    processes: Processes = dataclasses.field(default_factory=Processes)
    out: AnyPath | None = None


def main(arguments: list[str]) -> Outputs:
    given, overrides = split_arguments(arguments)
    if len(given) != 2:
        raise UsageError(f"give a model and a data file, not {len(given)} arguments")
    cfg = EvaluateConfig(model=given[0], data=data.DataConfig(paths=(given[1],)))
    cfg = override(cfg, overrides)
    cfg = dataclasses.replace(cfg, data=cfg.data.pinned())
    processes.start(cfg.processes)
    console.quiet = not processes.is_writer()
    print_config(cfg, console)
    processes.refuse_apart(cfg.mesh)
    with use_mesh(get_mesh(cfg.mesh)):
        measured = measure(cfg)
    console.print(
        f"{measured.nll:.4f} nats a token, perplexity {measured.perplexity:,.3f} over "
        f"{measured.tokens:,} tokens"
    )
    settings = {name: value for name, value in to_dict(cfg).items() if name != "processes"}
    result = {**measured._asdict(), "settings": settings}
    path = processes.by_one(lambda: write(cfg, result))
    return {"result": as_path(path)}


def write(cfg: EvaluateConfig, result: dict) -> str:
    """Writes a result and tells where."""
    paths = [cfg.out] if cfg.out is not None else free_paths(cfg)
    path = next(path for path in paths if path == cfg.out or is_free(path, result["settings"]))
    write_text(path, json.dumps(result, indent=2) + "\n")
    return str(path)


def free_paths(cfg: EvaluateConfig) -> Iterator[pathlib.Path]:
    """Where a result may lie: beside the model, by the name of the data, then with a number."""
    model, stem = pathlib.Path(cfg.model).expanduser(), pathlib.Path(cfg.data.paths[0]).stem
    folder = model if model.is_dir() else pathlib.Path()
    yield folder / f"perplexity-{stem}.json"
    yield from (folder / f"perplexity-{stem}-{number}.json" for number in itertools.count(2))


def is_free(path: pathlib.Path, settings: dict) -> bool:
    """Whether nothing lies there, or a result of the same settings."""
    try:
        return json.loads(path.read_text()).get("settings") == json.loads(json.dumps(settings))
    except FileNotFoundError:
        return True
    except ValueError:
        return False


def measure(cfg: EvaluateConfig):
    """Loads model and data and evaluates one on the other."""
    mesh = get_mesh(cfg.mesh)
    processor = lp.load_processor(cfg.tokenizer or cfg.model)
    tokenizer = processor.tokenizer
    batches = data.evaluation_batches(
        cfg.data,
        **cfg.data.encoders(tokenizer, processor),
        rows=own_rows(cfg.data.batch_size),
        split=cfg.split,
    )
    model = lp.load_model(cfg.model, dtype=cfg.dtype, mesh=mesh, ema=cfg.ema)
    tokenizer.check_vocab(model.decoder.cfg.vocab_size)
    if cfg.adapter is not None:
        model = lp.peft.load(model, cfg.adapter)
    pixels = pixels_of(processor)
    return perplexity(model, batches, max_batches=cfg.max_batches, console=console, pixels=pixels)


if __name__ == "__main__":
    run(main)
