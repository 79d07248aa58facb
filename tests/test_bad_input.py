"""Bad input to the real commands: one line that names the file and the remedy, an exit code, no
traceback unless asked for, and nothing that was there before is lost."""

import json
import os
import shutil
import struct

import pytest
from flax import nnx

import llmprep_jax as lp
from experiments import convert, evaluate, train
from llmprep_jax.cli import run
from llmprep_jax.models.llama.config import Config
from llmprep_jax.models.llama.model import Model
from llmprep_jax.train import checkpoint
from llmprep_jax.train.checkpoint import all_steps, read_meta
from tests.full_disk import disk_for_files_of
from tests.quick_compile import quick_compile
from tests.random_modules import random_module
from tests.text.samples import train_byte_level

CONFIG = """
import pathlib
from llmprep_jax.data import DataConfig
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.run import RunConfig

HERE = pathlib.Path(__file__).parent

def get_config():
    return RunConfig(
        model=str(HERE / "model"),
        data=DataConfig(paths=(str(HERE / "text.jsonl"),), seq_len=16, batch_size=2),
        steps=2,
        checkpoint=CheckpointConfig(every=1),
        out=HERE / "run",
    )
"""
VOCAB = 416


@pytest.fixture(scope="module", autouse=True)
def compilation(tmp_path_factory):
    with quick_compile(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model and its tokenizer, text, and a config that trains one on the other."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "config.py").write_text(CONFIG)
    (folder / "tokenizer").mkdir()
    train_byte_level().save(str(folder / "tokenizer" / "tokenizer.json"))
    cfg = Config(VOCAB, 8, 16, 1, 2, 1, 4, max_seq_len=64, tie_embeddings=True)
    model = random_module(lambda: Model(cfg, rngs=nnx.Rngs(0)))
    lp.save_model(model, folder / "model", processor=lp.load_processor(folder / "tokenizer"))
    lines = [json.dumps({"text": f"{n} is a number and {n + 1} the next"}) for n in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def model(files, tmp_path):
    """A copy of the model, to be damaged."""
    return shutil.copytree(files / "model", tmp_path / "model")


def error_of(capsys, command, *arguments, code=1) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        run(command.main, list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert stop.value.code == code, err
    return err


def evaluate_error(capsys, files, model, *overrides, code=1) -> str:
    out = f"out={files / 'never.json'}"
    error = error_of(capsys, evaluate, model, files / "text.jsonl", out, *overrides, code=code)
    assert not (files / "never.json").exists()
    return error


def test_a_missing_model_is_named_with_near_names(files, capsys):
    error = evaluate_error(capsys, files, files / "modle")
    assert f"no file or folder {files / 'modle'}; did you mean model?" in error


def set_config(model, **fields):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewrite_header(model, change):
    """Replaces a safetensors file's header, of JSON, and leaves its data."""
    path = model / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = change(json.loads(data[8 : 8 + size]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def first_tensor(change):
    def apply(header):
        change(next(value for key, value in header.items() if key != "__metadata__"))
        return header

    return apply


DAMAGES = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 100),
    "empty": lambda path: path.write_bytes(b""),
    "a header longer than the file": lambda path: path.write_bytes(b"\xff" * 7 + path.read_bytes()),
    "no header": lambda path: rewrite_header(path.parent, lambda header: b"not json"),
    "offsets out of range": lambda path: rewrite_header(
        path.parent, first_tensor(lambda tensor: tensor.update(data_offsets=[0, 10**12]))
    ),
    "another dtype": lambda path: rewrite_header(
        path.parent, first_tensor(lambda tensor: tensor.update(dtype="F99"))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_weights_file_is_named_with_the_remedy(files, model, capsys, damage):
    damage(model / "model.safetensors")
    error = evaluate_error(capsys, files, model)
    assert str(model / "model.safetensors") in error
    assert "download" in error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "lama"}, "unknown model_type 'lama'; did you mean llama"),
        ({"model_type": None}, "unknown model_type None; supported: llama"),
        ({"hidden_size": 12}, "model.embed_tokens.weight"),
        ({"num_hidden_layers": 2}, "model.layers.1"),
        ({"vocab_size": 300}, "model.embed_tokens.weight"),
        ({"num_key_value_heads": 3}, "num_heads (2) is no multiple of num_kv_heads (3)"),
        ({"hidden_size": "8"}, "hidden_size='8'; these must be positive whole numbers"),
        ({"hidden_act": "relu"}, "hidden_act='relu'; supported: 'silu'"),
    ],
    ids=str,
)
def test_a_config_that_is_not_the_weights_is_named(files, model, capsys, fields, message):
    set_config(model, **fields)
    error = evaluate_error(capsys, files, model)
    assert str(model) in error
    assert message in error


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}', "\udc80"])
def test_a_config_that_is_no_config_is_named(files, model, capsys, text):
    (model / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    error = evaluate_error(capsys, files, model)
    assert str(model) in error
    assert "config.json" in error


def test_pickled_weights_are_refused_with_the_way_to_convert_them(files, model, capsys):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    error = evaluate_error(capsys, files, model)
    assert f"{model} holds only pickled weights (pytorch_model.bin)" in error
    assert "save_pretrained(folder)" in error


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(files, tmp_path, capsys, command):
    wide = shutil.copytree(files / "tokenizer", tmp_path / "wide")
    added = json.loads((wide / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    ids = range(len(added["model"]["vocab"]), VOCAB + 50)
    added["added_tokens"] += [{"content": f"<new{i}>", "id": i, **flags} for i in ids]
    (wide / "tokenizer.json").write_text(json.dumps(added))
    if command == "evaluate":
        error = evaluate_error(capsys, files, files / "model", f"tokenizer={wide}")
    else:
        settings = (f"out={tmp_path / 'run'}", f"tokenizer={wide}")
        error = error_of(capsys, train, files / "config.py", *settings)
    assert str(wide) in error
    assert "use the tokenizer that belongs to the model" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no document in it; check the file or data.paths"),
        ("not json\n", ":1"),
        ('{"text": "good"}\n{"txt": "bad"}\n', ":2"),
    ],
)
def test_data_that_will_not_do_are_named_by_file_and_line(files, tmp_path, capsys, text, message):
    (tmp_path / "data.jsonl").write_text(text)
    arguments = (files / "model", tmp_path / "data.jsonl", f"out={tmp_path / 'x.json'}")
    error = error_of(capsys, evaluate, *arguments)
    assert f"{tmp_path / 'data.jsonl'}{message}" in error.replace(": there", "there")


def test_a_document_longer_than_the_context_is_named_where_that_is_an_error(
    files, tmp_path, capsys
):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "word " * 100}) + "\n")
    settings = [f"data.paths={tmp_path / 'long.jsonl'}", f"out={tmp_path / 'run'}"]
    error = error_of(capsys, train, files / "config.py", *settings, "data.overlong=error")
    assert f"{tmp_path / 'long.jsonl'}:1: the document has " in error
    assert (
        "the context holds 17; raise data.seq_len, or set data.overlong=split, truncate or drop"
        in error
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [(train, "unknown key stesp; did you mean steps?"), (evaluate, "did you mean max_batches?")],
    ids=["train", "evaluate"],
)
def test_an_unknown_key_lists_its_near_misses(files, capsys, command, message):
    if command is train:
        error = error_of(capsys, train, files / "config.py", "stesp=3", code=2)
    else:
        error = evaluate_error(capsys, files, files / "model", "max_batchs=1", code=2)
    assert message in error
    assert "see --help" in error


