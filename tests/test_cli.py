"""Says what this test command does.

Usage: test_cli NAME
"""

import os

import pytest

from experiments.command.start import TUNABLES, start_on_huge_pages
from llmprep_jax.cli import run
from llmprep_jax.config import UsageError


def run_and_catch(capsys, error=None, arguments=(), outputs=None):
    def main(arguments):
        if error is not None:
            raise error
        return outputs or {"arguments": " ".join(arguments)}

    with pytest.raises(SystemExit) as stop:
        run(main, list(arguments))
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_help_prints_the_docstring_of_the_command(capsys):
    code, out, _ = run_and_catch(capsys, arguments=["x", "--help"])
    assert (code, out) == (0, __doc__.strip() + "\n")


def test_a_command_ends_by_naming_its_outputs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = {"run": tmp_path / "run", "loss": 0.5}
    code, out, err = run_and_catch(capsys, outputs=outputs)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == "run   run"
    assert second == "loss  0.5"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("unknown key a"), 2, "error: unknown key a (see --help)\n"),
        (ValueError("a.txt: too\nlong"), 1, "error: a.txt: too long\n"),
        (
            FileNotFoundError(2, "No such file", "b.txt"),
            1,
            "error: b.txt: No such file; check the path\n",
        ),
        (OSError("disk full"), 1, "error: disk full\n"),
        (OSError(28, "No space left", "c"), 1, "error: c: No space left; free some space, or"),
        (PermissionError(13, "No", "d"), 1, "error: d: No; check the path and its permissions"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: x"), 1, "error: out of device memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code, message):
    got, out, err = run_and_catch(capsys, error)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert err.startswith(message)


def test_debug_shows_the_traceback_and_is_not_passed_on(capsys):
    code, _, err = run_and_catch(capsys, ValueError("bad"), ["--debug"])
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("error: bad\n")
    assert run_and_catch(capsys, arguments=["a", "--debug"])[1] == "arguments  a\n"


def test_a_bug_shows_its_traceback(capsys):
    code, _, err = run_and_catch(capsys, ZeroDivisionError("oops"))
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize(
    ("tunables", "starts_anew"),
    [(None, True), ("glibc.malloc.check=1", False)],
    ids=["new", "set by the user"],
)
def test_a_command_starts_anew_on_huge_pages_once(monkeypatch, tunables, starts_anew):
    calls, argv = [], ["-X", "dev", "-m", "experiments.train", "c.py"]
    monkeypatch.setattr("sys.orig_argv", ["python", *argv])
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr("os.execv", lambda path, arguments: calls.append(arguments[1:]))
    monkeypatch.setenv("GLIBC_TUNABLES", tunables or "")
    if tunables is None:
        monkeypatch.delenv("GLIBC_TUNABLES")
    start_on_huge_pages()
    start_on_huge_pages()  # as the new process does
    assert calls == ([argv] if starts_anew else [])
    assert os.environ.get("GLIBC_TUNABLES") == (TUNABLES if starts_anew else tunables)
