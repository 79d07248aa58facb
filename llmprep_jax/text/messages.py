"""Messages: what a conversation must look like before a chat template sees it.

A message is {"role": ..., "content": ...} with content a string or a list of {"type": "text",
"text": ...} parts, among which a model that sees has {"type": "image"} ones. Messages are copied
into plain JSON values, because a template is a program from the internet and must not get hold of
an object with methods.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmprep_jax.text.vocab import one_line

Conversation = Any  # a list of messages; `check_messages` says what is wrong with any other
MARKS = ("train", "weight")  # keys of a message that say whether it is learnt, for no template
TEXT = ("text",)  # kinds of parts that a model of text reads
WITH_IMAGES = ("text", "image")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def check_messages(messages: Conversation, kinds: tuple[str, ...] = TEXT) -> list[dict[str, Any]]:
    """A plain copy of the messages, whose parts are of `kinds`. Raises ValueError naming the
    message that is wrong."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"a conversation is a list of messages, got {type(messages).__name__};"
            ' give [{"role": "user", "content": "..."}]'
        )
    if not messages:
        raise ValueError(
            'a conversation needs a message; give [{"role": "user", "content": "..."}]'
        )
    return [_check_message(i, message, kinds) for i, message in enumerate(messages)]


def join_parts(content: str | list | None) -> str | None:
    """The text of a content that may be a list of parts."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def plain_values(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy made of JSON types alone. Raises ValueError when `values` (`name`) has others."""
    try:
        return {str(key): _plain(value) for key, value in values.items()}
    except (TypeError, RecursionError) as error:
        raise ValueError(f"{name}: {one_line(error)}; give plain JSON values") from None


def is_trained(i: int, message: Mapping[str, Any]) -> bool:
    """Whether message `i` is the assistant's and neither "train": false nor "weight": 0.

    Raises:
      ValueError: another value of either, both at odds, or a message of another role to be learnt.
    """
    train, weight = (message.get(key) for key in MARKS)
    if train not in (None, True, False):
        raise ValueError(f'message {i} has "train": {_show(train)}; give true or false')
    if weight not in (None, 0, 1):
        raise ValueError(
            f'message {i} has "weight": {_show(weight)}; an answer counts or it does not: give 1 or'
            " 0, and repeat a document that is to count for more"
        )
    if None not in (train, weight) and train != weight:
        raise ValueError(f'message {i} has both "train" and "weight", at odds; leave one out')
    if message["role"] != "assistant":
        if train:
            raise ValueError(
                f'message {i} is of role {message["role"]} and has "train": true; only what the'
                " assistant says is learnt, or everything by data.mask=all"
            )
        return False
    return train is not False and weight != 0


def without_marks(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as a template sees them, without what only training reads."""
    return [{k: v for k, v in message.items() if k not in MARKS} for message in messages]


def insert_after(pattern: re.Pattern[str], mark: str, value: Any) -> Any:
    """A copy of JSON values with `mark` after the first character of each match in its texts."""
    if isinstance(value, str):
        return pattern.sub(lambda match: match[0][0] + mark + match[0][1:], value)
    if isinstance(value, Mapping):
        return {key: insert_after(pattern, mark, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [insert_after(pattern, mark, item) for item in value]
    return value


def _check_message(i: int, message: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"message {i} is {type(message).__name__}, not an object with role and content"
        )
    missing = [key for key in ("role", "content") if key not in message]
    if missing == ["content"] and message.get("tool_calls"):
        missing = []
    if missing:
        raise ValueError(f"message {i} lacks {' and '.join(missing)}; give both role and content")
    role = message["role"]
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, 1)
        hint = "assistant" if role == "model" else near[0] if near else ", ".join(ROLES)
        raise ValueError(f"message {i} has role {_show(role)}; did you mean {hint}?")
    plain = plain_values(f"message {i}", message)
    return plain | {"content": _check_content(i, plain, kinds)}


def _check_content(i: int, message: dict[str, Any], kinds: tuple[str, ...]) -> str | list | None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(
            f"message {i} has content {_show(content)}; give a string or a list of"
            ' {"type": "text", "text": "..."} parts'
        )
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in kinds:
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(
                f"message {i} has a content part {_show(kind)}; this model reads parts of type"
                f" {' and '.join(kinds)}"
            )
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"message {i} has a text part without text; give its text as a string")
    return content


def _plain(value: Any) -> Any:
    """A copy made of JSON types alone; TypeError names any other type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise TypeError(f"there is a {type(value).__name__}")


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
