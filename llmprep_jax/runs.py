"""What a run is made of, built from its `RunConfig`: model, data and trainer.

`experiments.train` puts them together.
"""

import dataclasses
import functools
import pathlib
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from llmprep_jax import data, peft, quant
from llmprep_jax.evaluate.contrast import contrast
from llmprep_jax.evaluate.perplexity import perplexity
from llmprep_jax.models import registry
from llmprep_jax.models.tower_processor import TowerProcessor
from llmprep_jax.nn.param import Idle
from llmprep_jax.peft import AnyMethod
from llmprep_jax.peft.adapter import adapters
from llmprep_jax.pretrained import adapter_of_run, load_base, load_processor, training_settings
from llmprep_jax.remote import fetch
from llmprep_jax.sharding import batch_shards
from llmprep_jax.text.image_text import ImageTextProcessor
from llmprep_jax.text.processor import Processor
from llmprep_jax.train.batches import Pixels, own_rows
from llmprep_jax.train.contrastive import ContrastiveLoss
from llmprep_jax.train.freezing import leave_out, trained_weights
from llmprep_jax.train.loop import Evaluate
from llmprep_jax.train.run import RunConfig, make_meta
from llmprep_jax.train.trainer import Trainer, make_loss

ADAPTER_CONFIG = "adapter_config.json"


def open_processor(cfg: RunConfig) -> Processor:
    """The tokenizer of the run, with its chat template, and what the model's images need."""
    sizes = cfg.architecture
    sizes = registry.preset(sizes) if isinstance(sizes, str) else sizes
    kind = None if sizes is None else getattr(sizes, "model_type", None)
    processor = load_processor(cfg.tokenizer or cfg.model, kind)
    if cfg.chat_template is not None:
        processor.tokenizer.read_chat_template(cfg.chat_template)
    return processor


def build_model(
    cfg: RunConfig, mesh: jax.sharding.Mesh | None, say: Callable[[str], Any] = print
) -> tuple[nnx.Module, AnyMethod | None]:
    """The model with its adapter, on the mesh, and the adapter's method.

    Args:
      say: tells what becomes of an adapter that the model comes with.

    Raises:
      ValueError: all weights are to be trained and some are packed.
    """
    folder, method = open_adapter(cfg.adapter)
    packed = method and method.base_dtype  # QLoRA packs while it reads
    model = make_base(cfg, mesh, packed, say)
    if method is None:
        packed = quant.packed_layers(model)
        if packed:
            raise ValueError(
                f"{cfg.model} has packed weights ({next(iter(packed))}), which only adapters train "
                "around: give adapter=LoRA"
            )
        return model, None
    method = method.of_run(cfg.horizon)
    if cfg.freeze:
        method = leave_out(model, method, cfg.freeze)
    if folder is not None:
        model = peft.load(model, folder)
        return model, dataclasses.replace(method, targets=tuple(adapters(model)))
    return peft.inject(model, method, seed=cfg.seed, progress=_now_and_then(say)), method


def _now_and_then(say: Callable[[str], Any], seconds: float = 5.0) -> Callable[[str], None]:
    """Tells which layer's weight an adapter begins from, where that takes long."""
    last = time.monotonic()

    def progress(place: str) -> None:
        nonlocal last
        if time.monotonic() - last > seconds:
            last = time.monotonic()
            say(f"the adapter begins from the weight of {place}")

    return progress


def make_base(
    cfg: RunConfig,
    mesh: jax.sharding.Mesh | None,
    packed: str | None,
    say: Callable[[str], Any] = print,
) -> nnx.Module:
    """The model without adapters; one that the weights come with is merged."""
    if cfg.model is None:
        name = cfg.architecture
        sizes = registry.preset(name) if isinstance(name, str) else name
        sizes.check_platform(jax.default_backend())
        sizes = sizes.with_compute(cfg.compute)
        return jax.jit(lambda: registry.build(sizes, rngs=nnx.Rngs(cfg.seed)))()
    if adapter_of_run(cfg.model) is not None:
        say(f"the adapter of {cfg.model} is merged into its base, and training begins from that")
    return load_base(cfg.model, packed, mesh=mesh, compute=cfg.compute)


def open_adapter(adapter: AnyMethod | str | None) -> tuple[pathlib.Path | None, AnyMethod | None]:
    """The PEFT folder that training goes on from, if any, and the method.

    Raises:
      ValueError: there is no adapter in the folder.
    """
    if not isinstance(adapter, str):
        return None, adapter
    folder = fetch(adapter, lambda name: not name.startswith("checkpoints/")).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        folder = folder / "adapter"  # of a run
    if not (folder / ADAPTER_CONFIG).is_file():
        names = ", ".join(kind.__name__ for kind in typing.get_args(AnyMethod))
        raise ValueError(
            f"adapter={adapter}: there is no {ADAPTER_CONFIG}; give a folder that PEFT or a run of "
            f"ours wrote, or one of the methods {names}"
        )
    # a QLoRA's folder does not say how its base is packed
    return folder, adapter_of_run(folder.parent) or peft.read_method(folder)


