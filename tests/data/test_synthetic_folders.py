"""Generated documents as files: conversations, pictures, PDFs with their text, contact sheets."""

import dataclasses
import io
import itertools
import json

import numpy as np
import pypdfium2
import pytest
from PIL import Image

from experiments import synthesize
from llmprep_jax.config import UsageError
from llmprep_jax.data.records import to_document
from llmprep_jax.data.synthetic_documents import (
    Settings,
    contact_sheet,
    fonts,
    generate,
    to_pdf,
    write,
)
from llmprep_jax.data.synthetic_documents.lexicon import LANGUAGES
from tests.grids import cases

TINY = Settings(level="tiny", language=("en",), fonts=("Aileron",), holdout=0.25)
WRITTEN = tuple(language for language in LANGUAGES if fonts.families_by_language(()).get(language))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def content(folder) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("documents") / "tiny", 8, TINY)


def test_a_folder_holds_pictures_pdfs_and_a_line_a_question(folder):
    names = [f"{i:06d}" for i in range(8)]
    assert sorted(content(folder)) == sorted([
        *(f"images/{name}.png" for name in names), *(f"pdf/{name}.pdf" for name in names),
        "documents.jsonl", "train.jsonl", "heldout.jsonl", "settings.json", "sheet.png",
    ])  # fmt: skip
    documents = lines(folder / "documents.jsonl")
    assert [record["split"] for record in documents] == ["train"] * 3 + ["heldout"] + [
        "train"] * 3 + ["heldout"]  # fmt: skip
    for name in ("train", "heldout"):
        asked = [
            (record["id"], question["question"], question["answers"], question["boxes"])
            for record in documents
            if record["split"] == name
            for question in record["questions"]
        ]
        given = [
            (line["id"], line["messages"][0]["content"][1]["text"], line["answers"], line["boxes"])
            for line in lines(folder / f"{name}.jsonl")
        ]
        assert given == asked


def test_a_line_is_a_conversation_about_a_picture_in_the_folder(folder):
    line = lines(folder / "train.jsonl")[0]
    document = generate(TINY, 0)
    question = document.questions[0]
    assert line["messages"] == [
        {"role": "user", "content": [
            {"type": "image", "image": "images/000000.png"},
            {"type": "text", "text": question.text},
        ]},
        {"role": "assistant", "content": [{"type": "text", "text": question.answers[0]}]},
    ]  # fmt: skip
    assert to_document(line, None, "train.jsonl:1").messages == line["messages"]
    stored = np.asarray(Image.open(folder / line["messages"][0]["content"][0]["image"]))
    np.testing.assert_array_equal(stored, np.asarray(document.image))


def test_a_document_is_one_conversation_that_shows_its_picture_once(folder):
    record = lines(folder / "documents.jsonl")[1]
    messages = record["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * len(
        record["questions"])  # fmt: skip
    kinds = [[part["type"] for part in message["content"]] for message in messages]
    assert kinds == [["image", "text"], *[["text"]] * (len(messages) - 1)]
    # a record with "text" beside its messages would be two documents
    assert to_document(record, None, "documents.jsonl:2").messages == messages
    document = generate(TINY, 1)
    assert record["ocr"] == document.text
    assert record["words"] == [[word.text, list(word.box)] for word in document.words]


def test_the_settings_and_fonts_are_kept(folder):
    made = json.loads((folder / "settings.json").read_text())
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in made["settings"].items()}
    assert Settings(**fields) == TINY
    assert (made["count"], made["fonts"]) == (8, {"en": ["Aileron Pillow"]})


def test_a_folder_with_files_is_left_alone(folder):
    with pytest.raises(ValueError, match="holds files; give a new or an empty folder"):
        write(folder, 2, TINY)
    with pytest.raises(ValueError, match="count=0; give 1 or more"):
        write(folder / "new", 0, TINY)
    with pytest.raises(ValueError, match="workers=0; give 1 or more"):
        write(folder / "new", 1, TINY, workers=0)


def test_a_missing_font_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(fonts, "_files", dict)
    settings = Settings(language=("en", "zh-Hans"), fonts=("Aileron", "Noto Serif CJK"))
    with pytest.raises(ValueError, match="fonts-noto-cjk"):
        write(tmp_path / "new", 2, settings)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow  # each process imports the package
def test_several_processes_write_what_one_does(tmp_path):
    settings = dataclasses.replace(TINY, level="varied", width=200)
    one, two = (write(tmp_path / str(n), 10, settings, workers=n) for n in (1, 2))
    assert content(one) == content(two)


