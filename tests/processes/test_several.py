"""Two and four processes of two CPU devices each, joined by gloo, against one process.

Slow: each process imports everything anew and its devices share two cores. One launch serves many
tests.
"""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import pytest

import llmprep_jax as lp
from tests.processes.launch import environment, free_port, job, losses, make_files, slurm
from tests.train.toy import params_of

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
LAWS = "tests.processes.laws"
SECONDS = 500  # that a launch may take on a busy machine; an idle one needs a tenth
MISSED = 10  # seconds after which a process that says nothing is taken for dead, here
END = MISSED + 30  # in which the others must have ended


def results(folder: pathlib.Path, task: str, devices: int) -> list[dict]:
    """What each process found, by index."""
    files = sorted(folder.glob(f"{task}-{devices}-*.json"))
    return [json.loads(file.read_text()) for file in files]


def launch(folder, count, task, devices=2) -> None:
    logs = folder / f"log-{task}-{count}"
    with job(logs, count, LAWS, str(folder), task, devices=devices) as running:
        for ended in running.wait(SECONDS):
            assert ended.code == 0, ended.err
            assert "Traceback" not in ended.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process of four devices and two of two each have trained, saved and found."""
    folder = make_files(tmp_path_factory.mktemp("files"))
    launch(folder, 1, "train", devices=4)
    (folder / "alone.json").write_text(json.dumps(results(folder, "train", 4)[0]))
    launch(folder, 2, "train")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return results(folder, "train", 4)


@pytest.mark.parametrize("name", ["fsdp", "lora"])
def test_two_processes_train_as_one_does(folder, name):
    """Gloo adds in another order than one process does: weights differ in the last bit."""
    alone, two = [[*losses(folder / f"{name}-{count}").values()] for count in (1, 2)]
    assert two == pytest.approx(alone, rel=1e-6)
    assert len(alone) == {"fsdp": 4, "lora": 2}[name]


def test_processes_along_the_tensor_axis_have_the_whole_batch(found):
    assert [process["rows"] for process in found] == [
        {"tensor": [*range(8)], "fsdp": [0, 1, 4, 5], "dataxtensor": [0, 1, 4, 5]},
        {"tensor": [*range(8)], "fsdp": [2, 3, 6, 7], "dataxtensor": [2, 3, 6, 7]},
    ]


def test_slices_of_stacks_over_processes_come_to_each_host(found):
    assert [process["gathered"] for process in found] == [True, True]


def test_what_two_processes_save_is_what_one_saves(folder):
    run, one, two = [
        params_of(lp.load_model(folder / name)) for name in ("fsdp-2", "saved-1", "saved-2")
    ]
    chex.assert_trees_all_equal(two, run)
    chex.assert_trees_all_close(two, one, atol=1e-6, rtol=0)
    receipt = json.loads((folder / "saved-2" / "llmprep_receipt.json").read_text())
    assert receipt["measured_difference"] <= 1e-5
    names = {path.name for path in (folder / "lora-2" / "adapter").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "llmprep_receipt.json"}
    assert not [path for path in folder.rglob("*") if path.name.startswith(".saved")]


def test_two_processes_evaluate_as_one_does(folder):
    one, two = [json.loads((folder / f"evaluated-{n}.json").read_text()) for n in (1, 2)]
    assert two["tokens"] == one["tokens"]
    assert two["nll"] == pytest.approx(one["nll"], abs=1e-6)


def test_the_config_of_a_run_does_not_tell_of_its_processes(folder):
    one, two = [(folder / f"fsdp-{n}" / "run.json").read_text() for n in (1, 2)]
    assert two.replace("fsdp-2", "fsdp-1") == one
    assert "coordinator" not in two


def test_a_loss_that_is_not_finite_names_its_documents_whoever_read_them(folder, found):
    alone = json.loads((folder / "alone.json").read_text())["not finite"]
    assert alone.startswith("step 2: loss nan")
    assert [process["not finite"] for process in found] == [alone, alone]


def test_an_error_of_the_process_that_writes_is_raised_by_all(folder, found):
    words = "cannot write /full: No space left on device; free some space or choose another place"
    assert [process["full"] for process in found] == [words, words]
    assert not (folder / "full").exists()
    assert [process["error"] for process in found] == ["said once", "said once"]


def test_processes_agree_or_are_refused(found):
    assert [process["result"] for process in found] == [[True], [True]]
    assert [process["unlike"] for process in found] == [
        "",
        "the plan of process 1 is not that of process 0 (b: 1 here, 0 there); start all processes"
        " with the same command",
    ]
    apart = "2 processes without a mesh would each run by itself; give mesh=fsdp, or another mesh"
    assert all(process["apart"].startswith(apart) for process in found)


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.grid)])
def test_a_run_of_two_processes_goes_on_with_another_number_of_them(folder, count):
    """Saved at step 2; steps 3 and 4 are known from the two processes' own going on."""
    devices = max(4, 2 * count)
    for name in ("again", "tensor"):
        shutil.copytree(folder / "fsdp-2", folder / f"{name}-{devices}")
        shutil.rmtree(folder / f"{name}-{devices}" / "checkpoints" / "4")
    launch(folder, count, "resume", devices=devices // count)
    whole = losses(folder / "fsdp-2")
    again, tensor = [losses(folder / f"{name}-{devices}") for name in ("again", "tensor")]
    assert sorted(again) == sorted(tensor) == [1, 2, 3, 4, 5, 6]
    for other in (again, tensor):
        assert [other[step] for step in whole] == pytest.approx([*whole.values()], rel=1e-6)
    assert len({process["embed"] for process in results(folder, "resume", devices)}) == 1


def test_an_error_on_one_process_ends_all_and_is_said_once(folder):
    with job(folder / "log-fail", 2, LAWS, str(folder), "fail") as running:
        ended = running.wait(SECONDS)
    assert [process.code for process in ended] == [1, 1]
    said = "".join(process.err for process in ended)
    assert said.count("error: ") == 1
    assert "error: the disk of host 1 is gone" in ended[1].err
    assert "Traceback" not in said


def test_processes_that_were_told_different_things_do_not_start(folder):
    arguments = [str(folder / "config.py"), f"out={folder}/unlike", "mesh=fsdp"]
    with job(
        folder / "log-unlike", 2, "experiments.train", *arguments, own=[["seed=0"], ["seed=1"]]
    ) as running:
        ended = running.wait(SECONDS)
    assert [process.code for process in ended] == [1, 1]
    said = "".join(process.err for process in ended)
    assert said.count("error: ") == 1
    assert "the config of process 1 is not that of process 0 (seed: 1 here, 0 there)" in said


def kill_one(arguments: list[str], out: pathlib.Path, killed: int, logs: pathlib.Path) -> int:
    """Kills one of two processes, after which the other must end; the last step that is saved."""
    with job(
        logs,
        2,
        "experiments.train",
        *arguments,
        "steps=5000",
        "checkpoint.every=3",
        timeout=MISSED,
    ) as running:
        wait_for_step(out, 5, running)
        running.processes[killed].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        ended = running.wait(END)
        print(f"the other one ended after {time.monotonic() - begin:.1f} s")
    other = ended[1 - killed]
    assert other.code not in (0, None)
    assert other.err.count("Traceback") == 0
    done = max(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert done >= 3
    return done


def train_arguments(folder: pathlib.Path, out: pathlib.Path) -> list[str]:
    return [str(folder / "config.py"), f"out={out}", "mesh=fsdp"]


def test_the_others_end_when_the_one_that_leads_is_killed(folder, tmp_path):
    out = tmp_path / "run"
    assert kill_one(train_arguments(folder, out), out, 0, tmp_path / "log") >= 3


# two processes killed, and two that go on
@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.grid), 1])
def test_the_others_end_when_one_is_killed_and_the_run_goes_on_by_ssh(folder, killed, tmp_path):
    out = tmp_path / "run"
    arguments = train_arguments(folder, out)
    done = kill_one(arguments, out, killed, tmp_path / "log")
    before = losses(out)
    # the launcher over ssh, with a program in its place that runs the command here
    local = tmp_path / "ssh"
    local.write_text('#!/usr/bin/env bash\nshift\nexec bash -c "$1"\n')
    local.chmod(0o755)
    settings = {"HOSTS": "localhost 127.0.0.1", "SSH": str(local), "CODE": str(tmp_path)}
    settings |= {"PORT": str(free_port()), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    resumed = subprocess.run(
        [ROOT / "tpu_scripts" / "ssh_hosts.sh", "resume", *arguments, f"steps={done + 2}"],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed from step {done}" in resumed.stdout
    after = losses(out)
    assert sorted(after) == [*range(1, done + 3)]
    # the same mesh and processes: bit for bit, what was lost of the killed run too
    assert all(before[step] == after[step] for step in before.keys() & after.keys())


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.grid)], ids=str
)
def test_a_signal_to_one_process_saves_and_ends_all_of_a_cluster(folder, number, tmp_path):
    """The processes find each other by SLURM's variables alone."""
    out = tmp_path / "run"
    more = ["steps=5000", "checkpoint.every=100000"]
    arguments = [*train_arguments(folder, out), *more]
    with job(tmp_path / "log", 2, "experiments.train", *arguments, cluster=slurm) as running:
        wait_for_step(out, 3, running)
        running.processes[1].send_signal(number)
        ended = running.wait(SECONDS)
    assert [process.code for process in ended] == [0, 0]
    assert "stopped by SIGTERM" in ended[0].out
    (saved,) = [path.name for path in (out / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(losses(out)) == int(saved)


def wait_for_step(out: pathlib.Path, step: int, running) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for process in running.processes:
            assert process.poll() is None, running.ended()
        if (out / "metrics.jsonl").exists() and max(losses(out), default=0) >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step} after {SECONDS} s: {running.ended()}")
