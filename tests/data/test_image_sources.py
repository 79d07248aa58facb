"""Pictures where they lie: in tar shards, columns of Parquet and records of TFDS."""

import dataclasses
import io
import json
import pickle
import random
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from llmprep_jax.data import SourceOptions, open_source, row_groups
from llmprep_jax.data.documents import digest
from llmprep_jax.data.images import split_images
from llmprep_jax.data.refs import read_ref
from tests.data.corpora import same
from tests.data.picture_files import LAYOUTS, of_tars, png, prepare, write_parquet, write_tar
from tests.data.pictured import make_processor
from tests.data.test_images import batches, config
from tests.grids import cases

CAPTIONS = [(10 * i, {"caption": "abcdefgh"[: 1 + i % 5]}) for i in range(8)]
QUESTIONS = [(10 * i, {"question": "ab"[: 1 + i % 2], "answer": "cd"}) for i in range(8)]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Captioned pictures, in each layout."""
    folders = {name: tmp_path_factory.mktemp(name) for name in LAYOUTS}
    return {name: write(folders[name], CAPTIONS) for name, write in LAYOUTS.items()}


def refs_of(document):
    return split_images(document.messages or [], document.folder)[1]


def shades(document):
    """What its pictures show."""
    from llmprep_jax.vision import open_image

    return [int(open_image(ref.content(), name=ref.title)[0, 0, 0]) for ref in refs_of(document)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_batches_and_goes_on_in_them(paths, processor, layout):
    cfg = config(paths[layout], shuffle=True, seed=3, num_epochs=2, pack_window=2)
    stream, whole, states = batches(cfg, processor), [], []
    for batch in stream:
        whole.append(batch)
        states.append(json.dumps(stream.get_state()))
    as_files = list(batches(dataclasses.replace(cfg, paths=(paths["files"],)), processor))
    assert len(whole) >= 4
    assert all(same(a, b) for a, b in zip(whole, as_files, strict=True))
    resumed = batches(cfg, processor)
    resumed.set_state(json.loads(states[1]))
    assert all(same(a, b) for a, b in zip(resumed, whole[2:], strict=True))
    halves = [list(batches(cfg, processor, rows=rows)) for rows in ([0], [1])]
    for left, right, batch in zip(*halves, whole, strict=True):
        both = np.concatenate([left["images"], right["images"]])
        np.testing.assert_array_equal(both, batch["images"])


@pytest.mark.slow  # processes that import TFDS
def test_processes_decode_what_lies_in_other_files(paths, processor):
    cfg = dataclasses.replace(config("unread"), paths=tuple(paths.values()), decoders=1)
    there = list(batches(cfg, processor))
    here = list(batches(dataclasses.replace(cfg, decoders=0), processor))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_questions_are_asked_behind_their_picture(tmp_path, layout):
    source = open_source(LAYOUTS[layout](tmp_path, QUESTIONS))
    document = source[5]
    _, text = document.messages[0]["content"]
    assert text == {"type": "text", "text": "ab"}
    assert document.messages[1] == {"role": "assistant", "content": "cd"}
    assert shades(document) == [50]
    assert len(json.dumps(document.messages)) < 300
    assert len(pickle.dumps(refs_of(document))) < 300
    assert len(source) == 8


def test_a_document_names_where_its_image_lies(paths):
    names = {layout: open_source(path)[6].messages[0]["content"][0]["image"]
             for layout, path in paths.items()}  # fmt: skip
    size = len(png(60))
    assert names == {
        "files": "60.png",
        "tars": {"archive": "shard-1.tar", "name": "60.png", "offset": 4608, "size": size},
        "parquet": {"table": "a.parquet", "row": 6, "column": "image", "name": "60.png"},
        "bytes": {"table": "b.parquet", "row": 6, "column": "image"},
        "tfds": {"split": "train", "record": 6, "feature": "image"},
    }


def test_members_of_one_stem_are_one_sample_however_they_lie(tmp_path):
    said = [
        {"role": "user", "content": [{"type": "image", "image": "1.jpg"}, "b"]},
        {"role": "user", "content": [{"type": "image", "image": "x/chat.0.jpg"}]},
    ]
    said[0]["content"][1] = {"type": "text", "text": "b"}
    members = [
        ("__notes__.txt", "x"),
        ("x/b.png", png(20)),
        ("x/a.txt", "of a\n"),
        ("x/chat.json", json.dumps({"messages": said})),
        ("x/b.cls", "1"),
        ("x/a.JPG", png(10)),
        ("x/chat.0.jpg", png(30)),
        ("x/chat.1.jpg", png(40)),
        ("both.json", json.dumps({"conversations": [{"from": "human", "value": "<image>z"}]})),
        ("both.png", png(50)),
        ("readme", "no sample"),
    ]
    write_tar(tmp_path / "train/s.tar", members)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    source = open_source(tmp_path / "train")
    names = [source.name(i).rpartition(": ")[2] for i in range(len(source))]
    assert names == ["x/b", "x/a", "x/chat", "both"]
    assert [shades(source[i]) for i in range(4)] == [[20], [10], [40, 30], [50]]
    assert source[0].captions == ("dog",)
    assert source[1].captions == ("of a",)
    assert source[1].messages[1]["content"] == "of a"


def test_a_suffix_or_column_can_be_named(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.seg", png(5)), ("1.png", png(9)), ("1.txt", "t")])
    assert shades(open_source(tmp_path / "a.tar", SourceOptions(image="seg"))[0]) == [5]
    columns = {"photo": [png(7)], "title": ["t"], "image": [png(9)]}
    write_parquet(tmp_path / "a.parquet", columns)
    document = open_source(
        tmp_path / "a.parquet", SourceOptions(image="photo", field="title")
    )[0]  # fmt: skip
    assert shades(document) == [7]
    assert document.captions == ("t",)
    (tmp_path / "a.jsonl").write_text('{"file": "7.png", "q": "b", "a": "c"}\n')
    document = open_source(tmp_path / "a.jsonl", SourceOptions(image="file", field="q,a"))[0]
    assert [ref.name for ref in refs_of(document)] == ["7.png"]
    assert document.messages[1]["content"] == "c"


def test_a_new_shard_keeps_the_sides_of_its_documents(tmp_path):
    of_tars(tmp_path, CAPTIONS)
    before = {digest(d) for d in open_source(str(tmp_path / "*.tar"))}
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    of_tars(tmp_path, CAPTIONS[::-1])
    assert {digest(d) for d in open_source(str(tmp_path / "*.tar"))} == before
    assert len(before) == 8


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def lead_back(path):
    """With a header whose size is negative, so that the next one would be before it."""
    header = tarfile.TarInfo("3.png")
    header.size = -2048
    data = path.read_bytes()
    path.write_bytes(data[:4096] + header.tobuf(tarfile.GNU_FORMAT) + data[4096:])


SAMPLE = (("1.png", png(10)), ("1.txt", "t"), ("2.png", png(20)), ("2.txt", "u"))
BROKEN_TARS = {
    "cut in a member": (lambda p: cut(p, 520), r"read, from 1.png on \(it is cut short\)"),
    "cut in a later one": (lambda p: cut(p, 2048 + 530), r"from 2.png on \(.*copy it again"),
    "cut behind one": (lambda p: cut(p, 2048), r"s.tar: is cut short behind 1.txt, without an end"),
    "backwards": (lead_back, r"a header leads backwards|no tar that can be read"),
    "empty": (lambda p: cut(p, 0), "no tar that can be read, from its start on"),
    "a header": (
        lambda p: p.write_bytes(p.read_bytes()[:1100] + b"!" + p.read_bytes()[1101:]),
        "a header is broken behind 1.png; copy it again",
    ),
    "two tars": (lambda p: p.write_bytes(p.read_bytes() * 2), "more follows its end, behind 2.txt"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(600)), "is compressed.*gunzip it"),
    "twice": (lambda p: write_tar(p, [*SAMPLE, SAMPLE[0]]), "holds 1.png twice; write each sample"),
    "no sample": (lambda p: write_tar(p, [("a", "b")]), "there is no document in it"),
}  # fmt: skip


@pytest.mark.parametrize(("break_it", "words"), BROKEN_TARS.values(), ids=BROKEN_TARS)
def test_a_broken_tar_is_told_of_in_one_line(tmp_path, break_it, words):
    path = write_tar(tmp_path / "s.tar", SAMPLE)
    assert len(open_source(path)) == 2
    break_it(path)
    with pytest.raises(ValueError, match=words) as error:
        open_source(path)
    assert "s.tar" in str(error.value)
    assert "\n" not in str(error.value)


def asked_of(image):
    return [{"role": "user", "content": [{"type": "image", "image": image}]}]


BROKEN_SAMPLES = {
    "no caption": ([("2.png", png(9))], r"s.tar: 2: an image has 'caption', .* has 'image'"),
    "no words": ([("2.png", png(9)), ("2.txt", " \n")], "s.tar: 2: 'text' is missing"),
    "no utf-8": ([("2.png", png(9)), ("2.txt", b"a\xff")], r"s.tar: 2.txt: byte 2 is no UTF-8"),
    "no json": ([("2.png", png(9)), ("2.json", "{")], r"s.tar: 2.json: no JSON \(Expecting"),
    "a list": ([("2.png", png(9)), ("2.json", "[]")], "s.tar: 2.json: is no JSON object"),
    "no such class": ([("2.png", png(9)), ("2.cls", "2")], "s.tar: 2: class 2 is none of the 2 in"),
    "other names": (
        [
            ("2.png", png(9)),
            ("2.json", json.dumps({"messages": asked_of("x")})),
        ],
        "s.tar: 2: names image 'x'; it has 2.png",
    ),
    "no picture": ([("2.png", b"GIF?"), ("2.txt", "a")], r"tar: 2: .*tar: 2.png: .* no picture"),
    "half a picture": (
        [("2.png", png(9)[:45]), ("2.txt", "a")],
        "^[^ ]*s.tar: 2.png: cannot be decoded",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("members", "words"), BROKEN_SAMPLES.values(), ids=BROKEN_SAMPLES)
def test_a_broken_sample_is_named_with_its_member(tmp_path, processor, members, words):
    path = write_tar(tmp_path / "s.tar", [*SAMPLE[:2], *members])
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=words) as error:
        list(batches(config(str(path)), processor))
    assert "\n" not in str(error.value)


def test_only_the_group_of_a_row_is_read(tmp_path, monkeypatch):
    images = [{"bytes": png(i, (40, 40)), "path": None} for i in range(20)]
    path = write_parquet(tmp_path / "a.parquet", {"image": images, "text": list("abcdefghij" * 2)})
    source = open_source(path)
    assert source._tables[0].rows.nbytes < 20 * 20
    reads = []
    read = pyarrow.parquet.ParquetFile.read_row_group

    def counted(file, group, columns):
        reads.append((group, columns))
        return read(file, group, columns=columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    assert [shades(source[i]) for i in (7, 6, 13, 7)] == [[7], [6], [13], [7]]
    assert reads == [(3, ["image"]), (6, ["image"])]
    monkeypatch.setattr(row_groups, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"a.parquet: a group of rows holds .* row_group_size=100"):
        shades(source[19])


@pytest.mark.parametrize("as_struct", [True, False], ids=["structs", "bytes"])
def test_a_row_has_a_list_of_pictures(tmp_path, as_struct):
    def wrap(shade):
        return {"bytes": png(shade), "path": f"{shade}.png"} if as_struct else png(shade)

    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    kind = pyarrow.list_(kind if as_struct else pyarrow.binary())
    images = [[wrap(1), wrap(2)], [wrap(3)], [wrap(4), wrap(5)]]
    said = {"role": "user", "content": "<image>a<image>"}
    talks = [[said], [said | {"content": "<image>"}], [said]]
    table = pyarrow.table({"images": pyarrow.array(images, kind), "messages": talks})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = open_source(tmp_path / "a.parquet")
    assert [shades(source[i]) for i in range(3)] == [[1, 2], [3], [4, 5]]
    assert dict(source[0].fields) == {}


def test_a_path_in_a_table_is_a_file_beside_it(tmp_path):
    (tmp_path / "9.png").write_bytes(png(9))
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    image = pyarrow.array([{"bytes": None, "path": "9.png"}, {"path": "../9.png"}], kind)
    pyarrow.parquet.write_table(
        pyarrow.table({"image": image, "caption": ["a", "b"]}), tmp_path / "a.parquet"
    )
    write_parquet(tmp_path / "b.parquet", {"image": ["9.png"], "caption": ["a"]})
    source = open_source(tmp_path / "a.parquet")
    assert shades(source[0]) == shades(open_source(tmp_path / "b.parquet")[0]) == [9]
    with pytest.raises(ValueError, match="does not lie beside the data file"):
        shades(source[1])
    (tmp_path / "c.csv").write_text("image,caption\n9.png,a\n")
    assert shades(open_source(tmp_path / "c.csv")[0]) == [9]


BROKEN_TABLES = {
    "no image": ({"question": ["a"], "answer": ["b"]}, {}, "columns question, answer; name one by"),
    "none told": ({"text": ["a"]}, {"format": "caption"}, "columns text, and none is an image"),
    "another": ({"text": ["a"]}, {"image": "photo"}, "data.source.image=photo is none of them"),
    "null": ({"image": [png(1), None], "text": ["a", "b"]}, {}, "row 2: .*2: image: there is no"),
    "no picture": ({"image": [png(1), b"?"], "text": ["a", "b"]}, {}, "row 2: .*2: image: begins"),
    "half": ({"image": [png(1)[:45]], "text": ["a"]}, {}, "row 1: image: cannot be decoded"),
    "no caption": ({"image": [png(1)], "text": [""]}, {}, "a.parquet:row 1: 'text' is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "options", "words"), BROKEN_TABLES.values(), ids=BROKEN_TABLES)
def test_a_broken_row_is_named(tmp_path, processor, columns, options, words):
    path = write_parquet(tmp_path / "a.parquet", columns)
    source = SourceOptions(image=options.get("image"))
    cfg = config(str(path), source=source, format=options.get("format", "auto"))
    with pytest.raises(ValueError, match=words) as error:
        list(batches(cfg, processor))
    assert "a.parquet" in str(error.value)
    assert "\n" not in str(error.value)


def test_records_of_tfds_name_classes_and_have_lists(tmp_path):
    features = {
        "images": tfds.features.Sequence(tfds.features.Image()),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    records = [
        {"images": [io.BytesIO(png(i)), io.BytesIO(png(i + 100))], "label": label}
        for i, label in enumerate([1, 0, -1])
    ]
    source = open_source(prepare(tmp_path, features, records))
    assert shades(source[1]) == [1, 101]
    assert [source[i].captions for i in (0, 1)] == [("dog",), ("cat",)]
    with pytest.raises(ValueError, match=r"1.0.0:train 3: an image has 'caption'"):
        source[2]
    captions = tfds.features.Sequence({"text": tfds.features.Text()})
    features = {"image": tfds.features.Image(), "captions": captions}
    record = {"image": io.BytesIO(png(3)), "captions": [{"text": "a"}, {"text": "b"}]}
    source = open_source(prepare(tmp_path / "coco", features, [record]))
    assert source[0].captions == ("a", "b")
    assert shades(source[0]) == [3]


def test_a_shard_that_shrinks_under_a_run_is_told_of(tmp_path):
    path = write_tar(tmp_path / "s.tar", SAMPLE)
    (ref,) = refs_of(open_source(path)[1])
    cut(path, ref.offset + 9)
    with pytest.raises(ValueError, match=r"s.tar: 2.png: the archive has become shorter"):
        ref.content()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"s.tar"):
        ref.content()


BROKEN_REFS = {
    "outside": ({"archive": "../a.tar", "name": "a", "offset": 0, "size": 1}, "not lie beside"),
    "negative": ({"archive": "a.tar", "name": "a", "offset": -1, "size": 1}, "'offset' -1; give"),
    "no name": ({"archive": "a.tar", "offset": 0, "size": 1}, "'name' None; give a string"),
    "row": ({"table": "a.parquet", "row": True, "column": "c"}, "'row' True; give a number"),
    "item": ({"record": 0, "feature": "a", "split": "b", "item": "0"}, "'item' '0'; give a"),
    "empty": ({}, "an image part names no file"),
}  # fmt: skip


@pytest.mark.parametrize(("value", "words"), BROKEN_REFS.values(), ids=BROKEN_REFS)
def test_a_place_that_is_none_is_refused(value, words):
    with pytest.raises(ValueError, match=words):
        read_ref(value, "")


def mutations(data, count):
    """Copies with a few bytes changed, cut or put in."""
    rng = random.Random(0)
    for _ in range(count):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(broken))
            kind = rng.randrange(4)
            if kind == 0:
                broken[at] = rng.randrange(256)
            elif kind == 1:
                del broken[at : at + rng.randint(1, 600)]
            elif kind == 2:
                broken[at:at] = rng.randbytes(rng.randint(1, 600))
            else:
                broken[at : at + 8] = rng.choice([b"\0", b"\xff", b"7"]) * 8
            broken = broken or bytearray(b"\0")
        yield bytes(broken)


@pytest.mark.parametrize("count", cases([150, 5000], fast=[150], slow=[5000]))
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_mutated_files_are_read_or_refused_in_one_line(tmp_path, kind, count):
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        write_tar(path, [*SAMPLE, ("3.json", '{"text": "a"}'), ("é" * 120 + ".txt", "long")])
    else:
        write_parquet(path, {"image": [{"bytes": png(i), "path": "a"} for i in range(4)],
                             "text": ["a", "b", "c", "d"]})  # fmt: skip
    whole, refused = path.read_bytes(), 0
    for broken in mutations(whole, count):
        path.write_bytes(broken)
        source, words = tried(open_source, path)
        refused += source is None
        for i in range(0 if source is None else min(len(source), 9)):
            refs, more = tried(lambda source, i: refs_of(source[i]), source, i)
            words += more + "".join(tried(ref.content)[1] for ref in refs or ())
        assert "\n" not in words
    assert refused > count / 4


def tried(read, *args):
    """(what it gives or None, what it complains of)."""
    try:
        return read(*args), ""
    except (FileNotFoundError, ValueError) as error:
        return None, str(error)
