"""Load a model or a processor by path, and save one so that the rest of the world loads it.

A path is a Hugging Face folder, a GGUF file, a run folder of ours, or a hub id. Saving re-opens
what it wrote and compares logits with the live model before the folder is put in place. `dtype` is
that of the weights in memory and of the activations; None keeps the weights as stored, and a packed
one ("nf4") is of linear layers alone, whose activations are in bfloat16 unless `compute` says
otherwise.
"""

import collections
import dataclasses
import functools
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx

from llmprep_jax.config import check_fields, field_types, from_dict, to_dict
from llmprep_jax.models import registry
from llmprep_jax.models.hf_config import check_numbers
from llmprep_jax.models.model_config import ModelConfig
from llmprep_jax.nn.base_model import Source
from llmprep_jax.nn.param import AdapterParam, Compute, RouterBias
from llmprep_jax.peft import AnyMethod, inject, is_adapted, merge
from llmprep_jax.quant import export
from llmprep_jax.quant.folder import packers, unpacking
from llmprep_jax.quant.kinds import KINDS
from llmprep_jax.quant.linear import adopt, quantize_model
from llmprep_jax.remote import AnyPath, is_remote
from llmprep_jax.sharding import mesh_of, use_mesh
from llmprep_jax.text.processor import Processor
from llmprep_jax.train.checkpoint import FOLDER as CHECKPOINTS
from llmprep_jax.train.checkpoint import all_steps, read_meta, read_params
from llmprep_jax.train.freezing import trained_weights
from llmprep_jax.weights import hub, receipt, table
from llmprep_jax.weights.folder import read_json, refuse_adapter
from llmprep_jax.weights.rows import Table

FLOATS = ("float32", "bfloat16", "float16")
Dtype = Literal["float32", "bfloat16", "float16", "nf4", "fp4", "int8", "int4", "fp8"]
DTYPES = get_args(Dtype)


