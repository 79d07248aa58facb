"""Measure a model: its perplexity on a text, its answers about pictures, or its two towers.

    python -m experiments.evaluate MODEL DATA [a.b=c ...]
    python -m experiments.evaluate runs/mine/merged held_out.jsonl data.seq_len=512 dtype=bfloat16
    python -m experiments.evaluate MODEL DATA adapter=runs/mine/adapter out=after.json
    python -m experiments.evaluate MODEL questions.jsonl task=docvqa task.worst=100
    python -m experiments.evaluate MODEL pictures/ task=zero_shot

MODEL is a folder, a .gguf file, a run of ours or a hub id. DATA is a file, a folder or a pattern of
texts; with a task, a .jsonl of questions, answers and images, or of image and captions (retrieval),
or of image and label, or a folder with a folder for each class (zero_shot). Writes the result with
the settings to the JSON file `out`; where none is given, to TASK-DATA.json beside the model, or in
the working folder where the model is no folder. A result under other settings stays: the new one
gets a number. Beside it lies a page of the worst cases with their pictures.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.evaluate:EvaluateConfig")

import dataclasses
import functools
from typing import Any, Literal

import rich.console

import llmprep_jax as lp
from configs.meshes import get_mesh
from experiments.command import tasks
from experiments.command.measured import write
from experiments.command.task_settings import PERPLEXITY, TaskSettings
from llmprep_jax import data, processes
from llmprep_jax.cli import Outputs, run
from llmprep_jax.config import UsageError, override, print_config, split_arguments
from llmprep_jax.evaluate.perplexity import perplexity
from llmprep_jax.pretrained import Dtype
from llmprep_jax.processes import Processes
from llmprep_jax.remote import AnyPath
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
      task: what is measured; all but perplexity read DATA by themselves, and no setting of data.
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
    task: TaskSettings = dataclasses.field(default_factory=TaskSettings)
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
    of_text = cfg.task.name == PERPLEXITY
    if of_text:
        cfg = dataclasses.replace(cfg, data=cfg.data.pinned())
    else:
        tasks.refuse_unread(cfg)
    processes.start(cfg.processes)
    console.quiet = not processes.is_writer()
    print_config(cfg, console)
    processes.refuse_apart(cfg.mesh)
    with use_mesh(get_mesh(cfg.mesh)):
        processor = lp.load_processor(cfg.tokenizer or cfg.model)
        tasks.check_kind(processor, cfg.task.name, cfg.model)
        if of_text:
            return measure_text(cfg, processor)
        return tasks.run(cfg, processor, functools.partial(load, cfg, processor), console)


def measure_text(cfg: EvaluateConfig, processor: Any) -> Outputs:
    """Perplexity."""
    tokenizer = processor.tokenizer
    batches = data.evaluation_batches(
        cfg.data,
        **cfg.data.encoders(tokenizer, processor),
        rows=own_rows(cfg.data.batch_size),
        split=cfg.split,
    )
    model, pixels = load(cfg, processor), pixels_of(processor)
    limits = dict(max_batches=cfg.max_batches, console=console)
    measured = perplexity(model, batches, **limits, pixels=pixels)
    console.print(
        f"{measured.nll:.4f} nats a token, perplexity {measured.perplexity:,.3f} over "
        f"{measured.tokens:,} tokens"
    )
    return {"result": write(cfg, measured._asdict(), ("task",))}


def load(cfg: EvaluateConfig, processor: Any) -> Any:
    """The model, with its adapter."""
    model = lp.load_model(cfg.model, dtype=cfg.dtype, mesh=get_mesh(cfg.mesh), ema=cfg.ema)
    processor.tokenizer.check_vocab((model.cfg.decoder or model.text.cfg).vocab_size)
    return model if cfg.adapter is None else lp.peft.load(model, cfg.adapter)


if __name__ == "__main__":
    run(main)
