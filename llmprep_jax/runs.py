"""What a run is made of, built from its `RunConfig`: model, data and trainer.

`experiments.train` puts them together. A base that an adapter is trained on is packed while it is
read where the adapter is a QLoRA.
"""

import dataclasses
import functools

import jax
from flax import nnx

from llmprep_jax import data, peft
from llmprep_jax.evaluate.perplexity import perplexity
from llmprep_jax.models import registry
from llmprep_jax.nn.param import TRAINED, AdapterParam
from llmprep_jax.pretrained import load_model
from llmprep_jax.text.chat import encode_chat
from llmprep_jax.text.processor import Processor
from llmprep_jax.train.loop import Evaluate
from llmprep_jax.train.losses import next_token_loss, training_loss
from llmprep_jax.train.run import RunConfig
from llmprep_jax.train.step import own_rows
from llmprep_jax.train.trainer import Trainer


def build_model(cfg: RunConfig, mesh: jax.sharding.Mesh | None) -> nnx.Module:
    """The model with its adapter, on the mesh."""
    if cfg.model is not None:
        packed = getattr(cfg.adapter, "kind", None)  # QLoRA packs while it reads
        model = load_model(cfg.model, packed, mesh=mesh, compute=cfg.compute)
    else:
        name = cfg.architecture
        sizes = registry.preset(name) if isinstance(name, str) else name
        sizes = dataclasses.replace(sizes, compute=cfg.compute)
        model = jax.jit(lambda: registry.build(sizes, rngs=nnx.Rngs(cfg.seed)))()
    return model if cfg.adapter is None else peft.inject(model, cfg.adapter, seed=cfg.seed)


def open_data(cfg: RunConfig, processor: Processor) -> tuple[data.Batches, Evaluate | None]:
    """The training batches, and a function that evaluates a model on the held-out ones."""
    tokenizer = processor.tokenizer
    settings = {
        "encode": tokenizer.encode,
        "encode_chat": functools.partial(encode_chat, tokenizer),
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id or 0,
    }
    batches = data.build(cfg.data, **settings, rows=own_rows(cfg.data.batch_size, cfg.accumulate))
    if cfg.eval_data is None and not cfg.data.holdout:
        return batches, None
    held, split = cfg.eval_data or cfg.data, "heldout" if cfg.eval_data is None else "all"
    settings |= {"rows": own_rows(held.batch_size), "split": split}
    held_out = data.evaluation_batches(held, **settings)

    def evaluate(model: nnx.Module) -> dict[str, float]:
        found = perplexity(model, held_out, max_batches=cfg.eval_batches, chunk=cfg.loss_chunk)
        return {"eval_loss": found.nll, "eval_perplexity": found.perplexity}

    return batches, evaluate


def make_trainer(cfg: RunConfig, model: nnx.Module) -> Trainer:
    """The model's weights or its adapters, ready to be trained."""
    # an adapter learns from the next token alone: no further ones, and no balance of the experts
    loss_of = training_loss if cfg.adapter is None else next_token_loss
    return Trainer(
        model,
        TRAINED if cfg.adapter is None else AdapterParam,
        cfg,
        lambda model, batch, key: loss_of(
            peft.train_mode(model, key), batch, chunk=cfg.loss_chunk, z_loss=cfg.z_loss
        ),
    )
