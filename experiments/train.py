"""Train a model: from random weights, all of its weights, or an adapter on it.

    python -m experiments.train CONFIG [a.b=c ...]
    python -m experiments.train configs/smollm2_lora.py steps=50 optim.lr=1e-4 out=runs/mine

CONFIG is a Python file whose get_config() returns a RunConfig; a.b=c changes a field of it. The
same command again goes on from the last checkpoint, to the bit. SIGTERM saves and ends with exit
code 0, Ctrl-C with 130; a second one ends at once. On a cluster (SLURM, GKE, a TPU pod) each host
runs this command; on plain machines each with processes.coordinator=HOST:PORT processes.count=2
processes.index=0, the other with index=1. Outputs in `out`: run.json, metrics.jsonl, tensorboard/,
tokenizer/, checkpoints/, and adapter/ in PEFT's format where an adapter was trained (adapter_ema/
holds its running average).
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "llmprep_jax.train.run:RunConfig")

import dataclasses
import shlex

import jax
import rich.console
from flax import nnx

import llmprep_jax as lp
from configs.meshes import get_mesh
from llmprep_jax import processes, remote
from llmprep_jax.cli import Outputs, run
from llmprep_jax.config import UsageError, load_config, print_config, split_arguments
from llmprep_jax.interrupts import Interrupted
from llmprep_jax.runs import (
    build_model,
    count_steps,
    describe_model,
    make_trainer,
    open_data,
    open_processor,
)
from llmprep_jax.sharding import use_mesh
from llmprep_jax.text.processor import Processor
from llmprep_jax.train.batches import own_rows
from llmprep_jax.train.flops import count_flops
from llmprep_jax.train.loop import FitResult, fit, lock_folder
from llmprep_jax.train.monitor import METRICS_FILE
from llmprep_jax.train.run import RunConfig, claim_folder, count_trained, describe_data, saved_steps
from llmprep_jax.train.state import count
from llmprep_jax.train.trainer import Trainer

console = rich.console.Console()


def main(arguments: list[str]) -> Outputs:
    paths, overrides = split_arguments(arguments)
    if len(paths) != 1:
        raise UsageError(f"give one config file, not {len(paths)}")
    cfg = load_config(paths[0], overrides)
    if not isinstance(cfg, RunConfig):
        raise UsageError(f"{paths[0]} returns a {type(cfg).__name__}, no RunConfig")
    processes.start(cfg.processes)
    console.quiet = not processes.is_writer()
    print_config(cfg, console)
    processes.refuse_apart(mesh := get_mesh(cfg.mesh))
    with lock_folder(cfg.out), use_mesh(mesh):
        result = train(cfg, mesh)
        if result.stopped == "SIGINT":
            command = shlex.join(["python", "-m", "experiments.train", *arguments])
            raise Interrupted(f"interrupted and saved at step {result.step}; to go on: {command}")
        return write_outputs(cfg, result, mesh)


def write_outputs(cfg: RunConfig, result: FitResult, mesh: jax.sharding.Mesh | None) -> Outputs:
    """Writes the adapter, of the best checkpoint where that is kept, and names all outputs."""
    checkpoints = cfg.out / "checkpoints"
    outputs = {"run": cfg.out, "metrics": cfg.out / METRICS_FILE}
    outputs["checkpoint"] = checkpoints / str(result.step)
    if result.preempted:
        console.print(f"stopped by {result.stopped}; the same command goes on from here")
        return outputs
    models = {"adapter": result.model, "adapter_ema": result.ema_model}
    if result.best not in (None, result.step):
        outputs["best checkpoint"] = checkpoints / str(result.best)
        models = {"adapter": lp.load_model(outputs["best checkpoint"], mesh=mesh)}
        console.print(f"adapter/ is of step {result.best}, whose eval_loss was the lowest")
    for name, model in models.items() if cfg.adapter is not None else ():
        if model is not None:
            outputs[name] = lp.peft.save(model, cfg.out / name)
    return outputs


def train(cfg: RunConfig, mesh: jax.sharding.Mesh | None) -> FitResult:
    """Builds model and data, and fits one to the other; the folder's lock is held."""
    own_rows(cfg.data.batch_size, cfg.accumulate)  # refuses rows that do not part
    processor = open_processor(cfg)
    cfg = settle_steps(cfg, processor)
    cfg, changes = claim_folder(cfg)
    for change in changes:
        console.print(f"changed since the run began: {change}", markup=False, soft_wrap=True)
    model, method = build_model(cfg, mesh, lambda words: console.print(words, markup=False))
    processor.tokenizer.check_vocab((model.cfg.decoder or model.cfg).vocab_size)
    processes.by_one(lambda: remote.write_folder(cfg.out / "tokenizer", processor.save))
    batches, evaluate = open_data(cfg, processor)
    trainer = make_trainer(cfg, model, processor)
    describe(cfg, model, trainer)
    weights = trainer.split.params, trainer.split.frozen
    result = fit(
        trainer,
        batches,
        out=cfg.out,
        evaluate=evaluate,
        meta=describe_model(cfg, model, method),
        flops=count_flops(model.cfg, *weights, cfg.data.seq_len, model.image_work),
        console=console,
        locked=True,
    )
    if processes.is_writer():
        trained = count_trained(cfg.out / METRICS_FILE, cfg.data.batch_size * cfg.data.seq_len)
        words = describe_data(batches.report(), trained, of_pairs=model.cfg.decoder is None)
        console.print(words, soft_wrap=True, highlight=False)
    return result


def settle_steps(cfg: RunConfig, processor: Processor) -> RunConfig:
    """The config whose steps are its epochs."""
    if cfg.epochs is None:
        return cfg
    with console.status("counting the batches of the data"):
        steps = saved_steps(cfg) or count_steps(cfg, processor)
    console.print(f"epochs={cfg.epochs}: {steps} steps")
    return dataclasses.replace(cfg, steps=steps)


def describe(cfg: RunConfig, model: nnx.Module, trainer: Trainer) -> None:
    """Says what a step is, what is trained and what memory that takes."""
    rows, cut = cfg.data.batch_size, cfg.accumulate
    parts = f", in {cut} microbatches of {rows // cut}" if cut > 1 else ""
    of_text = f"rows of {cfg.data.seq_len} tokens"
    console.print(f"a step: {rows} {of_text if model.cfg.decoder else 'pairs'}{parts}")
    counts = lp.peft.count(model)  # packed weights by what they stand for
    total = counts.trainable + counts.frozen
    trained = count(trainer.split.params) if cfg.adapter is None else counts.trainable
    console.print(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
    console.print(f"optimizer state: {trainer.optimizer_bytes / 2**20:,.1f} MiB")
    if cfg.adapter is not None:
        lp.peft.print_counts(model, console, trainer.optimizer_bytes)


if __name__ == "__main__":
    run(main)
