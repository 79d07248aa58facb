"""Values by declared type: reading a setting's text, checking a value, naming a type in words.

What a field of a config may hold is its annotation: numbers, texts, truth values, paths, None,
Literal, tuples, mappings and unions of these. A union is tried from its narrowest member to its
widest, so `none` for `str | None` is None (write `'none'` for the text).
"""

import ast
import contextlib
import itertools
import math
import os
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from etils import epath

from llmprep_jax.remote import as_path

NONE_WORDS = ("none", "null")
BOOL_WORDS = {"true": True, "false": False}


class Mismatch(ValueError):
    """A value is not of a type; the message says what was wanted."""


def members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union; the type itself where it is none."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return tuple(itertools.chain.from_iterable(members(arg) for arg in typing.get_args(kind)))
    return (kind,)


def parse(text: str, kind: Any) -> Any:
    """Reads the text of a setting as a value of the declared type.

    Numbers may have underscores and must be finite; tuples are `1,2,3`, bracketed or not; quotes
    around a text are taken off; `none` is None where the type allows it.

    Raises:
      Mismatch: the text is no such value.
    """
    for member in sorted(members(kind), key=_width):
        if typing.get_origin(member) is tuple and str in members(kind) and not _is_list(text):
            continue  # "all-linear" for `str | tuple[str, ...]` is a text
        with contextlib.suppress(Mismatch):
            return _parse_member(text, member)
    raise Mismatch(f"wanted {describe(kind)}")


def check(value: Any, kind: Any) -> Any:
    """`value` as one of the declared type: an int becomes a float, a list a tuple, no more.

    Raises:
      Mismatch: it is of another type.
    """
    for member in sorted(members(kind), key=_width):
        with contextlib.suppress(Mismatch):
            return _check_member(value, member)
    raise Mismatch(f"wanted {describe(kind)}, not {value!r}")


def describe(kind: Any) -> str:
    """The words for a type in an error message."""
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    words |= {type(None): "none", pathlib.Path: "a path", epath.Path: "a path", Any: "anything"}
    parts = []
    for member in members(kind):
        items = typing.get_args(member)
        if typing.get_origin(member) is Literal:
            parts += [str(choice) for choice in items]
        elif typing.get_origin(member) is tuple:
            parts.append(f"a list of {', '.join(describe(k) for k in items if k is not Ellipsis)}")
        else:
            parts.append(words.get(member) or getattr(member, "__name__", str(member)))
    return " or ".join(dict.fromkeys(parts))


def _width(kind: Any) -> int:
    """The order in which the members of a union are tried: text last."""
    if typing.get_origin(kind) is Literal:
        return 2
    widths = {type(None): 0, bool: 1, int: 3, float: 4, pathlib.Path: 6, str: 7, Any: 8, object: 8}
    return widths.get(kind, 5)


def _parse_member(text: str, kind: Any) -> Any:
    _refuse_broken(text)
    word, origin = text.strip().lower(), typing.get_origin(kind)
    if kind is type(None) and word in NONE_WORDS:
        return None
    if kind is bool and word in BOOL_WORDS:
        return BOOL_WORDS[word]
    if origin is Literal:
        for choice in typing.get_args(kind):
            if _unquote(text.strip()) == str(choice):
                return choice
    if kind in (int, float):
        return check(_number(word, kind), kind)
    if kind in (str, Any, object):
        return _unquote(text)
    if kind is pathlib.Path and _unquote(text).strip():  # a path of nothing is the working folder
        return as_path(_unquote(text))
    if origin is tuple:
        return _parse_tuple(text.strip(), kind)
    if origin in (dict, Mapping):
        return check(_literal(text), kind)
    raise Mismatch(f"wanted {describe(kind)}")


def _refuse_broken(text: str) -> None:
    """File names and JSON take neither NUL nor lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Mismatch("wanted valid characters") from None
    if "\0" in text:
        raise Mismatch("wanted no NUL")


def _is_list(text: str) -> bool:
    text = text.strip()
    return _unquote(text) == text and ("," in text or text[:1] + text[-1:] in ("()", "[]"))


def _unquote(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _number(word: str, kind: type) -> int | float:
    with contextlib.suppress(ValueError):
        return kind(word)
    # "1e4" is a count that int() does not read
    with contextlib.suppress(ValueError):
        value = float(word)
        if value.is_integer() and "." not in word:
            return int(value)
    raise Mismatch(f"wanted {describe(kind)}")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Mismatch("wanted a Python literal") from None


def _parse_tuple(text: str, kind: Any) -> tuple[Any, ...]:
    if text[:1] + text[-1:] in ("()", "[]"):
        with contextlib.suppress(Mismatch):
            return check(_literal(text), kind)
        text = text[1:-1]
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if parts and not parts[-1]:
        parts.pop()  # "3," is a tuple of one
    kinds = typing.get_args(kind)
    if kinds[-1:] == (Ellipsis,):
        kinds = kinds[:1] * len(parts)
    if len(kinds) != len(parts):
        raise Mismatch(f"wanted {describe(kind)}")
    return tuple(parse(part, item) for part, item in zip(parts, kinds, strict=True))


def _check_member(value: Any, kind: Any) -> Any:
    origin, items = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, object) or (kind is type(None) and value is None):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float:
        return _finite(value)
    if origin is Literal and any(value == item and type(value) is type(item) for item in items):
        return value
    if origin is tuple and isinstance(value, (tuple, list)):
        items = items[:1] * len(value) if items[-1:] == (Ellipsis,) else items
        if len(items) == len(value):
            return tuple(check(item, k) for item, k in zip(value, items, strict=True))
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {check(k, items[0]): check(v, items[1]) for k, v in value.items()}
    if kind is pathlib.Path and isinstance(value, os.PathLike):
        return as_path(value)  # of a store too, whose paths are no pathlib.Path
    if isinstance(kind, type) and kind not in (bool, int) and isinstance(value, kind):
        return value
    if not isinstance(kind, type) and origin not in (tuple, dict, Mapping, Literal):
        return value  # callables and the like, which nothing here can check
    raise Mismatch(f"wanted {describe(kind)}")


def _finite(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise Mismatch("wanted a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise Mismatch("wanted a finite number")
    return number
