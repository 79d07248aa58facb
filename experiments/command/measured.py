"""Where a result of experiments.evaluate lies: beside the model, and never over another."""

import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from llmprep_jax import processes
from llmprep_jax.config import to_dict
from llmprep_jax.remote import AnyPath, as_path, write_text


def write(cfg: Any, numbers: dict[str, Any], unsaid: tuple[str, ...] = ()) -> AnyPath:
    """Writes numbers with the settings as JSON, in one process of several; returns where.

    The file is `cfg.out`; where that is None, TASK-DATA.json beside the model, or in the working
    folder where the model is no folder; where another result lies there, with a number.

    Args:
      cfg: an EvaluateConfig. unsaid: fields of it that are left out.
    """
    unsaid = ("processes", *unsaid)
    settings = {name: value for name, value in to_dict(cfg).items() if name not in unsaid}
    name = f"{cfg.task.name}-{pathlib.Path(cfg.data.paths[0]).stem}"
    text = json.dumps({**numbers, "settings": settings}, indent=2, ensure_ascii=False) + "\n"

    def put() -> str:
        paths = [cfg.out] if cfg.out is not None else _free_paths(cfg.model, name)
        path = next(path for path in paths if path == cfg.out or _is_free(path, settings))
        write_text(path, text)
        return str(path)

    return as_path(processes.by_one(put))


def _free_paths(model: str, name: str) -> Iterator[pathlib.Path]:
    """Where a result may lie, then with a number."""
    path = pathlib.Path(model).expanduser()
    folder = path if path.is_dir() else pathlib.Path()
    yield folder / f"{name}.json"
    yield from (folder / f"{name}-{number}.json" for number in itertools.count(2))


def _is_free(path: pathlib.Path, settings: dict) -> bool:
    """Whether nothing lies there, or a result of the same settings."""
    try:
        return json.loads(path.read_text()).get("settings") == json.loads(json.dumps(settings))
    except FileNotFoundError:
        return True
    except ValueError:
        return False
