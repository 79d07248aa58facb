"""Train a model: from random weights, all of its weights, or an adapter on it.

    python -m experiments.train CONFIG [a.b=c ...]
    python -m experiments.train configs/smollm2_lora.py steps=50 optim.lr=1e-4 out=runs/mine

CONFIG is a Python file whose get_config() returns a RunConfig; a.b=c changes a field of it. The
same command again goes on from the last checkpoint, to the bit. SIGTERM saves and ends with exit
code 0. Outputs in `out`: run.json, metrics.jsonl, tensorboard/, tokenizer/, checkpoints/, and
adapter/ in PEFT's format where an adapter was trained.
"""

import dataclasses
import functools

import jax
import rich.console
from flax import nnx

import llmprep_jax as lp
from configs.meshes import get_mesh
from llmprep_jax import data
from llmprep_jax.cli import Outputs, run
from llmprep_jax.config import UsageError, load_config, print_config, split_arguments
from llmprep_jax.evaluate.perplexity import perplexity
from llmprep_jax.models import registry
from llmprep_jax.nn.param import TRAINED, AdapterParam
from llmprep_jax.sharding import use_mesh
from llmprep_jax.text.chat import encode_chat
from llmprep_jax.train.loop import Evaluate, FitResult, fit
from llmprep_jax.train.losses import next_token_loss, training_loss
from llmprep_jax.train.metrics import count_flops
from llmprep_jax.train.monitor import METRICS_FILE
from llmprep_jax.train.optim import make_optimizer
from llmprep_jax.train.run import RunConfig, claim_folder, describe_data, make_meta, padding_share
from llmprep_jax.train.state import count, count_bytes, split_model
from llmprep_jax.train.step import check_rows

console = rich.console.Console()


def main(arguments: list[str]) -> Outputs:
    paths, overrides = split_arguments(arguments)
    if len(paths) != 1:
        raise UsageError(f"give one config file, not {len(paths)}")
    cfg = load_config(paths[0], overrides)
    if not isinstance(cfg, RunConfig):
        raise UsageError(f"{paths[0]} returns a {type(cfg).__name__}, no RunConfig")
    print_config(cfg, console)
    for change in claim_folder(cfg):
        console.print(f"changed since the run began: {change}", markup=False)
    mesh = get_mesh(cfg.mesh)
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
    check_rows(cfg.data.batch_size // cfg.accumulate)
    processor = lp.load_processor(cfg.tokenizer or cfg.model)
    if cfg.chat_template is not None:
        processor.tokenizer.read_chat_template(cfg.chat_template)
    model = build_model(cfg, mesh)
    processor.tokenizer.check_vocab(model.cfg.vocab_size)
    processor.save(cfg.out / "tokenizer")
    batches, evaluate = open_data(cfg, processor)
    trainable = TRAINED if cfg.adapter is None else AdapterParam
    # an adapter learns from the next token alone: no further ones, and no balance of the experts
    loss_of = training_loss if cfg.adapter is None else next_token_loss
    parts = split_model(model, trainable)
    trained, total = count(parts.params), count(parts.params) + count(parts.frozen)
    console.print(f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})")
    tx = make_optimizer(cfg.optim, parts.params, cfg.steps)
    state_bytes = count_bytes(jax.eval_shape(tx.init, parts.params))
    console.print(f"optimizer state: {state_bytes / 2**20:,.1f} MiB")
    if cfg.adapter is not None:
        lp.peft.print_counts(model, console, state_bytes)
    result = fit(
        model,
        trainable,
        batches,
        cfg,
        out=cfg.out,
        loss_fn=lambda model, batch, key: loss_of(
            lp.peft.train_mode(model, key), batch, chunk=cfg.loss_chunk, z_loss=cfg.z_loss
        ),
        evaluate=evaluate,
        meta=make_meta(cfg, registry.family_of(model).to_hf(model.cfg)),
        flops=count_flops(model.cfg, parts.params, parts.frozen, cfg.data.seq_len),
        console=console,
    )
    rows_of_tokens = cfg.data.batch_size * cfg.data.seq_len
    if jax.process_index() == 0:
        padding = padding_share(cfg.out / METRICS_FILE, rows_of_tokens)
        console.print(describe_data(batches.report(), padding), soft_wrap=True, highlight=False)
    return result


def build_model(cfg: RunConfig, mesh: jax.sharding.Mesh | None) -> nnx.Module:
    """The model with its adapter, on the mesh."""
    if cfg.model is not None:
        packed = getattr(cfg.adapter, "kind", None)  # QLoRA packs while it reads
        model = lp.load_model(cfg.model, packed, mesh=mesh, compute=cfg.compute)
    else:
        name = cfg.architecture
        sizes = registry.preset(name) if isinstance(name, str) else name
        sizes = dataclasses.replace(sizes, compute=cfg.compute)
        model = jax.jit(lambda: registry.build(sizes, rngs=nnx.Rngs(cfg.seed)))()
    return model if cfg.adapter is None else lp.peft.inject(model, cfg.adapter, seed=cfg.seed)


def open_data(cfg: RunConfig, processor) -> tuple[data.Batches, Evaluate | None]:
    """The training batches, and a function that evaluates a model on the held-out ones."""
    tokenizer = processor.tokenizer
    settings = {
        "encode": tokenizer.encode,
        "encode_chat": functools.partial(encode_chat, tokenizer),
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id or 0,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    batches = data.build(cfg.data, **settings)
    if cfg.eval_data is not None:
        held_out = data.evaluation_batches(cfg.eval_data, **settings, split="all")
    elif cfg.data.holdout:
        held_out = data.evaluation_batches(cfg.data, **settings)
    else:
        return batches, None

    def evaluate(model: nnx.Module) -> dict[str, float]:
        found = perplexity(model, held_out, max_batches=cfg.eval_batches, chunk=cfg.loss_chunk)
        return {"eval_loss": found.nll, "eval_perplexity": found.perplexity}

    return batches, evaluate


if __name__ == "__main__":
    run(main)
