"""Saving a folder that is known to be right before it is put in place.

Everything is written into a folder aside, re-opened and compared with what is in memory; only if
that holds does it take the place of what stood there, with a receipt beside the weights. Weights
that stood there stay whole until the new ones are, whatever fails, and files of another kind (a
README, a tokenizer that is not written anew) move over. A store renames no folders, so there it is
done file by file.
"""

import ctypes
import datetime
import functools
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from llmprep_jax import processes, remote
from llmprep_jax.remote import AnyPath
from llmprep_jax.weights.gather import to_host
from llmprep_jax.weights.safetensors import (
    beside,
    cannot_write,
    is_weights,
    write_file,
    write_folder,
)

RECEIPT = "llmprep_receipt.json"


def save_folder(
    folder: str | AnyPath,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    verify: Callable[[Path], float],
    tolerance: float,
    extra_files: Callable[[Path], None] | None = None,
    config_name: str = "config.json",
    weights_name: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> AnyPath:
    """Writes config and tensors, verifies them, and puts the folder in place.

    Several processes call this together, on a folder that all of them see: all gather the tensors
    and verify, one writes.

    Args:
      verify: given the written folder, re-opens it and returns the measured difference.
      tolerance: the largest difference that is not drift.
      extra_files: writes what else belongs into the folder (a tokenizer).
      weights_name: one file of this name instead of model.safetensors or shards (adapters).

    Raises:
      ValueError: the difference is beyond the tolerance, or not finite; nothing was put in place.
      OSError: the folder cannot be written; nothing was put in place.
    """

    def write(aside: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        _write_json(aside / config_name, config)
        if weights_name is None:
            write_folder(aside, tensors, max_shard_bytes)
        else:
            write_file(aside / weights_name, dict(tensors))
        if extra_files is not None:
            extra_files(aside)

    save = functools.partial(_save, tensors=tensors, write=write, tolerance=tolerance)
    if remote.is_remote(folder):
        return _save_remote(remote.as_path(folder), save, verify)
    return save(Path(folder).resolve(), verify)


def _save(
    folder: Path,
    verify: Callable[[Path], float],
    *,
    tensors: Iterable[tuple[str, np.ndarray]],
    write: Callable[[Path, Iterable[tuple[str, np.ndarray]]], None],
    tolerance: float,
) -> Path:
    """As `save_folder`, on this machine."""
    aside, dtypes, in_place = Path(processes.by_one(lambda: str(_make_aside(folder)))), set(), False

    def put_in_place() -> None:
        _write_json(aside / RECEIPT, _receipt(tolerance, difference, sorted(dtypes)))
        _sync(aside)
        _swap(aside, folder)

    try:
        _write_by_one(functools.partial(write, aside), _noting_dtypes(tensors, dtypes))
        difference = float(verify(aside))
        _refuse_drift(folder, difference, tolerance)
        processes.by_one(put_in_place)
        in_place = True
        processes.by_one(lambda: _take_over(aside, folder))
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        if not in_place and processes.is_writer():  # else what is left there is somebody's
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def _save_remote(
    folder: epath.Path, save: Callable[..., Path], verify: Callable[[Any], float]
) -> epath.Path:
    """Saves here, copies that aside there, verifies what is there, and puts it in place.

    File by file, since a store renames no folders: who reads at that moment may see both.
    """
    scratch = Path(processes.by_one(tempfile.mkdtemp))
    aside = folder.parent / f".{folder.name}.{scratch.name}"

    def verify_there(written: Path) -> float:
        processes.by_one(lambda: remote.upload(written, aside))
        return verify(str(aside))

    try:
        saved = save(scratch / "saved", verify_there)
        processes.by_one(lambda: _put_there(saved, folder))
    except OSError as error:
        raise cannot_write(folder, error) from error
    finally:
        remote.forget(aside)
        if processes.is_writer():
            remote.delete(aside)
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _put_there(saved: Path, folder: epath.Path) -> None:
    """Copies a saved folder, and deletes the weights that it replaces."""
    remote.upload(saved, folder)
    with remote.reached(folder):
        for path in folder.iterdir():
            if is_weights(path.name) and not (saved / path.name).exists():
                path.unlink()


def _make_aside(folder: Path) -> Path:
    """An empty folder beside the one that is to be written."""
    if folder.exists() and not folder.is_dir():
        raise OSError(f"cannot write {folder}: it is a file; choose another place")
    aside = beside(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        raise cannot_write(folder, error) from error
    return aside


def _write_by_one(
    write: Callable[[Iterator[tuple[str, np.ndarray]]], None],
    tensors: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Has one process write tensors that all of them gather, to the last one whatever happens."""
    error: Exception | None = None
    if processes.is_writer():
        try:
            write(tensors)
        except Exception as failure:  # whatever it is, the others gather on
            error = failure
    if processes.are_several():
        try:
            for _ in tensors:  # by those that do not write, and after an error
                pass
        except Exception as failure:
            error = error or failure

    def outcome() -> None:
        if error is not None:
            raise error

    processes.by_one(outcome)
    outcome()  # of a process that failed to gather, alone


def _refuse_drift(folder: Path, difference: float, tolerance: float) -> None:
    if not difference <= tolerance:
        raise ValueError(
            f"{folder} was not saved: re-opened, it differs from the live model by"
            f" {difference:.3g}, more than {tolerance:.3g}; save in a wider dtype, or report it"
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _noting_dtypes(
    tensors: Iterable[tuple[str, np.ndarray]], dtypes: set[str]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in tensors:
        dtypes.add(str(array.dtype))
        yield name, array


def _sync(folder: Path) -> None:
    """Has the disk keep the names in a folder, and the small files whose writer did not ask it."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(aside: Path, folder: Path) -> None:
    """Puts `aside` in place; a folder that stood there is then at `aside`.

    In one step where the system can (Linux), else in three renames.
    """
    if not folder.exists():
        os.replace(aside, folder)
        return
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(aside), os.fsencode(folder)
    if rename is not None and rename(at_cwd, names[0], at_cwd, names[1], exchange) == 0:
        return
    old = beside(folder)
    os.replace(folder, old)
    try:
        os.replace(aside, folder)
    except OSError:
        os.replace(old, folder)
        raise
    os.replace(old, aside)


def _take_over(old: Path, folder: Path) -> None:
    """Moves into the folder what the old one held besides weights and what was written anew."""
    for path in list(old.iterdir()) if old.exists() else ():
        if not is_weights(path.name) and not (folder / path.name).exists():
            os.replace(path, folder / path.name)
    shutil.rmtree(old, ignore_errors=True)


def _receipt(tolerance: float, difference: float, dtypes: list[str]) -> dict[str, Any]:
    versions = {}
    for package in ("llmprep_jax", "jax", "flax", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "compared": "outputs of the saved and the live model on a fixed probe",
        "tolerance": tolerance,
        "measured_difference": difference,
        "dtypes": dtypes,
        "versions": versions,
        "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def probe_difference(model: nnx.Module, other: nnx.Module) -> float:
    """The largest difference of two models' outputs on fixed inputs, relative to the largest of
    each."""
    ours, theirs = probe(model), probe(other)
    differences = [
        np.abs(x - theirs[name]).max() / max(np.abs(x).max(), 1e-30) for name, x in ours.items()
    ]
    return float(np.max(differences))  # NaN where one is


def probe(model: nnx.Module) -> dict[str, np.ndarray]:
    """A model's outputs on fixed inputs."""
    return {name: to_host(x) for name, x in _probe(model).items()}


@jax.jit
def _probe(model: nnx.Module) -> dict[str, jax.Array]:
    return model.probe()
