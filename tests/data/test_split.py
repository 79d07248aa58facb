"""What is held out of few documents, and of one."""

import numpy as np
import pytest

from llmprep_jax.data import DataConfig, build, evaluation_batches
from llmprep_jax.data.documents import Document, digest
from llmprep_jax.data.split import Documents
from tests.data.corpora import EOS, chat, encode, encode_chat, write_lines


class Texts:
    """A source of given documents."""

    def __init__(self, documents):
        self._documents = documents

    def __len__(self):
        return len(self._documents)

    def __getitem__(self, index):
        return self._documents[index]

    def name(self, index):
        return str(index)


def sides(documents, holdout):
    whole = Documents([Texts(documents)], "t", 0)
    return [[d for _, d in whole.side(holdout, split)] for split in ("train", "heldout")]


def texts_of(documents):
    return [document.text for document in documents]


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    documents = [Document("", text=f"document {i}") for i in range(1000)]
    tenth, fifth = (set(texts_of(sides(documents, share)[1])) for share in (0.1, 0.2))
    assert tenth < fifth
    assert len(tenth) == pytest.approx(100, abs=30)
    assert len(fifth) == pytest.approx(200, abs=40)


@pytest.mark.parametrize("count", [2, 10, 34])
def test_at_least_one_conversation_is_held_out(count):
    talks = [Document("", messages=chat(f"q{i}", "a")["messages"]) for i in range(count)]
    train, held = sides(talks, 1e-6)
    assert [digest(held[0])] == [min(map(digest, talks))]
    assert len(train) == count - 1
    assert held[0] not in train
    assert sides(talks[::-1], 1e-6)[1] == held
    copies = sides([*talks, held[0]], 1e-6)
    assert copies[1] == [held[0], held[0]]
    assert held[0] not in copies[0]


def test_at_least_one_document_is_trained_on():
    documents = [Document("", text=f"document {i}") for i in range(3)]
    train, held = sides(documents, 0.999999)
    assert len(train) == 1
    assert sorted(texts_of(train + held)) == sorted(texts_of(documents))


def test_of_few_texts_the_end_of_one_is_held_out():
    documents = [
        Document("", text="".join(f"line {k} of {i}\n" for k in range(1000))) for i in (1, 2)
    ]
    train, held = sides(documents, 0.05)
    assert len(train) == 2
    assert len(held) == 1
    (cut,) = [d for d in train if not d.is_end]
    assert cut.text + held[0].text in texts_of(documents)
    assert cut.text.endswith("\n")
    assert len(held[0].text) == pytest.approx(0.1 * len(documents[0].text), rel=0.02)
    assert (cut.is_start, held[0].is_start, held[0].is_end) == (True, False, True)


@pytest.mark.parametrize("text", ["x" * 1000, "wörter " * 150, "é\n" * 500])
def test_of_one_text_the_end_is_held_out(text):
    (train,), (held,) = sides([Document("", text=text)], 0.1)
    assert train.text + held.text == text
    assert 0.08 < len(held.text) / len(text) < 0.32
    again = sides([Document("", text=text)] * 3, 0.1)
    assert [texts_of(part) for part in again] == [[train.text] * 3, [held.text] * 3]


@pytest.mark.parametrize("document", [
    Document("", messages=chat("q", "a")["messages"]), Document("", text="x"),
    Document("", text="2+2=4", answer=4),
], ids=["conversation", "short", "completion"])  # fmt: skip
def test_one_document_that_cannot_be_parted_is_refused_with_remedies(document):
    with pytest.raises(
        ValueError, match=r"^t: there is one document.*set data.holdout=0, or give more"
    ):
        sides([document], 0.05)


def ids_of(batches):
    found = []
    for batch in batches:
        for b in range(len(batch["tokens"])):
            at = np.flatnonzero(batch["segment_ids"][b])
            found.append([*batch["tokens"][b, at].tolist(), *batch["targets"][b, at[-1:]].tolist()])
    return [ids for ids in found if ids]


def test_a_single_file_runs_under_a_config_that_holds_something_out(tmp_path):
    (tmp_path / "book.txt").write_text("one two three four five six\n" * 20)
    cfg = DataConfig((str(tmp_path / "book.txt"),), seq_len=1000, batch_size=1, packing="padded",
                     holdout=0.05, num_epochs=1)  # fmt: skip
    settings = dict(encode=lambda text: [7, *encode(text)], encode_part=encode, eos_id=EOS)
    (train,), (held,) = ids_of(build(cfg, **settings)), ids_of(evaluation_batches(cfg, **settings))
    assert bytes(train[1:] + held[:-1]).decode() == "one two three four five six\n" * 20
    # the text begins in what is trained on and ends in what is held out
    assert (train[0], train.count(EOS), held.count(7), held[-1]) == (7, 0, 0, EOS)


def test_conversations_too_few_for_the_share_run(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [chat(f"q{i}", "a") for i in range(8)])
    cfg = DataConfig((path,), seq_len=32, batch_size=1, holdout=0.01, num_epochs=1)
    settings = dict(encode=encode, encode_chat=encode_chat, eos_id=EOS)
    train, held = build(cfg, **settings), evaluation_batches(cfg, **settings)
    assert (train.num_documents, held.num_documents) == (7, 1)
