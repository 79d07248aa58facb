"""From documents to pieces: next tokens, what counts for the loss, and documents that are too
long."""

import dataclasses
import time

import numpy as np
import pytest

from llmprep_jax.data.documents import Document
from llmprep_jax.data.encoding import COUNTS, Encoder, check_answers
from tests.data.corpora import EOS, chat, encode, encode_chat

SHORT = Document("a.jsonl:1", text="abc")
LONG = Document("a.jsonl:2", text="abcdefghij")
TALK = Document("a.jsonl:3", messages=chat("why", "so it is")["messages"])

encoder = Encoder(encode, encode_chat, EOS, seq_len=4)


def shown(encoded):
    return [
        (bytes(p.tokens.tolist()), bytes(p.targets.tolist()), p.counts.tolist())
        for p in encoded.pieces
    ]


def counted(encoded):
    return {key: n for key, n in zip(COUNTS, encoded.counts, strict=True) if n}


def test_each_token_is_paired_with_the_next_and_the_text_ends():
    encoded = encoder((7, SHORT))
    assert shown(encoded) == [(b"abc", b"bc\0", [True] * 3)]
    assert encoded.pieces[0].doc_id == 7
    assert encoded.pieces[0].tokens.dtype == np.int32
    assert counted(encoded) == {"documents": 1, "tokens": 3, "targets": 3}


def test_the_end_is_not_put_twice_nor_where_there_is_none():
    ended = dataclasses.replace(encoder, encode=lambda text: [*encode(text), EOS])
    assert shown(ended((0, SHORT))) == shown(encoder((0, SHORT)))
    without = dataclasses.replace(encoder, eos_id=None)
    assert shown(without((0, SHORT))) == [(b"ab", b"bc", [True] * 2)]


def test_a_long_text_is_split_so_that_every_target_counts_once():
    encoded = encoder((0, LONG))
    assert shown(encoded) == [
        (b"abcd", b"bcde", [True] * 4),
        (b"efgh", b"fghi", [True] * 4),
        (b"ij", b"j\0", [True] * 2),
    ]
    assert counted(encoded) == {"documents": 1, "tokens": 10, "targets": 10, "split": 1}


def test_only_answers_count_in_conversations_unless_all_does():
    wide = dataclasses.replace(encoder, seq_len=20)
    (answers,) = shown(wide((0, TALK)))
    assert answers == (b"\2why\n\3so it is", b"why\n\3so it is\n", [False] * 5 + [True] * 9)
    (everything,) = shown(dataclasses.replace(wide, answers_only=False)((0, TALK)))
    assert everything == (*answers[:2], [True] * 14)


def test_a_long_conversation_is_truncated_and_what_is_lost_is_counted():
    encoded = dataclasses.replace(encoder, seq_len=8)((0, TALK))
    assert shown(encoded) == [(b"\2why\n\3so", b"why\n\3so ", [False] * 5 + [True] * 3)]
    assert counted(encoded) == {
        "documents": 1,
        "tokens": 8,
        "targets": 3,
        "truncated": 1,
        "lost": 6,
    }


def test_a_conversation_cut_before_its_answer_is_counted_as_empty():
    encoded = encoder((0, TALK))
    assert encoded.pieces == []
    assert counted(encoded) == {"documents": 1, "truncated": 1, "lost": 9, "empty": 1}


def test_pieces_of_a_split_conversation_without_an_answer_are_left_out():
    encoded = dataclasses.replace(encoder, overlong="split")((0, TALK))
    assert [targets for _, targets, _ in shown(encoded)] == [b"\3so ", b"it i", b"s\n"]
    assert counted(encoded) == {"documents": 1, "tokens": 10, "targets": 9, "split": 1}


def test_a_long_document_can_be_dropped_or_cut():
    dropped = dataclasses.replace(encoder, overlong="drop")((0, LONG))
    assert dropped.pieces == []
    assert counted(dropped) == {"documents": 1, "dropped": 1}
    cut = dataclasses.replace(encoder, overlong="truncate")((0, LONG))
    assert shown(cut) == [(b"abcd", b"bcde", [True] * 4)]
    assert counted(cut) == {"documents": 1, "tokens": 4, "targets": 4, "truncated": 1, "lost": 6}


def test_a_long_document_can_be_an_error_that_names_it():
    strict = dataclasses.replace(encoder, overlong="error")
    assert shown(strict((0, SHORT))) == shown(encoder((0, SHORT)))
    with pytest.raises(
        ValueError,
        match=r"^a.jsonl:2: the document has 11 tokens and the context holds 5; raise data.seq",
    ):
        strict((0, LONG))


