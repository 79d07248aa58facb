"""The demo's dataset: well formed, of the stated size, and without traces of the printed page."""

import pathlib
import re

from configs.data import make_devils_dictionary as maker
from llmprep_jax.data import open_source

PATH = pathlib.Path(maker.__file__).with_name("devils_dictionary.jsonl")

ENTRY = """LOGIC, n.  The art of _thinking_ in strict accordance with a half-
baked {REASON} (See RIMER.) -- as
follows:

    A verse that is
    not kept.
                                                                  G.J.
"""


def test_entries_are_questions_and_short_answers():
    source = open_source(PATH)
    assert len(source) == 940
    for i in range(len(source)):
        question, answer = source[i].messages
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert len(answer["content"].split()) <= 120
        assert re.search(r"[.!?][\"')]*$", answer["content"])
        assert not re.search(r"[{}_]|  |^ ", answer["content"], re.MULTILINE)
    assert source[2].messages[1]["content"] == (
        "ABDICATION, n. An act whereby a sovereign attests his sense of the high temperature "
        "of the throne."
    )


def test_prose_is_unwrapped_and_cut_before_verse():
    paragraphs, has_quotation = maker.prose_of(ENTRY)
    assert has_quotation
    assert paragraphs == [
        "LOGIC, n. The art of thinking in strict accordance with a half-baked REASON -- as follows:"
    ]
    assert maker.answer_of(["One sentence.  It goes on thus:"], True) == "One sentence."
    assert maker.headword_of("KING'S EVIL, n.  A malady") == "king's evil"
    assert maker.headword_of("R.I.P.  A careless abbreviation") == "R.I.P."
    assert maker.headword_of("WALL STREET, n.  A symbol") == "Wall Street"


def test_what_is_left_out_is_out():
    source = open_source(PATH)
    said = {source[i].messages[1]["content"].split(",")[0].lower() for i in range(len(source))}
    assert not said & set(maker.LEFT_OUT)
