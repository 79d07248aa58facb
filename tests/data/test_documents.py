"""Documents: what a record may hold, and on which side of the hold-out it falls."""

import json

import pytest

from llmprep_jax.data.documents import Document, digest, is_held_out, to_document
from tests.data.corpora import chat


def test_the_digest_is_of_the_content_alone():
    assert digest(Document("a:1", text="abdication")) == 0x16316E4AA4C57BBF  # b2sum -l 64
    assert digest(Document("a:1", text="abdication")) == digest(Document("b", text="abdication"))
    one = Document("a", messages=[{"role": "user", "content": "é"}])
    other = Document("a", messages=[{"content": "é", "role": "user"}])
    assert digest(one) == digest(other) != digest(Document("a", text="é"))


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    documents = [Document("", text=f"document {i}") for i in range(4000)]
    tenth = {d.text for d in documents if is_held_out(d, 0.1)}
    fifth = {d.text for d in documents if is_held_out(d, 0.2)}
    assert tenth < fifth
    assert len(tenth) == pytest.approx(400, abs=60)
    assert len(fifth) == pytest.approx(800, abs=80)


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
        ({}, None, "it has no fields; name the right one by field="),
        ({"body": "b"}, None, "it has 'body'; name the right one by field="),
        ({"text": "a", "messages": []}, None, "one of them; choose one by field="),
        ({"text": "a"}, "body", "x:1: a record has 'body', one of them; it has 'text'"),
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
