"""Sources: the documents of files, at random, decoded when they are asked for."""

import json
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llmprep_jax.data import SourceOptions, json_files, open_source
from llmprep_jax.data.json_files import JsonLines
from llmprep_jax.data.text_files import TextFiles
from tests.data.corpora import chat, write_lines, write_texts

QUICK = hypothesis.settings(deadline=None, max_examples=100)


def all_texts(source):
    return [source[i].text for i in range(len(source))]


def test_lines_are_read_in_any_order(tmp_path):
    source = open_source(write_texts(tmp_path / "a.jsonl", 20, "d"))
    in_order = all_texts(source)
    assert [source[i].text for i in (19, 0, 7)] == [in_order[19], in_order[0], in_order[7]]
    assert source.name(7) == f"{tmp_path}/a.jsonl:8"
    assert source[7].name == source.name(7)


def test_blank_lines_do_not_count_and_lines_keep_their_numbers(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \t\n{"text": "two"}\n\n{"text": "three"}'
    )
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr(json_files, "_BLOCK", block)
        source = open_source(path)
        assert all_texts(source) == ["one", "two", "three"]
        assert [source.name(i).rsplit(":")[-1] for i in range(3)] == ["1", "4", "6"]


def test_a_broken_line_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"\n{"text": "\xff"}\n{"text": "d"}\n')
    source = open_source(path)
    assert (source[0].text, source[3].text) == ("a", "d")
    expected = f"{path}:2: no JSON (Expecting ',' delimiter, column 13); write one object a line"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        source[1]
    expected = f"{path}:3: byte 11 of the line is no UTF-8; save the file as UTF-8"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        source[2]


def test_a_line_nested_without_end_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + "\n" + '{"text": ' + "9" * 5000 + "}\n")
    source = open_source(path)
    with pytest.raises(ValueError, match=r"a.jsonl:1: nested too deep; correct the line$"):
        source[0]
    with pytest.raises(ValueError, match=r"^[^\n]*a.jsonl:2: [^\n]*$"):
        source[1]


line = st.one_of(
    st.binary(max_size=30),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["text", "messages", "role", "x"]), inner, max_size=3)
        ),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
    st.text(max_size=8).map(lambda text: json.dumps({"text": text}).encode()),
)


def read(source, index):
    """The document, or what the source complains of; any other error fails the test."""
    try:
        return source[index], None
    except ValueError as error:
        return None, str(error)


@QUICK
@hypothesis.given(st.lists(line, max_size=6), st.sampled_from([b"\n", b"\r\n"]), st.integers(1, 40))
def test_any_line_is_a_document_or_one_line_of_complaint(tmp_path_factory, lines, end, block):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(end.join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "_BLOCK", block)
        source = JsonLines([path])
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    numbers = [i + 1 for i, text in enumerate(content) if text.strip(b" \t\r")]
    assert [source.name(i) for i in range(len(source))] == [f"{path}:{n}" for n in numbers]
    for i, number in enumerate(numbers):
        document, complaint = read(source, i)
        if document is None:
            assert complaint.startswith(f"{path}:{number}: ")
            assert "\n" not in complaint
        else:
            record = json.loads(content[number - 1])
            assert document.text == record.get("text")
            assert document.messages == record.get("messages")


def test_a_folder_is_all_visible_files_below_it_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    write_texts(tmp_path / "deep" / "a.jsonl", 2, "deep")
    write_texts(tmp_path / "b.ndjson", 3, "b")
    write_texts(tmp_path / ".hidden.jsonl", 3, "hidden")
    source = open_source(tmp_path)
    assert [source.name(i) for i in (0, 2, 3, 4)] == [
        f"{tmp_path}/b.ndjson:1",
        f"{tmp_path}/b.ndjson:3",
        f"{tmp_path}/deep/a.jsonl:1",
        f"{tmp_path}/deep/a.jsonl:2",
    ]
    assert len(open_source(str(tmp_path / "*" / "*.jsonl"))) == 2


