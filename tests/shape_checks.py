"""Checks shapes and types of arguments in the package while tests run, as jaxtyping's import hook
does, in a tenth of the time.

That hook wraps every function, and those defined inside others anew at each call: 716,000 checked
calls in one file of tests, a quarter of the suite. Here functions that state shapes are checked by
jaxtyping, others of modules and classes by beartype, and inner ones that state no shape not at all.
"""

import ast
import functools
import inspect
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType

import beartype
import jaxtyping

_check_shapes = jaxtyping.jaxtyped(typechecker=beartype.beartype)


def install(package: str) -> None:
    """Modules of `package` that are imported from now on are checked."""
    sys.meta_path.insert(0, _Finder(package))


def check_types(function: Callable) -> Callable:
    """`function` by beartype; `jaxtyping_disable` turns that off too."""
    if inspect.isgeneratorfunction(function):  # beartype takes no other annotation than Iterator
        return function
    checked = beartype.beartype(function)
    if checked is function:  # it states no type
        return function

    @functools.wraps(function)
    def call(*args, **kwargs):
        __tracebackhide__ = True
        return (function if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

    return call


class _Decorate(ast.NodeTransformer):
    """Puts a check on each function that needs one; `_level` counts the functions around it and
    `_absent` are the names that are imported for type checkers alone."""

    def __init__(self):
        self._level, self._absent = 0, set()

    def visit_If(self, node: ast.If) -> ast.If:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            imports = [x for x in node.body if isinstance(x, ast.ImportFrom)]
            self._absent |= {alias.name for x in imports for alias in x.names}
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        if node.decorator_list:  # a dataclass is checked where it is made
            node.decorator_list.insert(0, _name("_check_shapes"))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self._level += 1
        self.generic_visit(node)
        self._level -= 1
        # innermost, below @property, @jax.jit and the like
        if _states_shape(node.args) or (node.returns and _states_shape(node.returns)):
            node.decorator_list.append(_name("_check_shapes"))
        elif self._level == 0 and not self._names_absent(node.args):
            node.decorator_list.append(_name("check_types"))
        return node

    def _names_absent(self, annotations: ast.arguments) -> bool:
        """Whether a type is only there for type checkers, which beartype would not find."""
        constants = [x.value for x in ast.walk(annotations) if isinstance(x, ast.Constant)]
        return not self._absent.isdisjoint(constants)


def _name(check: str) -> ast.expr:
    return ast.parse(f"__import__('{__name__}').shape_checks.{check}", mode="eval").body


def _states_shape(annotations: ast.AST) -> bool:
    """Whether something like Float[Array, "B T"] is among them."""
    return any(
        isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Tuple)
        and isinstance(node.slice.elts[-1], ast.Constant)
        and isinstance(node.slice.elts[-1].value, str)
        for node in ast.walk(annotations)
    )


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # past the cached one, which checks nothing
        path = self.get_filename(fullname)
        module = _Decorate().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(module), path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    def __init__(self, package: str):
        self._package = package

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self._package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
