"""The house's rules that a program can see: who imports whom, what is not used, how long files are.

Imports point down only. This reads the source, so an import inside a function counts as one at the
top does.
"""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASE = {"types", "sharding", "processes", "remote"}  # what everything below the families may use
# top-level module or folder of llmprep_jax: what else of the package it may import
MAY_IMPORT = {
    "types": set(),
    "sharding": set(),
    "processes": set(),
    "remote": set(),
    "values": {"remote"},
    "near_names": set(),
    "config": {"values", "near_names", "remote"},
    "interrupts": set(),
    "cli": {"config", "interrupts", "processes", "remote"},
    "kernels": set(),
    "nn": {"kernels", *BASE},
    "models": {"nn", "text", "vision", "weights", *BASE},
    "weights": BASE,
    "quant": {"nn", "weights", *BASE},
    "peft": {"nn", "quant", "weights", *BASE},
    "text": {"weights", *BASE},
    "vision": BASE,
    "data": {"text", "vision", "config", *BASE},
    "train": {"kernels", "nn", "peft", "data", "config", "interrupts", *BASE},
    "generate": {"kernels", "nn", "text", *BASE},
    "evaluate": {"train", "generate", "data", "vision", *BASE},
    "pretrained": {"models", "nn", "peft", "quant", "text", "train", "weights", "config", *BASE},
    "runs": {
        *{"models", "nn", "peft", "quant", "text", "train", "data", "evaluate", "pretrained"},
        *{"config", "remote", "sharding"},
    },
    "__init__": {"peft", "quant", "generate", "pretrained", "train", "runs"},
}
_NNX = ("jit", "grad", "value_and_grad", "vmap", "pmap", "scan", "remat", "shard_map", "Optimizer")
FORBIDDEN = {f"nnx.{name}" for name in _NNX} | {"jax.pmap", "jax.experimental"}
MESH_AXES = {"data", "fsdp", "tensor", "expert"}
CONTEXTS = {"_rules.value"}  # of jax.make_user_context, no Variable
NAMES_AXES = {"llmprep_jax/sharding.py", "configs/meshes.py"}
FOREIGN = {"pickle", "torch", "transformers", "tensorflow", "peft"}  # of tests, or of nobody
# have no other home yet
ALLOWED_EXPERIMENTAL = {"jax.experimental.multihost_utils", "jax.experimental.topologies"}


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, with what it takes `from` a module."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name(path)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


PACKAGE = sources("llmprep_jax")
PRODUCT = sources("llmprep_jax", "experiments", "configs")
EVERYTHING = [*PRODUCT, *sources("tests")]


def problems_of(paths: list[Path], look: Callable[[Path], Iterator[str]]) -> list[str]:
    return [f"{name(path)}: {problem}" for path in paths for problem in look(path)]


def test_imports_point_down():
    def look(path):
        own = path.relative_to(ROOT / "llmprep_jax").parts[0].removesuffix(".py")
        if own not in MAY_IMPORT:
            yield f"{own} is new: say above what it may import"
            return
        for module in imports(path):
            root, *rest = module.split(".")
            if root in ("experiments", "configs", "tests"):
                yield f"{module} lies above the package"
            if root == "llmprep_jax" and rest[0] not in MAY_IMPORT[own] | {own}:
                yield f"{own} may not import {module}"

    assert not problems_of(PACKAGE, look)


def test_configs_do_not_import_experiments():
    def look(path):
        yield from (module for module in imports(path) if module.startswith("experiments"))

    assert not problems_of(sources("configs"), look)


def test_families_do_not_import_each_others_internals():
    def look(path):
        family = path.relative_to(ROOT / "llmprep_jax/models").parts[0]
        for module in imports(path):
            _, folder, of, *inner = f"{module}...".split(".")
            shared = ("hf_config", "hf_names", "model_config", "towers", "deepseek_parts")
            shared += ("prompt_processor", "tower_processor", family)
            foreign = folder == "models" and of not in shared
            if foreign and (inner[0] or of in ("", "registry")):  # a family as a whole may be
                yield module

    models = ROOT / "llmprep_jax/models"
    assert not problems_of([path for path in PACKAGE if models in path.parents[1:]], look)


def test_no_file_imports_what_belongs_to_tests_or_to_nobody():
    def look(path):
        for module in imports(path):
            foreign = module.split(".")[0] in FOREIGN
            # benchmarks time transformers and peft beside us
            is_benchmark = path.name.startswith("bench") or path.parent.name == "bench"
            if foreign and not is_benchmark:
                yield module
            allowed = module in ALLOWED_EXPERIMENTAL or (
                "kernels" in path.parts and module.startswith("jax.experimental.pallas")
            )
            if module.startswith("jax.experimental") and not allowed:
                yield module

    assert not problems_of(PRODUCT, look)


def test_transforms_are_jaxs_own():
    def look(path):
        called = {id(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Attribute):
                continue
            text = ast.unparse(node)
            if text in FORBIDDEN or text.endswith(".with_sharding_constraint"):
                yield f"line {node.lineno}: {text}"
            if node.attr == "value" and id(node) not in called and text not in CONTEXTS:
                yield f"line {node.lineno}: {text}; read a Variable by v[...]"

    assert not problems_of(PRODUCT, look)


def test_mesh_axes_are_named_where_rules_are():
    def look(path):
        specs = [
            node
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("jax.P", "PartitionSpec")
        ]
        inside = {id(leaf) for spec in specs for leaf in ast.walk(spec)}
        for node in ast.walk(tree(path)):
            # "data" and the like are words too; in a PartitionSpec they are axes
            named = isinstance(node, ast.Constant) and node.value in MESH_AXES
            if named and (node.value == "fsdp" or id(node) in inside):
                yield f"line {node.lineno}: {node.value}"

    assert not problems_of([path for path in PRODUCT if name(path) not in NAMES_AXES], look)


def test_files_and_functions_are_short():
    def look(path):
        lines = path.read_text(encoding="utf-8").count("\n")
        limit = 150 if path.parent == ROOT / "experiments" else 500
        limit = 300 if path.name == "model.py" else limit
        if lines > limit:
            yield f"{lines} lines, {limit} allowed"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and "kernels" not in path.parts:
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    yield f"{node.name} has {length} lines"

    assert not problems_of(EVERYTHING, look)


def test_files_open_with_a_paragraph():
    def look(path):
        if tree(path).body and not ast.get_docstring(tree(path)):
            yield "no docstring"

    assert not problems_of(EVERYTHING, look)


def test_helpers_live_with_their_noun():
    assert not [name(p) for p in EVERYTHING if p.stem in ("util", "utils", "helpers", "misc")]


def test_nothing_is_left_undone():
    undone = re.compile(
        r"TODO|FIXME|raise NotImplementedError|pytest\.(skip|xfail)|mark\.(skip|xfail)"
    )

    def look(path):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if path != Path(__file__) and undone.search(line):
                yield f"line {number}: {line.strip()}"

    assert not problems_of(EVERYTHING, look)


def test_packaging_is_one_short_file():
    assert (ROOT / "setup.py").read_text(encoding="utf-8").count("\n") <= 40
