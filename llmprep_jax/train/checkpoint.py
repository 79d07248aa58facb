"""Asynchronous Orbax checkpoints of a run, whole or not there at all.

One folder a step with five items: `params` (what is trained, nothing else: the frozen base stays
where it was loaded from, and `meta` says where), `optim` (moments, step, key), `ema`, `data` (the
place in the data, one for all processes) and `meta` (JSON from which the model can be rebuilt).
Orbax writes a step aside and renames it, so a kill leaves the last whole one. Saving does not copy;
the arrays are read while the next step runs, which therefore cannot reuse their memory and
allocates it anew, once a checkpoint.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llmprep_jax import processes
from llmprep_jax.config import settle
from llmprep_jax.remote import AnyPath, absolute, delete, is_remote
from llmprep_jax.sharding import on_devices
from llmprep_jax.train.offload import retype
from llmprep_jax.train.state import TrainState, path_name

FOLDER = "checkpoints"
_DELETED = ".deleted"
_PARTIAL = "*.orbax-checkpoint-tmp*"
_ARRAYS, _JSON = ("params", "optim", "ema"), ("data", "meta")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      every: steps between checkpoints; None: only at the end and on SIGTERM.
      keep_last: how many of the latest stay.
      keep_every: checkpoints at multiples of this stay for good; None: none do.
      keep_best: whether the one with the lowest eval_loss is written after its evaluation, and
        stays.
    """

    every: int | None = 500
    keep_last: int = 2
    keep_every: int | None = None
    keep_best: bool = False

    def __post_init__(self):
        settle(self)
        for name in ("every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


class Checkpoints:
    """The checkpoints of one run folder; use as a context, which waits for saves under way.

    Args:
      out: the run's folder.
      cfg: retention.
      meta: what `read_meta` returns later; JSON.

    Attributes:
      best: a step whose checkpoint stays, where the config keeps the best.

    Raises:
      OSError: the folder cannot be written.
    """

    def __init__(self, out: AnyPath, cfg: CheckpointConfig, meta: dict[str, Any]):
        self.folder, self._meta = absolute(out) / FOLDER, meta
        self._deletion: threading.Thread | None = None
        self.best: int | None = None
        _silence_orbax()
        processes.by_one(lambda: _prepare(self.folder))
        keep = [ocp.checkpoint_managers.LatestN(cfg.keep_last)]
        if cfg.keep_every:
            keep.append(ocp.checkpoint_managers.EveryNSteps(cfg.keep_every))
        if cfg.keep_best:
            keep.append(_Best(self))
        self._manager = _open_manager(
            self.folder,
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
            # renamed before it is deleted, so that a kill leaves no half of an old checkpoint
            todelete_subdir=None if is_remote(out) else _DELETED,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and processes.are_several():
            return  # a save under way ends with all processes, and the others wait for this one
        try:
            self.wait()
        except OSError:
            if kind is None:  # else the error under way is the one to tell of
                raise
        finally:
            with contextlib.suppress(ValueError, OSError, RuntimeError):  # told of by now
                self._manager.close()
            self._empty_bin()
            self._join_deletion()

    @property
    def latest(self) -> int | None:
        """The step of the last whole checkpoint."""
        return latest_step(self.folder.parent)

    def save(self, state: TrainState, data_state: Any) -> None:
        """Begins to save; returns as soon as the arrays may be donated.

        Raises:
          OSError: this or the checkpoint before it cannot be written; whole ones are untouched.
        """
        step = int(state.step)
        items = {
            **{name: ocp.args.PyTreeSave(tree) for name, tree in _to_items(state).items()},
            "data": ocp.args.JsonSave({"place": data_state}),
            "meta": ocp.args.JsonSave(self._meta | {"step": step}),
        }
        with self._explained():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._empty_bin()

    def wait(self) -> None:
        """Waits for a save under way.

        Raises:
          OSError: it failed.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises what went wrong in a save under way, without waiting for it."""
        with self._explained():
            self._manager.check_for_errors()

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Any]:
        """Reads a checkpoint into the shapes, dtypes and shardings of `abstract`.

        Args:
          step: which.
          abstract: of `abstract_of`, on the mesh that the run is on now.

        Returns:
          The state, and the data state that was saved with it.

        Raises:
          ValueError: the checkpoint is of another model or optimizer, or does not read.
        """
        path = self.folder / str(step)
        targets = _to_items(abstract)
        for name, target in targets.items():
            _compare(path, self._manager, name, target)
        args = {name: _restore_arrays(target) for name, target in targets.items()}
        with _readable(path):
            items = self._manager.restore(
                step, args=ocp.args.Composite(**args, data=ocp.args.JsonRestore())
            )
        restored = {name: retype(items[name]) for name in targets}
        return _from_items(restored, abstract), _place_in_data(path, items["data"])

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what Orbax raises into one line, and frees the space of the partial checkpoint."""
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:
            _silence_closed_loops()
            for partial in self.folder.glob(_PARTIAL):
                delete(partial)
            whole = all_steps(self.folder.parent)
            kept = f"whole are {', '.join(map(str, whole))}" if whole else "there is no earlier one"
            raise OSError(
                f"{self.folder}: a checkpoint could not be written ({_reason(error)}); {kept}; "
                "free space or give another out folder, and run again"
            ) from error

    def _empty_bin(self) -> None:
        """Deletes what Orbax put aside, in a thread: unlinking takes 0.1 s a GB."""
        self._join_deletion()
        if processes.is_writer() and (self.folder / _DELETED).is_dir():
            self._deletion = threading.Thread(target=delete, args=(self.folder / _DELETED,))
            self._deletion.start()

    def _join_deletion(self) -> None:
        if self._deletion is not None:
            self._deletion.join()


class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of `Checkpoints.best`."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [info.step == self._checkpoints.best for info in checkpoints]


def _open_manager(folder: AnyPath, **options: Any) -> ocp.CheckpointManager:
    # uncompressed: zstd takes 8 % off float32 weights and makes reading them three times as long
    arrays = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in _ARRAYS}
    texts = {name: ocp.JsonCheckpointHandler() for name in _JSON}
    return ocp.CheckpointManager(
        folder,
        item_handlers=arrays | texts,
        options=ocp.CheckpointManagerOptions(**options),
    )


def _prepare(folder: AnyPath) -> None:
    """Makes the folder, without what a killed run had not finished to write or to delete."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob(_PARTIAL), folder / _DELETED]:
        delete(path)


class _NotFromOrbax(logging.Filter):
    """Orbax logs tracebacks of errors that it also raises; a user gets the one line instead."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


def _silence_orbax() -> None:
    logger = logging.getLogger("absl")
    if not any(isinstance(f, _NotFromOrbax) for f in logger.filters):
        logger.addFilter(_NotFromOrbax())


@functools.cache
def _silence_closed_loops() -> None:
    """After an error, reads and writes still under way call back into Orbax's closed event loop."""
    shown = sys.unraisablehook

    def show(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = show


def _reason(error: BaseException) -> str:
    """The end of `OUT_OF_RANGE: Error writing "..": ..: No space left on device [..]`."""
    text = " ".join(str(error).split()).split(" [os_error_code")[0]
    return text.rsplit(": ", 1)[-1] or type(error).__name__


def _to_items(state: TrainState) -> dict[str, Any]:
    """A state as the arrays of a checkpoint's items; a key is saved as its numbers."""
    if isinstance(state.key, jax.Array):
        key = jax.random.key_data(state.key)
    else:
        data = jax.eval_shape(jax.random.key_data, state.key)
        key = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.key.sharding)
    items = {
        "params": state.params,
        "optim": {"step": state.step, "key": key, "opt_state": state.opt_state},
    }
    return items if state.ema is None else items | {"ema": state.ema}


def _from_items(items: dict[str, Any], abstract: TrainState) -> TrainState:
    optim = items["optim"]
    key = jax.random.wrap_key_data(optim["key"])
    params, ema = items["params"], items.get("ema")
    return TrainState(optim["step"], params, optim["opt_state"], ema, key)


def _restore_arrays(target: Any) -> ocp.args.PyTreeRestore:
    args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(target, restore_args=args)


def abstract_of(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, for `restore`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): tuple(leaf.shape) for path, leaf in flat}


