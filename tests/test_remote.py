"""gs:// and s3:// paths: never a local folder named "gs:", and read and written like local ones.

A store in memory stands for both; Orbax's own writer of arrays speaks to the real ones alone.
"""

import json
import pathlib

import chex
import fsspec
import pytest
from etils import epath
from flax import nnx
from fsspec.implementations.memory import MemoryFileSystem

import llmprep_jax as lp
from llmprep_jax import remote
from llmprep_jax.config import load_config
from llmprep_jax.data import SourceOptions, open_source
from llmprep_jax.models.llama.config import Config
from llmprep_jax.models.llama.model import Model
from llmprep_jax.train.checkpoint import all_steps
from llmprep_jax.train.loop import lock_folder
from llmprep_jax.train.metrics import JsonLines, TensorBoard, read_jsonl
from llmprep_jax.train.run import claim_folder
from tests.processes.launch import make_files
from tests.random_modules import random_module
from tests.train.toy import params_of


class Store(MemoryFileSystem):
    """Buckets in memory."""

    store, pseudo_dirs = {}, [""]

    def __init__(self, *args, finalize_on_close=None, **settings):
        super().__init__(*args, **settings)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol("memory://" + path.rpartition("://")[2])


@pytest.fixture
def store(monkeypatch, tmp_path):
    """gs:// and s3:// in memory, copies in a folder of the test, which is the working folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Store, "store", {})
    monkeypatch.setattr(Store, "pseudo_dirs", [""])
    real = fsspec.filesystem
    monkeypatch.setattr(
        fsspec, "filesystem", lambda name, **_: Store() if name in ("gcs", "s3") else real(name)
    )
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield epath.Path("gs://bucket")
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    assert not [path for path in (tmp_path / "work").rglob("*") if path.name.endswith(":")]


@pytest.fixture(scope="module")
def model():
    cfg = Config(416, 16, 32, 2, 4, 2, 4, max_seq_len=64, tie_embeddings=True)
    return random_module(lambda: Model(cfg, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("text", ["gs://b/run", "s3://b/run", "gs:/b/run"])
def test_a_text_becomes_a_path_of_the_store_that_it_names(text):
    path = remote.as_path(text)
    assert str(path) == text.replace(":/b", "://b")
    assert str(path / "x") == f"{path}/x"
    assert remote.as_path(pathlib.Path(text)) == path  # pathlib takes a slash away
    assert remote.absolute(path) is path
    assert remote.is_remote(text)
    assert not any(map(remote.is_remote, ("gs", "/gs:/b", "C:/b", "a://b")))


def test_a_run_of_a_store_keeps_its_files_there(store, tmp_path):
    files = make_files(tmp_path)
    cfg = load_config(files / "config.py", ["out=gs://bucket/run"])
    assert isinstance(cfg.out, epath.Path)
    with lock_folder(cfg.out):
        claimed, changes = claim_folder(cfg)
    assert (claimed.out, changes) == (cfg.out, [])
    assert json.loads((store / "run" / "run.json").read_text())["out"] == "gs://bucket/run"
    assert all_steps(cfg.out) == []
    for done in (0, 2):  # what a killed run wrote after step 2 is dropped
        lines, events = (
            JsonLines(cfg.out / "metrics.jsonl", done),
            TensorBoard(cfg.out / "tb", done),
        )
        for step in (done + 1, done + 2, done + 3):
            lines.write({"step": step, "loss": 1.0})
            events.write({"step": step, "loss": 1.0})
        lines.close()
        events.close()
    records = read_jsonl(cfg.out / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert len(list((cfg.out / "tb").iterdir())) == 2


def test_models_and_adapters_are_saved_to_a_store_and_loaded_from_it(store, model, tmp_path):
    processor = lp.load_processor(make_files(tmp_path) / "tokenizer")
    (store / "model").mkdir(parents=True)
    (store / "model" / "model-00001-of-00002.safetensors").write_text("of an earlier save")
    lp.save_model(model, "gs://bucket/model", processor=processor)
    names = {path.name for path in (store / "model").iterdir()}
    assert {"model.safetensors", "llmprep_receipt.json", "tokenizer.json"} <= names
    assert not [name for name in names if name.startswith("model-")]
    assert {path.name for path in store.iterdir()} == {"model"}  # nothing is left aside
    back = lp.load_model("gs://bucket/model")
    chex.assert_trees_all_equal(params_of(back), params_of(model))
    assert lp.load_processor("gs://bucket/model").tokenizer.vocab_size
    adapted = lp.peft.inject(model, lp.peft.LoRA(rank=2))
    lp.peft.save(adapted, "s3://bucket/adapter", base_model="gs://bucket/model")
    assert lp.peft.is_adapted(lp.peft.load(back, "s3://bucket/adapter"))


def test_a_copy_is_renewed_when_the_file_is_another(store):
    (store / "data").mkdir(parents=True)
    (store / "data" / "a.jsonl").write_text('{"text": "one"}\n')
    (store / "data" / "b.jsonl").write_text('{"text": "two"}\n')
    for path in ("gs://bucket/data", "gs://bucket/data/*.jsonl"):
        source = open_source(path, SourceOptions())
        assert [source[i].text for i in range(len(source))] == ["one", "two"]
    (store / "data" / "a.jsonl").write_text('{"text": "new"}\n')
    (store / "data" / "b.jsonl").unlink()
    source = open_source("gs://bucket/data", SourceOptions())
    assert [source[i].text for i in range(len(source))] == ["new"]
    with pytest.raises(FileNotFoundError, match=r"^gs://bucket/none: no such file or folder"):
        open_source("gs://bucket/none", SourceOptions())


@pytest.mark.parametrize("load", [lp.load_model, lp.load_processor, open_source])
def test_a_store_whose_package_is_missing_is_told_of_in_one_line(load, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"^s3://bucket/x needs the package s3fs; pip install s3fs$"):
        load("s3://bucket/x")
    assert not list(tmp_path.iterdir())
