"""What an installed wheel is: the library, whole and alone."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted((ROOT / "llmprep_jax").rglob("*.py"))
IMPORT_ALL = """
import importlib, pathlib, sys
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
import llmprep_jax as lp
print(lp.peft.LoRA().rank)
"""


def required() -> dict[str, list[str]]:
    """Names of the distributions that setup.py asks for, by extra; "" for all users."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    texts = {"": []}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            texts[""] = _strings(node.value)
        if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS":
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                texts[key.value] = _strings(value)
    return {
        extra: [re.split(r"[^\w-]", text)[0] for text in found] for extra, found in texts.items()
    }


def _strings(node: ast.expr) -> list[str]:
    return [leaf.value for leaf in ast.walk(node) if isinstance(leaf, ast.Constant)]


def imported() -> set[str]:
    """Top-level modules that the package imports."""
    nodes = [node for path in MODULES for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_what_only_tests_use_is_an_extra():
    needed = required()
    assert "chex" not in imported()
    assert "chex" not in needed[""]
    assert "chex" in needed["dev"]


def test_what_the_package_imports_is_asked_for():
    of_import = {"orbax": "orbax-checkpoint", "array_record": "array-record"}
    of_import |= {"tensorflow_datasets": "tensorflow-datasets", "absl": "absl-py", "PIL": "pillow"}
    ours = {"llmprep_jax", *sys.stdlib_module_names}
    asked = {name for names in required().values() for name in names}
    missing = {name for name in imported() - ours if of_import.get(name, name) not in asked}
    assert not missing


@pytest.mark.slow  # builds and installs, and imports some hundred modules in a process of its own
def test_a_wheel_holds_every_module_and_works_where_there_is_no_checkout(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"  # the build writes beside what it builds
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        (source / name).symlink_to(ROOT / name)
    for name in ("llmprep_jax", "experiments", "configs"):
        (source / name).symlink_to(ROOT / name)
    run([*pip, "wheel", *options, "-w", str(tmp_path / "wheel"), str(source)], tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {path.relative_to(ROOT).as_posix() for path in MODULES}
    target = tmp_path / "site"
    run([*pip, "install", *options, "--target", str(target), str(wheel)], tmp_path)
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES]
    names = [name.removesuffix(".__init__") for name in names]
    out = run([sys.executable, "-c", IMPORT_ALL, str(target), *names], tmp_path, PYTHONPATH=target)
    assert out.split() == ["16"]


def run(command: list[str], folder: pathlib.Path, **environment) -> str:
    """What a command prints that runs outside the checkout."""
    environment = {name: str(value) for name, value in environment.items()}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