def _compare(path: AnyPath, manager: ocp.CheckpointManager, name: str, target: Any) -> None:
    """Refuses a checkpoint whose arrays are not the ones wanted, naming the first of them."""
    if not (path / name).is_dir():
        raise ValueError(f"{path} holds no {name}; give the run another out folder")
    with _readable(path):
        saved = manager.item_metadata(int(path.name))[name]
    was, now = _shapes(saved.tree), _shapes(target)
    wrong = [key for key in dict.fromkeys([*now, *was]) if was.get(key) != now.get(key)]
    if wrong:
        key = wrong[0]
        raise ValueError(
            f"{path}: {name} {key} is {was.get(key, 'not there')} in the checkpoint and "
            f"{now.get(key, 'not there')} in this run ({len(wrong)} arrays differ); go on with the "
            "config that the run began with, or give another out folder"
        )


@contextlib.contextmanager
def _readable(path: AnyPath) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError, KeyError, RuntimeError) as error:
        _silence_closed_loops()
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path} does not read ({reason}); delete it to go on from the one before"
        ) from error


def _place_in_data(path: AnyPath, saved: dict[str, Any]) -> Any:
    """The data state of a checkpoint, also of one from before places were the same everywhere."""
    if "place" in saved:
        return saved["place"]
    if len(saved["processes"]) > 1:
        raise ValueError(
            f"{path} is of an earlier version, whose {len(saved['processes'])} processes each had "
            "a place of their own in the data; begin a new run from its weights by model=PATH"
        )
    return json.loads(saved["processes"][0])


