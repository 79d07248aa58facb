"""Documents with images: what tokens they are, that nothing cuts them, and their rows' pictures."""

import dataclasses
import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from llmprep_jax.data import DataConfig, build, open_source
from llmprep_jax.data.documents import digest
from llmprep_jax.data.encoding import Encoder, Piece
from llmprep_jax.data.images import Ref, Run
from llmprep_jax.data.packing import fit_together
from llmprep_jax.text.image_text import ImageTextProcessor
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.vision.kinds import PanAndScan
from tests.data.corpora import same
from tests.data.pictured import asked, draw, make_processor, write
from tests.grids import cases
from tests.models import seeing
from tests.models.seeing import EACH, IMAGE, SIDE


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"))


def config(path, **fields):
    defaults = dict(seq_len=32, batch_size=2, num_epochs=1, shuffle=False, max_images=4, prefetch=0)
    return DataConfig(paths=(path,), **(defaults | fields))


def batches(cfg, processor, **settings):
    return build(cfg, **cfg.encoders(processor.tokenizer, processor), **settings)


def encoder_of(processor, **fields):
    cfg = config("unread", **fields)
    keys = cfg.encoders(processor.tokenizer, processor)
    names = ("encode", "encode_chat", "eos_id", "images")
    return Encoder(
        **{name: keys[name] for name in names},
        seq_len=cfg.seq_len,
        overlong=cfg.overlong,
        answers_only=cfg.mask == "answers",
    )


@pytest.mark.parametrize("mask", ["answers", "all"])
def test_an_image_is_its_tokens_and_none_of_them_is_a_target(tmp_path, processor, mask):
    path = write(tmp_path, [asked("a", 10, "b", 20, "c")])
    (batch,) = batches(config(path, mask=mask, batch_size=1), processor)
    a, b, c = (processor.tokenizer.encode(x)[0] for x in "abc")
    U, A, end, run = 2, 3, 1, [IMAGE] * EACH
    ids = [U, a, *run, b, *run, c, end, A, a, b, end]
    assert batch["tokens"][0].tolist() == ids[:-1] + [0] * (33 - len(ids))
    expected = [t != IMAGE if mask == "all" else i > 13 for i, t in enumerate(ids)][1:]
    assert batch["loss_mask"][0].tolist() == expected + [False] * (33 - len(ids))
    assert batch["images"].dtype == np.uint8
    assert batch["images"].shape == (1, 4, SIDE, SIDE, 3)
    assert batch["images"][0, :, 0, 0, 0].tolist() == [10, 20, 0, 0]
    assert batch["image_mask"].tolist() == [[True, True, False, False]]


class Wrapping(ImageTextProcessor):
    """As Gemma 3's: an image's token stands between words."""

    def wrapped(self, pictures):
        return ["cc<image>d"] * len(pictures)


def test_what_is_written_around_images_moves_answers_with_it(tmp_path, processor):
    path = write(tmp_path, [asked("a", 10, "b", 20)])
    wrapping = Wrapping(processor.tokenizer, processor.images, "<image>")
    (batch,) = batches(config(path, batch_size=1), wrapping)
    a, b, c, d = (processor.tokenizer.encode(x)[0] for x in "abcd")
    U, A, end, image = 2, 3, 1, [c, c, *[IMAGE] * EACH, d]
    ids = [U, a, *image, b, *image, end, A, a, b, end]
    assert batch["tokens"][0].tolist() == ids[:-1] + [0] * (33 - len(ids))
    answer = len(ids) - 3
    expected = [i >= answer for i in range(1, len(ids))]
    assert batch["loss_mask"][0].tolist() == expected + [False] * (33 - len(ids))


def test_images_in_pieces_that_lie_apart_are_refused(tmp_path, processor):
    path = write(tmp_path, [asked("a", 10)])
    draw(tmp_path / "images/10.png", 10, (60, 20))
    scans = PanAndScan(
        {
            "size": {"height": SIDE, "width": SIDE},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 4,
        },
        tokens=EACH,
    )
    with pytest.raises(ValueError, match="do_pan_and_scan cuts an image into pieces"):
        list(batches(config(path, batch_size=1), Wrapping(processor.tokenizer, scans, "<image>")))