def test_a_document_without_pairs_is_counted_as_empty():
    for text in ("", "a"):
        encoded = dataclasses.replace(encoder, eos_id=None)((0, Document("", text=text)))
        assert encoded.pieces == []
        assert counted(encoded) == {"documents": 1, "empty": 1}


def test_what_the_tokenizer_refuses_is_named_on_one_line():
    def refuse(messages, fields):
        raise ValueError("message 0 has role 'bot';\n did you mean assistant?")

    refusing = dataclasses.replace(encoder, encode_chat=refuse)
    with pytest.raises(ValueError, match=r"^a.jsonl:3: message 0 has role 'bot'; did you mean"):
        refusing((0, TALK))
    with pytest.raises(
        ValueError, match=r"^a.jsonl:3: a conversation needs a tokenizer with a chat"
    ):
        dataclasses.replace(encoder, encode_chat=None)((0, TALK))


def test_a_part_of_a_text_begins_and_ends_only_where_the_text_does():
    marked = dataclasses.replace(
        encoder, encode=lambda text: [7, *encode(text), EOS], encode_part=encode, seq_len=9
    )
    first = dataclasses.replace(SHORT, is_end=False)
    middle = dataclasses.replace(first, is_start=False)
    last = dataclasses.replace(SHORT, is_start=False)
    assert [shown(marked((0, part)))[0][1] for part in (SHORT, first, middle, last)] == [
        b"abc\0", b"abc", b"bc", b"bc\0",
    ]  # fmt: skip
    assert shown(marked((0, first)))[0][0][0] == 7
    assert shown(marked((0, middle)))[0][0] == b"ab"


def test_of_a_prompt_with_its_completion_the_completion_counts():
    def encode_completion(text, start):
        return encode(text), [i >= start for i in range(len(text))]

    pair = Document("a", text="2+2=4", answer=4)
    whole = dataclasses.replace(encoder, encode_completion=encode_completion, seq_len=9)
    assert shown(whole((0, pair))) == [(b"2+2=4", b"+2=4\0", [False] * 3 + [True] * 2)]
    everything = dataclasses.replace(whole, answers_only=False)
    assert shown(everything((0, pair))) == [(b"2+2=4", b"+2=4\0", [True] * 5)]
    with pytest.raises(ValueError, match=r"^a: a prompt with its completion needs a tokenizer"):
        encoder((0, pair))


def test_what_is_not_to_be_learnt_is_refused_where_everything_is():
    silent = dataclasses.replace(
        TALK, messages=[TALK.messages[0], TALK.messages[1] | {"weight": 0}]
    )
    everything = dataclasses.replace(encoder, answers_only=False, seq_len=20)
    with pytest.raises(
        ValueError, match=r"^a.jsonl:3: message 1 is not to be learnt, and data.mask=all"
    ):
        everything((0, silent))


def test_the_first_piece_that_is_left_stands_for_its_document():
    wide = dataclasses.replace(encoder, overlong="split")
    assert [p.is_first for p in wide((0, LONG)).pieces] == [True, False, False]
    assert [p.is_first for p in wide((0, TALK)).pieces] == [True, False, False]
    (whole,) = dataclasses.replace(encoder, seq_len=None)((0, LONG)).pieces
    assert (whole[:3].is_first, whole[3:].is_first) == (True, False)


ALL = Document("d", messages=[{"role": "assistant", "content": "so"}])
NONE = Document("d", messages=[{"role": "user", "content": "why"}])


def marks_all(messages, fields):
    ids, answers = encode_chat(messages)
    return ids, [all(answers[1:])] * len(ids)


@pytest.mark.parametrize(("documents", "words"), [
    ([NONE, NONE], "t: in 2 of 2 conversations, by the chat template of a/b, there is no token"),
    ([ALL] * 3, "t: in 3 of 3 conversations, by the chat template of a/b, every token is to be"),
])  # fmt: skip
def test_masks_that_are_all_empty_or_all_full_are_an_error_with_the_template(documents, words):
    marking = dataclasses.replace(encoder, encode_chat=marks_all)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        check_answers(marking, list(enumerate(documents)), "t", "a/b", 9.0)
    assert words in str(error.value)
    with pytest.warns(UserWarning, match="by the chat template of a/b"):  # not all were looked at
        check_answers(marking, _slow(documents), "t", "a/b", 0.05)
    asked = dataclasses.replace(marking, answers_only=False)
    check_answers(asked, list(enumerate(documents)), "t", "a/b", 9.0)
    for fine in ([*documents, ALL if documents[0] is NONE else NONE], [SHORT], []):
        check_answers(marking, list(enumerate(fine)), "t", "a/b", 9.0)


def _slow(documents):
    yield 0, documents[0]
    time.sleep(0.06)
    yield 1, documents[1]
