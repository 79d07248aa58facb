"""Thoughts and answers of a reasoning model: in a finished text and in one that comes in pieces."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprep_jax.text import Processor, Reply, ThoughtSplitter, split_thoughts
from llmprep_jax.text.thinking import opens_thought, parts_of
from tests.text import tool_templates
from tests.text.samples import ASSISTANT

CODE = "```\n</think> <think>\n```"
# text -> (thoughts, answer) when the prompt did not open the thoughts, and when it did
TEXTS = {
    "<think>\nhm, 4\n\nso\n</think>\n\nIt is 4.\n": [("hm, 4\n\nso", "It is 4.\n")] * 2,
    "hm\n</think>\n\nIt is 4.": [("", "hm\n</think>\n\nIt is 4."), ("hm", "It is 4.")],
    "\n\nhm</think>4": [("", "\n\nhm</think>4"), ("hm", "4")],
    "It is 4.": [("", "It is 4."), ("It is 4.", "")],
    "<think>\nhm, the": [("hm, the", "")] * 2,
    "<think>\nhm\n\n": [("hm", "")] * 2,
    "<think>\nhm\n</thin": [("hm\n</thin", "")] * 2,
    "<think>\n\n</think>\n\n4": [("", "4")] * 2,
    "<think></think>4": [("", "4")] * 2,
    "<think>\nhm</think>\n\n": [("hm", "")] * 2,
    f"<think>\nhm\n</think>\n\n{CODE}\n": [("hm", f"{CODE}\n")] * 2,
    f"hm</think>{CODE}": [("", f"hm</think>{CODE}"), ("hm", CODE)],
    f"See {CODE}": [("", f"See {CODE}"), ("See ```", " <think>\n```")],
    "<think>a <think> b</think>c</think>d": [("a <think> b", "c</think>d")] * 2,
    " \n<think>\n\n  a\n b </think>\n\n    x = 1\n": [("  a\n b ", "    x = 1\n")] * 2,
    "<thin": [("", "<thin"), ("<thin", "")],
    "\n <": [("", "\n <"), (" <", "")],
    "<<think>": [("", "<<think>"), ("<<think>", "")],
    "</think>\n4": [("", "</think>\n4"), ("", "4")],
    "a</</think>4": [("", "a</</think>4"), ("a</", "4")],
    " \n": [("", " \n"), (" ", "")],
    "": [("", "")] * 2,
}  # fmt: skip
CASES = [
    pytest.param(text, opened, Reply(*parts[opened]), id=f"{text!r}-{opened}")
    for text, parts in TEXTS.items()
    for opened in (False, True)
]


def joined(pieces: list[str], opened: bool) -> Reply:
    splitter = ThoughtSplitter(opened)
    replies = [*map(splitter.push, pieces), splitter.flush()]
    return Reply(*map("".join, zip(*replies, strict=True)))


@pytest.mark.parametrize(("text", "opened", "reply"), CASES)
def test_a_finished_text_is_parted(text, opened, reply):
    assert split_thoughts(text, opened) == reply


@pytest.mark.parametrize(("text", "opened", "reply"), CASES)
def test_a_stream_is_parted_wherever_two_cuts_fall(text, opened, reply):
    for i, j in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        assert joined([text[:i], text[i:j], text[j:]], opened) == reply
    assert joined(list(text), opened) == reply


_PIECES = st.sampled_from(
    [*"a \n<>/", "\n\n", "<think>", "</think>", "<think>\n", "</thi", "nk>", "<th", "ink>", "é"]
)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(_PIECES, max_size=14), opened=st.booleans())
def test_pieces_of_any_stream_join_to_the_parts_of_the_whole(pieces, opened):
    whole = split_thoughts("".join(pieces), opened)
    assert joined(pieces, opened) == whole
    assert joined(list("".join(pieces)), opened) == whole


def test_only_what_may_become_a_tag_is_held_back():
    splitter = ThoughtSplitter()
    said = [splitter.push(piece) for piece in ("<thi", "nk>", "\n", "hm", ",\n", "\nso</", "b")]
    assert said == [("", "")] * 3 + [("hm", ""), (",", ""), ("\n\nso", ""), ("</b", "")]
    said = [splitter.push(piece) for piece in ("\n</thin", "k>\n", "\n", "4", " <", "\n")]
    assert said == [("", "")] * 3 + [("", "4"), ("", " <"), ("", "\n")]
    assert splitter.flush() == ("", "")


def test_one_piece_may_hold_both_parts():
    piece = ThoughtSplitter().push("<think>\nhm\n</think>\n\n4")
    assert piece == ("hm", "4")
    assert list(parts_of(piece)) == [("hm", ""), ("", "4")]
    assert list(parts_of(Reply("", ""))) == []


@pytest.mark.parametrize(("prompt", "opens"), [
    (f"{ASSISTANT}<think>\n", True), (f"{ASSISTANT}<think>", True), ("<think>", True),
    (ASSISTANT, False), ("<think>\n\n</think>\n\n", False), ("", False),
    (f"What is <think>?{ASSISTANT}", False), (f"<think>{ASSISTANT}", False),
])  # fmt: skip
def test_a_prompt_that_ends_with_the_opening_tag_opens_the_thoughts(prompt, opens):
    assert opens_thought(prompt) is opens


ALWAYS = tool_templates.QWEN3 + "{{ '<think>\\n' if add_generation_prompt }}"


# Qwen3 as first released thinks or does not, as it is told; of its later forms one always does
@pytest.mark.parametrize(("template", "fields", "said"), [
    (tool_templates.QWEN3, {}, "<think>\nhm\n</think>\n\n4"),
    (tool_templates.QWEN3, {"enable_thinking": True}, "<think>\nhm\n</think>\n\n4"),
    (tool_templates.QWEN3, {"enable_thinking": False}, "4"),
    (ALWAYS, {}, "hm\n</think>\n\n4"),
], ids=["free", "on", "off", "always"])  # fmt: skip
def test_thoughts_of_qwen3_are_told_apart_in_each_of_its_ways(
    with_template, template, fields, said
):
    tokenizer = with_template(template)
    question = [{"role": "user", "content": "2 + 2?"}]
    (ids,) = Processor(tokenizer)(question, **fields)["tokens"]
    opened = opens_thought(tokenizer.decode(ids, skip_special=False))
    thoughts = "" if fields == {"enable_thinking": False} else "hm"
    assert split_thoughts(said, opened) == Reply(thoughts, "4")