def load_data(
    processor: Processor, paths: str | pathlib.Path | Sequence[str | pathlib.Path], **settings: Any
) -> "data.Batches":
    """Batches of text and conversations for a training loop: numpy arrays [B, T] by name; for two
    towers of pairs, of images with captions.

    Args:
      processor: whose tokenizer, chat template and image processor encode them.
      paths: a file, a folder or a pattern, or several.
      settings: fields of `data.DataConfig`: seq_len, batch_size, num_epochs, ...

    Raises:
      FileNotFoundError, ValueError: in one line, with the file and the remedy.
    """
    paths = (paths,) if isinstance(paths, (str, pathlib.Path)) else paths
    cfg = data.DataConfig(paths=tuple(map(str, paths)), **settings)
    if isinstance(processor, TowerProcessor):
        return data.build_pairs(cfg, _pairing(processor), rows=own_rows(cfg.batch_size))
    return data.build(
        cfg, **cfg.encoders(processor.tokenizer, processor), rows=own_rows(cfg.batch_size)
    )


def open_data(cfg: RunConfig, processor: Processor) -> "tuple[data.Batches, Evaluate | None]":
    """The training batches, and a function that evaluates a model on the held-out ones."""
    if isinstance(processor, TowerProcessor):
        return _open_pairs(cfg, processor)
    if cfg.data.random_crop is not None or cfg.data.random_flip:
        raise ValueError(
            "data.random_crop and data.random_flip are for models of two towers; leave them out"
        )
    tokenizer = processor.tokenizer
    encoders = cfg.data.encoders(tokenizer, processor)
    batches = data.build(cfg.data, **encoders, rows=own_rows(cfg.data.batch_size, cfg.accumulate))
    if cfg.eval_data is None and not cfg.data.holdout:
        return batches, None
    eval_data, split = _held_out(cfg)
    held_out = data.evaluation_batches(
        eval_data,
        **eval_data.encoders(tokenizer, processor),
        rows=own_rows(eval_data.batch_size),
        split=split,
    )

    def evaluate(model: nnx.Module) -> dict[str, float]:
        result = perplexity(
            model, held_out, max_batches=cfg.eval_batches, pixels=pixels_of(processor)
        )
        return {"eval_loss": result.nll, "eval_perplexity": result.perplexity}

    return batches, evaluate


def _held_out(cfg: RunConfig) -> tuple[data.DataConfig, str]:
    """What is evaluated on."""
    return (cfg.data, "heldout") if cfg.eval_data is None else (cfg.eval_data, "all")


def _open_pairs(
    cfg: RunConfig, processor: TowerProcessor
) -> "tuple[data.Batches, Evaluate | None]":
    """The same of pairs of images and captions."""
    pairing = _pairing(processor)
    batches = data.build_pairs(cfg.data, pairing, rows=own_rows(cfg.data.batch_size))
    if cfg.eval_data is None and not cfg.data.holdout:
        return batches, None
    (eval_data, split), shards = _held_out(cfg), batch_shards().count
    held = data.HeldOutPairs(eval_data, pairing, split, shards, own_rows, cfg.eval_batches)
    loss = contrastive_loss(cfg, processor)

    def evaluate(model: nnx.Module) -> dict[str, float]:
        result = contrast(model, held, loss)
        both = {"image_to_text": result.image_to_text, "text_to_image": result.text_to_image}
        recalls = {f"eval_{name}_r1": value for name, value in both.items()}
        return {"eval_loss": result.loss, **recalls}

    return batches, evaluate


def _pairing(processor: TowerProcessor) -> "data.Pairing":
    encode = functools.partial(processor.encode, width=processor.max_len)
    return data.Pairing(encode, processor.images)


def contrastive_loss(cfg: RunConfig, processor: TowerProcessor) -> ContrastiveLoss:
    """The loss of a run of two towers."""
    how, pixels = cfg.contrastive, processor.images.normalization
    scaled = dict(mean=pixels.mean, std=pixels.std, scale=pixels.scale)
    return ContrastiveLoss(how.kind, how.form, how.chunk, **scaled)


def count_steps(cfg: RunConfig, processor: Processor) -> int:
    """How many batches the run's epochs are."""
    once = dataclasses.replace(cfg.data, prefetch=0)
    if isinstance(processor, TowerProcessor):
        return max(sum(1 for _ in data.build_pairs(once, _pairing(processor), rows=())), 1)
    batches = data.build(once, **once.encoders(processor.tokenizer, processor), rows=())
    return max(sum(1 for _ in batches), 1)


def describe_model(cfg: RunConfig, model: nnx.Module, method: AnyMethod | None) -> dict[str, Any]:
    """What the run's checkpoints say of the model."""
    config = registry.to_hf(model.cfg)
    trains_all = not cfg.freeze and not jax.tree.leaves(nnx.state(model, Idle))
    settings = training_settings(model.cfg)
    return make_meta(cfg, config, method, settings, trains_all=trains_all)


def make_trainer(cfg: RunConfig, model: nnx.Module, processor: Processor | None = None) -> Trainer:
    """The model's weights or its adapters, ready to be trained.

    Args:
      processor: says how images are normalised; None: there are none.
    """
    loss_fn = make_loss(cfg.z_loss, pixels_of(processor))
    if isinstance(processor, TowerProcessor):
        loss_fn = contrastive_loss(cfg, processor)
    # of an adapter all that there is: it is put around nothing that is frozen
    trainable = None if cfg.adapter is not None else trained_weights(model, cfg.freeze)
    return Trainer(model, trainable, cfg, loss_fn)


def pixels_of(processor: Processor | None) -> Pixels | None:
    """How images are normalised on the device; None of a processor of text."""
    return processor.images.pixels if isinstance(processor, ImageTextProcessor) else None
