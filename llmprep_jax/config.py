"""Runs are Python: loading a config file, changing single fields by `a.b=c`, saving what was
resolved.

A config file defines `get_config()`, which returns one frozen dataclass; nested dataclasses are its
sections. `override` replaces fields by dotted path and converts the text to the field's declared
type. All changes of one dataclass are made in one `dataclasses.replace`, so `num_heads=6
num_kv_heads=3` passes a check that neither change alone would pass.
"""

import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import pathlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.text

from llmprep_jax.near_names import suggest
from llmprep_jax.remote import as_path
from llmprep_jax.values import NONE_WORDS, Mismatch, check, describe, members, parse

TYPE_KEY = "_type"


class UsageError(ValueError):
    """The command was called wrongly: an unknown key, a value of the wrong type, no such config."""


def load_config(path: str | pathlib.Path, overrides: Iterable[str] = ()) -> Any:
    """Runs a config file and applies overrides.

    Args:
      path: a Python file that defines `get_config() -> frozen dataclass`.
      overrides: texts `a.b=c`.

    Raises:
      UsageError: no such file, one that does not run, a value of the wrong type, a bad override.
    """
    path = pathlib.Path(path)
    if not _is_file(path):
        raise UsageError(f"no config file {path}; {_siblings(path)}")
    config = _run_config_file(path)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UsageError(f"{path}: get_config() returned a {type(config).__name__}, no dataclass")
    config = look_up(override(config, overrides))
    try:
        check_fields(config)
    except Mismatch as error:
        raise UsageError(f"{path}: {error}") from None
    return config


