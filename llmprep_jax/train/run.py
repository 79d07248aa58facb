"""What a run is: `RunConfig`, the one thing that configs/*.py return, and the folder it owns.

The folder holds run.json (the resolved config), metrics.jsonl, tensorboard/, tokenizer/ and
checkpoints/. A folder belongs to one run, and the same command goes on with it. Settings in `FREE`
may change, and each change is said; a command that changes another (the model, its data) is
refused.
"""

import dataclasses
import datetime
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from llmprep_jax import processes
from llmprep_jax.config import UsageError, catch_up, changed_fields, from_dict, to_dict
from llmprep_jax.data import DataConfig
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.remat import check as check_remat
from llmprep_jax.peft import AnyMethod
from llmprep_jax.processes import Processes
from llmprep_jax.remote import AnyPath, write_text
from llmprep_jax.sharding import MeshSizes
from llmprep_jax.train.checkpoint import all_steps
from llmprep_jax.train.contrastive import ContrastiveConfig
from llmprep_jax.train.metrics import read_jsonl
from llmprep_jax.train.optim import OptimConfig, make_schedule
from llmprep_jax.train.trainer import FitConfig

RUN_FILE = "run.json"
DTYPES = ("float32", "bfloat16", "float16")
# what may differ when a run goes on: where, how fast, how often and how far it learns; not what the
# checkpoint's arrays are, nor which data it is at
FREE = ("out", "steps", "schedule_steps", "epochs", "accumulate", "log_every", "skip_nonfinite")
FREE = (*FREE, "eval_every", "eval_batches", "eval_data", "checkpoint", "mesh", "peak_flops")
FREE = (*FREE, "compute.remat", "compute.offload", "compute.unroll", "optim")
FREE = (
    *FREE,
    "contrastive.form",
    "contrastive.chunk",
    "data.paths",
    "data.prefetch",
    "data.threads",
    "data.decoders",
    "data.num_epochs",
)
FIXED = ("optim.optimizer", "optim.moment_dtype")  # by them the moments are other arrays
OURS = ("run.json", "run.tmp", "metrics.jsonl", "metrics.tmp", "tensorboard", "tokenizer")
OURS = (*OURS, "checkpoints", "adapter", "adapter_ema")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(FitConfig):
    """One training run.

    Attributes:
      model: where weights come from: a folder, a .gguf file, a run of ours or a hub id; None:
        random ones of `architecture`.
      architecture: a preset's name or a family's Config, for random weights; None: as `model` is.
      tokenizer: where the tokenizer comes from; None: from where `model` does.
      chat_template: a Jinja file, for the tokenizer of a base model, which has none; it is saved
        with the run.
      adapter: what is trained in place of the model: a method, by its name (adapter=QLoRA) or its
        settings (adapter.rank=8), or a folder of PEFT's or a run's, whose adapter is trained on;
        None: all of the model is.
      freeze: what stays as it is: parts (language, vision, projector, embed, head; text), paths of
        weights (language.layers.attn) or regexes for whole ones. No adapter goes there either.
      epochs: how often the data are read; sets `steps`, after counting their batches once.
      data: what it is trained on; data.batch_size rows of data.seq_len tokens a step.
      eval_data: what it is evaluated on, all splits of it; settings that are not given are those of
        data; None: what data.holdout keeps back, if anything.
      eval_batches: at most so many; None: all.
      compute: dtypes, rematerialisation and unrolling. Weights are float32 masters with compute in
        bf16 for `dtype="bfloat16", param_dtype="float32"`.
      mesh: a name in configs/meshes.py, or sizes, as `mesh.fsdp=4 mesh.tensor=2`; None: one device.
      z_loss: weight of the squared logsumexp.
      contrastive: the loss of models of two towers (CLIP, SigLIP).
      processes: where this process stands among several; not saved with the run.
      out: the run's folder.
    """

    model: str | None = None
    architecture: Any | None = None
    tokenizer: str | None = None
    chat_template: AnyPath | None = None
    adapter: AnyMethod | str | None = None
    freeze: tuple[str, ...] = ()
    epochs: int | None = None
    data: DataConfig
    eval_data: DataConfig | None = dataclasses.field(default=None, metadata={"like": "data"})
    eval_batches: int | None = None
    compute: Compute = dataclasses.field(default_factory=Compute)
    mesh: str | MeshSizes | None = None
    z_loss: float = 0.0
    contrastive: ContrastiveConfig = dataclasses.field(default_factory=ContrastiveConfig)
    processes: Processes = dataclasses.field(default_factory=Processes)
    out: AnyPath

    def __post_init__(self):
        super().__post_init__()
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give either model (weights) or architecture (random weights)")
        if self.model is None and self.tokenizer is None:
            raise ValueError("give tokenizer: random weights come without one")
        if self.data.batch_size % self.accumulate:
            raise ValueError(
                f"data.batch_size={self.data.batch_size} is no multiple of "
                f"accumulate={self.accumulate}"
            )
        if self.adapter is None and self.optim.lora_plus != 1:
            raise ValueError("optim.lora_plus is for LoRA adapters: leave it or set adapter=LoRA")
        if self.freeze and isinstance(self.adapter, str):
            raise ValueError(
                f"freeze={','.join(self.freeze)}: an adapter of a folder is trained on as it is;"
                " leave freeze out, or give a method"
            )
        if str(self.out) == ".":
            raise ValueError("out is the working folder; give a folder of its own: out=runs/NAME")
        _check_compute(self.compute)
        for name in ("eval_batches", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.epochs is not None and self.data.num_epochs != self.epochs:
            data = dataclasses.replace(self.data, num_epochs=self.epochs)
            object.__setattr__(self, "data", data)


def _check_compute(compute: Compute) -> None:
    for name in ("dtype", "matmul_dtype", "param_dtype"):
        value = getattr(compute, name)
        if value not in DTYPES and not (name == "matmul_dtype" and value is None):
            raise ValueError(f"compute.{name}={value!r}; the dtypes are {', '.join(DTYPES)}")
    check_remat(compute)


def _pin_date(cfg: RunConfig) -> RunConfig:
    """The config with a date, the same on all processes."""
    if cfg.data.date is not None:
        return cfg
    date = processes.by_one(lambda: _date_of(cfg.out))
    eval_data = cfg.eval_data
    if eval_data is not None and eval_data.date is None:
        eval_data = dataclasses.replace(eval_data, date=date)
    data = dataclasses.replace(cfg.data, date=date)
    return dataclasses.replace(cfg, data=data, eval_data=eval_data)


def _date_of(out: AnyPath) -> str | None:
    path = out / RUN_FILE
    if all_steps(out) and path.is_file():
        return (_read_run(path).get("data") or {}).get("date")
    return datetime.date.today().isoformat()


def claim_folder(cfg: RunConfig) -> tuple[RunConfig, list[str]]:
    """Writes the config into the run's folder, whose lock the caller holds (`lock_folder`).

    Returns:
      The config, with the date that chat templates write (that of the run it goes on with, or
      today's), whose schedule stays laid over as many steps as when the run began, unless
      `schedule_steps` is given; and what of it differs from that of the run it goes on with, one
      line each, and which settings an older version began the run without.

    Raises:
      UsageError: it holds checkpoints of a run with another config, or files of something else.
      OSError: it cannot be written.
    """
    cfg = _pin_date(cfg)
    path, changes = cfg.out / RUN_FILE, []
    if all_steps(cfg.out) and path.is_file():
        old, versions = _catch_up(_read_run(path), cfg)
        cfg, words = _keep_schedule(cfg, old)
        changes = list(changed_fields(old, saved_fields(cfg)))
        fixed = [(key, was, now) for key, was, now in changes if not _is_free(key)]
        if fixed:
            key, was, now = fixed[0]
            raise UsageError(
                f"{cfg.out} holds a run with another config ({key} was {was!r}, is {now!r}); give "
                f"another out folder by out=FOLDER, or go on from its weights by model={cfg.out}"
            )
        in_words = ("schedule_steps",) if words else ()
        changes = [f"{key}: {was!r} -> {now!r}" for key, was, now in changes if key not in in_words]
        changes += words + versions
    elif not path.is_file() and cfg.out.is_dir():
        others = sorted(f.name for f in cfg.out.iterdir() if f.name not in (*OURS, ".lock"))
        if others:
            raise UsageError(f"{cfg.out} holds {others[0]}, no run; give a new folder by out=")
    processes.check_alike("the config", saved_fields(cfg))
    processes.by_one(lambda: _write_run(path, cfg))
    return cfg, changes


def _catch_up(old: Mapping[str, Any], cfg: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """What an older version wrote of a run, as this one would have, and what that means, said."""
    now, added, removed = catch_up(old, cfg)
    for fields in (now, added):
        fields.pop("processes", None)  # which is in no run.json
    parts = {
        "settings that the run began without have their defaults": added,
        "settings that there are no more have no effect": removed,
    }
    return now, [
        f"{words}: {', '.join(f'{key}={value!r}' for key, value in fields.items())}"
        for words, fields in parts.items()
        if fields
    ]


def _keep_schedule(cfg: RunConfig, old: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """The config with the horizon that the run began with, and what that means, in words."""
    was = old.get("schedule_steps") or old.get("steps") or cfg.horizon
    if cfg.schedule_steps is None and was != cfg.steps:
        words = (
            f"the learning rate keeps its {cfg.optim.schedule} schedule over {was} steps; "
            f"schedule_steps={cfg.steps} lays it over all {cfg.steps}"
        )
        return dataclasses.replace(cfg, schedule_steps=was), [words]
    done = max(all_steps(cfg.out))
    before = from_dict(OptimConfig, old["optim"]) if "optim" in old else cfg.optim
    rates = [
        float(make_schedule(optim, steps)(done))
        for optim, steps in ((before, was), (cfg.optim, cfg.horizon))
    ]
    if rates[0] == rates[1]:
        return cfg, []
    return cfg, [f"the learning rate of step {done + 1}: {rates[0]:.3g} -> {rates[1]:.3g}"]


def saved_steps(cfg: RunConfig) -> int | None:
    """The steps that a run's epochs were counted to be, where it goes on with as many."""
    path = cfg.out / RUN_FILE
    old = _read_run(path) if all_steps(cfg.out) and path.is_file() else {}
    return old.get("steps") if old.get("epochs") == cfg.epochs else None


def saved_fields(cfg: RunConfig) -> dict[str, Any]:
    """The config as run.json and checkpoints keep it: alike on all processes."""
    fields = to_dict(cfg)
    del fields["processes"]
    return fields


def _write_run(path: AnyPath, cfg: RunConfig) -> None:
    write_text(path, json.dumps(saved_fields(cfg), indent=2, allow_nan=False) + "\n")


def _read_run(path: AnyPath) -> dict[str, Any]:
    try:
        old = json.loads(path.read_text())
    except ValueError:  # no JSON, or no text
        old = None
    if not isinstance(old, dict):
        raise ValueError(
            f"{path} is damaged; delete it to go on with the run's checkpoints under this config"
        )
    return old


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has been trained on: tokens, those of them that are targets, and padding's share
    of the rows."""

    tokens: int
    targets: int
    padding: float


def count_trained(metrics: AnyPath, tokens_per_step: int) -> Trained | None:
    """Sums up the steps of a metrics file that changed anything; None where there are none."""
    records = read_jsonl(metrics) if metrics.exists() else []
    records = [r for r in records if "input_tokens" in r and "skipped" not in r]
    if not records:
        return None
    tokens, targets = (int(sum(r[name] for r in records)) for name in ("input_tokens", "tokens"))
    return Trained(tokens, targets, 1 - tokens / (len(records) * tokens_per_step))


def describe_data(
    report: Mapping[str, Any], trained: Trained | None, *, of_pairs: bool = False
) -> str:
    """What was trained on, and what became of the documents that were read, in one line.

    Args:
      report: of `Batches.report`; its documents run ahead of the batches by a packing window.
      trained: of the whole run; None: nothing was.
      of_pairs: whether a document is an image with captions for two towers.
    """
    if of_pairs:
        pairs = 0 if trained is None else trained.targets
        return f"data: trained on {pairs:,} pairs; read ahead up to {report['documents']:,}"
    cut = {name: report[name] for name in ("split", "truncated", "dropped") if report[name]}
    long = ", ".join(f"{number:,} {name}" for name, number in cut.items()) or "none"
    lost = f" ({report['lost']:,} targets lost)" if report["lost"] else ""
    parts = []
    if trained is not None:
        parts = [
            f"trained on {trained.tokens:,} tokens, {trained.targets:,} of them targets, of "
            f"{report['yielded']['documents']:,} documents",
            f"padding {trained.padding:.1%}",
        ]
    parts += [
        f"read ahead up to {report['documents']:,} documents of {report['tokens']:,} tokens",
        f"longer than the context: {long}{lost}",
        *([f"without a target: {report['empty']:,}"] if report["empty"] else []),
        *([f"images lost: {report['images_lost']:,}"] if report.get("images_lost") else []),
    ]
    return "data: " + "; ".join(parts)


def _is_free(key: str) -> bool:
    is_free = any(key == free or key.startswith(f"{free}.") for free in FREE)
    return is_free and key not in FIXED


def make_meta(
    cfg: RunConfig,
    hf_config: Mapping[str, Any],
    method: Any | None,
    training: Mapping[str, Any] | None = None,
    *,
    trains_all: bool = True,
) -> dict[str, Any]:
    """What each checkpoint says of its model, for `load_model` to rebuild it.

    Args:
      method: of the adapter that is trained.
      training: of `pretrained.training_settings`.
      trains_all: whether all weights of a model without an adapter are trained, and saved.

    Returns:
      base: path of the frozen weights, None where all weights are in the checkpoint; config: the
      Hugging Face config.json of the model, and training: what this does not hold; adapter: its
      settings or None; run: the whole config; versions.
    """
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    return {
        "format": 1,
        "base": cfg.model if cfg.adapter is not None or not trains_all else None,
        "config": dict(hf_config),
        "training": dict(training or {}),
        "adapter": to_dict(method),
        "run": saved_fields(cfg),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
