"""Folders that are verified before they take the place of what stood there."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from llmprep_jax.weights import receipt
from llmprep_jax.weights.safetensors import SafetensorsFile
from tests.weights.test_safetensors import full_disk

CONFIG = {"model_type": "llama"}


def tensors(value: float = 1.0, count: int = 3):
    return ((f"w{i}", np.full(4, value, np.float32)) for i in range(count))


def save(folder, *, value=1.0, difference=0.0, **settings):
    return receipt.save_folder(
        folder,
        CONFIG,
        tensors(value),
        verify=lambda written: difference,
        tolerance=1e-5,
        **settings,
    )


def value_of(folder) -> float:
    return float(SafetensorsFile(folder / "model.safetensors").read("w0")[0])


def test_a_saved_folder_has_config_weights_and_a_receipt(tmp_path):
    seen = []

    def verify(written):
        seen.append(sorted(p.name for p in written.iterdir()))
        return 3e-6

    folder = receipt.save_folder(
        tmp_path / "runs" / "model",
        CONFIG,
        tensors(),
        verify=verify,
        tolerance=1e-5,
        extra_files=lambda aside: (aside / "tokenizer.json").write_text("{}"),
    )
    assert folder == tmp_path / "runs" / "model"
    assert seen == [["config.json", "model.safetensors", "tokenizer.json"]]
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    paper = json.loads((folder / "llmprep_receipt.json").read_text())
    assert paper["tolerance"] == 1e-5
    assert paper["measured_difference"] == 3e-6
    assert paper["dtypes"] == ["float32"]
    assert paper["versions"]["numpy"] == np.__version__
    assert paper["saved_at"].startswith("20")
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("difference", [1.1e-5, np.inf, np.nan], ids=str)
def test_drift_is_refused_and_what_stood_there_stays(tmp_path, difference):
    save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model was not saved: re-opened, it differs") as caught:
        save(tmp_path / "model", value=2.0, difference=difference)
    assert len(str(caught.value).splitlines()) == 1
    assert value_of(tmp_path / "model") == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_replaced_and_other_files_in_it_stay(tmp_path):
    folder = save(tmp_path / "model", max_shard_bytes=16)
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    (folder / "README.md").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "a.txt").write_text("mine too")
    save(folder, value=2.0)
    assert value_of(folder) == 2.0
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "llmprep_receipt.json",
        "logs",
        "model.safetensors",
    ]
    assert (folder / "logs" / "a.txt").read_text() == "mine too"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_where_the_system_cannot_swap_three_renames_do(tmp_path, monkeypatch):
    folder = save(tmp_path / "model")
    (folder / "README.md").write_text("mine")
    monkeypatch.setattr(receipt.ctypes, "CDLL", lambda name: None)
    save(folder, value=2.0)
    assert value_of(folder) == 2.0
    assert (folder / "README.md").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_adapter_is_one_file_of_another_name(tmp_path):
    names = {"config_name": "adapter_config.json", "weights_name": "adapter_model.safetensors"}
    folder = save(tmp_path / "adapter", **names)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "llmprep_receipt.json",
    ]
    assert save(folder, value=2.0, **names) == folder


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    folder = save(tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    save(tmp_path / "link", value=2.0)
    assert (tmp_path / "link").is_symlink()
    assert value_of(folder) == 2.0


def failing(error):
    def verify(written):
        raise error

    return verify


@pytest.mark.parametrize("error", [ValueError("not loadable"), KeyboardInterrupt()], ids=repr)
def test_a_failing_check_leaves_what_stood_there(tmp_path, error):
    save(tmp_path / "model")
    with pytest.raises(type(error)):
        receipt.save_folder(
            tmp_path / "model", CONFIG, tensors(2.0), verify=failing(error), tolerance=1.0
        )
    assert value_of(tmp_path / "model") == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    save(tmp_path / "model")
    large = [("w0", np.zeros(100_000, np.float32))]
    with full_disk(50_000), pytest.raises(OSError, match="File too large; free some") as caught:
        receipt.save_folder(tmp_path / "model", CONFIG, large, verify=float, tolerance=1.0)
    assert str(caught.value).startswith(f"cannot write {tmp_path}/model: ")
    assert value_of(tmp_path / "model") == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file: it is a file; choose another place"):
        save(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot write .*file/model: File exists; check its"):
        save(tmp_path / "file" / "model")


SAVER = """
import sys, numpy as np
from llmprep_jax.weights.receipt import save_folder
value = 1.0
print("ready", flush=True)
while True:
    value += 1
    rows = [("w0", np.full(200_000, value, np.float32))]
    save_folder(sys.argv[1], {"value": value}, rows, verify=lambda path: 0.0, tolerance=0.0)
"""


@pytest.mark.slow  # starts six processes that import jax
def test_whatever_moment_it_is_killed_at_a_whole_folder_stands_there(tmp_path):
    folder = tmp_path / "model"
    save(folder)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for pause in (0.03, 0.05, 0.08, 0.11, 0.17, 0.29):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, env=environment
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(pause)
        process.kill()
        process.wait()
        process.stdout.close()
        config = json.loads((folder / "config.json").read_text())
        assert value_of(folder) == config.get("value", 1.0)
        assert (folder / "llmprep_receipt.json").is_file()