def look_up(config: Any) -> Any:
    """The config with the functions among its fields called."""
    new = {}
    for name in field_types(type(config)):
        value = getattr(config, name)
        if isinstance(value, types.FunctionType):
            new[name] = value()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            section = look_up(value)
            new |= {} if section is value else {name: section}
    return dataclasses.replace(config, **new) if new else config


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _run_config_file(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file; configs are named *.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UsageError(f"{path} defines no function get_config()")
        return module.get_config()
    except UsageError:
        raise
    except Exception as error:
        place = f"{path}:{_line_in(error, path)}"
        raise UsageError(f"{place}: {type(error).__name__}: {_one_line(error)}") from error


def _line_in(error: BaseException, path: pathlib.Path) -> int:
    """The last line of the config file that an exception went through."""
    line = (error.lineno or 0) if isinstance(error, SyntaxError) else 0
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _siblings(path: pathlib.Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    names = sorted(p.name for p in folder.glob("*.py") if p.name != "__init__.py")
    if not names:
        return f"{folder} holds no config"
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names[:12])}"


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Parts a command line into positional arguments and `a.b=c` overrides.

    Raises:
      UsageError: an argument that begins with a dash; commands have no flags.
    """
    positional: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        if argument.startswith("-"):
            raise UsageError(f"unknown flag {argument}; settings are written name=value")
        key, equals, _ = argument.partition("=")
        dotted = all(part.isidentifier() or part.isdigit() for part in key.split("."))
        (overrides if equals and dotted else positional).append(argument)
    return positional, overrides


def only_overrides(arguments: Iterable[str]) -> list[str]:
    """The overrides of a command line that has nothing else.

    Raises:
      UsageError: there is something else.
    """
    positional, overrides = split_arguments(arguments)
    if positional:
        raise UsageError(f"settings are written name=value, not {positional[0]!r}")
    return overrides


def override(config: Any, overrides: Iterable[str]) -> Any:
    """Replaces fields of a tree of dataclasses.

    A section that is None comes into being when a field of it is set; a section of one of several
    classes is chosen by the class's name, `adapter=QLoRA`, or `adapter._type=QLoRA`. A class may
    say by `SET_BY` which of its fields a section that is set as a whole sets: `task=docvqa` is
    `task.name=docvqa`.

    Args:
      config: a dataclass instance.
      overrides: texts `a.b=c`; `a.0.b=c` reaches into a tuple; of two for one key the last wins.

    Raises:
      UsageError: no such key (near misses are named), a value of the wrong type, or one that the
        config refuses.
    """
    changes: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"{text!r} is no setting; write key=value")
        _plan(changes, key.split("."), value)
    try:
        return _apply(config, type(config), changes, ())
    except _UnknownKey as error:
        keys = list(_dotted_keys(config, type(config)))
        hint = suggest(keys, error.path, error.key) or f"the keys are {', '.join(error.known)}"
        name = ".".join((*error.path, error.key))
        raise UsageError(f"unknown key {name}; {hint}") from None


class _UnknownKey(Exception):
    """A section has no such key, but those known."""

    def __init__(self, path: tuple[str, ...], key: str, known: Iterable[str]):
        super().__init__(key)
        self.path, self.key, self.known = path, key, list(dict.fromkeys(known))


def _plan(changes: dict[str, Any], path: Sequence[str], value: str) -> None:
    """Notes a change in a tree of dicts by key, whose leaves are the texts as typed."""
    for depth, part in enumerate(path[:-1], 1):
        inner = changes.setdefault(part, {})
        if not isinstance(inner, dict):
            inner = changes[part] = {TYPE_KEY: _class_name(inner, path[:depth])}
        changes = inner
    if isinstance(changes.get(path[-1]), dict):
        changes[path[-1]][TYPE_KEY] = _class_name(value, path)
    else:
        changes[path[-1]] = value


def _class_name(text: str, path: Sequence[str]) -> str:
    """What a section is set to as a whole while parts of it are set too: a class at most."""
    if not text.isidentifier() or text.lower() in NONE_WORDS:
        raise UsageError(f"{'.'.join(path)} is set as a whole and in part")
    return text


def _apply(value: Any, kind: Any, changes: str | dict[str, Any], path: tuple[str, ...]) -> Any:
    """`value`, of declared type `kind`, with the planned changes made."""
    name, field = ".".join(path), getattr(kind, "SET_BY", None)
    if isinstance(changes, str) and changes in _classes(kind):
        changes = {TYPE_KEY: changes}
    elif field is not None and (isinstance(changes, str) or TYPE_KEY in changes):
        whole = {TYPE_KEY: changes} if isinstance(changes, str) else changes
        changes = {field if key == TYPE_KEY else key: text for key, text in whole.items()}
    if isinstance(changes, str):
        try:
            return parse(changes, kind)
        except Mismatch as error:
            raise UsageError(f"{name}={changes}: {error}") from None
    if TYPE_KEY in changes:
        return _change_class(value, kind, dict(changes), path)
    if value is None or (isinstance(value, str) and _classes(kind)):  # in place of a name too
        return _make_section(kind, path, changes)
    if isinstance(value, tuple):
        return _apply_to_tuple(value, kind, changes, path)
    if not dataclasses.is_dataclass(value):
        if not changes:
            return value
        raise UsageError(f"{name} is {value!r}, no section; set {name}=... as a whole")
    new = _new_fields(type(value), value, changes, path)
    return _construct(lambda: dataclasses.replace(value, **new), path, new)


def _new_fields(
    cls: type, value: Any, changes: Mapping[str, Any], path: tuple[str, ...]
) -> dict[str, Any]:
    """The changed fields of a section of this class, whose others are those of `value`."""
    kinds, new = field_types(cls), {}
    likes = {field.name: field.metadata.get("like") for field in dataclasses.fields(cls)}
    for key, change in changes.items():
        if key not in kinds:
            raise _UnknownKey(path, key, kinds)
        old = getattr(value, key, None)
        if old is None and likes[key] is not None and isinstance(change, dict):
            old = getattr(value, likes[key])
        new[key] = _apply(old, kinds[key], change, (*path, key))
    return new


def _apply_to_tuple(
    value: tuple[Any, ...], kind: Any, changes: Mapping[str, Any], path: tuple[str, ...]
) -> tuple[Any, ...]:
    new = list(value)
    for key, change in changes.items():
        if not (key.isascii() and key.isdigit() and int(key) < len(value)):
            count = len(value)
            raise UsageError(f"{'.'.join(path)} has {count} items, counted from 0, and no {key!r}")
        new[int(key)] = _apply(value[int(key)], _item_type(kind, int(key)), change, (*path, key))
    return tuple(new)


def _item_type(kind: Any, index: int) -> Any:
    for member in members(kind):
        if typing.get_origin(member) is tuple:
            items = typing.get_args(member)
            return items[0] if items[-1] is Ellipsis else items[index]
    return Any


def _change_class(value: Any, kind: Any, changes: dict[str, Any], path: tuple[str, ...]) -> Any:
    """A section of another class that its declared type allows; what both have is kept."""
    name = changes.pop(TYPE_KEY)
    classes = _classes(kind)
    if name not in classes:
        known = ", ".join(classes) or "none, it is no section"
        raise UsageError(f"{'.'.join((*path, TYPE_KEY))}={name}; the classes are {known}")
    both = set(field_types(classes[name])) & set(field_types(type(value)) if value else ())
    new = {key: getattr(value, key) for key in both}
    new |= _new_fields(classes[name], value, changes, path)
    return _construct(lambda: classes[name](**new), path, {})


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _classes(kind: Any) -> dict[str, type]:
    """The sections that a type allows, by name."""
    return {member.__name__: member for member in members(kind) if _is_section(member)}


def _make_section(kind: Any, path: tuple[str, ...], changes: Mapping[str, Any]) -> Any:
    """What a section that is None becomes when these keys of it are set: the first that has all."""
    name, classes = ".".join(path), list(_classes(kind).values())
    if not classes:
        raise UsageError(f"{name} is None, no section; set {name}=... as a whole")
    for cls in classes:
        if set(changes) <= set(field_types(cls)):
            new = _new_fields(cls, None, changes, path)
            return _construct(lambda cls=cls, new=new: cls(**new), path, new)
    known = [key for cls in classes for key in field_types(cls)]
    unknown = [key for key in changes if key not in known]
    if unknown:
        raise _UnknownKey(path, unknown[0], known)
    raise UsageError(f"{name}: no class has all of {', '.join(changes)}; choose one by {name}=NAME")


def _construct(make: Callable[[], Any], path: tuple[str, ...], new: Mapping[str, Any]) -> Any:
    """Calls a dataclass's constructor; what that refuses is the user's error."""
    try:
        return make()
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        place = ".".join((*path, *new) if len(new) == 1 else path)
        raise UsageError(f"{place}: {_one_line(error)}".removeprefix(": ")) from error


def _dotted_keys(value: Any, kind: Any) -> Iterator[str]:
    """All keys of a section and of those in it, also of ones that are None."""
    classes = [type(value)] if _is_section(type(value)) else list(_classes(kind).values())
    for cls in classes:
        for name, inner in field_types(cls).items():
            yield name
            keys = dict.fromkeys(_dotted_keys(getattr(value, name, None), inner))
            yield from (f"{name}.{key}" for key in keys)


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The declared type of each field that a dataclass's constructor takes, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def check_fields(config: Any, path: str = "") -> None:
    """Holds the fields of a tree of dataclasses against their declared types.

    Raises:
      Mismatch: a field is of another type.
    """
    for name, kind in field_types(type(config)).items():
        value = getattr(config, name)
        try:
            check(value, kind)
        except Mismatch as error:
            raise Mismatch(f"{path}{name}: {error}") from None
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_fields(value, f"{path}{name}.")


def to_dict(config: Any) -> Any:
    """Plain data for JSON: a dataclass is a dict that names its class, a tuple is a list."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {name: to_dict(getattr(config, name)) for name in field_types(type(config))}
        return {TYPE_KEY: type(config).__name__, **fields}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    return str(config)


