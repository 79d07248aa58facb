"""Which linear layers an adapter goes around, by PEFT's rules of names.

A layer goes by our path ("layers.attn.q") and by Hugging Face's module name
("model.layers.3.self_attn.q_proj"). A stack holds many layers under one path and is adapted whole,
so a regex that picks layer 3 alone is refused there; layers in a list (`nn.stack.unstack`) are
picked one by one.
"""

import difflib
import functools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from flax import nnx

from llmprep_jax.nn.base_model import BaseModel
from llmprep_jax.nn.linear import Einsum, Embed, Head
from llmprep_jax.nn.moe import ExpertWeights
from llmprep_jax.nn.param import Idle
from llmprep_jax.peft.experts import are_apart, experts
from llmprep_jax.quant.linear import find_layers
from llmprep_jax.weights.rows import Row, Table
from llmprep_jax.weights.table import Entry

Targets = str | tuple[str, ...] | list[str]
Number = float | int
Pattern = tuple[tuple[str, Number], ...] | Mapping[str, Number]
Place = tuple[int, ...]  # in a stack; () for a layer of its own
Names = tuple[str, ...]  # what one layer goes by
# every linear layer, or those below parts of a model by the names of `BaseModel.parts`
PRESETS = {"all-linear": (), "language": ("language", "text"), "vision": ("vision", "projector")}


def bases(model: nnx.Module) -> dict[str, Einsum]:
    """A model's linear layers by path; an adapted one by the path that its adapter took."""
    layers, others = find_layers(model, lambda node: isinstance(node, Einsum)), _others(model)
    return {
        path: base
        for path, base in layers.items()
        # the copy of a layer that is trained whole is no layer beside it
        if not path.endswith(".trained")
        and not _is_idle(base)
        and (experts(base) or plain(path) not in others)
    }


def _is_idle(base: Einsum) -> bool:
    return isinstance(getattr(base, "w", None), Idle)


def _others(model: nnx.Module) -> set[str]:
    """Paths of what is linear with us and no layer in transformers, so that PEFT passes it by.

    These are parameters of larger modules, convolutions, and all of an nn.MultiheadAttention, whose
    out_proj is a layer by its class but is used by its weight alone.
    """
    table = {path.removesuffix(".w"): row for path, row in rows(model).items()}
    end = ".in_proj_weight"
    attentions = {row.name.removesuffix(end) for row in table.values() if row.name.endswith(end)}
    return {
        path
        for path, row in table.items()
        if not row.name.endswith(".weight")
        or len(re.findall(r"\([^)]*\)|\S+", row.pattern.split("->")[0])) != 2
        or row.name.rsplit(".", 2)[0] in attentions
    }


def stacked(base: Einsum) -> int | None:
    """How many layers' weights a linear layer holds, None for one layer."""
    return base.shape[0] if len(base.shape) > len(base.axes) else None


def plain(path: str) -> str:
    """A path as weight tables have it: without the numbers of layers in a list."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def table_of(model: nnx.Module) -> Table:
    """A model's weight table; a module that is no model has none."""
    return getattr(model, "weights", Table({}))


def rows(model: nnx.Module) -> dict[str, Row]:
    """The weight table of the tensors that transformers has in memory, which PEFT adapts."""
    return table_of(model).modules_in_memory()


def modules(model: nnx.Module) -> dict[str, dict[Place, str]]:
    """Hugging Face's module names of the linear layers that the model's weight table has."""
    return _modules(model, bases(model))


def idle_modules(model: nnx.Module) -> set[str]:
    """Names of the linear layers that are in files and compute nothing."""
    named = _modules(model, find_layers(model, lambda x: isinstance(x, Einsum) and _is_idle(x)))
    return {name for of_path in named.values() for name in of_path.values()}


def other_modules(model: nnx.Module) -> set[str]:
    """Names of modules that get no adapter, but would in PEFT by a name's end: those with weights,
    and those that hold others, which PEFT refuses."""
    table = {path.removesuffix(".w"): row.name for path, row in rows(model).items()}
    names = {table[path] for path in _others(model) if table[path].endswith(".weight")}
    steps = [name.split(".")[:-2] for name in table.values()]
    holders = {".".join(step[:end]) for step in steps for end in range(1, len(step) + 1)}
    return holders | idle_modules(model) | {name.removesuffix(".weight") for name in names}