def load_model(
    path: str | Path,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    compute: Compute | None = None,
    ema: bool = False,
    only: str | None = None,
) -> nnx.Module:
    """Loads a model.

    Args:
      path: a Hugging Face folder (config.json and safetensors), a .gguf file, a run folder of ours
        (its last checkpoint; RUN/checkpoints/STEP: that one), or a hub id "org/name", which is
        downloaded.
      dtype: "float32", "bfloat16" or "float16"; None as stored (GGUF: float32), and packed where a
        folder's weights are (bitsandbytes, GPTQ, AWQ, fp8 in blocks). "nf4", "fp4", "int8", "int4"
        or "fp8": linear layers are packed while they are read, one tensor at a time, and everything
        else (embeddings, norms, the head) is in bfloat16.
      mesh: the weights are placed on it, a process reading what its devices hold (and packing
        whole matrices, of which it keeps its rows); None: the default device.
      compute: dtypes, remat and unrolling in detail. Where a float `dtype` is given too, that is
        the weights', and a warning says so if `param_dtype` is another; with a packed one
        `param_dtype` is that of everything else.
      ema: of a run that kept one (`ema_decay`), the running average of what it trained, in place of
        the weights themselves.
      only: a part of a composed model, "language" or "vision" for most: nothing else is read, and
        what is saved of it is a model of its own.

    Raises:
      FileNotFoundError, ValueError: in one line, with the file and the remedy.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; the dtypes are {', '.join(DTYPES)}")
    source, path = Source(str(path)), hub.resolve(path)
    run, step = _find_run(path)
    if run is not None:
        model = _load_run(run, step, dtype, mesh, compute, ema, source)
        return model if only is None else _part(model, only)
    if ema:
        raise ValueError(f"{path} is no run: only runs keep a running average; leave ema out")
    checkpoint = unpacking(hub.open_checkpoint(path))
    cfg, stored = _read_config(checkpoint), _stored_dtype(checkpoint)
    to_dense, kind = dtype in FLOATS, dtype if dtype in KINDS else None
    as_stored = dtype is None and compute is None
    compute = _settle(dtype, compute, Compute(dtype=stored, param_dtype=stored))
    with use_mesh(mesh):
        abstract, names = _abstract(cfg.with_compute(compute), checkpoint, only)
        pack = {} if to_dense else packers(abstract, checkpoint, kind)
        model = table.load(
            abstract,
            checkpoint,
            names,
            dtype=None if as_stored else compute.param_dtype,
            dtypes=[(RouterBias, "float32")],
            pack=pack.get,
        )
    model = adopt(model, compute.param_dtype)
    model.source = source
    return model


def _part(model: nnx.Module, path: str) -> nnx.Module:
    """A model that is a part of a composed one."""
    decoder = model.cfg.decoder
    if decoder is model.cfg:
        raise ValueError(f"only={path!r}: the model is a language model as a whole; leave only out")
    parts = [name for name, part in vars(model).items() if isinstance(part, nnx.Module)]
    if path not in parts:
        raise ValueError(f"the model has no part {path!r}; those there are: {', '.join(parts)}")
    return getattr(model, path)


def _settle(dtype: str | None, compute: Compute | None, default: Compute) -> Compute:
    """The dtypes in detail, from what `load_model` was told; `default` if that was nothing."""
    if compute is None:
        # what is not packed is in bf16
        plain = "bfloat16" if dtype in KINDS else dtype
        return default if plain is None else Compute(dtype=plain, param_dtype=plain)
    if dtype not in FLOATS or dtype == compute.param_dtype:
        return compute
    warnings.warn(
        f"dtype={dtype!r} and compute.param_dtype={compute.param_dtype!r} do not agree: the weights"
        f" are in {dtype}, and computed with in {compute.dtype}",
        stacklevel=3,
    )
    return dataclasses.replace(compute, param_dtype=dtype)


def _find_run(path: Path) -> tuple[Path | None, int | None]:
    """The run that a path is or is a checkpoint of, and which checkpoint (None: the last)."""
    if all_steps(path):
        return path, None
    run = path.parent.parent
    is_checkpoint = path.parent.name == CHECKPOINTS and path.name.isdigit()
    return (run, int(path.name)) if is_checkpoint and path.is_dir() else (None, None)


def _load_run(
    path: Path,
    step: int | None,
    dtype: str | None,
    mesh: jax.sharding.Mesh | None,
    compute: Compute | None,
    ema: bool,
    source: Source,
) -> nnx.Module:
    """The model of a run's checkpoint; an adapter is on the base model that the run names."""
    meta = read_meta(path, step)
    kind = dtype if dtype in KINDS else None
    compute = _settle(dtype, compute, from_dict(Compute, meta["run"]["compute"]))
    if ema and meta["run"].get("ema_decay") is None:
        raise ValueError(f"{path} keeps no running average: it was trained without ema_decay")
    with use_mesh(mesh):
        if meta["adapter"] is not None:
            adapter = from_dict(AnyMethod, meta["adapter"])
            kind = kind or adapter.base_dtype
            model = inject(load_base(meta["base"], kind, mesh=mesh, compute=compute), adapter)
            graph, params, frozen = nnx.split(model, AdapterParam, ...)
        else:
            family = registry.family_of_type(meta["config"].get("model_type"))
            cfg = family.from_hf(meta["config"]).with_compute(compute)
            cfg = with_training_settings(cfg, meta.get("training", {}))
            abstract = registry.abstract(cfg)
            trained = trained_weights(abstract, meta["run"].get("freeze", ()))
            graph, params, frozen = nnx.split(abstract, trained, ...)
            if jax.tree.leaves(frozen):
                frozen = _untrained(meta, cfg, compute, mesh, trained)
        item = "ema" if ema else "params"
        params = read_params(path, nnx.to_pure_dict(params), step, item=item)
        model = nnx.merge(graph, params, nnx.to_pure_dict(frozen))
        if meta["adapter"] is None and not ema:  # what `source` names has the weights themselves
            model.source = source
        whole = kind is not None and meta["adapter"] is None
        return quantize_model(model, kind) if whole else model