def all_steps(out: AnyPath) -> list[int]:
    """The steps of a run folder's whole checkpoints, ascending."""
    folder = out / FOLDER
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def latest_step(out: AnyPath) -> int | None:
    """The step of a run folder's last whole checkpoint, or None."""
    return max(all_steps(out), default=None)


def read_meta(out: AnyPath, step: int | None = None) -> dict[str, Any]:
    """The meta that was saved with a checkpoint.

    Args:
      out: a run's folder.
      step: which checkpoint; None: the last.

    Raises:
      ValueError: there is no such checkpoint, or it does not read.
    """
    path = _checkpoint_path(out, step)
    with _readable(path), open_for_reading(path) as manager:
        return manager.restore(
            int(path.name), args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]


def read_params(
    out: AnyPath, abstract: Any, step: int | None = None, *, item: str = "params"
) -> Any:
    """The trained parameters of a checkpoint, as nested dicts.

    Args:
      abstract: the same tree with `shape`, `dtype` and `sharding` at the leaves.
      item: "params", or "ema" for their running average.

    Raises:
      ValueError: there is no such checkpoint, it is of another model, or it does not read.
    """
    path = _checkpoint_path(out, step)
    with open_for_reading(path) as manager:
        _compare(path, manager, item, abstract)
        with _readable(path):
            target = jax.tree.map(_on_devices, abstract)
            args = ocp.args.Composite(**{item: _restore_arrays(target)})
            # without a sharding, Orbax restores numpy arrays
            return jax.tree.map(jnp.asarray, manager.restore(int(path.name), args=args)[item])


def _on_devices(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_devices(x.sharding))


def _checkpoint_path(out: AnyPath, step: int | None) -> AnyPath:
    steps = all_steps(out)
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"checkpoint {step}"
        hint = f"; there are {', '.join(map(str, steps))}" if steps else ""
        raise ValueError(f"{out} holds no {wanted}{hint}")
    return absolute(out / FOLDER / str(steps[-1] if step is None else step))


@contextlib.contextmanager
def open_for_reading(path: AnyPath) -> Iterator[ocp.CheckpointManager]:
    """An Orbax manager that changes nothing in the folder of a checkpoint."""
    _silence_orbax()
    manager = _open_manager(path.parent, read_only=True)
    try:
        yield manager
    finally:
        manager.close()