def _modules(model: nnx.Module, layers: Mapping[str, Einsum]) -> dict[str, dict[Place, str]]:
    table, by_path = rows(model), {}
    for path, base in layers.items():
        if f"{plain(path)}.w" in table:
            place = tuple(int(part) for part in path.split(".") if part.isdigit())
            row = Entry(path, base.shape, table[f"{plain(path)}.w"], place)
            by_path[path] = {at: name.removesuffix(".weight") for at, name in row.names().items()}
    return by_path


def part(model: nnx.Module, path: str) -> Any:
    """What a model has at a path."""
    return functools.reduce(getattr, path.split("."), model)


def embedding(model: nnx.Module) -> str | None:
    """The path of a model's embedding, None: it has none."""
    path = table_of(model).embed
    return path and path.removesuffix(".w")


def linear_layers(model: nnx.Module) -> dict[str, list[Names]]:
    """The names of each layer of every path that holds linear layers."""
    theirs = modules(model)
    ours = {path: tuple(dict.fromkeys((path, plain(path)))) for path in bases(model)}
    return {
        path: [(*own, name) for name in theirs[path].values()] if path in theirs else [own]
        for path, own in ours.items()
    }


def offered(
    model: nnx.Module, targets: Targets, layers: Mapping[str, Sequence[Names]]
) -> tuple[Targets, dict[str, Sequence[Names]]]:
    """(targets as `select` takes them, the layers that they are looked for among).

    "language" is every linear layer of the language model, or of a text tower; all of a model that
    reads text alone. "vision" is every one of what images pass through, projectors too.

    Raises:
      ValueError: "vision" of a model that sees nothing.
    """
    if not isinstance(targets, str) or targets not in PRESETS:
        return targets, dict(layers)
    is_named = isinstance(model, BaseModel) and len(table_of(model)) > 0
    of_model, parts = bases(model), model.parts if is_named else {}
    paths = [path for name in PRESETS[targets] for path in parts.get(name, ())]
    if targets == "vision" and not paths:
        raise ValueError(
            'targets are "vision", but the model has no part that sees; "all-linear" takes every'
            " linear layer"
        )
    within = tuple(f"{path}." for path in paths) or ("",)
    return "all-linear", {
        path: names
        for path, names in layers.items()
        if f"{path}.".startswith(within) and not is_table(of_model[path])
    }


def is_table(base: Einsum) -> bool:
    """Whether a layer is an embedding or an output head, which "all-linear" leaves alone."""
    return isinstance(base, (Embed, Head))


def is_extra(model: nnx.Module, path: str) -> bool:
    """Whether a layer is in a module beside the layers, which transformers' model lacks."""
    return path.startswith(tuple(f"{name}." for name in getattr(model, "extras", ())))


def words(model: nnx.Module) -> dict[str, tuple[str, ...]]:
    """By path, words without which a target does not mean a layer.

    PEFT adapts what is an nn.Linear in transformers: routed experts that are one parameter are
    none, and modules beside the layers (multi-token prediction) are not there.
    """
    extras, table, by_path = getattr(model, "extras", ()), rows(model), {}
    for path, base in bases(model).items():
        own = [name for name in extras if path.startswith(f"{name}.")]
        row = table.get(f"{plain(path)}.w")
        is_one = isinstance(base, ExpertWeights) and not (row and are_apart(base, row.pattern))
        by_path[path] = (*own, *(["experts"] if is_one else []))
    return by_path


def _meant(targets: Targets, needed: Sequence[str]) -> Targets:
    """The targets that have every one of these words."""
    if isinstance(targets, str):
        return targets if all(word in targets for word in needed) else ()
    return tuple(target for target in targets if all(word in target for word in needed))


def is_name(targets: Targets) -> bool:
    """Whether targets are one bare name, "q_proj", which is meant as in a list of names."""
    return isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets) is not None


