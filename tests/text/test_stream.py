"""Incremental detokenisation: pieces join to the decoding of the whole, character by character."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprep_jax.text import StreamDecoder, Tokenizer
from tests.text.samples import (
    GEMMA_SPM,
    LLAMA_SPM,
    TRICKY,
    train_byte_level,
    train_sentencepiece,
)

KINDS = ("byte_level", "llama", "gemma", "unigram")


@pytest.fixture(scope="module")
def tokenizers_by_kind(tmp_path_factory) -> dict[str, Tokenizer]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    train_byte_level().save(str(folders["byte_level"] / "tokenizer.json"))
    train_sentencepiece(folders["llama"], **LLAMA_SPM)
    train_sentencepiece(folders["gemma"], **GEMMA_SPM)
    train_sentencepiece(folders["unigram"], byte_fallback=True)
    return {kind: Tokenizer.from_folder(folder) for kind, folder in folders.items()}


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> list[str]:
    decoder = tokenizer.stream(skip_special)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


# whether special tokens are shown is one line of the decoding, the same for every kind
SOME = [("byte_level", True), ("gemma", True), ("llama", False), ("unigram", False)]
REST = [cell for cell in itertools.product(KINDS, (True, False)) if cell not in SOME]


@pytest.mark.parametrize(
    ("kind", "skip_special"),
    [*SOME, *[pytest.param(*cell, marks=pytest.mark.grid) for cell in REST]],
)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_ids_join_to_their_decoding(tokenizers_by_kind, kind, skip_special, data):
    tokenizer = tokenizers_by_kind[kind]
    some_id = st.one_of(
        st.integers(0, tokenizer.vocab_size + 5),
        st.integers(0, 263),  # where special tokens and bytes are
        st.sampled_from(sorted(tokenizer.special_ids)),
    )
    ids = data.draw(st.lists(some_id, max_size=30))
    assert "".join(stream(tokenizer, ids, skip_special)) == tokenizer.decode(ids, skip_special)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TRICKY)
def test_pieces_of_a_text_hold_whole_characters(tokenizers_by_kind, kind, text):
    tokenizer = tokenizers_by_kind[kind]
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids, skip_special=True)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_piece_comes_as_soon_as_it_is_certain(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["byte_level"]
    ids = tokenizer.encode("the é")
    assert stream(tokenizer, ids, True) == ["the", " ", "", "é", ""]


def test_sentencepiece_keeps_the_spaces_between_words(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["llama"]
    ids = tokenizer.encode("the answer<s> the user")
    pieces = stream(tokenizer, ids, True)
    assert "".join(pieces) == "the answer the user" == tokenizer.decode(ids)


def test_bytes_wait_for_the_end_of_their_run(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["llama"]
    e_acute = [tokenizer.id_of("<0xC3>"), tokenizer.id_of("<0xA9>")]
    comma = tokenizer.id_of(",")
    assert stream(tokenizer, [*e_acute, comma], True) == ["", "", "é,", ""]
    assert stream(tokenizer, [*e_acute, e_acute[0]], True) == ["", "", "", "\ufffd" * 3]


def test_a_decoder_of_nothing_says_nothing():
    decoder = StreamDecoder(lambda ids: "".join(map(chr, ids)))
    assert decoder.flush() == ""
    assert [decoder.push(ord(c)) for c in "ab"] == ["a", "b"]
    assert decoder.flush() == ""
