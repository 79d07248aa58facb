"""Train a model: from random weights, all of its weights, or an adapter on it.

    python -m experiments.train CONFIG [a.b=c ...]
    python -m experiments.train configs/smollm2_lora.py steps=50 optim.lr=1e-4 out=runs/mine

CONFIG is a Python file whose get_config() returns a RunConfig; a.b=c changes a field of it. The
same command again goes on from the last checkpoint, to the bit. SIGTERM saves and ends with exit
code 0. On a cluster (SLURM, GKE, a TPU pod) each host runs this command; on plain machines each
with processes.coordinator=HOST:PORT processes.count=2 processes.index=0, the other with index=1.
Outputs in `out`: run.json, metrics.jsonl, tensorboard/, tokenizer/, checkpoints/, and adapter/ in
PEFT's format where an adapter was trained.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "llmprep_jax.train.run:RunConfig")

import jax
import rich.console
from flax import nnx

import llmprep_jax as lp
from configs.meshes import get_mesh
from llmprep_jax import processes
from llmprep_jax.cli import Outputs, run
from llmprep_jax.config import UsageError, load_config, print_config, split_arguments
from llmprep_jax.models import registry
from llmprep_jax.runs import build_model, make_trainer, open_data
from llmprep_jax.sharding import use_mesh
from llmprep_jax.train.loop import FitResult, fit
from llmprep_jax.train.metrics import count_flops
from llmprep_jax.train.monitor import METRICS_FILE
from llmprep_jax.train.run import RunConfig, claim_folder, describe_data, make_meta, padding_share
from llmprep_jax.train.state import count
from llmprep_jax.train.step import own_rows
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
    mesh = get_mesh(cfg.mesh)
    processes.refuse_apart(mesh)
    for change in claim_folder(cfg):
        console.print(f"changed since the run began: {change}", markup=False)
    with use_mesh(mesh):
        result = train(cfg, mesh)
        outputs = {"run": cfg.out, "metrics": cfg.out / METRICS_FILE}
        outputs["checkpoint"] = cfg.out / "checkpoints" / str(result.step)
        if cfg.adapter is not None and not result.preempted:
            model = result.ema_model or result.model
            outputs["adapter"] = lp.peft.save(model, cfg.out / "adapter", base_model=cfg.model)
    if result.preempted:
        console.print("stopped by SIGTERM; the same command goes on from here")
    return outputs


def train(cfg: RunConfig, mesh: jax.sharding.Mesh | None) -> FitResult:
    """Builds model and data, and fits one to the other."""
    own_rows(cfg.data.batch_size, cfg.accumulate)  # refuses rows that do not part
    processor = lp.load_processor(cfg.tokenizer or cfg.model)
    if cfg.chat_template is not None:
        processor.tokenizer.read_chat_template(cfg.chat_template)
    model = build_model(cfg, mesh)
    processor.tokenizer.check_vocab(model.cfg.vocab_size)
    processes.by_one(lambda: processor.save(cfg.out / "tokenizer"))
    batches, evaluate = open_data(cfg, processor)
    trainer = make_trainer(cfg, model)
    describe(cfg, model, trainer)
    parts = trainer.split
    result = fit(
        trainer,
        batches,
        out=cfg.out,
        evaluate=evaluate,
        meta=make_meta(cfg, registry.family_of(model).to_hf(model.cfg)),
        flops=count_flops(model.cfg, parts.params, parts.frozen, cfg.data.seq_len),
        console=console,
    )
    rows_of_tokens = cfg.data.batch_size * cfg.data.seq_len
    if processes.is_writer():
        padding = padding_share(cfg.out / METRICS_FILE, rows_of_tokens)
        console.print(describe_data(batches.report(), padding), soft_wrap=True, highlight=False)
    return result


def describe(cfg: RunConfig, model: nnx.Module, trainer: Trainer) -> None:
    """Says what is trained and what memory that takes."""
    trained, frozen = count(trainer.split.params), count(trainer.split.frozen)
    total = trained + frozen
    console.print(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
    console.print(f"optimizer state: {trainer.optimizer_bytes / 2**20:,.1f} MiB")
    if cfg.adapter is not None:
        lp.peft.print_counts(model, console, trainer.optimizer_bytes)


if __name__ == "__main__":
    run(main)
