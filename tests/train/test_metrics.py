"""Lines that survive a kill, event files that TensorBoard reads, and the bar."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from llmprep_jax.train.flops import Flops
from llmprep_jax.train.metrics import (
    JsonLines,
    Progress,
    TensorBoard,
    memory,
    read_jsonl,
)
from llmprep_jax.train.monitor import Monitor, NonFiniteError
from tests.full_disk import disk_for_files_of


def test_memory_is_this_processes():
    ballast = np.ones(2**27, np.uint8)
    assert 0.125 < memory()["rss_gib"] < 64
    assert ballast[-1] == 1


def test_lines_after_the_resumed_step_and_broken_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": i, "loss": i / 8} for i in range(1, 7)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 7, "lo')
    lines = JsonLines(path, step=4)
    lines.write({"step": 5, "loss": 0.1})
    assert read_jsonl(path) == [*records[:4], {"step": 5, "loss": 0.1}]  # readable while open
    lines.close()
    JsonLines(path, step=0).close()
    assert read_jsonl(path) == []


def test_numbers_without_a_json_word_are_null(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1, "loss": math.nan})
    lines.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None}]


def test_float32_losses_survive_the_file_bit_for_bit(tmp_path):
    loss = np.float32(1.0) / np.float32(3.0)
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    lines.write({"step": 1, "loss": loss.item()})
    lines.close()
    assert np.float32(read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"]) == loss


def test_tensorboard_reads_what_is_written(tmp_path):
    board = TensorBoard(tmp_path, 2)
    board.write({"step": 3, "loss": 0.5, "note": "text is left out"})
    board.close()
    (file,) = tmp_path.iterdir()
    events = list(EventFileLoader(str(file)).Load())
    assert [event.session_log.status for event in events if event.HasField("session_log")] == [1]
    (scalars,) = [event for event in events if event.HasField("summary")]
    (value,) = scalars.summary.value
    assert (scalars.step, value.tag) == (3, "loss")
    assert value.tensor.float_val[0] == 0.5


def test_the_bar_shows_loss_speed_and_eta_on_a_terminal():
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=120)
    progress = Progress(10, 0, console)
    progress.phase("compiling")
    progress.phase("training")
    progress.update(4, {"loss": 2.5, "tokens_per_s": 1234.0, "mfu": 0.25}, 3661.0)
    progress.close()
    for words in ("training", "4/10", "loss 2.5000", "1,234 tok/s", "MFU 25.0%", "eta 1:01:01"):
        assert words in out.getvalue()


def test_lines_stand_in_for_the_bar_in_a_file():
    out = io.StringIO()
    progress = Progress(100, 0, rich.console.Console(file=out, width=20))
    progress.phase("compiling")
    for step in range(1, 101):
        progress.update(step, {"loss": 1.0, "tokens_per_s": 10.0}, math.nan)
    progress.close()
    assert out.getvalue().splitlines() == [
        "compiling ...",
        "step 1/100 loss 1.0000 10 tok/s eta -:--:--",
        "step 100/100 loss 1.0000 10 tok/s eta -:--:--",
    ]


def metrics(loss: float, finite: bool = True) -> dict:
    numbers = {"loss": loss, "tokens": 3.0, "input_tokens": 8.0, "grad_norm": 1.0, "lr": 0.1}
    return {name: jnp.float32(x) for name, x in numbers.items()} | {"finite": jnp.bool_(finite)}


def quiet() -> rich.console.Console:
    return rich.console.Console(quiet=True)


def test_the_monitor_records_every_step_however_seldom_it_looks(tmp_path):
    with Monitor(tmp_path, 4, 0, flops=Flops(0, 10), peak=1e3, console=quiet()) as monitor:
        for step in range(1, 5):
            monitor.note(step, metrics(step / 2), None)
        monitor.flush(lambda: None, keep=1)
        assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
        monitor.flush(lambda: None)
        monitor.flush(lambda: None)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [r["loss"] for r in records] == [0.5, 1.0, 1.5, 2.0]
    last = records[-1]
    assert last["mfu"] == pytest.approx(60 * last["tokens_per_s"] / 8e3)
    assert last["step_s"] > 0


def test_a_non_finite_step_is_named_with_its_documents_and_the_last_checkpoint(tmp_path):
    with Monitor(tmp_path, 4, 0, name="web:{}".format, console=quiet()) as monitor:
        monitor.note(1, metrics(1.0), np.array([[5]]))
        monitor.note(2, metrics(math.inf, finite=False), np.array([[9, 7], [7, -1]]))
        monitor.note(3, metrics(1.0), np.array([[11]]))
        with pytest.raises(NonFiniteError) as error:
            monitor.flush(lambda: 40)
    message = str(error.value)
    assert message.startswith("step 2: loss inf, gradient norm 1.0; documents of its batch: ")
    assert "7 (web:7), 9 (web:9); look at them, lower optim.lr, or skip" in message
    assert "skip_nonfinite=10; last" in message
    assert message.endswith(f"last good checkpoint: {tmp_path / 'checkpoints' / '40'}")
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("kind", [JsonLines, TensorBoard])
def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path, kind):
    file = kind(tmp_path / "metrics", 0)
    with disk_for_files_of(16), pytest.raises(OSError, match="File too large; free space") as error:
        file.write({"step": 1, "loss": 2.0, "eval_loss": 3.0})
    assert str(error.value).startswith(f"cannot write {tmp_path / 'metrics'}")
    file.close()
