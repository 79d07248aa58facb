"""ArrayRecord by TFDS: written from any source and read back, without a network or TensorFlow."""

import json
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from llmprep_jax.data import SourceOptions, open_source
from llmprep_jax.data.documents import digest
from llmprep_jax.data.json_files import JsonLines
from llmprep_jax.data.tfds_text import write_array_record
from tests.data.corpora import chat, write_lines, write_texts

tfds.disable_progress_bar()


def test_documents_come_back_as_they_were(tmp_path):
    records = [{"text": "é 1"}, chat("why?", "so"), {"text": ""}, {"text": "𝄞\n"}]
    source = open_source(write_lines(tmp_path / "a.jsonl", records))
    folder = write_array_record(source, tmp_path / "prepared")
    assert [p.name for p in (tmp_path / "prepared").iterdir()] == ["text_documents"]
    for path in (folder, tmp_path / "prepared"):
        back = open_source(path)
        assert len(back) == 4
        for i in (3, 0, 1, 2):
            assert (back[i].text, back[i].messages) == (source[i].text, source[i].messages)
            assert digest(back[i]) == digest(source[i])
        assert back.name(1) == f"{folder}:train 2"


def test_a_text_that_looks_like_anything_stays_a_text(tmp_path):
    (tmp_path / "a.txt").write_text('{"messages": []}\n\n[1]\n\n%s')
    source = open_source(tmp_path / "a.txt", SourceOptions(part="paragraph"))
    back = open_source(write_array_record(source, tmp_path / "prepared"))
    assert [back[i].text for i in range(3)] == ['{"messages": []}', "[1]", "%s"]


def test_what_is_there_is_not_kept_silently(tmp_path):
    source = open_source(write_texts(tmp_path / "a.jsonl", 2, "a"))
    write_array_record(source, tmp_path / "prepared")
    with pytest.raises(
        ValueError, match=r"1.1.0 holds a dataset already; remove it or choose another"
    ):
        write_array_record(source, tmp_path / "prepared")
    with pytest.raises(ValueError, match="no document to write; check the source"):
        write_array_record(JsonLines([]), tmp_path / "other")


def test_a_broken_document_is_named_and_leaves_nothing_that_reads(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{}\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: a record has 'text' or 'messages'"):
        write_array_record(open_source(tmp_path / "a.jsonl"), tmp_path / "prepared")
    assert not list((tmp_path / "prepared").glob("*/1.1.0"))


def test_a_folder_that_is_not_prepared_is_refused_on_one_line(tmp_path):
    tfds_options = SourceOptions(format="tfds")
    with pytest.raises(
        FileNotFoundError, match=r"^[^\n]*: no features.json; give the version folder"
    ):
        open_source(tmp_path, tfds_options)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(ValueError, match=r"^[^\n]*: TFDS does not read it: [^\n]*$"):
        open_source(tmp_path, tfds_options)
    source = open_source(write_texts(tmp_path / "a.jsonl", 2, "a"))
    folder = write_array_record(source, tmp_path / "prepared")
    with pytest.raises(ValueError, match=r"1.1.0 has no split test; it has train$"):
        open_source(folder, SourceOptions(tfds_split="test"))


SCRIPT = """
import socket, sys

def refuse(*_):
    raise AssertionError("the network was asked for")

socket.socket.connect = socket.getaddrinfo = refuse
from llmprep_jax.data import DataConfig, build, open_source
assert "pyarrow" not in sys.modules and "tensorflow_datasets" not in sys.modules

from llmprep_jax.data.tfds_text import write_array_record
import tensorflow_datasets as tfds
folder = write_array_record(open_source(sys.argv[1]), sys.argv[2])
records = tfds.data_source("text_documents", data_dir=sys.argv[2], split="train")
print(len(records), records[7]["text"].decode())
batches = build(
    DataConfig((str(folder),), seq_len=8, batch_size=2), lambda t: list(t.encode()), eos_id=0
)
print(next(batches)["tokens"].shape)
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""


@pytest.mark.slow  # imports in a process of its own
def test_there_is_no_network_no_tensorflow_and_no_noise_at_the_end(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", 9, "a")
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, str(tmp_path / "prepared")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    # the prefetching thread is still at work when this process ends
    assert ran.returncode == 0, ran.stderr
    text = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[7])["text"]
    assert ran.stdout.splitlines() == [f"9 {text}", "(2, 8)"]
    assert "Traceback" not in ran.stderr
    assert "Exception" not in ran.stderr