def matches(targets: Targets, names: Sequence[str]) -> bool:
    """Whether a layer that goes by `names` is targeted."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str) and not is_name(targets):
        return any(re.fullmatch(targets, name) for name in names)
    targets = (targets,) if isinstance(targets, str) else targets
    return any(name == t or name.endswith(f".{t}") for name in names for t in targets)


def select(
    targets: Targets,
    layers: Mapping[str, Sequence[Names]],
    label: str = "target",
    kind: str = "linear layer",
    needed: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """The paths that are targeted, sorted.

    Args:
      label, kind: words of the errors.
      needed: by path, the words that a target must have to mean it, as `words` gives them.

    Raises:
      ValueError: a target is no regex, matches no layer, or matches some layers of a stack alone.
    """
    if not targets:
        raise ValueError('no targets given; "all-linear" takes every linear layer')
    if isinstance(targets, str):
        check_regex(label, targets)
    needed = needed or {}

    def takes(targets: Targets, path: str) -> set[bool]:
        meant = _meant(targets, needed.get(path, ()))
        return {matches(meant, names) for names in layers[path]}

    for target in [targets] if isinstance(targets, str) else [(item,) for item in targets]:
        if not any(True in takes(target, path) for path in layers):
            name = target if isinstance(target, str) else target[0]
            refuse_unmatched(label, name, layers, kind)
    chosen = []
    for path in sorted(layers):
        is_taken = takes(targets, path)
        if len(is_taken) > 1:
            raise ValueError(
                f"{label}s {targets!r} take some layers of the stack {path} and leave others; take"
                " all of them, or unstack(model.layers) first"
            )
        chosen += [path] if is_taken == {True} else []
    return chosen


def is_among(numbers: Collection[int], within: Sequence[str], name: str) -> bool:
    """Whether a name is of one of the layers of these numbers, as PEFT reads names.

    Args:
      within: regexes of what the layers are numbered in; (): anything.
    """
    starts = [rf"(?:.*?\.)??(?:{container})" for container in within] or [r".*?\.[^.]*"]
    matched = (re.match(rf"{start}\.(?P<layer>\d+)\.", name) for start in starts)
    number = next((match["layer"] for match in matched if match), None)
    return number is not None and int(number) in numbers


def check_layers(targets: Targets, numbers: Any, within: Sequence[str]) -> None:
    """Refuses what is no selection of layers by number."""
    for container in within:
        check_regex("layers_pattern", container)
    if numbers is None:
        if within:
            raise ValueError("layers_pattern is for layers_to_transform; give the layers' numbers")
        return
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"layers_to_transform is {numbers!r}; it must hold layers' numbers")
    if isinstance(targets, str) and targets not in PRESETS:
        raise ValueError(
            f"layers_to_transform is for targets by name; put the numbers into {targets!r}"
        )


def first(pattern: Pattern, names: Sequence[str]) -> Number | None:
    """The value of the first key that matches the end of a name, whole parts only."""
    for key, value in pattern:
        if any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names):
            return value
    return None


def as_pattern(label: str, pattern: Any, *, whole: bool) -> tuple[tuple[str, Number], ...]:
    """A checked pattern as a tuple of pairs; `whole` asks for counts.

    Raises:
      ValueError: a key is no regex, or a value no number that will do.
    """
    pairs = tuple(pattern.items() if isinstance(pattern, Mapping) else map(tuple, pattern))
    for key, value in pairs:
        check_regex(f"{label} key", key)
        check_number(f"{label} of {key!r}", value, whole=whole)
    return pairs


def check_number(label: str, value: Any, *, whole: bool) -> None:
    """Refuses what is no count (`whole`), or no finite number other than 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if whole and not (number and int(value) == value and value >= 1):
        raise ValueError(f"{label} is {value!r}; it must be a whole number of at least 1")
    if not whole and not (number and math.isfinite(value) and value != 0):
        raise ValueError(f"{label} is {value!r}; it must be a finite number other than 0")


def check_regex(label: str, text: Any) -> None:
    """Refuses what is no regular expression."""
    try:
        re.compile(text)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{label} {text!r} is no regex: {error}; escape what is meant as is"
        ) from (error)


def check_keys(label: str, pattern: Pattern, layers: Mapping[str, Sequence[Names]]) -> None:
    """Refuses a pattern's key that matches none of `layers`."""
    for key, _ in pattern:
        if not any(first(((key, 1),), names) for of_path in layers.values() for names in of_path):
            refuse_unmatched(f"{label} key", key, layers)


def refuse_unmatched(
    label: str, text: str, layers: Mapping[str, Sequence[Names]], kind: str = "linear layer"
) -> None:
    """Raises the error of a name or regex without a layer."""
    known = {name.rsplit(".", 1)[-1] for of_path in layers.values() for name in of_path[0]}
    # a regex is near a name by its last word: ".*\.wq" is nearer to "q" than to "o_proj"
    word = (re.findall(r"\w+", text) or [text])[-1]
    near = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.3) or sorted(known)
    raise ValueError(f"{label} {text!r} matches no {kind}; near names: {', '.join(near)}")