@pytest.mark.parametrize("policy", ["truncate", "split"])
def test_at_every_length_an_image_is_whole_or_left_out(tmp_path, processor, policy):
    (document,) = open_source(write(tmp_path, [asked("abc", 10, "d", 20, 30, "e", 40)]))
    with pytest.raises(ValueError, match=r"image images/10.png is 4 tokens of 1 pictures.*holds 3"):
        encoder_of(processor, seq_len=3, overlong=policy)((0, document))
    for length in range(EACH, 30):
        encoder = encoder_of(processor, seq_len=length, overlong=policy, max_images=3, mask="all")
        encoded, kept = encoder((0, document)), 0
        for piece in encoder._fit(document, _whole(encoder, document), {}):
            assert len(piece) <= length
            marked = np.zeros(len(piece), bool)
            for run in piece.runs:
                marked[run.start : run.stop] = True
            np.testing.assert_array_equal(piece.tokens == IMAGE, marked)
            assert len(piece.runs) <= 3
            kept += len(piece.runs)
        assert encoded.images_lost == 4 - kept
        assert kept == 4 or policy == "truncate"


def _whole(encoder, document):
    ids, counts, runs = encoder.tokenize(document)
    return Piece(0, ids[:-1], ids[1:], counts[1:], runs=runs)


def piece(size, pictures):
    ids = np.zeros(size + 1, np.int32)
    run = Run(0, 1, pictures, Ref("", "a.png"), 1)
    return Piece(0, ids[:-1], ids[1:], np.ones(size, bool), runs=(run,) if pictures else ())


def test_a_row_has_room_for_so_many_pictures():
    pieces = [piece(5, 2), piece(3, 2), piece(2, 1), piece(3, 0)]
    for most, expected in {3: [[2, 0], [2, 1]], 4: [[2, 2], [1, 0]]}.items():
        rows = fit_together(pieces, 8, most)
        assert [[p.pictures for p in row] for row in rows] == expected


def talks(count):
    rng = np.random.default_rng(0)
    images = [[10 * int(i) for i in rng.integers(0, 25, rng.integers(0, 3))] for _ in range(count)]
    return [asked("what is"[: i % 7], *own, "now") for i, own in enumerate(images)]


def test_packed_rows_have_the_loss_of_rows_of_their_own(tmp_path, processor):
    path, model = write(tmp_path, talks(12)), seeing.seeing("llama-tied-9-3-heads")
    loss = jax.jit(lambda batch: next_token_loss(model, batch, pixels=processor.images.pixels))
    sums = {}
    for packing in ("packed", "padded"):
        found = list(batches(config(path, packing=packing, seq_len=48, max_images=6), processor))
        placed = [jax.tree.map(lambda x: x[0], place_batch(batch)) for batch in found]
        sums[packing] = np.sum([loss(batch)[:2] for batch in placed], axis=0)
    assert len(placed) == 6
    np.testing.assert_allclose(sums["packed"], sums["padded"], rtol=1e-5)
    assert loss._cache_size() == 1
    swapped = placed[0] | {"images": placed[0]["images"][::-1]}
    assert abs(loss(swapped).total - loss(placed[0]).total) > 1e-3


@pytest.mark.parametrize(
    "fields",
    [{}, pytest.param({"threads": 2, "prefetch": 2, "decoders": 2}, marks=pytest.mark.slow)],
    ids=["alone", "processes"],
)
def test_a_stream_with_images_goes_on_bit_by_bit(tmp_path, processor, fields):
    cfg = config(write(tmp_path, talks(20)), shuffle=True, pack_window=2, num_epochs=2, **fields)
    whole, states = [], []
    stream = batches(cfg, processor)
    for batch in stream:
        whole.append(batch)
        states.append(json.dumps(stream.get_state()))
    assert len(whole) > 6
    cfg = dataclasses.replace(cfg, decoders=0)
    resumed = batches(cfg, processor)
    resumed.set_state(json.loads(states[3]))
    assert all(same(a, b) for a, b in zip(resumed, whole[4:], strict=True))
    halves = [list(batches(cfg, processor, rows=rows)) for rows in ([0], [1])]
    for left, right, batch in zip(*halves, whole, strict=True):
        for name in ("tokens", "images", "image_mask"):
            np.testing.assert_array_equal(np.concatenate([left[name], right[name]]), batch[name])


