"""Questions about pictures are read from whatever holds them, and refused by file and line."""

import json
import tarfile

import pytest

from llmprep_jax.data import synthetic_documents
from llmprep_jax.data.refs import Ref
from llmprep_jax.evaluate.ocrbench import FORMULAS
from llmprep_jax.evaluate.questions import read_questions
from llmprep_jax.evaluate.tasks import get_task
from tests.data.pictured import draw

SHORT = "\nAnswer the question using a single word or phrase."
PICTURE = {"type": "image"}


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / f"images/{name}.png", 100)
    return tmp_path


def read(folder, *records, task="exact", name="q.jsonl", **settings):
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    (folder / name).write_text(text + "\n")
    return read_questions(folder / name, get_task(task), **settings)


def words(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("record", "content"),
    [
        ({"question": " who? ", "answer": "x"}, "who?" + SHORT),
        (
            {"question": "who?", "answer": "x", "image": "images/a.png"},
            [PICTURE, words("who?" + SHORT)],
        ),
        (
            {
                "question": "<image> or <image>?",
                "answers": ["x"],
                "images": ["images/a.png", "images/b.png"],
            },
            [PICTURE, words(" or "), PICTURE, words("?" + SHORT)],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": "images/a.png"},
                            words("who?"),
                        ],
                    },
                    {"role": "assistant", "content": [words("x")]},
                ]
            },
            [PICTURE, words("who?" + SHORT)],
        ),
        (
            {
                "image": "images/a.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nwho?"},
                    {"from": "gpt", "value": "x"},
                ],
            },
            [PICTURE, words("who?" + SHORT)],
        ),
    ],
    ids=["text", "picture", "places", "messages", "llava"],
)
def test_a_record_is_asked_as_the_task_does(folder, record, content):
    (question,) = read(folder, record)
    assert question.messages == [{"role": "user", "content": content}]
    assert question.answers == ("x",)
    parts = content if isinstance(content, list) else [words(content)]
    names = ["a", "b"][: parts.count(PICTURE)]
    assert question.images == tuple(Ref(str(folder), f"images/{name}.png") for name in names)
    blind = question.blind()[-1]["content"]
    blind = blind if isinstance(blind, list) else [words(blind)]
    assert blind == [part for part in parts if part != PICTURE]


def test_questions_are_named_by_their_lines_and_limited(folder):
    records = [{"question": f"{i}?", "answer": i} for i in range(3)]
    first, second = read(folder, *records, limit=2)
    assert (first.name, second.name) == (f"{folder / 'q.jsonl'}:1", f"{folder / 'q.jsonl'}:2")
    assert (second.text, second.answers) == ("1?", ("1",))
    whole = read(folder, *records, name="q.json")
    assert whole[2].name == f"{folder / 'q.json'}:record 3"


def test_earlier_turns_are_shown_as_they_are(folder):
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "who?"},
    ]
    (question,) = read(folder, {"messages": turns, "answers": ["x", "y"]})
    assert question.messages == [*turns[:2], {"role": "user", "content": "who?" + SHORT}]
    assert question.text == "who?"


def test_splits_are_the_tasks_own_then_what_is_known(folder):
    record = {
        "question": "who?",
        "answers": ["x"],
        "kind": "receipt",
        "question_types": ["form", "table"],
        "year": 1998,
    }
    (question,) = read(folder, record, task="docvqa")
    assert question.splits == ("form", "table", "kind: receipt")
    (question,) = read(folder, record, task="docvqa", splits=("year",))
    assert question.splits == ("year: 1998",)


def test_a_formula_is_told_by_the_first_split(folder):
    record = {"question": "?", "answers": ["x"], "kind": "a", "question_type": FORMULAS}
    (question,) = read(folder, record, task="ocrbench")
    assert question.splits[0] == FORMULAS
    with pytest.raises(ValueError, match=r"q\.jsonl:1: an empty reference answer"):
        read(folder, record | {"answers": [" "]}, task="ocrbench")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": []}, 'has no answers; give "answers", a list of texts'),
        ({"answers": None}, "has no answers"),
        ({"question": " "}, 'has no question; give "question"'),
        ({"image": "images/c.png"}, "no picture .*images/c.png; paths begin in the folder"),
        ({"image": "../a.png"}, r"image '\.\./a\.png' does not lie beside the data file"),
        ({"image": "broken.png"}, ".*/broken.png: begins with b'no pictu'"),
        ({"image": ["images/a.png"], "question": "<image><image>?"}, "there are 2 images in the"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "the conversation ends with no question",
        ),
        ({"questions": ["who?"]}, "question 1 is 'who[?]'; write objects"),
    ],
    ids=["none", "null", "question", "missing", "outside", "broken", "markers", "turns", "several"],
)
def test_what_cannot_be_asked_is_refused_by_its_line(folder, changes, message):
    (folder / "broken.png").write_bytes(b"no picture at all")
    good = {"question": "who?", "answers": ["x"], "image": "images/a.png"}
    with pytest.raises(ValueError, match=rf"q\.jsonl:2: {message}") as error:
        read(folder, good, good | changes)
    assert "\n" not in str(error.value)
    assert str(error.value).count("q.jsonl:2") == 1


def test_what_holds_no_questions_is_refused(folder):
    with pytest.raises(ValueError, match=r"q\.jsonl: holds no questions"):
        read(folder)
    with pytest.raises(ValueError, match=r"q\.jsonl:1: holds a list"):
        read(folder, [1])
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.jsonl"):
        read_questions(folder / "nowhere.jsonl", get_task("exact"))


def test_a_picture_may_lie_in_an_archive(folder):
    with tarfile.open(folder / "pages.tar", "w") as archive:
        archive.add(folder / "images/a.png", "a.png")
    with tarfile.open(folder / "pages.tar") as archive:
        member = archive.getmember("a.png")
    image = {"archive": "pages.tar", "name": "a.png"}
    image |= {"offset": member.offset_data, "size": member.size}
    content = [{"type": "image", "image": image}, words("who?")]
    record = {"messages": [{"role": "user", "content": content}], "answers": ["x"]}
    (question,) = read(folder, record)
    assert question.images[0].content() == (folder / "images/a.png").read_bytes()
    image["size"] = 20
    with pytest.raises(ValueError, match=r"q\.jsonl:1: .*pages\.tar: a\.png: "):
        read(folder, record)


def test_textvqa_needs_answers_of_several_people(folder):
    with pytest.raises(ValueError, match=r"q\.jsonl:1: 1 reference answers"):
        read(folder, {"question": "who?", "answers": ["x"]}, task="textvqa")


def test_generated_documents_are_read_by_question_and_by_document(tmp_path):
    settings = synthetic_documents.Settings(
        kind=("sign",), language=("en",), level="tiny", width=96
    )
    synthetic_documents.write(tmp_path / "made", 3, settings, pdf=False, workers=1)
    task = get_task("docvqa")
    by_document = read_questions(tmp_path / "made/documents.jsonl", task)
    by_question = [
        question
        for side in ("train", "heldout")
        if (tmp_path / f"made/{side}.jsonl").read_text()
        for question in read_questions(tmp_path / f"made/{side}.jsonl", task)
    ]
    assert len(by_question) == len(by_document) > 3
    key = lambda q: (str(q.images), q.text)  # noqa: E731
    for one, other in zip(sorted(by_document, key=key), sorted(by_question, key=key), strict=True):
        assert (one.messages, one.answers, one.splits) == (
            other.messages,
            other.answers,
            other.splits,
        )
        assert "kind: sign" in one.splits
        assert "language: en" in one.splits
