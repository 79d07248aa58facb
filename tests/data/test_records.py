"""Records of the formats that fine-tuning data come in, and tables that hold them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from llmprep_jax.data import SourceOptions, open_source
from llmprep_jax.data.records import to_document
from tests.data.corpora import write_lines


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


TALK = [user("q"), assistant("a")]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLED = json.dumps(CALL["function"])


@pytest.mark.parametrize(("record", "messages"), [
    ({"conversations": SHAREGPT}, TALK),
    ({"messages": SHAREGPT}, TALK),
    ({"conversation": TALK}, TALK),
    ({"conversations": SHAREGPT, "system": "s"}, [{"role": "system", "content": "s"}, *TALK]),
    ({"conversations": json.dumps(SHAREGPT)}, TALK),
    ({"conversations": [*SHAREGPT, {"from": "observation", "value": "r"}]},
     [*TALK, {"role": "tool", "content": "r"}]),
    ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": CALLED}]},
     [TALK[0], assistant("", tool_calls=[CALL])]),
    ({"conversations": [SHAREGPT[0], SHAREGPT[1] | {"weight": 0}]},
     [TALK[0], assistant("a", weight=0)]),
    ({"instruction": "q", "output": "a"}, TALK),
    ({"instruction": "q", "input": "", "output": "a"}, TALK),
    ({"instruction": "add", "input": "1 1", "output": "2"}, [user("add\n\n1 1"), assistant("2")]),
    ({"instruction": "add", "context": "1 1", "response": "2"},
     [user("add\n\n1 1"), assistant("2")]),
    ({"instruction": "q", "output": "a", "system": "s", "history": [["p", "b"]]},
     [{"role": "system", "content": "s"}, user("p"), assistant("b"), *TALK]),
    ({"prompt": [user("q")], "completion": [assistant("a")]}, TALK),
    ({"prompt": [user("p"), assistant("b"), user("q")], "completion": [assistant("a")]},
     [user("p"), assistant("b", train=False), *TALK]),
], ids=range(15))  # fmt: skip
def test_columns_of_each_format_are_found(record, messages):
    document = to_document(record, None, "n")
    assert (document.messages, document.text) == (messages, None)
    assert "system" not in document.fields


def test_a_prompt_and_its_completion_are_a_text_of_which_the_end_is_learnt():
    document = to_document({"prompt": "2+2=", "completion": "4", "id": 3}, None, "n")
    assert (document.text, document.answer) == ("2+2=4", 4)


@pytest.mark.parametrize("texts", ["a red disc", ["a red disc", "a circle"]])
def test_an_image_with_captions_is_a_conversation_that_says_the_first(texts):
    key = "caption" if isinstance(texts, str) else "captions"
    document = to_document({"image": "1.png", key: texts, "id": 3}, None, "n")
    asked = {"role": "user", "content": [{"type": "image", "image": "1.png"}]}
    assert document.messages == [asked, assistant("a red disc")]
    assert document.captions == (("a red disc",) if isinstance(texts, str) else tuple(texts))
    assert document.fields == {"id": 3}


def test_the_format_or_two_columns_can_be_told():
    record = {"text": "t", "instruction": "q", "output": "a", "question": "q", "answer": "a"}
    with pytest.raises(ValueError, match="columns of text and alpaca; choose by data.format=text"):
        to_document(record, None, "n")
    assert to_document(record, None, "n", "alpaca").messages == TALK
    assert to_document(record, None, "n", "text").text == "t"
    assert to_document(record, "question,answer", "n").messages == TALK
    assert to_document({"my_column": SHAREGPT}, "my_column", "n").messages == TALK
    with pytest.raises(ValueError, match="field names one column or two, not 'a,b,c'"):
        SourceOptions(field="a,b,c")


@pytest.mark.parametrize(("record", "words"), [
    ({"messages": [{"from": "robot", "value": ""}]}, "'messages' has a message 0 from 'robot'"),
    ({"conversations": "hello"}, "'conversations' is a string; give a list of messages"),
    ({"conversations": "[hello"}, "'conversations' is text that is no JSON"),
    ({"image": "1.png", "caption": "a", "captions": ["a"]}, "one of 'caption', 'captions'"),
    ({"image": "1.png", "captions": []}, "'captions' is missing; it has 'image', 'captions'"),
    ({"image": "1.png", "captions": ["a", 3]}, "'captions' is a number; give a string"),
    ({"instruction": "q", "output": 3}, "'output' is a number; give a string"),
    ({"instruction": "q", "output": "a", "response": "b"}, "one of 'output', 'response'"),
    ({"instruction": "q", "output": "a", "history": ["p"]}, "'history' holds no pairs"),
    ({"prompt": [user("q")], "completion": "a"}, "'prompt' is a list; give a string"),
    ({"prompt": "q"}, "it has 'prompt'; name the right one by data.source.field=NAME"),
    ({"messages": TALK, "conversations": SHAREGPT}, "a record has one of messages, conversations"),
    ({"messages": TALK, "tools": "no"}, "'tools' is text that is no JSON"),
])  # fmt: skip
def test_records_that_do_not_fit_are_named_in_one_line(record, words):
    with pytest.raises(ValueError, match=r"^x:1: [^\n]*$") as error:
        to_document(record, None, "x:1")
    assert words in str(error.value)


def test_what_else_a_record_holds_is_kept_for_the_template():
    record = {"messages": TALK, "tools": [{"name": "f"}], "enable_thinking": False, "x": None}
    fields = {"tools": [{"name": "f"}], "enable_thinking": False, "x": None}
    assert to_document(record, None, "n").fields == fields
    assert to_document(record | {"tools": '[{"name": "f"}]'}, None, "n").fields == fields
    assert to_document(record | {"tools": " "}, None, "n").fields["tools"] is None


def calls(**arguments) -> list[dict]:
    function = {"name": "f", "arguments": arguments}
    return [
        user("q"),
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
    ]


def test_nulls_that_arrow_puts_in_are_dropped_and_those_of_json_stay(tmp_path):
    rows = [
        {"messages": calls(city="Oslo"), "tools": [{"name": "f", "strict": True}]},
        {"messages": calls(zip="0150")},
        {"messages": [*calls(deep={"a": 1}), *calls(deep={"b": [{"c": 1}, {"d": 2}]})]},
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert [source[i].messages for i in range(3)] == [row["messages"] for row in rows]
    assert [source[i].fields for i in range(3)] == [{"tools": rows[0]["tools"]}, {}, {}]
    null = calls(city="Oslo", zip=None)
    path = write_lines(tmp_path / "a.jsonl", [{"messages": null, "tools": None}])
    assert open_source(path)[0].messages == null
    assert open_source(path)[0].fields == {"tools": None}


def test_maps_of_parquet_are_objects_and_bytes_are_left_out(tmp_path):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    message = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string(), "x": kind})
    row = [user("q") | {"x": [("k", "v")]}, assistant("a")]
    table = pyarrow.table({
        "messages": pyarrow.array([row], pyarrow.list_(message)), "raw": [b"\xff"], "n": [1],
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    document = open_source(tmp_path / "a.parquet")[0]
    assert document.messages == [user("q") | {"x": {"k": "v"}}, assistant("a")]
    assert document.fields == {"n": 1}


def test_only_the_text_of_a_table_of_texts_is_read(tmp_path):
    table = pyarrow.table({"text": ["one"], "big": [[0.0] * 9]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source[0].text == "one"
    assert source._tables[0].rows.column_names == ["text"]
    named = open_source(tmp_path / "a.parquet", SourceOptions(field="text"))
    assert named._tables[0].rows.column_names == ["text"]


RECORDS = [{"text": "one"}, {"text": "zwei é"}]


@pytest.mark.parametrize("text", [
    json.dumps(RECORDS), "\ufeff\n" + json.dumps(RECORDS, indent=2), json.dumps({"data": RECORDS}),
    "\n".join(map(json.dumps, RECORDS)), "\ufeff\n" + "\r\n".join(map(json.dumps, RECORDS)) + "\n",
], ids=["list", "indented", "inside", "lines", "crlf"])  # fmt: skip
def test_a_json_file_is_a_list_of_records_or_lines(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text("{}")
    source = open_source(tmp_path)
    assert [source[i].text for i in range(len(source))] == ["one", "zwei é"]
    assert source.name(1).startswith(f"{tmp_path}/a.json:")


def test_one_record_is_a_file_too(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"messages": TALK}, indent=1))
    assert open_source(tmp_path / "a.json")[0].messages == TALK


@pytest.mark.parametrize(("name", "data", "words"), [
    ("a.json", b"[1, 2", "a.json:1: no JSON (Expecting ',' delimiter, column 6); write one list"),
    ("a.json", b'[{"text": "\xff"}]', "a.json: byte 12 of the file is no UTF-8"),
    ("a.json", b"[" * 100_000, "a.json: nested too deep"),
    ("a.json", b"[]", "there is no document in it"),
    ("a.json", b" \n", "there is no document in it"),
    ("a.json", b"[3]", "a.json:record 1: found a number; a record is an object"),
    ("a.csv", b"", "there is no document in it"),
    ("a.csv", b"text\n", "there is no document in it"),
    ("a.csv", b"text\na\xff\n", "a.csv: byte 7 of the file is no UTF-8"),
    ("a.csv", b"text,x\na,b\nc\n", "a.csv:3: 1 values under a header of 2"),
    ("a.csv", b'text\n"a\nb', "a.csv:2: unexpected end of data"),
    ("a.csv", b"text,text\na,b\n", "a.csv:1: the header has a name twice"),
    ("a.csv", b"a,b\n1,2\n", "a.csv:2: a record has 'text' or 'messages'"),
], ids=range(13))  # fmt: skip
def test_a_broken_file_is_named_in_one_line(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        open_source(tmp_path / name)[0]
    assert words in str(error.value)


def test_rows_of_csv_are_records_named_by_their_first_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        '\ufeffinstruction,input,output\r\nadd,"1,\n1",2\r\n\r\n"say ""hi""",,"hi, é"\r\n'.encode()
    )
    source = open_source(tmp_path / "a.csv")
    assert source[0].messages == [user("add\n\n1,\n1"), assistant("2")]
    assert source[1].messages == [user('say "hi"'), assistant("hi, é")]
    assert [source.name(i) for i in (0, 1)] == [f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:5"]
    (tmp_path / "b.tsv").write_text("question\tanswer\nq\ta\n")
    options = SourceOptions(field="question,answer")
    assert open_source(tmp_path / "b.tsv", options)[0].messages == TALK
    (tmp_path / "c.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(open_source(tmp_path / "c.csv")[0].text) == 200_000


def test_a_folder_of_tables_is_read_in_order(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"text\n{name}1\n{name}2\n")
    source = open_source(tmp_path)
    assert [source[i].text for i in (0, 1, 2, 3)] == ["a1", "a2", "b1", "b2"]
    assert source.name(2) == f"{tmp_path}/b.csv:2"