def test_ten_counts_of_tiles_are_one_shape_and_what_prompts_are_given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiled")
    processor = make_processor(folder, is_tiled=True)
    sizes = [(SIDE * w, SIDE) for w in range(1, 10)] + [(SIDE * 2, SIDE * 2)]
    for i, size in enumerate(sizes):
        draw(folder / f"images/{i}.png", 20 * i, size)
    path = write(folder, [*[asked(i, "a") for i in range(10)], asked(1, 9, "a")], shades=())
    cfg = config(path, max_images=10, seq_len=100, batch_size=1, packing="padded")
    found = list(batches(cfg, processor))
    assert len({tuple((k, x.shape, x.dtype) for k, x in batch.items()) for batch in found}) == 1
    counts = [int(batch["image_mask"].sum()) for batch in found]
    assert counts == [2, 3, 4, 5, 6, 7, 8, 9, 10, 5, 3 + 5]
    assert found[9]["grids"][0, :2].tolist() == [[2, 2], [0, 0]]
    both = processor.images([folder / f"images/{i}.png" for i in (1, 9)])
    np.testing.assert_array_equal(found[10]["images"][0, :8], both.values)
    assert found[10]["grids"][0, :3].tolist() == [[2, 1], [2, 2], [0, 0]]
    for i in (3, 9):
        pixels = processor.images(folder / f"images/{i}.png")
        np.testing.assert_array_equal(found[i]["images"][0, : counts[i]], pixels.values)
        tokens = processor.images.count(*sizes[i])
        assert (found[i]["tokens"] == IMAGE).sum() == tokens


def test_a_moved_folder_keeps_its_sides(tmp_path):
    (tmp_path / "a").mkdir()
    path = write(tmp_path / "a", talks(5))
    before = [digest(open_source(path)[i]) for i in range(5)]
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = open_source(tmp_path / "b/data.jsonl")
    assert [digest(moved[i]) for i in range(5)] == before
    assert len(set(before)) == 5


def test_llavas_records_name_images_beside_their_texts(tmp_path, processor):
    said = [{"from": "human", "value": "<image>\nab"}, {"from": "gpt", "value": "c"}]
    records = [{"id": "1", "image": "images/50.png", "conversations": said}]
    write(tmp_path, [])
    (tmp_path / "data.json").write_text(json.dumps(records))
    (document,) = open_source(tmp_path / "data.json")
    assert document.messages[0]["content"] == [
        {"type": "image", "image": "images/50.png"},
        {"type": "text", "text": "ab"},
    ]
    assert dict(document.fields) == {"id": "1"}
    with pytest.warns(UserWarning, match="the records hold id"):
        (batch,) = batches(config(str(tmp_path / "data.json")), processor)
    assert batch["images"][0, 0, 0, 0].tolist() == [50, 50, 50]


BROKEN = {
    "absent": (asked(777, "a"), "images/777.png: no such file"),
    "no picture": (asked(1, "a"), r"images/1.png: begins with b'no pictu', no picture"),
    "outside": (
        [{"role": "user", "content": [{"type": "image", "image": "../x.png"}]}, *asked("a")[1:]],
        "does not lie beside the data file",
    ),
    "bare": (
        [{"role": "user", "content": [{"type": "image"}]}, *asked("a")[1:]],
        "an image part names no file",
    ),
    "too wide": (asked(*[10] * 5, "a"), "takes|holds 32 and 4|5 pictures"),
}


@pytest.mark.parametrize(("messages", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_images_are_told_of_in_one_line_with_their_document(
    tmp_path, processor, messages, words
):
    path = write(tmp_path, [asked("a"), messages])
    (tmp_path / "images/1.png").write_text("no picture")
    with pytest.raises(ValueError, match=words) as error:
        list(batches(config(path, overlong="error"), processor))
    assert "data.jsonl:2: " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("decoders", cases([0, 1], fast=[0], slow=[1]))
def test_a_picture_that_breaks_behind_its_header_names_its_file(tmp_path, processor, decoders):
    path = write(tmp_path, [asked(10, "a")])
    file = tmp_path / "images/10.png"
    file.write_bytes(file.read_bytes()[:45])
    with pytest.raises(ValueError, match=r"images/10.png: cannot be decoded") as error:
        list(batches(config(path, decoders=decoders), processor))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reason", ["stream", "text"])
def test_images_need_rows_that_keep_them_and_a_model_that_sees(tmp_path, processor, reason):
    path = write(tmp_path, [asked(10, "a")])
    cfg = config(path, packing="stream" if reason == "stream" else "packed")
    keys = cfg.encoders(processor.tokenizer, processor if reason == "stream" else None)
    with pytest.raises(ValueError, match="the conversation has images, for a model that sees"):
        list(itertools.islice(build(cfg, **keys), 1))
