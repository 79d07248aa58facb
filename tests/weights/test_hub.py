"""What a user may call a model: a path that exists, a hub id, or a mistake with a hint."""

import huggingface_hub
import pytest

from llmprep_jax.weights import hub
from llmprep_jax.weights.folder import FolderCheckpoint
from llmprep_jax.weights.gguf import GgufCheckpoint
from llmprep_jax.weights.safetensors import write_folder
from tests.weights.test_gguf_weights import write


@pytest.fixture
def downloads(monkeypatch):
    """Records what would be fetched, and fetches nothing."""
    asked = []

    def snapshot_download(repo, **settings):
        asked.append((repo, settings))
        return "/cache/model"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_what_exists_is_never_fetched(tmp_path, downloads, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/model").resolve() == tmp_path / "org" / "model"
    assert hub.resolve(tmp_path) == tmp_path
    assert downloads == []


def test_home_is_spelled_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert hub.resolve("~/model") == tmp_path / "model"


def test_a_hub_id_is_fetched_without_pickles_or_other_formats(downloads):
    assert str(hub.resolve("org/model-1.5B", revision="v2")) == "/cache/model"
    [(repo, settings)] = downloads
    assert repo == "org/model-1.5B"
    assert settings == {
        "revision": "v2",
        "allow_patterns": ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"],
        "ignore_patterns": ["*/*"],
    }


def test_without_a_network_the_error_is_one_line_with_the_fix(monkeypatch):
    def offline(*args, **settings):
        raise ConnectionError("Max retries\nexceeded " + "x" * 900)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(OSError, match=r"org/model is no local path, and the hub") as caught:
        hub.resolve("org/model")
    assert "ConnectionError: Max retries exceeded" in str(caught.value)
    assert str(caught.value).endswith("or download the folder and give its path")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["nothing", "/a/b/c", "./no/where", "a/b/c", "folder/smollm.gguf", "models/x.gguf"]
)
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(tmp_path, downloads, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        hub.resolve(name)
    assert downloads == []


def test_an_empty_path_is_refused_and_not_taken_for_the_working_folder():
    for name in ("", " "):
        with pytest.raises(ValueError, match="the path of the model is empty"):
            hub.resolve(name)


def test_near_misses_are_named(tmp_path, downloads):
    for name in ("smollm2-135m", "smollm2-360m", "gemma"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=r"did you mean smollm2-135m or smollm2-360m\?"):
        hub.resolve(tmp_path / "smollm2-135")
    with pytest.raises(FileNotFoundError, match=f"no folder {tmp_path}/models either"):
        hub.resolve(tmp_path / "models" / "gemma")


def test_checkpoints_are_told_apart(tmp_path):
    write(tmp_path / "a.gguf")
    assert isinstance(hub.open_checkpoint(tmp_path / "a.gguf"), GgufCheckpoint)
    assert isinstance(hub.open_checkpoint(tmp_path), GgufCheckpoint)
    write(tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"holds 2 models \(a\.gguf, b\.gguf\); give the path of"):
        hub.open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    write_folder(tmp_path, [])
    assert isinstance(hub.open_checkpoint(tmp_path), FolderCheckpoint)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(
        ValueError, match=r"notes\.txt is no model: give a folder with config\.json"
    ):
        hub.open_checkpoint(tmp_path / "notes.txt")
