"""What a run is: `RunConfig`, the one thing that configs/*.py return, and the folder it owns.

The folder holds run.json (the resolved config), metrics.jsonl, tensorboard/, tokenizer/ and
checkpoints/. The one thing a reader would get wrong: a folder belongs to one config; the same
command goes on with it, and a command that would make other numbers of it is refused.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from llmprep_jax import processes
from llmprep_jax.config import UsageError, changed_fields, to_dict
from llmprep_jax.data import DataConfig
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.stack import REMAT_POLICIES
from llmprep_jax.peft import AnyMethod
from llmprep_jax.processes import Processes
from llmprep_jax.sharding import MeshSizes
from llmprep_jax.train.checkpoint import all_steps
from llmprep_jax.train.metrics import read_jsonl
from llmprep_jax.train.trainer import FitConfig

RUN_FILE = "run.json"
DTYPES = ("float32", "bfloat16", "float16")
# what may differ when a run goes on: where, how fast and how often, not what is computed
FREE = ("out", "steps", "accumulate", "log_every", "eval_every", "eval_batches", "eval_data")
FREE = (*FREE, "checkpoint", "mesh", "peak_flops", "loss_chunk", "compute.remat", "compute.unroll")
FREE = (*FREE, "data.paths", "data.prefetch", "data.threads", "optim.offload")


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
      adapter: a LoRA or LongLoRA that is trained in place of the model; None: all of it is.
      data: what it is trained on; data.batch_size rows of data.seq_len tokens a step.
      eval_data: what it is evaluated on, all splits of it; None: what data.holdout keeps back, if
        anything.
      eval_batches: at most so many; None: all.
      compute: dtypes, rematerialisation and unrolling. Weights are float32 masters with compute in
        bf16 for `dtype="bfloat16", param_dtype="float32"`.
      mesh: a name in configs/meshes.py, or sizes, as `mesh.fsdp=4 mesh.tensor=2`; None: one device.
      loss_chunk: positions of each row whose logits exist at one time; None: all.
      z_loss: weight of the squared logsumexp.
      processes: where this process stands among several; not saved with the run.
      out: the run's folder.
    """

    model: str | None = None
    architecture: Any | None = None
    tokenizer: str | None = None
    chat_template: pathlib.Path | None = None
    adapter: AnyMethod | None = None
    data: DataConfig
    eval_data: DataConfig | None = None
    eval_batches: int | None = None
    compute: Compute = dataclasses.field(default_factory=Compute)
    mesh: str | MeshSizes | None = None
    loss_chunk: int | None = None
    z_loss: float = 0.0
    processes: Processes = dataclasses.field(default_factory=Processes)
    out: pathlib.Path

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
            raise ValueError(
                "optim.lora_plus is for LoRA adapters: leave it or set adapter._type=LoRA"
            )
        _check_compute(self.compute)
        for name in ("eval_batches", "loss_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


def _check_compute(compute: Compute) -> None:
    for name in ("dtype", "matmul_dtype", "param_dtype"):
        value = getattr(compute, name)
        if value not in DTYPES and not (name == "matmul_dtype" and value is None):
            raise ValueError(f"compute.{name}={value!r}; the dtypes are {', '.join(DTYPES)}")
    remats = ("none", *REMAT_POLICIES)
    if compute.remat not in remats:
        raise ValueError(f"compute.remat={compute.remat!r}; the policies are {', '.join(remats)}")


def claim_folder(cfg: RunConfig) -> list[str]:
    """Makes the run's folder and writes the config into it.

    Returns:
      What of the config differs from that of the run it goes on with, one line each.

    Raises:
      UsageError: it holds checkpoints of a run with another config.
      OSError: it cannot be written.
    """
    path = cfg.out / RUN_FILE
    changes = []
    if all_steps(cfg.out) and path.is_file():
        old = _read_run(path)
        changes = list(changed_fields(old, saved_fields(cfg)))
        fixed = [(key, was, now) for key, was, now in changes if not _is_free(key)]
        if fixed:
            key, was, now = fixed[0]
            raise UsageError(
                f"{cfg.out} holds a run with another config ({key} was {was!r}, is {now!r}); give "
                "another out folder, or go on from its weights by model=PATH"
            )
    processes.check_alike("the config", saved_fields(cfg))
    processes.by_one(lambda: _write_run(path, cfg))
    return [f"{key}: {was!r} -> {now!r}" for key, was, now in changes]


def saved_fields(cfg: RunConfig) -> dict[str, Any]:
    """The config as run.json and checkpoints keep it: alike on all processes."""
    fields = to_dict(cfg)
    del fields["processes"]
    return fields


def _write_run(path: pathlib.Path, cfg: RunConfig) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(saved_fields(cfg), indent=2, allow_nan=False) + "\n")
    aside.replace(path)


def _read_run(path: pathlib.Path) -> dict[str, Any]:
    try:
        old = json.loads(path.read_text())
    except ValueError:  # no JSON, or no text
        old = None
    if not isinstance(old, dict):
        raise ValueError(
            f"{path} is damaged; delete it to go on with the run's checkpoints under this config"
        )
    return old


def describe_data(report: Mapping[str, Any], padding: float | None) -> str:
    """What became of the documents that were read, in one line.

    Args:
      report: of `Batches.report`; its documents run ahead of the batches by a packing window.
      padding: the share of the batches' tokens that was padding; None: not known.
    """
    cut = {name: report[name] for name in ("split", "truncated", "dropped") if report[name]}
    long = ", ".join(f"{number:,} {name}" for name, number in cut.items()) or "none"
    lost = f" ({report['lost']:,} targets lost)" if report["lost"] else ""
    parts = [
        f"read {report['documents']:,} documents, {report['tokens']:,} tokens",
        *([] if padding is None else [f"padding {padding:.1%}"]),
        f"longer than the context: {long}{lost}",
        *([f"without a target: {report['empty']:,}"] if report["empty"] else []),
    ]
    return "data: " + "; ".join(parts)


def padding_share(metrics: pathlib.Path, tokens_per_step: int) -> float | None:
    """The share of padding in all batches of a run, from its metrics file."""
    inputs = [record["input_tokens"] for record in read_jsonl(metrics) if "input_tokens" in record]
    return 1 - sum(inputs) / (len(inputs) * tokens_per_step) if inputs else None


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def make_meta(cfg: RunConfig, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """What each checkpoint says of its model, for `load_model` to rebuild it.

    Returns:
      base: path of the frozen weights, None where all weights are in the checkpoint; config: the
      Hugging Face config.json of the model; adapter: its settings or None; run: the whole config;
      versions.
    """
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    return {
        "format": 1,
        "base": cfg.model if cfg.adapter is not None else None,
        "config": dict(hf_config),
        "adapter": to_dict(cfg.adapter),
        "run": saved_fields(cfg),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
