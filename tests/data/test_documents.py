"""Documents: what a record may hold, and on which side of the hold-out it falls."""

import json

import pytest

from llmprep_jax.data.documents import Document, digest
from llmprep_jax.data.records import to_document
from tests.data.corpora import chat


def test_the_digest_is_of_the_content_alone():
    assert digest(Document("a:1", text="abdication")) == 0x16316E4AA4C57BBF  # b2sum -l 64
    assert digest(Document("a:1", text="abdication")) == digest(Document("b", text="abdication"))
    one = Document("a", messages=[{"role": "user", "content": "é"}])
    other = Document("a", messages=[{"content": "é", "role": "user"}])
    assert digest(one) == digest(other) != digest(Document("a", text="é"))


def test_a_record_is_a_text_or_a_conversation():
    assert to_document({"text": "a", "id": 3}, None, "n") == Document("n", text="a")
    conversation = chat("why?", "so")
    assert to_document(conversation, None, "n").messages == conversation["messages"]
    assert to_document({"text": "a", "body": "b"}, "body", "n").text == "b"
    assert to_document({"text": None, "messages": [{"role": "user"}]}, None, "n").text is None


@pytest.mark.parametrize(
    ("record", "field", "words"),
    [
        (None, None, "x:1: found null; a record is an object with 'text' or 'messages'"),
        (["a"], None, "x:1: found a list; a record is an object with 'text' or 'messages'"),
        ({"text": 3}, None, "x:1: 'text' is a number; give a string"),
        ({"text": []}, None, "x:1: 'text' is a list; give a string"),
        ({"messages": ""}, None, "x:1: 'messages' is a string; give a list of messages"),
        ({"body": 1.5}, "body", "x:1: 'body' is a number; give a string, or a list of messages"),
        ({}, None, "it has no fields; name the right one by data.source.field="),
        ({"body": "b"}, None, "it has 'body'; name the right one by data.source.field="),
        (
            {"text": "a", "messages": []},
            None,
            "columns of text and messages; choose by data.format=text",
        ),
        (
            {"text": "a"},
            "body",
            "x:1: a record has 'body'; it has 'text'; name the right one by data.source.field=",
        ),
        ({"messages": []}, None, "'messages' is empty; a conversation needs a message"),
        ({"messages": ["hi"]}, None, "'messages' has a message 0 that is no {\"role\""),
        ({"messages": [{"content": "hi"}]}, None, "'messages' has a message 0 that is no"),
        ({"text": json.loads('"\\ud800"')}, None, "'text' holds half a surrogate pair"),
        (chat(json.loads('"\\udfff"'), ""), None, "'messages' holds half a surrogate pair"),
    ],
)
def test_a_record_that_is_no_document_is_named(record, field, words):
    with pytest.raises(ValueError, match=r"^x:1: ") as error:
        to_document(record, field, "x:1")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