def to_json(config: Any) -> str:
    """The text of `to_dict`, indented."""
    return json.dumps(to_dict(config), indent=2, allow_nan=False)


def from_dict(kind: Any, data: Any) -> Any:
    """The value of declared type `kind` whose `to_dict` is `data`.

    Raises:
      UsageError: a class, a field or a value that the type does not have.
    """
    if isinstance(data, Mapping) and TYPE_KEY in data:
        classes = _classes(kind)
        name = " ".join(str(data[TYPE_KEY]).split())
        if name not in classes:
            raise UsageError(f"a {name} is saved where {describe(kind)} is wanted")
        kinds = field_types(classes[name])
        unknown = [key for key in data if key not in kinds and key != TYPE_KEY]
        if unknown:
            raise UsageError(f"unknown key {name}.{unknown[0]}; the keys are {', '.join(kinds)}")
        new = {key: from_dict(kinds[key], item) for key, item in data.items() if key != TYPE_KEY}
        return _construct(lambda: classes[name](**new), (name,), new)
    if isinstance(data, list):
        data = tuple(from_dict(_item_type(kind, index), item) for index, item in enumerate(data))
    if isinstance(data, str) and pathlib.Path in members(kind):
        return as_path(data)
    try:
        return check(data, kind)
    except Mismatch as error:
        raise UsageError(str(error)) from None