def _untrained(
    meta: Mapping[str, Any],
    cfg: ModelConfig,
    compute: Compute,
    mesh: jax.sharding.Mesh | None,
    trained: Any,
) -> Any:
    """What a run without an adapter left as it was, and its checkpoints therefore lack."""
    if meta["base"] is None:  # the weights were random
        seed = meta["run"]["seed"]
        model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(seed)))()
    else:
        model = load_base(meta["base"], None, mesh=mesh, compute=compute)
    return nnx.split(model, trained, ...)[2]


def load_base(
    path: str | Path,
    kind: str | None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    compute: Compute | None = None,
) -> nnx.Module:
    """A model without adapters: that of a run is merged, before linear layers are packed.

    Args:
      kind: what linear layers are packed as; None: as stored.
    """
    if adapter_of_run(path) is None:
        return load_model(path, kind, mesh=mesh, compute=compute)
    model = merge(load_model(path, mesh=mesh, compute=compute))
    model.source = Source(str(path))
    return model if kind is None else quantize_model(model, kind)


def training_settings(cfg: ModelConfig) -> dict[str, Any]:
    """What of a model's Config a run goes by and no config.json holds, as JSON."""
    parts = [part for part in (cfg, cfg.decoder) if part is not None]
    return {name: to_dict(getattr(part, name)) for part in parts for name in _kept_by_runs(part)}


def with_training_settings(cfg: ModelConfig, saved: Mapping[str, Any]) -> ModelConfig:
    """The Config with what `training_settings` gave; that of older runs is empty."""

    def known(part: ModelConfig) -> dict[str, Any]:
        kinds = _kept_by_runs(part).items()
        return {name: from_dict(kind, saved[name]) for name, kind in kinds if name in saved}

    if cfg.decoder is not None and (changes := known(cfg.decoder)):
        cfg = cfg.with_decoder(**changes)
    return dataclasses.replace(cfg, **changes) if (changes := known(cfg)) else cfg


def _kept_by_runs(cfg: ModelConfig) -> dict[str, Any]:
    """The fields that say so, with their types."""
    kinds, fields = field_types(type(cfg)), dataclasses.fields(cfg)
    return {f.name: kinds[f.name] for f in fields if f.metadata.get("is_trained_by")}


def adapter_of_run(path: str | Path) -> Any | None:
    """The settings of the adapter that a run trained; None for all else that is loaded."""
    path = hub.resolve(path) if is_remote(path) else Path(path).expanduser()
    run, step = _find_run(path)
    adapter = read_meta(run, step)["adapter"] if run is not None else None
    return None if adapter is None else from_dict(AnyMethod, adapter)


def _read_config(checkpoint: Any) -> ModelConfig:
    """The Config of a checkpoint."""
    try:
        family = registry.family_of_type(checkpoint.config.get("model_type"))
        cfg = family.from_hf(checkpoint.config, checkpoint.names)
        cfg = cfg.with_token_ids(checkpoint.token_id)
        check_fields(cfg)
        check_numbers(cfg)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{checkpoint.path}: config.json does not make sense ({reason})"
        ) from error
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    return cfg


def _abstract(cfg: ModelConfig, checkpoint: Any, only: str | None) -> tuple[nnx.Module, Table]:
    """The model, or a part, without weights, and its table; a stored head that differs from the
    embedding unties them."""
    model = registry.abstract(cfg)
    is_tied = cfg.decoder is not None and cfg.decoder.tie_embeddings
    if is_tied and table.head_is_separate(checkpoint, model.weights_among(checkpoint.names)):
        model = registry.abstract(cfg.with_decoder(tie_embeddings=False))
    names = model.weights_among(checkpoint.names)
    return (model, names) if only is None else (_part(model, only), names.only(only))


