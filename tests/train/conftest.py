"""Runs that several files look at, each made once."""

import contextlib
import io

import pytest

from experiments import train
from tests.train.runs import command, make_files, with_adapter


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with config.py, a tokenizer, text, and a Hugging Face model."""
    folder = tmp_path_factory.mktemp("files")
    make_files(folder)
    return folder


@pytest.fixture(scope="session")
def run_text(files, tmp_path_factory):
    """A run that is over, and what it printed; tests copy its folder."""
    out = tmp_path_factory.mktemp("over") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        outputs = train.main(command(files, out))
    assert outputs == {
        "run": out,
        "metrics": out / "metrics.jsonl",
        "checkpoint": out / "checkpoints" / "6",
    }
    return out, " ".join(text.getvalue().split())


@pytest.fixture(scope="session")
def run_folder(run_text):
    return run_text[0]


@pytest.fixture(scope="session")
def lora_run(files, tmp_path_factory):
    """A run that trained a LoRA for four steps."""
    out = tmp_path_factory.mktemp("lora") / "run"
    keys = [*with_adapter(files, "LoRA"), "optim.warmup_steps=0", "steps=4", "ema_decay=0.5"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(command(files, out, *keys))
    return out


@pytest.fixture(scope="session")
def averaged_run(files, tmp_path_factory):
    """A run of all weights that kept their average, and saved twice."""
    out = tmp_path_factory.mktemp("averaged") / "run"
    settings = ["ema_decay=0.5", "steps=2", "optim.lr=0.1", "checkpoint.every=1", "data.holdout=0"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(command(files, out, *settings))
    return out