def changed_fields(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Where two results of `to_dict` differ: dotted key, old value, new value."""
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key), new.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            for inner, *values in changed_fields(was, now):
                yield f"{key}.{inner}", *values
        elif was != now:
            yield key, was, now


def catch_up(
    old: Mapping[str, Any], config: Any, prefix: str = ""
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A result of an older version's `to_dict`, as this one would have written it.

    Args:
      config: whose classes are those of the sections.

    Returns:
      It, with defaults for the fields that it lacks and without those that there are no more; and
      these two, by dotted key.
    """
    new, added, removed = dict(old), {}, {}
    for key in [key for key in old if key != TYPE_KEY and key not in field_types(type(config))]:
        removed[prefix + key] = new.pop(key)
    for field in dataclasses.fields(config):
        was, now = old.get(field.name), getattr(config, field.name)
        if field.init and field.name not in old:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is not dataclasses.MISSING:
                new[field.name] = added[prefix + field.name] = to_dict(default)
        elif isinstance(was, Mapping) and was.get(TYPE_KEY) == type(now).__name__:
            inner = catch_up(was, now, f"{prefix}{field.name}.")
            new[field.name], added, removed = inner[0], added | inner[1], removed | inner[2]
    return new, added, removed


def settle(config: Any) -> None:
    """Converts a dataclass's fields to their declared types; for `__post_init__`, first of all.

    An int becomes a float, a list a tuple, a text a path. Functions are left: `look_up` calls them.

    Raises:
      ValueError: a field is of another type; says which in one line.
    """
    for name, kind in field_types(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, types.FunctionType):
            continue
        if isinstance(value, str) and pathlib.Path in members(kind) and str not in members(kind):
            value = as_path(value)
        try:
            settled = check(value, kind)
        except Mismatch as error:
            raise UsageError(f"{type(config).__name__}.{name}: {error}") from None
        if settled is not getattr(config, name):
            object.__setattr__(config, name, settled)


def changes_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and values of a config that are not its class's defaults."""
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        is_section = dataclasses.is_dataclass(value) and not isinstance(value, type)
        if value == default or not field.init:
            continue
        if is_section and type(value) is not type(default) and default is not dataclasses.MISSING:
            yield prefix + field.name, type(value).__name__
        if is_section:
            yield from changes_of(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def print_config(config: Any, console: rich.console.Console | None = None) -> None:
    """Prints what of a config differs from the defaults, a line each."""
    console = console or rich.console.Console()
    for key, value in changes_of(config):
        shown = value if isinstance(value, (str, os.PathLike)) else repr(value)
        line = rich.text.Text.assemble((key, "cyan"), f" = {shown}")
        console.print(line, soft_wrap=True, highlight=False)
