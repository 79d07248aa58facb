"""What holds in several processes, all in one go; one of the tests' separate processes.

    python -m tests.processes.laws FOLDER TASK [processes.count=2 ...]

FOLDER holds what `launch.make_files` makes; what was found goes to FOLDER/TASK-<index>.json.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np

import llmprep_jax as lp
from experiments import convert, evaluate, train
from llmprep_jax import cli, processes
from llmprep_jax.config import override, split_arguments
from llmprep_jax.processes import Processes
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.batches import own_rows, place_batch
from llmprep_jax.weights import receipt
from llmprep_jax.weights.gather import to_host


@dataclasses.dataclass(frozen=True)
class Settings:
    processes: Processes = dataclasses.field(default_factory=Processes)


def main(arguments: list[str]) -> None:
    (folder, task), overrides = split_arguments(arguments)
    settings = override(Settings(), overrides)
    processes.start(settings.processes)
    folder, index = pathlib.Path(folder), settings.processes.index or 0
    found = {"train": trained, "resume": resumed, "fail": failed}[task](folder, index)
    (folder / f"{task}-{len(jax.devices())}-{index}.json").write_text(json.dumps(found))


def run(folder: pathlib.Path, out: str, *overrides: str) -> None:
    train.main([str(folder / "config.py"), f"out={folder / out}", *overrides])


def trained(folder: pathlib.Path, index: int) -> dict[str, Any]:
    """Trains, saves and evaluates on 4 devices, of one process or of two."""
    name = f"{jax.process_count()}"
    run(folder, f"fsdp-{name}", "mesh=fsdp")
    run(folder, f"lora-{name}", "mesh=tensor", "adapter._type=LoRA", "adapter.rank=2", "steps=2")
    model = lp.load_model(folder / f"fsdp-{name}", mesh=make_mesh({"fsdp": 2, "tensor": 2}))
    both = ["mesh.fsdp=2", "mesh.tensor=2"]
    convert.main([str(folder / f"fsdp-{name}"), str(folder / f"saved-{name}"), *both])
    measured = folder / f"evaluated-{name}.json"
    text = [str(folder / f"saved-{name}"), str(folder / "text"), f"tokenizer={folder}/tokenizer"]
    sizes = ["data.seq_len=32", "data.batch_size=8", "data.source.part=paragraph", "max_batches=3"]
    evaluate.main([*text, *sizes, "mesh=fsdp", f"out={measured}"])
    found = {"gathered": gathers(), "not finite": not_finite(folder, index), **placed()}
    return found if name == "1" else found | {"full": full_disk(model, folder, index), **agreed()}


def gathers() -> bool:
    """Whether slices of a stack come to every host bit by bit, those over experts too."""
    whole = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(ml_dtypes.bfloat16)
    whole[1, 3, :2] = -0.0, np.nan
    mesh = make_mesh({"expert": 2, "fsdp": 2})
    sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "expert", "fsdp"))
    x = jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
    places = [(), (2,), (1, 3), (0, 1)]
    return all(to_host(x, place).tobytes() == whole[place].tobytes() for place in places)


def placed() -> dict[str, Any]:
    """Which rows are here under each mesh, and what their devices hold of 8 rows in 2 parts."""
    rows = np.arange(8, dtype=np.int32)[:, None] * np.ones(3, np.int32)
    found = {}
    for axes in ({"tensor": 4}, {"fsdp": 4}, {"data": 2, "tensor": 2}):
        with use_mesh(make_mesh(axes)):
            own = own_rows(8, 2)
            array = place_batch({"tokens": rows[own]}, 2)["tokens"]
            assert array.shape == (2, 4, 3)
            np.testing.assert_array_equal(to_host(array), rows.reshape(2, 4, 3))
            found["x".join(axes)] = own
    return {"rows": found}


@contextlib.contextmanager
def looked_at(look: Callable[[int, dict[str, np.ndarray]], None]) -> Iterator[None]:
    """Training whose batches `look` is given, with their numbers from 1, before they are used."""
    open_data = train.open_data

    def opened(*arguments: Any) -> Any:
        batches, evaluate = open_data(*arguments)
        numbers, kind = itertools.count(1), type(batches)

        class Looked(kind):
            def __next__(self) -> dict[str, np.ndarray]:
                batch = kind.__next__(self)
                look(next(numbers), batch)
                return batch

        batches.__class__ = Looked
        return batches, evaluate

    with mock.patch.object(train, "open_data", opened):
        yield


def not_finite(folder: pathlib.Path, index: int) -> str:
    """The error of a batch that is poisoned in the last process's rows alone."""

    def poison(number: int, batch: dict[str, np.ndarray]) -> None:
        if number == 2 and index == jax.process_count() - 1:
            batch["loss_mask"][-1] = np.inf

    with looked_at(poison):
        return message_of(lambda: run(folder, f"poisoned-{jax.process_count()}", "mesh=fsdp"))


def full_disk(model: Any, folder: pathlib.Path, index: int) -> str:
    """What every process is told when the one that writes finds the disk full."""

    def write(aside: pathlib.Path, tensors: Iterator, size: int) -> None:
        next(tensors)
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(receipt, "write_folder", write):
        return message_of(lambda: lp.save_model(model, folder / "full")).replace(str(folder), "")


def agreed() -> dict[str, Any]:
    """What processes agree on: the result or the error of one of them, and that they are alike."""

    def refuse() -> None:
        raise ValueError("said once")

    unlike = {"a": 1, "b": jax.process_index()}
    return {
        "result": processes.by_one(lambda: [processes.is_writer()]),
        "error": message_of(lambda: processes.by_one(refuse)),
        "unlike": message_of(lambda: processes.check_alike("the plan", unlike)),
        "apart": message_of(lambda: processes.refuse_apart(None)),
    }


def message_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def resumed(folder: pathlib.Path, index: int) -> dict[str, Any]:
    """Goes on from what two processes saved, on all devices that there are now."""
    count = len(jax.devices())
    run(folder, f"again-{count}", "mesh=fsdp", "steps=6")
    run(folder, f"tensor-{count}", "mesh=tensor", "steps=6")
    model = lp.load_model(folder / f"again-{count}")
    return {"embed": hashlib.sha256(np.asarray(model.embed.w[...]).tobytes()).hexdigest()}


def failed(folder: pathlib.Path, index: int) -> dict[str, Any]:
    """An error of process 1 alone, in the midst of training."""

    def fail(number: int, batch: dict[str, np.ndarray]) -> None:
        if number == 4 and index == 1:
            raise ValueError("the disk of host 1 is gone")

    with looked_at(fail):
        run(folder, "failed", "mesh=fsdp", "steps=1000")
    return {}


if __name__ == "__main__":
    cli.run(main)
