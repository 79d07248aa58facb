"""Folders and files at gs://, s3:// and their like, by `etils.epath`, as Orbax has them.

`pathlib` makes a folder named "gs:" of "gs://bucket/run", so a text that a user gives becomes a
path by `as_path` alone. What needs a real file system (memory maps, appending, renaming in one
step) works on a copy: `fetch` brings files here before they are read, `write_folder` takes them
there when they are whole. Locks cannot be had there: two runs in one remote folder are not kept
apart.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

_SCHEME = re.compile(r"(gs|s3|az):/+")
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
AnyPath = pathlib.Path | epath.Path


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is of an object store; also one that pathlib has taken a slash from."""
    return _SCHEME.match(os.fspath(path)) is not None


def as_path(path: str | os.PathLike) -> AnyPath:
    """A text as a path of this machine, or of the store that its beginning names."""
    text = os.fspath(path)
    scheme = _SCHEME.match(text)
    return epath.Path(f"{scheme[1]}://{text[scheme.end() :]}") if scheme else pathlib.Path(path)


def absolute(path: AnyPath) -> AnyPath:
    """A path from the root, links followed; remote ones are that already."""
    return path if is_remote(path) else path.resolve()


def delete(path: AnyPath) -> None:
    """Removes a folder with all that is in it, as far as that can be done."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        as_path(path).rmtree()


def fetch(
    path: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True
) -> pathlib.Path:
    """The local copy of a remote file, folder or pattern; a local path as it is.

    Copies are kept, and renewed where size or time differ. Files that begin with a dot stay there.

    Args:
      wanted: whether a file of a folder is, by its path in it.

    Raises:
      FileNotFoundError: there is nothing.
      OSError: the store cannot be reached; in one line, with the remedy.
    """
    if not is_remote(path):
        return pathlib.Path(path)
    source = as_path(path)
    with reached(source):
        root, files = _list(source, wanted)
        if not files:
            raise FileNotFoundError(f"{source}: no such file or folder; check the path")
        kept = {_local(file): file for file in files}
        for target, file in kept.items():
            _copy(file, target)
        copied_root = _local(root)
        for old in [p for p in copied_root.rglob("*") if p.is_file() and p not in kept]:
            name = old.relative_to(copied_root).as_posix()
            if root is source and wanted(name):  # gone from there since the last copy
                old.unlink(missing_ok=True)
    return _local(source)


def write_folder(path: AnyPath, write: Callable[[pathlib.Path], Any]) -> None:
    """Has `write` write a local folder, and copies its files where `path` is remote."""
    if not is_remote(path):
        write(pathlib.Path(path))
        return
    with tempfile.TemporaryDirectory() as aside:
        write(pathlib.Path(aside))
        upload(pathlib.Path(aside), as_path(path))


def forget(path: AnyPath) -> None:
    """Deletes the local copy of a remote path."""
    shutil.rmtree(_local(as_path(path)), ignore_errors=True)


def write_text(path: AnyPath, text: str) -> None:
    """Replaces a file in one step, as the store or the file system has it."""
    if is_remote(path):
        with reached(path):
            path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def upload(folder: pathlib.Path, target: epath.Path) -> None:
    """Copies the files of a local folder, those of subfolders too."""
    with reached(target):
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            upload_file(file, target / file.relative_to(folder).as_posix())


def upload_file(file: pathlib.Path, target: epath.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 22)


@contextlib.contextmanager
def reached(path: AnyPath) -> Iterator[None]:
    """Turns what stores and their packages raise into one line.

    Raises:
      OSError: with the path and the remedy.
    """
    scheme = os.fspath(path).partition("://")[0]
    package = _PACKAGES.get(scheme, "")
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except ImportError:
        raise OSError(f"{path} needs the package {package}; pip install {package}") from None
    except Exception as error:  # each store has exceptions of its own
        if package and importlib.util.find_spec(package) is None:
            raise OSError(f"{path} needs the package {package}; pip install {package}") from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(f"{path} cannot be had: {reason}; check the path and your rights") from error


def _list(source: epath.Path, wanted: Callable[[str], bool]) -> tuple[epath.Path, list[epath.Path]]:
    """The folder that a path is or lies in, and the files that it means."""
    if re.search(r"[*?\[]", source.name):
        matches = source.parent.glob(source.name)
        return source.parent, [file for file in matches if not file.is_dir()]
    if not source.is_dir():
        return source.parent, [source] if source.exists() else []
    names = ((file, file.relative_to(source).as_posix()) for file in _below(source))
    return source, [file for file, name in names if wanted(name)]


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files below a folder, hidden ones left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def _local(path: epath.Path) -> pathlib.Path:
    """Where the copy of a remote path lies."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    scheme, _, rest = os.fspath(path).partition("://")
    return pathlib.Path(home) / "llmprep_jax" / "remote" / scheme / rest


def _copy(source: epath.Path, target: pathlib.Path) -> None:
    theirs = source.stat()
    if target.is_file() and theirs.mtime:
        ours = target.stat()
        if (ours.st_size, int(ours.st_mtime)) == (theirs.length, theirs.mtime):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with source.open("rb") as data, aside.open("wb") as file:
            shutil.copyfileobj(data, file, 1 << 22)
        if theirs.mtime:
            os.utime(aside, (theirs.mtime, theirs.mtime))
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
