"""Several processes as one run: how they find each other, what one does for all, how they end.

`start` comes before anything that uses a device. On a cluster whose environment says who is who
(SLURM, GKE, Kubernetes jobs, TPU pods, Open MPI) it takes no settings; on plain machines each
process is given `coordinator`, `count` and `index`; and where neither is there, nothing happens. An
error in one process ends all of them: the one that was first prints it, the others end within
seconds with exit code 1. A process that is killed is missed after `timeout` seconds at the latest.
Whatever all processes do together (`share`, a jitted function on the mesh, a save) must be reached
by all of them; what one does alone must not fail without the others learning of it, which is what
`by_one` is for.
"""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import cloud_tpu_init, distributed  # whether there are TPUs; the key-value store

_ERROR, _ALIVE, _ENDED = "llmprep/error", "llmprep/alive/", "llmprep/ended/"
_BEAT = 1.0  # seconds between signs of life
_GOODBYE = 10.0  # seconds that process 0, which holds the store, waits for the others to end
_LONG_MS = 7 * 24 * 3600 * 1000  # a save may take hours; who dies in it is missed by `_Watch`
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Processes:
    """Where this process stands among those of a run; not part of what the run computes.

    Attributes:
      coordinator: HOST:PORT of process 0, a port that is free there; None: as the cluster says, or
        one process alone.
      count: how many there are.
      index: which one this is, from 0.
      timeout: seconds without a sign of life after which a process is taken for dead and the others
        end.
      start_timeout: seconds within which all must have come up.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    timeout: int = 60
    start_timeout: int = 300

    def __post_init__(self):
        for name in ("timeout", "start_timeout"):
            if getattr(self, name) < 5:
                raise ValueError(f"{name} must be at least 5 seconds, not {getattr(self, name)}")
        given = [name for name in ("coordinator", "count", "index") if self.is_given(name)]
        if given and len(given) < 3:
            raise ValueError(
                f"give processes.coordinator=HOST:PORT, processes.count and processes.index"
                f" together, not {' and '.join(given)} alone; none of them on a cluster that says"
                " who is who"
            )
        if not given:
            return
        if not re.fullmatch(r"\S+:\d+", self.coordinator):
            raise ValueError(f"coordinator is {self.coordinator!r}; give HOST:PORT of process 0")
        if not 0 <= self.index < self.count:
            raise ValueError(f"index is {self.index}; of {self.count} it is 0 to {self.count - 1}")

    def is_given(self, name: str) -> bool:
        return getattr(self, name) is not None


def cluster(environment: Mapping[str, str], on_tpu: bool | None = None) -> str | None:
    """The cluster that says who is who among several processes; None: this one is alone.

    Read from variables alone: nothing is started or asked over the network. On a TPU host without
    such variables JAX asks the metadata server how many hosts there are.

    Args:
      on_tpu: whether this host has TPUs; None: as JAX finds.
    """

    def is_several(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    # SLURM_NTASKS is there in a job's own shell too, where srun has not started anything yet
    if "SLURM_STEP_NODELIST" in environment and is_several("SLURM_NTASKS"):
        return "SLURM"
    if is_several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    if not (cloud_tpu_init.running_in_cloud_tpu_vm if on_tpu is None else on_tpu):
        return None
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "GKE" if "," in hosts or is_several("MEGASCALE_NUM_SLICES") else None
    return None if "TPU_SKIP_MDS_QUERY" in environment else "TPU pod"


def start(settings: Processes) -> None:
    """Joins the processes of a run, before any device is used; nothing where there is one.

    Raises:
      ValueError: they do not come together; says what was waited for.
    """
    given = settings.coordinator is not None
    name = "plain machines" if given else cluster(os.environ)
    if distributed.global_state.client is not None or name is None or settings.count == 1:
        return
    try:
        jax.distributed.initialize(
            settings.coordinator,
            settings.count,
            settings.index,
            initialization_timeout=settings.start_timeout,
            # a backstop: `_Watch` misses a process sooner, and ends with one line
            heartbeat_timeout_seconds=2 * settings.timeout,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if name == "TPU pod" and distributed.global_state.client is None:
            return  # a host without a metadata server is alone
        reason = " ".join(str(error).split())[:200]
        place = f"{settings.index} of {settings.count} at {settings.coordinator}" if given else name
        raise ValueError(
            f"the processes did not come together within {settings.start_timeout} s"
            f" ({place}: {reason}); start all of them with one coordinator that each can reach"
        ) from None
    if are_several():
        _Watch.begin(settings.timeout)


def are_several() -> bool:
    """Whether this process is one of several."""
    return distributed.global_state.num_processes > 1


def is_writer() -> bool:
    """Whether this process is the one that writes and prints for all."""
    return distributed.global_state.process_id == 0


def refuse_apart(mesh: Any) -> None:
    """Refuses several processes without a mesh, each of which would compute the same by itself.

    Raises:
      ValueError: there are several and the mesh is None.
    """
    if mesh is None and are_several():
        count = distributed.global_state.num_processes
        raise ValueError(
            f"{count} processes without a mesh would each run by itself; give mesh=fsdp, or another"
            " mesh over all devices"
        )


def by_one(work: Callable[[], Any]) -> Any:
    """Runs `work` on one process and gives all of them its result, which must be JSON.

    All processes call this; the others wait.

    Raises:
      OSError, ValueError: on all processes, what `work` raised.
      RuntimeError: on the others, where it raised anything else, which is named.
    """
    if not are_several():
        return work()
    client, key = distributed.global_state.client, f"llmprep/by_one/{next(_numbers)}"
    if is_writer():
        error: Exception | None = None
        try:
            outcome = json.dumps({"result": work()})
        except Exception as failure:  # whatever it is, the others wait for it
            outcome, error = json.dumps({"error": _described(failure)}), failure
        client.key_value_set(key, outcome)
        if error is not None:
            raise error
    outcome = json.loads(client.blocking_key_value_get(key, _LONG_MS))
    if "error" in outcome:
        kind, arguments = outcome["error"]
        raise _KINDS[kind](*arguments)
    return outcome["result"]


_KINDS = {kind.__name__: kind for kind in (OSError, ValueError, RuntimeError)}


def _described(error: Exception) -> tuple[str, list[Any]]:
    """An error as JSON; one of the system keeps its number, from which the remedy follows."""
    if isinstance(error, ValueError):
        return "ValueError", [str(error)]
    if not isinstance(error, OSError):
        return "RuntimeError", [f"{type(error).__name__}: {error}"]
    if error.errno is None:
        return "OSError", [str(error)]
    return "OSError", [error.errno, error.strerror, error.filename and str(error.filename)]


def check_alike(what: str, value: Any) -> None:
    """Refuses a start in which the processes were not told the same.

    Args:
      what: named in the message, e.g. "the config". value: JSON.

    Raises:
      ValueError: on the processes that differ from process 0.
    """
    own, first = json.loads(json.dumps(value)), by_one(lambda: value)
    if own != first:
        keys = [key for key in first if own.get(key) != first[key]] if isinstance(own, dict) else []
        shown = f" ({keys[0]}: {own.get(keys[0])!r} here, {first[keys[0]]!r} there)" if keys else ""
        raise ValueError(
            f"{what} of process {distributed.global_state.process_id} is not that of process 0"
            f"{shown}; start all processes with the same command"
        )


def is_first_to_fail(message: str) -> bool:
    """Tells the other processes of an error here; False where another one's came first."""
    if not are_several():
        return True
    own = {"process": distributed.global_state.process_id, "message": message}
    try:
        distributed.global_state.client.key_value_set(_ERROR, json.dumps(own))
    except jax.errors.JaxRuntimeError:  # the name is taken, or process 0 is gone with the store
        return False
    return True


