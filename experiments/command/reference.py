"""The settings of a command, read from the source of their dataclasses: name, type, default, words.

Nothing is imported, so that help takes no second. A field's words are those of its class's
docstring, under "Attributes", or stand behind it on its line. A section that may be one of several
classes shows the fields of each that those before it do not have.
"""

import ast
import dataclasses
import re
import textwrap
from collections.abc import Iterator

from experiments.command.source import Class, assigned, resolve, source


@dataclasses.dataclass(frozen=True)
class Setting:
    """A line of the reference; `kind` and `default` are as in the source, or in words."""

    name: str
    kind: str
    default: str
    words: str


def describe(settings: str) -> str:
    """Help in 100 columns for "module:Class"."""
    lines = []
    for setting in settings_of(settings):
        default = f" = {setting.default}" if setting.default else ""
        lines.append(f"  {setting.name}: {setting.kind}{default}")
        lines += textwrap.wrap(setting.words, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def settings_of(settings: str) -> list[Setting]:
    """All settings of "module:Class", those of sections by their dotted names."""
    module, name = settings.split(":")
    resolved = resolve(module, name)
    assert isinstance(resolved, Class), f"{settings} is no class"
    return list(_list(resolved, "", {}))


def _list(cls: Class, prefix: str, shown: dict[str, str]) -> Iterator[Setting]:
    """The settings of a class; `shown` are classes that are listed already, and where."""
    for name, (owner, node) in _fields(cls).items():
        words = _words(cls).get(name) or _comment(owner.module, node)
        sections = _sections(owner.module, node.annotation)
        default = _default(owner.module, assigned(node))
        path = prefix + name
        if sections and sections[0].node.name in shown:
            words += f"; its settings are those of {shown[sections[0].node.name]}"
            sections_shown = []
        else:
            sections_shown = sections
        if len(sections) == 1 and sections_shown and default == "":
            shown[sections[0].node.name] = path
            yield from _list(sections[0], f"{path}.", shown)
            continue
        kind = _kind(owner.module, node.annotation)
        yield Setting(path, kind, default or ("" if sections else "required"), words)
        yield from _list_each(sections_shown, path, shown)


def _list_each(sections: list[Class], path: str, shown: dict[str, str]) -> Iterator[Setting]:
    """The settings of classes of which a field holds one, each that is alike once."""
    seen: set[Setting] = set()
    for section in sections:
        shown[section.node.name] = path
        inner = list(_list(section, f"{path}.", shown))
        for setting in inner:
            if setting not in seen:
                owner = f"of {section.node.name}: " if seen else ""  # the first is the usual one
                yield dataclasses.replace(setting, words=owner + setting.words)
        seen |= set(inner)


def _fields(cls: Class) -> dict[str, tuple[Class, ast.AnnAssign]]:
    """The fields of a class and of those it derives from, and which of them has each."""
    fields: dict[str, tuple[Class, ast.AnnAssign]] = {}
    for base in cls.node.bases:
        parent = resolve(cls.module, ast.unparse(base))
        fields |= _fields(parent) if isinstance(parent, Class) else {}
    for node in cls.node.body:
        is_field = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if is_field and "ClassVar" not in ast.unparse(node.annotation):
            fields[node.target.id] = (cls, node)
    return {name: field for name, field in fields.items() if not name.startswith("_")}


def _sections(module: str, annotation: ast.expr) -> list[Class]:
    """The dataclasses that a field may hold."""
    if isinstance(annotation, ast.BinOp):
        sides = (annotation.left, annotation.right)
        return [section for side in sides for section in _sections(module, side)]
    if not isinstance(annotation, ast.Name):
        return []
    resolved = resolve(module, annotation.id)
    if isinstance(resolved, tuple):  # the name of a union
        return _sections(*resolved)
    is_section = resolved is not None and any(
        "dataclass" in ast.unparse(d) for d in resolved.node.decorator_list
    )
    return [resolved] if is_section else []


def _default(module: str, value: ast.expr | None) -> str:
    """As in the source; empty where there is none or a section makes itself."""
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        keywords = {keyword.arg: assigned(keyword) for keyword in value.keywords}
        return _default(module, keywords.get("default"))
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "pathlib.Path":
        return str(ast.literal_eval(value.args[0]))
    if isinstance(value, ast.Name):
        resolved = resolve(module, value.id)
        return _default(*resolved) if isinstance(resolved, tuple) else value.id
    return ast.unparse(value)


def _kind(module: str, annotation: ast.expr) -> str:
    """A type in words; names of types are replaced by what they stand for."""
    if isinstance(annotation, ast.BinOp):
        return f"{_kind(module, annotation.left)} | {_kind(module, annotation.right)}"
    if isinstance(annotation, ast.Name):
        resolved = resolve(module, annotation.id)
        return _kind(*resolved) if isinstance(resolved, tuple) else annotation.id
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
        item, *rest = annotation.slice.elts
        if isinstance(item, ast.Name) and [ast.unparse(node) for node in rest] == ["..."]:
            return f"list of {_kind(module, item)}"
    text = ast.unparse(annotation).replace("pathlib.Path", "path").replace("AnyPath", "path")
    text = re.sub(r"Literal\[([^]]*)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), text)
    return re.sub(r"tuple\[(.+), \.\.\.\]", r"list of \1", text)


def _words(cls: Class) -> dict[str, str]:
    """What the docstrings of a class and of those it derives from say of its fields."""
    words: dict[str, str] = {}
    for base in cls.node.bases:
        parent = resolve(cls.module, ast.unparse(base))
        words |= _words(parent) if isinstance(parent, Class) else {}
    _, _, text = (ast.get_docstring(cls.node) or "").partition("Attributes:\n")
    text, names = " ".join(text.split()), "|".join(map(re.escape, _fields(cls)))
    starts = list(re.finditer(rf"(?:^|(?<=[.;)] ))((?:{names})(?:, (?:{names}))*): ", text))
    ends = [*(start.start() for start in starts[1:]), len(text)][: len(starts)]
    for start, end in zip(starts, ends, strict=True):
        meaning = text[start.end() : end].strip().rstrip(".")
        words |= dict.fromkeys(start[1].split(", "), meaning)
    return words


def _comment(module: str, node: ast.AnnAssign) -> str:
    """What stands behind a field on its line."""
    line = source(module).splitlines()[node.end_lineno - 1]
    return line.encode()[node.end_col_offset :].decode().strip().removeprefix("# ")