def text_page(document):
    return pypdfium2.PdfDocument(to_pdf(document))[0].get_textpage()


@pytest.mark.parametrize(("language", "level"), cases(
    [*itertools.product(WRITTEN, ("plain", "varied"))],
    fast=[(language, "plain") for language in WRITTEN],
))  # fmt: skip
def test_a_pdf_holds_the_text_of_its_page(level, language):
    settings = Settings(level=level, language=(language,), rotation=0.0, width=200)
    for i in (0, 1, 3):
        document = generate(settings, i)
        found = text_page(document).get_text_range()
        # readers put lines in an order of their own
        assert sorted("".join(found.split())) == sorted("".join(document.text.split()))


def test_a_pdf_shows_the_pixels_of_its_picture():
    document = generate(TINY, 0)
    page = pypdfium2.PdfDocument(to_pdf(document))[0]
    (picture,) = (item for item in page.get_objects() if isinstance(item, pypdfium2.PdfImage))
    shown = picture.get_bitmap().to_pil().convert("RGB")
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(document.image))
    assert page.get_size() == pytest.approx((0.72 * 112, 0.72 * 112))
    assert picture.get_bounds() == pytest.approx((0, 0, 0.72 * 112, 0.72 * 112))


@pytest.mark.parametrize("rotation", [0.0, 20.0])
def test_text_of_a_pdf_lies_where_the_picture_has_it(rotation):
    settings = Settings(kind=("sign",), language=("en",), fonts=("Aileron",), rotation=rotation,
                        level="varied", color=False)  # fmt: skip
    document = generate(settings, 2)
    page, height = text_page(document), document.image.size[1]
    text = page.get_text_range()
    seen = 0
    for word in document.words:
        at = text.find(word.text)
        if text.count(word.text) != 1:
            continue
        boxes = np.array([page.get_charbox(at + k, loose=True) for k in range(len(word.text))])
        left, bottom, right, top = *boxes[:, :2].min(0) / 0.72, *boxes[:, 2:].max(0) / 0.72
        middle = np.array([(left + right) / 2, height - (bottom + top) / 2])
        box = np.array(word.box)
        size = max(box[2] - box[0], box[3] - box[1])
        assert np.abs(middle - (box[:2] + box[2:]) / 2).max() < 0.2 * size, word
        seen += 1
    assert seen >= 2


def test_worn_pages_are_jpeg_in_a_pdf():
    for level, name in (("plain", b"/FlateDecode"), ("varied", b"/DCTDecode")):
        settings = Settings(kind=("sign",), language=("en",), level=level, width=200)
        pdf = to_pdf(generate(settings, 0))
        assert name in pdf
        assert pdf.startswith(b"%PDF-1.5")
        size = int(pdf.rsplit(b"startxref\n", 1)[1].split()[0])
        assert pdf[size:].startswith(b"xref\n")


def test_a_contact_sheet_shows_a_row_a_language_and_marks_the_answers():
    settings = Settings(kind=("receipt", "menu", "chart", "letter"), language=("en",), width=300,
                        fonts=("Aileron",), color=False)  # fmt: skip
    sheet = contact_sheet(settings, 4)
    tallest = sheet.size[1] - 64 - 2 * 12
    assert (sheet.size[0], tallest) == (4 * 332 + 12, 330)
    values = np.asarray(sheet, int)
    marked = (values[..., 0] - values[..., 1:].max(-1)) > 90  # of letters, few pixels are all red
    for i in range(4):
        cell = marked[12:, 12 + 332 * i : 332 + 332 * i]
        assert cell[:tallest].any()  # the box
        assert cell[tallest:].any()  # the answer below


def test_the_command_writes_a_folder_and_a_sheet(tmp_path, capsys):
    arguments = ["kind=receipt,menu", "language=en", "level=tiny", "fonts=Aileron", "count=4"]
    outputs = synthesize.main([str(tmp_path / "out"), *arguments, "pdf=false"])
    assert Image.open(outputs["contact sheet"]).size[0] > 600
    assert len(lines(outputs["documents"])) == 4
    assert not (tmp_path / "out" / "pdf").exists()
    assert "4 documents" in capsys.readouterr().out
    with pytest.raises(UsageError, match="give one folder to write, not 0"):
        synthesize.main(arguments)
    with pytest.raises(UsageError, match="kind"):
        synthesize.main([str(tmp_path / "new"), "kind=poem"])


def test_pictures_are_stored_without_loss(folder):
    stored = (folder / "images/000002.png").read_bytes()
    assert Image.open(io.BytesIO(stored)).mode == "RGB"
