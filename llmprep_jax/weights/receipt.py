"""Saving a folder that is known to be right before it is put in place.

Everything is written into a folder aside, re-opened and compared with what is in memory; only if that holds
does it replace what stood there, with a receipt beside the weights. The one thing a reader would get wrong:
an older folder of the same name stays whole until the new one is, whatever fails.
"""

import datetime
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.weights.safetensors import write_file, write_folder

RECEIPT = "llmprep_receipt.json"


def save_folder(
    folder: str | Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    verify: Callable[[Path], float],
    tolerance: float,
    extra_files: Callable[[Path], None] | None = None,
    config_name: str = "config.json",
    weights_name: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes config and tensors, verifies them, and puts the folder in place.

    Args:
      verify: given the written folder, re-opens it and returns the measured difference.
      tolerance: the largest difference that is not drift.
      extra_files: writes what else belongs into the folder (a tokenizer).
      weights_name: one file of this name instead of model.safetensors or shards (adapters).

    Raises:
      ValueError: the difference is beyond the tolerance, or not finite; nothing was put in place.
      OSError: the folder cannot be written.
    """
    folder = Path(folder).absolute()
    aside = _make_aside(folder)
    try:
        (aside / config_name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if weights_name is None:
            write_folder(aside, tensors, max_shard_bytes)
        else:
            write_file(aside / weights_name, dict(tensors))
        if extra_files is not None:
            extra_files(aside)
        difference = float(verify(aside))
        if not difference <= tolerance:
            raise ValueError(
                f"{folder} was not saved: re-opened, it differs from the live model by {difference:.3g},"
                f" more than {tolerance:.3g}"
            )
        receipt = _receipt(tolerance, difference)
        (aside / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
        _put_in_place(aside, folder)
    except OSError as error:
        raise OSError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _make_aside(folder: Path) -> Path:
    if folder.is_file():
        raise OSError(f"cannot write {folder}: it is a file")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OSError(f"cannot write {folder}: {error.strerror}") from error
    aside.chmod(0o755)
    return aside


def _put_in_place(aside: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(aside, folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    os.replace(folder, old)  # onto an empty folder
    try:
        os.replace(aside, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _receipt(tolerance: float, difference: float) -> dict[str, Any]:
    versions = {}
    for package in ("llmprep_jax", "jax", "flax", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "compared": "logits of the saved and the live model on a fixed probe",
        "tolerance": tolerance,
        "measured_difference": difference,
        "versions": versions,
        "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def probe_difference(model: nnx.Module, other: nnx.Module) -> float:
    """The largest difference of two models' logits on a fixed probe, as a share of the largest logit."""
    rows = np.random.default_rng(0).integers(0, model.cfg.vocab_size, (2, 24), dtype=np.int32)
    ours, theirs = [np.asarray(_probe(each, jnp.asarray(rows))) for each in (model, other)]
    return float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-30))


@jax.jit
def _probe(model: nnx.Module, tokens_BT: jax.Array) -> jax.Array:
    return model(tokens_BT).logits
