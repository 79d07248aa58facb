"""Who is who among processes, before any is started: settings, clusters, and rows by sharding."""

import concurrent.futures
import threading
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from llmprep_jax import processes
from llmprep_jax.processes import Processes, cluster
from llmprep_jax.sharding import batch_shards, make_mesh, use_mesh
from llmprep_jax.train.batches import own_rows
from llmprep_jax.weights import receipt
from llmprep_jax.weights.gather import to_host


class Store(dict):
    """The key-value store of processes that are threads of this one."""

    def __init__(self):
        super().__init__()
        self.there = threading.Condition()

    def key_value_set(self, key, value):
        with self.there:
            self[key] = value
            self.there.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.there:
            assert self.there.wait_for(lambda: key in self, 10), "waited for what does not come"
            return self[key]


@pytest.fixture
def together(monkeypatch):
    """Runs a function as two processes; gives what each of them returns or raises."""
    store, own = Store(), threading.local()

    class State:
        client, num_processes = store, 2
        process_id = property(lambda self: own.index)

    class Numbers:
        def __next__(self):
            own.number += 1
            return own.number

    def run(work):
        def one(index):
            own.index, own.number = index, 0
            try:
                return work(index)
            except Exception as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))

    monkeypatch.setattr(processes, "distributed", types.SimpleNamespace(global_state=State()))
    monkeypatch.setattr(processes, "_numbers", Numbers())
    return run


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ValueError("a name twice"), "a name twice"),
        (TypeError("no array"), "TypeError: no array"),
        (MemoryError(), "MemoryError: "),
    ],
    ids=["OSError", "ValueError", "TypeError", "MemoryError"],
)
def test_whatever_fails_where_one_writes_reaches_all_and_none_waits(together, error, elsewhere):
    gathering = threading.Barrier(2)

    def tensors():
        for number in range(3):
            gathering.wait(10)  # as a gather of arrays does
            yield str(number), np.zeros(1)

    def write(tensors):
        next(tensors)
        raise error

    writer, other = together(lambda index: receipt._write_by_one(write, tensors()))
    assert (writer, str(other)) == (error, elsewhere)
    assert type(other) is (
        type(error) if isinstance(error, (OSError, ValueError)) else RuntimeError
    )


def test_a_failed_gather_leaves_processes_that_go_on_together(together):
    def work(index):
        def tensors():
            yield "a", np.zeros(1)
            raise ValueError("an array is gone")

        with pytest.raises(ValueError, match="an array is gone"):
            receipt._write_by_one(list, tensors())
        return processes.by_one(lambda: index)

    assert together(work) == [0, 0]


def test_a_result_that_is_no_json_is_an_error_of_all(together):
    writer, other = together(lambda index: processes.by_one(lambda: {1, 2}))
    assert (type(writer), type(other)) == (TypeError, RuntimeError)
    assert "set is not JSON serializable" in str(other)


SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "16", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("environment", "on_tpu", "name"),
    [
        ({}, False, None),
        (SLURM, False, "SLURM"),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, False, None),  # a job's shell, not its steps
        ({"OMPI_COMM_WORLD_SIZE": "2"}, False, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, False, "Kubernetes"),
        ({"KUBERNETES_SERVICE_HOST": "h"}, False, None),  # a notebook in a container
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, "GKE"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({}, True, "TPU pod"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
    ],
)
def test_a_cluster_is_known_by_its_environment(environment, on_tpu, name):
    assert cluster(environment, on_tpu) == name


def test_one_process_starts_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("started"))
    processes.start(Processes())
    processes.start(Processes("localhost:1", 1, 0))
    assert not processes.are_several()
    assert processes.is_writer()
    assert processes.by_one(lambda: [1]) == [1]
    processes.refuse_apart(None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"count": 2}, "together, not count alone; none of them on a cluster"),
        ({"coordinator": "h:1", "count": 2, "index": 2}, "index is 2; of 2 it is 0 to 1"),
        ({"coordinator": "h", "count": 2, "index": 0}, "give HOST:PORT of process 0"),
        ({"timeout": 1}, "timeout must be at least 5 seconds, not 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        Processes(**fields)
    assert words in str(error.value)


def test_processes_that_do_not_come_together_are_an_error_on_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED:\nBarrier timed out")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        processes.start(Processes("h:1", 2, 1, start_timeout=7))
    assert "within 7 s (1 of 2 at h:1: DEADLINE_EXCEEDED: Barrier timed out)" in str(error.value)


@pytest.mark.parametrize(
    ("axes", "count"),
    [({"tensor": 8}, 1), ({"fsdp": 8}, 8), ({"data": 2, "fsdp": 2, "tensor": 2}, 4)],
    ids=str,
)
def test_the_parts_of_a_batch_follow_from_the_mesh(axes, count):
    with use_mesh(make_mesh(axes)):
        assert batch_shards() == (count, tuple(range(count)))
        assert own_rows(16, 2) == list(range(16))
        if count == 8:
            with pytest.raises(ValueError, match="4 rows does not part over the mesh fsdp=8"):
                own_rows(8, 2)


@pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8]
)
def test_a_slice_comes_to_the_host_bit_by_bit(dtype):
    whole = np.random.default_rng(0).integers(
        0, 255, (3, 4, 8 * np.dtype(dtype).itemsize), np.uint8
    )
    whole = whole.view(dtype)
    mesh = make_mesh({"expert": 4, "fsdp": 2})
    for axes in (jax.P(None, "expert", "fsdp"), jax.P(None, ("expert", "fsdp")[0]), jax.P()):
        x = jax.device_put(whole, jax.sharding.NamedSharding(mesh, axes))
        for place in ((), (2,), (1, 3)):
            assert to_host(x, place).tobytes() == whole[place].tobytes()
    assert to_host(jnp.arange(6).reshape(2, 3), (1,)).tolist() == [3, 4, 5]
