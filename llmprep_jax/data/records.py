"""Records (JSON objects, rows of a table) to documents: which columns hold what.

Formats are those that datasets for fine-tuning come in: a text; messages; ShareGPT's conversations
of `from` and `value`; Alpaca's instruction, input and output; a prompt and its completion; an image
and its captions; an image, a question and its answers. A prompt and a completion that are strings
go through no chat template (they are one text of which the completion is learnt), while Alpaca's
columns are a question and an answer and do, and so do an image and its first caption.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from llmprep_jax.data.documents import Document, Messages
from llmprep_jax.data.images import name_parts

RecordFormat = Literal[
    "auto", "text", "messages", "sharegpt", "alpaca", "prompt", "caption", "question"
]
Record = Mapping[str, Any]

CONVERSATIONS = ("messages", "conversations", "conversation")
ROLES = {  # what ShareGPT's `from` is called
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response", "function"), "tool"),
    "function_call": "assistant",
}
_INPUTS, _OUTPUTS = ("input", "context"), ("output", "response")
# of images, in order: what data sets call them
IMAGES = ("image", "images", "file_name")
CAPTIONS = ("caption", "captions", "text", "label")
QUESTIONS, ANSWERS = ("question", "query"), ("answer", "answers", "label")


def to_document(
    record: Any,
    field: str | None,
    name: str,
    record_format: RecordFormat = "auto",
    image: str | None = None,
) -> Document:
    """The document that a record (a JSON object or a row) holds.

    Args:
      record: decoded.
      field: the key that holds the document, or two, "question,answer", of a question and its
        answer; None: as `record_format` has it.
      name: of the document.
      record_format: which columns hold the document; "auto": those that are there.
      image: the key that holds the image; None: one of IMAGES.

    Raises:
      ValueError: the record has no such field, several, or something else in it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{name}: found {_kind(record)}; a record is an object with 'text' or 'messages'"
        )
    try:
        if image is not None:
            others = {k: v for k, v in record.items() if k not in (*IMAGES, image)}
            record = {**others, "image": _get(record, image, "image")}
        if field is not None:
            return _of_field(record, field, name)
        return _READERS[_format_of(record, record_format)](record, name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def formats_of(keys: Iterable[str]) -> list[str]:
    """The formats whose columns are among `keys`, and "messages" for both kinds of messages."""
    keys = set(keys)
    has = {
        "messages": not keys.isdisjoint(CONVERSATIONS),
        "prompt": {"prompt", "completion"} <= keys,
        "alpaca": "instruction" in keys and not keys.isdisjoint(_OUTPUTS),
    }
    talks = [name for name, is_there in has.items() if is_there]
    if talks or keys.isdisjoint(IMAGES):
        return [*(["text"] if "text" in keys else []), *talks]
    if not keys.isdisjoint(QUESTIONS) and not keys.isdisjoint(ANSWERS):
        return ["question"]
    return [] if keys.isdisjoint(CAPTIONS) else ["caption"]


def _format_of(record: Record, record_format: RecordFormat) -> str:
    if record_format != "auto":
        return record_format
    formats = formats_of(key for key, value in record.items() if value is not None)
    if len(formats) == 1:
        return formats[0]
    if formats:
        raise ValueError(
            f"a record holds one document, and this has columns of {' and '.join(formats)}; choose"
            f" by data.format={formats[0]} or data.source.field=NAME"
        )
    if any(record.get(key) is not None for key in IMAGES):
        raise ValueError(
            f"an image has {', '.join(map(repr, CAPTIONS))}, a 'question' and its 'answer', or"
            f" 'messages'; the record has {_names(record)}; name the right one by"
            " data.source.field=NAME"
        )
    if not record.keys().isdisjoint(QUESTIONS) and not record.keys().isdisjoint(ANSWERS):
        raise ValueError(
            f"a question has an image in {', '.join(map(repr, IMAGES))}; the record has"
            f" {_names(record)}; name the image by data.source.image=NAME, or for questions without"
            " images data.source.field=question,answer"
        )
    raise ValueError(
        "a record has 'text' or 'messages', or the columns of ShareGPT, Alpaca, a prompt and its"
        f" completion or an image and its caption; it has {_names(record)}; name the right one by"
        " data.source.field=NAME"
    )


def _of_field(record: Record, field: str, name: str) -> Document:
    keys = field.split(",")
    values = [_get(record, key) for key in keys]
    if any(record.get(key) is not None for key in IMAGES) and not isinstance(values[0], list):
        read = _of_question if len(keys) == 2 else _of_caption
        return read(record, name, *keys)
    if len(keys) == 2:
        texts = [_checked_text(key, value) for key, value in zip(keys, values, strict=True)]
        return _conversation(record, _turns(*texts), keys, name)
    if isinstance(values[0], list):
        return _of_messages(record, field, name)
    if isinstance(values[0], str):
        return Document(name, text=_checked_text(field, values[0]))
    raise ValueError(f"{field!r} is {_kind(values[0])}; give a string, or a list of messages")


def _of_text(record: Record, name: str) -> Document:
    return Document(name, text=_checked_text("text", _get(record, "text")))


def _of_conversations(record: Record, name: str) -> Document:
    given = [key for key in CONVERSATIONS if record.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"a record has one of {', '.join(CONVERSATIONS)}; it has {_names(record)}; name the"
            " right one by data.source.field=NAME"
        )
    return _of_messages(record, given[0], name)


def _of_messages(record: Record, key: str, name: str) -> Document:
    messages = _messages(key, record[key])
    system = record.get("system")
    used = [key]
    if isinstance(system, str):
        used.append("system")
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    return _conversation(record, messages, used, name)


def _of_prompt(record: Record, name: str) -> Document:
    prompt, completion = _get(record, "prompt"), _get(record, "completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [  # what was said before is not learnt
            message | ({"train": False} if message["role"] == "assistant" else {})
            for message in _messages("prompt", prompt)
        ]
        messages = [*before, *_messages("completion", completion)]
        return _conversation(record, messages, ("prompt", "completion"), name)
    prompt = _checked_text("prompt", prompt)
    completion = _checked_text("completion", completion)
    return Document(name, text=prompt + completion, answer=len(prompt))


def _of_alpaca(record: Record, name: str) -> Document:
    """Instruction and input are the question; `history` holds pairs of earlier turns."""
    outputs = [key for key in _OUTPUTS if record.get(key) is not None]
    if len(outputs) != 1:
        raise ValueError(
            f"an alpaca record has one of 'output', 'response'; it has {_names(record)}"
        )
    inputs = [key for key in _INPUTS if record.get(key)]
    question = [_checked_text(key, _get(record, key)) for key in ("instruction", *inputs)]
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": _checked_text("system", record["system"])})
    for turn in record.get("history") or ():
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise ValueError("'history' holds no pairs of a question and an answer; correct it")
        messages += _turns(*(_checked_text("history", text) for text in turn))
    messages += _turns(
        "\n\n".join(filter(None, question)), _checked_text(outputs[0], record[outputs[0]])
    )
    used = ("instruction", *_INPUTS, *_OUTPUTS, "system", "history")
    return _conversation(record, messages, used, name)


def _of_caption(record: Record, name: str, key: str | None = None) -> Document:
    """An image, and what is said of it: one text or several, of which a conversation has the
    first."""
    if key is None and record.get("caption") is not None and record.get("captions") is not None:
        raise ValueError(f"a record has one of 'caption', 'captions'; it has {_names(record)}")
    captions = _texts(record, CAPTIONS if key is None else (key,))
    messages = _turns(_pictures(record), captions[0])
    document = _conversation(record, messages, (*IMAGES, *CAPTIONS, key or ""), name)
    return dataclasses.replace(document, captions=tuple(captions))


def _of_question(
    record: Record, name: str, question: str | None = None, answer: str | None = None
) -> Document:
    """The picture before its question; of several right answers the first."""
    (asked,) = _texts(record, QUESTIONS if question is None else (question,))[:1]
    (said,) = _texts(record, ANSWERS if answer is None else (answer,))[:1]
    messages = _turns([*_pictures(record), {"type": "text", "text": asked}], said)
    used = (*IMAGES, *QUESTIONS, *ANSWERS, question or "", answer or "")
    return _conversation(record, messages, used, name)


def _pictures(record: Record) -> list[dict[str, Any]]:
    """Image parts of what the record names."""
    given = next((record[key] for key in IMAGES if record.get(key) is not None), None)
    images = given if isinstance(given, list) else [given]
    if not images or not all(isinstance(image, str | Mapping) and image for image in images):
        raise ValueError(f"there is no image; it has {_names(record)}; leave the record out")
    return [{"type": "image", "image": image} for image in images]


def _texts(record: Record, keys: Sequence[str]) -> list[str]:
    """What the first of some columns that is there says: a text, a number or a list of either, bare
    or as objects have it in VQAv2's answers and COCO's captions."""
    key = next((key for key in keys if record.get(key) is not None), keys[0])
    value = record.get(key)
    value = value.get("text") if isinstance(value, Mapping) else value
    texts = []
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        if isinstance(item, Mapping):
            item = item.get("answer", item.get("text"))
        if key in ANSWERS and isinstance(item, int | float) and not isinstance(item, bool):
            item = str(item)
        texts.append(_checked_text(key, item))
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{key!r} is missing; it has {_names(record)}; leave the record out")
    return texts


_READERS: dict[str, Callable[[Record, str], Document]] = {
    "text": _of_text,
    "messages": _of_conversations,
    "sharegpt": _of_conversations,
    "prompt": _of_prompt,
    "alpaca": _of_alpaca,
    "caption": _of_caption,
    "question": _of_question,
}


def _turns(question: str | list[dict[str, Any]], answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _conversation(record: Record, messages: Messages, used: Iterable[str], name: str) -> Document:
    """A conversation, with what else its record holds as fields for the chat template."""
    fields = {key: value for key, value in record.items() if key not in set(used)}
    if isinstance(fields.get("tools"), str):  # columns of tables hold JSON as text
        fields["tools"] = _parse("tools", fields["tools"]) if fields["tools"].strip() else None
    messages, fields = name_parts(messages, fields)
    return Document(name, messages=messages, fields=fields)


def _messages(key: str, value: Any) -> Messages:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parse(key, value)
    if not isinstance(value, list):
        raise ValueError(f"{key!r} is {_kind(value)}; give a list of messages")
    if not value:
        raise ValueError(f"{key!r} is empty; a conversation needs a message")
    messages = [_message(key, i, message) for i, message in enumerate(value)]
    _checked_text(key, json.dumps(messages, ensure_ascii=False))
    return messages


def _message(key: str, i: int, message: Any) -> dict[str, Any]:
    """A message of `role` and `content`, or of ShareGPT's `from` and `value`."""
    if isinstance(message, Mapping) and isinstance(message.get("from"), str):
        role, value = ROLES.get(message["from"].lower()), message.get("value")
        if role is None:
            raise ValueError(
                f"{key!r} has a message {i} from {message['from']!r}; known are {', '.join(ROLES)}"
            )
        rest = {k: v for k, v in message.items() if k not in ("from", "value")}
        call = _call(value) if message["from"].lower() == "function_call" else None
        if call is not None:
            return {"role": role, "content": "", "tool_calls": call, **rest}
        return {"role": role, "content": value, **rest}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f'{key!r} has a message {i} that is no {{"role": ..., "content": ...}} and no'
            ' {"from": ..., "value": ...}; correct it'
        )
    return dict(message)


def _call(value: Any) -> list[dict[str, Any]] | None:
    """The calls that a ShareGPT function_call spells as JSON; None where it is none."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    is_call = [isinstance(call, dict) and "name" in call for call in calls]
    return [{"type": "function", "function": call} for call in calls] if all(is_call) else None


def _parse(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{key!r} is text that is no JSON ({reason}); correct it") from None


def _get(record: Record, key: str, option: str = "field") -> Any:
    if record.get(key) is None:
        raise ValueError(
            f"a record has {key!r}; it has {_names(record)}; name the right one by"
            f" data.source.{option}=NAME, or choose another data.format"
        )
    return record[key]


def _names(record: Record) -> str:
    return ", ".join(repr(key) for key in list(record)[:8]) or "no fields"


def _checked_text(key: str, text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is {_kind(text)}; give a string")
    try:
        text.encode()
    except UnicodeEncodeError:  # "\ud800" in JSON is a half of a character
        raise ValueError(
            f"{key!r} holds half a surrogate pair; correct the \\ud... escape"
        ) from None
    return text


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number"}
    names |= {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
