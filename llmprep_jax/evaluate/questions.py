"""Questions about pictures, read from a file of JSON objects, however a benchmark names its fields.

A record is a question with its answers and pictures, a document with several questions, or a
conversation whose last user's message is the question; all become messages. What cannot be asked or
scored is told here, before a model is loaded, by file and line.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmprep_jax.data.images import MARKER, name_parts, split_images
from llmprep_jax.data.json_files import read_records
from llmprep_jax.data.records import CONVERSATIONS, to_document
from llmprep_jax.data.refs import Ref, read_ref
from llmprep_jax.evaluate.tasks import Task
from llmprep_jax.vision.open import image_size

Record = Mapping[str, Any]
Messages = list[dict[str, Any]]
_USUAL_SPLITS = ("category", "kind", "language")  # of `data.synthetic_documents`
_IMAGES = ("images", "image")


@dataclasses.dataclass(frozen=True)
class Question:
    """What a model is asked, and what is right.

    Attributes:
      name: file and line. messages: the last is the user's; image parts are bare.
      images: where they are, in the order of the parts.
      text: the question as it stands in the data. answers: what is right.
      splits: what it counts among, the metric's own category first.
    """

    name: str
    messages: Messages
    images: tuple[Ref, ...]
    text: str
    answers: tuple[str, ...]
    splits: tuple[str, ...] = ()

    def blind(self) -> Messages:
        """The messages without image parts: what a model answers that sees nothing."""
        return [
            {**message, "content": [part for part in content if part.get("type") != "image"]}
            if isinstance(content := message["content"], list)
            else message
            for message in self.messages
        ]


def read_questions(
    path: str | pathlib.Path,
    task: Task,
    *,
    splits: Sequence[str] = (),
    limit: int | None = None,
) -> list[Question]:
    """The questions of a .jsonl or .json file, pictures beside it.

    Args:
      splits: fields of a record by which scores are listed too; (): the task's own, and those of
        category, kind and language that there are.
      limit: at most so many; None: all.

    Raises:
      FileNotFoundError, ValueError: in one line, by file and line: no question, no answers, answers
        that the metric refuses, a missing picture.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; questions are a .jsonl file, an object a line")
    questions: list[Question] = []
    for name, record in read_records(path):
        for question in _questions(record, name, path.parent, task, splits):
            questions.append(question)
            if len(questions) == limit:
                return questions
    if not questions:
        raise ValueError(
            f"{path}: holds no questions; write an object a line, with question, answers and image"
        )
    return questions


def find_picture(value: Any, folder: pathlib.Path) -> Ref:
    """The picture that a record of a file in `folder` names, its header read.

    Raises:
      ValueError: it names none, one that does not lie beside the file, or what is no picture.
    """
    return _checked(read_ref(value, str(folder)))


def _checked(picture: Ref) -> Ref:
    content = picture.content()
    if isinstance(content, pathlib.Path) and not content.is_file():
        raise ValueError(f"no picture {content}; paths begin in the folder of the data file")
    image_size(content, name=picture.title)
    return picture


def _questions(
    record: Record, name: str, folder: pathlib.Path, task: Task, splits: Sequence[str]
) -> Iterator[Question]:
    """Those of a record, each checked."""
    several = record.get("questions")
    if not isinstance(several, list):
        yield _question(record, name, folder, task, splits)
        return
    shared = {k: v for k, v in record.items() if k not in ("questions", *CONVERSATIONS)}
    for number, own in enumerate(several, 1):
        if not isinstance(own, Mapping):
            raise ValueError(f"{name}: question {number} is {own!r}; write objects")
        yield _question(shared | own, f"{name} question {number}", folder, task, splits)


def _question(
    record: Record, name: str, folder: pathlib.Path, task: Task, splits: Sequence[str]
) -> Question:
    try:
        messages, said = _messages(record, name)
        answers = _answers(record, said)
        text = _text(messages[-1]["content"])
        messages = [*messages[:-1], _prompted(messages[-1], task)]
        messages, refs = split_images(messages, str(folder))
        own = tuple(_splits(record, task, splits))
        extra = (own[0] if own else None,) if task.by_category else ()
        task.metric("", answers, *extra)  # refuses answers that nothing could be right by
        return Question(name, messages, tuple(map(_checked, refs)), text, answers, own)
    except (ValueError, OSError) as error:
        reason = str(error).removeprefix(f"{name}: ")
        raise ValueError(f"{name}: {reason}") from None


def _messages(record: Record, name: str) -> tuple[Messages, str | None]:
    """(what is asked, the reply that the record itself holds)."""
    if any(record.get(key) is not None for key in CONVERSATIONS):
        messages = to_document(record, None, name, "messages").messages
        said = None
        if messages[-1]["role"] == "assistant":
            *messages, last = messages
            said = _text(last["content"])
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("the conversation ends with no question of the user's; correct it")
        return messages, said
    question = record.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('has no question; give "question", a text, or "messages"')
    key = next((key for key in _IMAGES if record.get(key)), None)
    images = [] if key is None else record[key]
    images = [images] if isinstance(images, str) else images
    if MARKER not in question and isinstance(images, list):
        question = MARKER * len(images) + question
    messages, _ = name_parts([{"role": "user", "content": question}], {"images": images})
    return messages, None


def _answers(record: Record, said: str | None) -> tuple[str, ...]:
    answers = record.get("answers", record.get("answer", said))
    answers = answers if isinstance(answers, list) else [answers]
    is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)  # noqa: E731
    texts = tuple(str(x) if is_number(x) else x for x in answers)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError('has no answers; give "answers", a list of texts, or "answer"')
    return texts


def _text(content: Any) -> str:
    """What a message says."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))


def _prompted(message: dict[str, Any], task: Task) -> dict[str, Any]:
    """The user's message as the task has it asked: its last text becomes the prompt."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": task.prompt(content)}
    texts = [i for i, part in enumerate(content) if isinstance(part.get("text"), str)]
    if not texts:
        raise ValueError("the user's last message has no text; write the question into it")
    parts = list(content)
    parts[texts[-1]] = {**parts[texts[-1]], "text": task.prompt(parts[texts[-1]]["text"])}
    return {**message, "content": parts}


def _splits(record: Record, task: Task, splits: Sequence[str]) -> Iterator[str]:
    """What a question counts among; of fields that are not the task's own, with the field."""
    fields = splits or dict.fromkeys((task.splits, *_USUAL_SPLITS))
    for field in fields:
        value = record.get(field) if field is not None else None
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            yield str(one) if field == task.splits else f"{field}: {one}"