def test_a_named_format_goes_before_the_suffix(tmp_path):
    (tmp_path / "a.log").write_text("a log")
    assert open_source(tmp_path / "a.log", SourceOptions(format="text"))[0].text == "a log"
    (tmp_path / "b.txt").write_text("a text")
    write_texts(tmp_path / "c.jsonl", 3, "c")
    assert len(open_source(tmp_path, SourceOptions(format="jsonl"))) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.jsonl", "missing.jsonl: no such file or folder; check data.paths"),
        ("*.xls", "*.xls: no such file or folder; check data.paths"),
        (
            "a.log",
            "a.log: has no suffix that we know; give data.source.format=jsonl, json, parquet, csv,",
        ),
        ("mixed", "mixed: holds files of formats jsonl, text; give data.source.format=jsonl"),
        ("empty.jsonl", "empty.jsonl: there is no document in it; check the file or data.paths"),
        ("empty.txt", "empty.txt: there is no document in it"),
        ("no.parquet", "no.parquet: not read as Parquet: "),
        ("hollow", "hollow: the folder holds no files; check data.paths"),
    ],
)
def test_a_path_that_cannot_be_read_is_named_on_one_line(tmp_path, name, words):
    (tmp_path / "a.log").write_text("a log")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "no.parquet").write_text("no")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("a")
    write_texts(tmp_path / "mixed" / "b.jsonl", 1, "b")
    kind = FileNotFoundError if "no such file" in words else ValueError
    with pytest.raises(kind, match=r"^[^\n]*$") as error:
        open_source(tmp_path / name)
    assert words in str(error.value)


def test_parquet_rows_are_documents(tmp_path):
    rows = [chat("q", "a")["messages"], chat("r", "b")["messages"]]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["one", "two", "é"]}), tmp_path / "a.parquet"
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": ["four"]}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": rows, "n": [1, 2]}), tmp_path / "c.parquet"
    )
    source = open_source(str(tmp_path / "[ab].parquet"))
    assert all_texts(source) == ["one", "two", "é", "four"]
    assert source.name(3) == f"{tmp_path}/b.parquet:row 1"
    assert open_source(tmp_path / "c.parquet")[1].messages == rows[1]
    with pytest.raises(
        ValueError, match=r"it has the columns messages, n; name one by data.source.field=NAME$"
    ):
        open_source(tmp_path / "c.parquet", SourceOptions(field="body"))
    with pytest.raises(ValueError, match=r"c.parquet:row 1: 'n' is a number"):
        open_source(tmp_path / "c.parquet", SourceOptions(field="n"))[0]


def test_text_files_are_documents_or_parted_into_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n\n  \nthree\r\n\r\n\n")
    (tmp_path / "b.md").write_text("four\n")
    (tmp_path / "c.txt").write_text("")
    whole = open_source(tmp_path)
    assert all_texts(whole) == ["one\ntwo\n\n  \nthree\r\n\r\n\n", "four\n"]
    assert whole.name(1) == f"{tmp_path}/b.md"
    parts = open_source(tmp_path, SourceOptions(part="paragraph"))
    assert all_texts(parts) == ["one\ntwo", "three", "four"]
    assert parts.name(1) == f"{tmp_path}/a.txt#2"


def test_a_text_file_that_is_no_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\nb\xe9d")
    source = open_source(tmp_path / "a.txt", SourceOptions(part="paragraph"))
    assert source[0].text == "good"
    with pytest.raises(ValueError, match=r"a.txt#2: byte 8 of the file is no UTF-8; save the file"):
        source[1]


@QUICK
@hypothesis.given(
    st.text(st.sampled_from("a é\n€𝄞"), min_size=1, max_size=120), st.integers(16, 60)
)
def test_chunks_together_are_the_file_and_end_between_characters(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "chunks.txt"
    path.write_bytes(text.encode())
    parts = all_texts(TextFiles([path], "chunk", size))
    assert "".join(parts) == text
    assert all(0 < len(part.encode()) <= size for part in parts)


def test_chunks_end_after_a_line_or_word(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one two three\nfour five six seven eight nine")
    parts = all_texts(TextFiles([path], "chunk", 20))
    assert parts == ["one two three\n", "four five six seven ", "eight nine"]


def test_only_the_document_asked_for_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    write_lines(path, [{"text": "a" * 50}, {"text": "b" * 50}])
    source = open_source(path)
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[:30] = 255
    path.write_bytes(data.tobytes())
    assert source[1].text == "b" * 50
    with pytest.raises(ValueError, match=r"a.jsonl:1: byte 1 of the line is no UTF-8"):
        source[0]
