"""What commands do before their imports: help, the reference of settings, compile cache, Ctrl-C."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

import experiments.__main__
from experiments.command.reference import describe, settings_of
from experiments.command.settings_page import commands, page
from experiments.command.start import use_compile_cache
from llmprep_jax.config import field_types
from llmprep_jax.train.run import RunConfig

ROOT = pathlib.Path(__file__).parents[1]
HELP = """
import runpy, sys
sys.argv = ["train", "--help"]
try:
    runpy.run_module("experiments.train", run_name="__main__")
except SystemExit as stop:
    assert not stop.code
assert "jax" not in sys.modules
"""
# loaded by its path: the package's own imports take seconds
CHILD = f"""
import hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("i", {str(ROOT / "llmprep_jax" / "interrupts.py")!r})
interrupts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(interrupts)
interrupts.watch()
work = lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # a C function of minutes
"""


def test_help_lists_every_setting_and_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "  optim.lr: float = 0.0003\n      peak learning rate\n" in done.stdout
    assert "  data.paths: list of str = required\n" in done.stdout
    assert "LLMPREP_COMPILE_CACHE" not in done.stdout  # it is off here


def test_a_reader_of_the_help_who_leaves_is_no_error():
    command = f"{sys.executable} -m experiments.train --help | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, check=False)
    assert (done.stdout.count(b"\n"), done.stderr) == (1, b"")


def test_every_setting_is_explained():
    for command, settings in commands():
        for setting in settings_of(settings):
            assert setting.words.rpartition(": ")[2], f"{command}: {setting.name}"


def test_the_reference_is_that_of_the_code():
    listed = {s.name.partition(".")[0] for s in settings_of("llmprep_jax.train.run:RunConfig")}
    assert listed == set(field_types(RunConfig))
    text = describe("llmprep_jax.train.run:RunConfig")
    assert "optim.optimizer: adamw |" in text
    assert "  adapter.total_steps: int" in text
    assert "  eval_data: DataConfig | None = None\n" in text


def test_the_page_of_settings_is_up_to_date():
    saved = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert saved == page(), "python -m experiments.command.settings_page > docs/settings.md"


def test_the_commands_are_listed(capsys):
    experiments.__main__.main()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("train ") and "Train a model" in line for line in lines)
    assert {line.split()[0] for line in lines[:-2]} >= {"train", "evaluate", "generate", "convert"}


def cache_settings(monkeypatch, **environment) -> dict[str, str]:
    """What of the environment JAX is told when a command starts with these variables."""
    names = ("LLMPREP_COMPILE_CACHE", "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    use_compile_cache()
    return {name: os.environ[name] for name in names[1:] if name in os.environ}


def test_programs_are_kept_in_the_users_cache_and_that_is_said_once(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "llmprep_jax" / "compiled"
    expected = {"JAX_COMPILATION_CACHE_DIR": str(folder)}
    expected |= {"JAX_COMPILATION_CACHE_MAX_SIZE": str(4 * 2**30)}
    assert cache_settings(monkeypatch, XDG_CACHE_HOME=tmp_path) == expected
    said = capsys.readouterr().err
    assert f"{folder}, at most 4 GiB" in said
    assert "LLMPREP_COMPILE_CACHE=off turns that off" in said
    assert cache_settings(monkeypatch, XDG_CACHE_HOME=tmp_path) == expected
    assert capsys.readouterr().err == ""


def test_the_compile_cache_goes_where_it_is_told_or_is_off(monkeypatch, tmp_path, capsys):
    assert cache_settings(monkeypatch, LLMPREP_COMPILE_CACHE="off") == {}
    found = cache_settings(monkeypatch, LLMPREP_COMPILE_CACHE=tmp_path / "mine")
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "mine")
    own = {"JAX_COMPILATION_CACHE_DIR": "elsewhere"}
    assert cache_settings(monkeypatch, **own) == own


def start(script: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_ctrl_c_ends_a_command_at_once_while_c_code_runs():
    process = start("print('ready', flush=True); work()")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")


HELD = """
import os, time
with interrupts.held(lambda: os.write(1, b"noted\\n")) as came:
    print("ready", flush=True)
    {work}
print("saved", came(), flush=True)
"""


def test_a_first_ctrl_c_that_is_held_is_noted_and_a_second_ends_at_once():
    process = start(HELD.format(work="work()"))
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noted\n"  # while the C code runs
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")


def test_what_holds_ctrl_c_ends_when_it_likes():
    process = start(HELD.format(work="while not came(): time.sleep(0.01)\n    time.sleep(0.3)"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    # the note is written by a thread of its own, and a line at once
    assert (process.returncode, sorted(out.splitlines()), err) == (0, ["noted", "saved True"], "")


def test_importing_a_command_does_nothing(monkeypatch):
    monkeypatch.setattr("sys.argv", ["mtp", "--help"])
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("started anew"))
    before = signal.getsignal(signal.SIGINT)
    sys.modules.pop("experiments.mtp", None)
    __import__("experiments.mtp")
    assert signal.getsignal(signal.SIGINT) is before
