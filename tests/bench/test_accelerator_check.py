"""The check of an accelerator, whole, on a CPU; and on a machine without loaders of data."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

import experiments.accelerator_check
from experiments.accelerator_check import SHARES, parts

BARE = """
import sys

MISSING = {"grain", "array_record", "tensorflow_datasets", "tensorboard", "gguf", "sentencepiece"}
MISSING |= {"torch", "transformers", "peft", "beartype", "chex", "huggingface_hub", "matplotlib"}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import experiments.accelerator_check
from experiments.bench import generation, llama
from experiments.bench.timing import in_turn
import numpy as np

cfg = llama.config("tiny", 1)
call = llama._step("ours", cfg, "lora", llama.batch_of(1, 16, 512))
print(float(call.call()) > 0, generation._generator("ours", cfg)(np.ones((1, 4), int), 2).shape)
"""


@pytest.mark.grid  # a fresh process, which compiles a step and a generation for a minute
def test_a_machine_without_loaders_of_data_trains_and_generates():
    command = [sys.executable, "-c", BARE]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quick)
    assert done.stdout.split("\n")[-2] == "True (1, 2)", done.stderr


def test_every_section_is_made_of_parts():
    for size in ("full", "tiny"):
        assert all(list(parts(section, size)) for section in SHARES)
    assert sum(SHARES.values()) == pytest.approx(1)


def test_a_section_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="unknown sections .'x'.; there are parity, dispatch"):
        experiments.accelerator_check.main(["sections=x"])


@pytest.mark.slow  # a dozen processes that import JAX or torch
def test_the_whole_check_runs_on_a_cpu_and_leaves_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torch's threads wait by spinning
    monkeypatch.setitem(os.environ, "XLA_FLAGS", "")  # one device, not the tests' eight
    sizes = ["size=tiny", "seconds=900", f"out={tmp_path}"]
    outputs = experiments.accelerator_check.main(sizes)
    rows = [json.loads(line) for line in outputs["numbers"].read_text().splitlines()]
    sections = list(dict.fromkeys(row["section"] for row in rows))
    told = ["environment", "parity", "dispatch", "step, lora", "step, full", "generation"]
    assert [name for name in sections if name in told] == told
    assert {"forward", "backward", "decode"} <= set(sections)
    not_done = [row["check"] for row in rows if row["section"] == "not done"]
    peers = ["torch sdpa"] * all(map(importlib.util.find_spec, ("torch", "transformers", "peft")))
    # XLA's CPU compiler has no ragged exchange
    assert {name for name in not_done if peers or "torch" not in name} <= {"ragged"}
    parity = [row for row in rows if "limit" in row]
    errors = [row for row in parity if "worst gradient's" in row]
    assert len(errors) >= 6
    assert all(row["worst gradient's"] <= row["limit"] for row in errors)
    # for other devices
    assert {row["impl"] for row in parity if row not in errors} <= {"tokamax"}
    steps = [row for row in rows if row["section"].startswith("step")]
    assert [row["contender"] for row in steps] == ["ours", "ours", *peers, *peers]
    tables = outputs["tables"].read_text()
    assert "## parity\n\n| op | case | dtype | impl |" in tables
    # a goal of a GPU is none of a CPU
    assert "NeMo" not in tables