@pytest.mark.parametrize("name", ["train", "evaluate", "convert"])
def test_an_output_that_cannot_be_written_is_named(files, tmp_path, capsys, name):
    (tmp_path / "file").write_text("kept")
    below = tmp_path / "file" / "out"
    if name == "train":
        error = error_of(capsys, train, files / "config.py", f"out={below}")
    elif name == "evaluate":
        arguments = (files / "model", files / "text.jsonl", "data.seq_len=16", f"out={below}")
        error = error_of(capsys, evaluate, *arguments, "max_batches=1")
    else:
        error = error_of(capsys, convert, files / "model", below)
    assert str(tmp_path / "file") in error
    assert "choose another place" in error
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow  # trains, and runs again
# Orbax's other writes find its event loop closed; the command hides that, pytest tells of it
@pytest.mark.filterwarnings("ignore:(?s).*Event loop is closed")
def test_a_full_disk_during_a_checkpoint_keeps_the_one_before(files, tmp_path, capsys, monkeypatch):
    save, arguments = checkpoint.Checkpoints.save, (files / "config.py", f"out={tmp_path}")

    def save_on_a_full_disk(self, state, data_state):
        if int(state.step) == 1:
            return save(self, state, data_state)
        self.wait()
        with disk_for_files_of(2**10):
            save(self, state, data_state)
            self.wait()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_on_a_full_disk)
        error = error_of(capsys, train, *arguments)
    assert f"{tmp_path / 'checkpoints'}: a checkpoint could not be written" in error
    assert "whole are 1; free space or give another out folder, and run again" in error
    assert all_steps(tmp_path) == [1]
    assert read_meta(tmp_path)["step"] == 1
    train.main(list(map(str, arguments)))  # with room again, the same command goes on
    assert "resumed from step 1" in capsys.readouterr().out
    assert all_steps(tmp_path) == [1, 2]
    assert lp.load_model(tmp_path).cfg.vocab_size == VOCAB


def test_a_full_disk_during_an_export_keeps_the_folder_that_was_there(files, model, capsys):
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with disk_for_files_of(2**10):
        error = error_of(capsys, convert, files / "model", model)
    assert f"cannot write {model}: File too large; free some space" in error
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_debug_shows_the_traceback_before_the_line(files, capsys):
    with pytest.raises(SystemExit) as stop:
        run(evaluate.main, [str(files / "modle"), str(files / "text.jsonl"), "--debug"])
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: no file or folder")
