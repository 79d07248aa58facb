"""Classes and values of the source by the names they have in a module, nothing being imported."""

import ast
import dataclasses
import functools
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Class:
    """A dataclass in the source, and the module it is in."""

    module: str
    node: ast.ClassDef


@functools.cache
def source(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return ""


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(source(module))


def resolve(module: str, name: str) -> "Class | tuple[str, ast.expr] | None":
    """A class by the name it has in a module, through imports; or the value a name is given."""
    head, _, rest = name.partition(".")
    for node in tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Class(module, node)
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == [name]:
            return module, assigned(node)
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == head:
                    inner = (f"{node.module}.{alias.name}", rest)
                    return resolve(*inner) if rest else resolve(node.module or "", alias.name)
    return None


def assigned(node: ast.AST) -> ast.expr | None:
    """What a name, a field or a keyword is given; None for a field without a default."""
    *others, last = ast.iter_child_nodes(node)
    return None if isinstance(node, ast.AnnAssign) and len(others) < 2 else last
