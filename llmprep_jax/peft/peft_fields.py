"""Single fields of adapter_config.json: read with a check, and written as PEFT would."""

from collections.abc import Iterable, Mapping
from typing import Any

from llmprep_jax.peft.targets import Number
from llmprep_jax.weights.safetensors import quoted


def flag(config: Mapping[str, Any], name: str) -> bool:
    """A field that is true or false; false where it is missing or null."""
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {quoted(value)}; it must be true or false")
    return value


def names(config: Mapping[str, Any], field: str) -> str | tuple[str, ...] | None:
    """A field that holds a string or a list of them."""
    value = config.get(field)
    if not value or isinstance(value, str):
        return value or None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{field} is {quoted(value)}; it must hold names")
    return tuple(value)


def mapping(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A field that holds an object; an empty one where it is missing or null."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {quoted(value)}; it must be an object")
    return value


def number(config: Mapping[str, Any], name: str, default: Number) -> Number:
    """A field that holds a number."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {quoted(value)}; it must be a number")
    return value


def shortest(values: Mapping[str, Any], every: Iterable[str]) -> dict[str, Any]:
    """The values by a module's last name where all of that name have one value, else by module.

    Numbers are no names: a list of layers has them too.
    """
    of_leaf: dict[str, set] = {}
    for module in every:
        of_leaf.setdefault(module.rsplit(".", 1)[-1], set()).add(values.get(module))
    short = {}
    for module, value in values.items():
        leaf = module.rsplit(".", 1)[-1]
        short[leaf if len(of_leaf[leaf]) == 1 and not leaf.isdigit() else module] = value
    return short


def whole(number: Number) -> Number:
    """PEFT's lora_alpha is a whole number where it can be."""
    return int(number) if int(number) == number else number


def rows_from_peft(config: Mapping[str, Any]) -> tuple[int, ...]:
    """trainable_token_indices: a list, or an object that has one for the embedding."""
    value = config.get("trainable_token_indices") or []
    if isinstance(value, dict):
        if len(value) > 1 or not next(iter(value)).endswith("embed_tokens"):
            raise ValueError(
                f"trainable_token_indices names {', '.join(map(quoted, value))}; embed_tokens alone"
                " can have some"
            )
        value = next(iter(value.values()))
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ValueError(f"trainable_token_indices is {quoted(value)}; it must hold tokens' ids")
    return tuple(value)