def leave(code: int) -> None:
    """Ends this process after an error; returns where it is alone.

    Without the usual clean-up, which would wait for the others, who wait for this one.
    """
    if not are_several():
        return
    client = distributed.global_state.client
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        if is_writer():  # the store ends with it, so it goes last
            end, others = time.monotonic() + _GOODBYE, distributed.global_state.num_processes - 1
            while time.monotonic() < end and len(client.key_value_dir_get(_ENDED)) < others:
                time.sleep(0.1)
        else:
            client.key_value_set(f"{_ENDED}{distributed.global_state.process_id}", "")
    os._exit(code)


class _Watch(threading.Thread):
    """Gives signs of life, ends this process when another has failed, and misses dead ones."""

    def __init__(self, timeout: int):
        super().__init__(daemon=True, name="watch over the processes")
        self._client = distributed.global_state.client
        self._index = distributed.global_state.process_id
        self._timeout, self._over = timeout, threading.Event()
        now = time.monotonic()
        self._seen = {str(i): ("", now) for i in range(distributed.global_state.num_processes)}

    @classmethod
    def begin(cls, timeout: int) -> None:
        """Starts it, and has it end before JAX's own connection does."""
        watch = cls(timeout)
        watch.start()
        atexit.register(watch.end)

    def end(self) -> None:
        self._over.set()
        self.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._beat("done")
        jax.distributed.shutdown()

    def run(self) -> None:
        for number in itertools.count():
            if self._over.wait(_BEAT):
                return
            try:
                self._beat(str(number))
                failed = self._failed()
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone; JAX ends this process for it
            if failed is not None:
                if failed["process"] != self._index:  # else the error is being printed here
                    leave(1)
                return

    def _beat(self, sign: str) -> None:
        self._client.key_value_set(f"{_ALIVE}{self._index}", sign, allow_overwrite=True)

    def _failed(self) -> dict[str, Any] | None:
        """The error of a process, if one has failed; process 0 looks for dead ones too."""
        if self._index == 0:
            self._miss()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is none
            return json.loads(self._client.key_value_try_get(_ERROR))
        return None

    def _miss(self) -> None:
        now = time.monotonic()
        for key, sign in self._client.key_value_dir_get(_ALIVE):
            index = key.rsplit("/", 1)[-1]
            if sign == "done" or sign != self._seen[index][0]:
                self._seen[index] = (sign, now)
        late = [i for i, (sign, at) in self._seen.items() if now - at > self._timeout]
        late = [index for index in late if self._seen[index][0] != "done"]
        if late:
            message = (
                f"process {late[0]} has given no sign of life for {self._timeout} s; look at its"
                " own output and machine, and run the same command again to go on"
            )
            if is_first_to_fail(message):
                print(f"error: {message}", file=sys.stderr)
            leave(1)