def _stored_dtype(checkpoint: Any) -> str:
    """The dtype of most tensors."""
    counts = collections.Counter(str(checkpoint.dtype(name)) for name in checkpoint.names)
    known = [name for name, _ in counts.most_common() if name in FLOATS]
    return known[0] if known else "float32"


def load_processor(path: str | Path, model_type: str | None = None) -> Processor:
    """The tokenizer, chat template and image processor that go with a model; paths as in
    `load_model`.

    Args:
      model_type: of the model, where the folder holds none.
    """
    path = hub.resolve(path)
    path = _find_run(path)[0] or path
    try:
        kind = registry.processor_class(model_type) if model_type else _processor_class(path)
        return kind.from_path(path)
    except FileNotFoundError:
        refuse_adapter(path)  # which may have a tokenizer, or none
        raise


def _processor_class(path: Path) -> type[Processor]:
    """Of the family whose model is there; that for text where there is none."""
    if all_steps(path):
        kind = read_meta(path, None)["config"].get("model_type")
    elif (path / "config.json").is_file():
        kind = read_json(path / "config.json").get("model_type")
    else:
        return Processor
    return registry.processor_class(kind)


def save_model(
    model: nnx.Module,
    folder: str | AnyPath,
    *,
    processor: Processor | None = None,
    tolerance: float = 1e-5,
) -> AnyPath:
    """Writes a Hugging Face folder that transformers loads.

    The folder is written aside, re-opened, and its logits compared with the live model's on a fixed
    probe; only then is it put in place, with a receipt of tolerance, difference and versions. A
    model with adapters is refused: merge it, or save the adapters with `peft.save`. Packed layers
    are written as they are, nf4, fp4 and int8 in bitsandbytes' layout and fp8 in DeepSeek-V3's;
    int4 is refused: make it dense with `quant.dequantize_model`.

    Args:
      tolerance: largest allowed difference of the probe's logits, as a share of the largest of
        them.

    Raises:
      ValueError: the model has adapters, or packed weights or settings that no folder holds, the
        processor's tokenizer has more ids than the model, or what was written does not give the
        same logits.
      OSError: the folder cannot be written; what stood there before is untouched.
    """
    if is_adapted(model):
        raise ValueError("the model has adapters; save lp.peft.merge(model), or use lp.peft.save")
    export.check_can_save(model)
    if processor is not None:
        processor.tokenizer.check_vocab((model.cfg.decoder or model.cfg).vocab_size)
    config = registry.to_hf(model.cfg) | {"dtype": str(model.dtype)}
    config |= export.config_fields(model, model.weights)
    return receipt.save_folder(
        Path(folder),
        config,
        _with_copies(export.tensors(model, model.weights), model.weights.copies),
        extra_files=functools.partial(
            _write_extras, config, processor, model.cfg.decoder is not None
        ),
        verify=lambda written: receipt.probe_difference(
            model, load_model(written, mesh=mesh_of(model), compute=model.cfg.compute)
        ),
        tolerance=tolerance,
    )


def _with_copies(
    tensors: Iterable[tuple[str, np.ndarray]], copies: Mapping[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors, and each once more under the names of its copies."""
    for name, array in tensors:
        yield name, array
        yield from ((copy, array) for copy, original in copies.items() if original == name)


def _write_extras(
    config: Mapping[str, Any], processor: Processor | None, generates: bool, folder: Path
) -> None:
    """The processor's files, and the ids that end a reply, where transformers looks for them."""
    ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if processor is not None:
        processor.save(folder)
        ids["eos_token_id"] = list(processor.tokenizer.stop_ids) or ids["eos_token_id"]
    ids = {name: value for name, value in ids.items() if value is not None}
    if generates:
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
