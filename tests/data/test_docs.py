"""docs/data.md: every record in it is read as the page says."""

import json
import pathlib
import re

from llmprep_jax.data import open_source
from llmprep_jax.data.records import to_document

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
RECORDS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
QUESTION = {"role": "user", "content": "What is 6 * 7?"}


def test_every_record_of_the_page_is_read():
    documents = [to_document(record, None, "docs/data.md") for record in RECORDS]
    assert [document.answer for document in documents] == [None] * 4 + [7] + [None] * 7
    assert documents[1].messages == [QUESTION, {"role": "assistant", "content": "42"}]
    assert documents[2].messages == [
        {"role": "system", "content": "Be brief."},
        *documents[1].messages,
    ]
    assert documents[3].messages[0]["content"] == "Add the numbers.\n\n6, 7"
    assert documents[6].captions == ("a red disc on snow", "a red circle")
    assert documents[7].messages[1]["content"] == "red"
    assert list(documents[8].fields) == ["tools"]
    assert documents[9].messages[1]["train"] is False
    assert documents[10].messages[0]["content"] == documents[11].messages[0]["content"]


def test_the_table_of_the_page_is_read(tmp_path):
    (table,) = re.findall(r"```csv\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "a.csv").write_text(table)
    assert open_source(tmp_path / "a.csv")[0].messages[1]["content"] == "13"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == (
        "talks.json:record 1 [{'role': 'user', 'content': 'What is 6 * 7?'}, "
        "{'role': 'assistant', 'content': '42'}]\n"
    )
