"""Pairs of images and captions: which caption and which part of a picture a row has, and that it is
the same one wherever the reading goes on and however many processes there are."""

import functools
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from llmprep_jax.data import DataConfig
from llmprep_jax.data.pairs import HeldOutPairs, Pairing, build_pairs
from llmprep_jax.vision import ImageProcessor
from llmprep_jax.vision.views import View, draw_view

SIDE, LENGTH = 8, 6
IMAGES = ImageProcessor.from_fields(
    {"size": {"height": SIDE, "width": SIDE}, "resample": 0}, "siglip"
)


def encode(texts):
    """The number that a text ends in, and ones."""
    return np.array([[int(text.split()[-1])] + [1] * (LENGTH - 1) for text in texts], np.int32)


PAIRING = Pairing(encode, IMAGES)


def write(folder, shades, name="data", captions=2):
    """Pictures that are darker at the left, with captions that end in their shade and number."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for shade in shades:
        picture = np.full((12, 16, 3), shade, np.uint8)
        picture[:, :8] //= 2
        Image.fromarray(picture).save(folder / f"images/{shade}.png")
        texts = [f"shade {shade * 10 + n}" for n in range(captions)]
        lines.append(json.dumps({"image": f"images/{shade}.png", "captions": texts}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines))
    return str(folder / f"{name}.jsonl")


def pairs(path, **settings):
    paths = (path,) if isinstance(path, str) else path
    rows = settings.pop("rows", None)
    cfg = DataConfig(paths=paths, **{"batch_size": 4, "prefetch": 0, **settings})
    return build_pairs(cfg, PAIRING, rows=rows)


def shades_of(batch):
    return batch["images"].max(axis=(1, 2, 3, 4)).tolist()


def test_each_row_is_an_image_and_one_of_its_captions(tmp_path):
    path = write(tmp_path, range(100, 110))
    batches = list(pairs(path, num_epochs=20))
    assert len(batches) == 50  # across epochs: 200 pairs, four a batch
    numbers = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert (numbers // 10).tolist() == [shade for batch in batches for shade in shades_of(batch)]
    drawn = {shade: {int(n) % 10 for n in numbers if n // 10 == shade} for shade in range(100, 110)}
    assert drawn == {shade: {0, 1} for shade in range(100, 110)}
    assert 70 < (numbers % 10).sum() < 130
    assert batches[0]["images"].shape == (4, 1, SIDE, SIDE, 3)
    assert list(batches[0]) == ["tokens", "images", "image_mask", "doc_ids"]


def test_what_does_not_fill_a_batch_is_left_out(tmp_path):
    path = write(tmp_path, range(100, 110), captions=1)
    batches = pairs(path, num_epochs=1)
    assert [len(batch["tokens"]) for batch in batches] == [4, 4]
    with pytest.raises(ValueError, match=r"there are 10 pairs, fewer than data.batch_size=11"):
        pairs(path, num_epochs=1, batch_size=11)


VIEWS = dict(random_crop=(0.3, 0.9), random_flip=True)


def test_reading_goes_on_with_the_same_captions_and_parts_of_pictures(tmp_path):
    path = write(tmp_path, range(100, 110))
    whole = pairs(path, **VIEWS)
    expected = [next(whole) for _ in range(6)]
    begun = pairs(path, **VIEWS)
    for _ in range(3):
        next(begun)
    resumed = pairs(path, **VIEWS)
    resumed.set_state(json.loads(json.dumps(begun.get_state())))
    for wanted in expected[3:]:
        got = next(resumed)
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    assert resumed.report()["yielded"]["targets"] == 24
    with pytest.raises(ValueError, match="random_flip was True and is False"):
        pairs(path, random_crop=(0.3, 0.9)).set_state(begun.get_state())


def test_processes_have_parts_of_the_batch_that_one_would_have(tmp_path):
    path = write(tmp_path, range(100, 110))
    whole, first, second = (pairs(path, rows=rows, **VIEWS) for rows in (None, [0, 1], [2, 3]))
    for _ in range(2):
        wanted, *parts = next(whole), next(first), next(second)
        for name in ("tokens", "images"):
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, wanted[name])
        assert all(np.array_equal(part["doc_ids"], wanted["doc_ids"]) for part in parts)


def test_sources_are_mixed_by_the_shares_of_their_rows(tmp_path):
    paths = write(tmp_path, range(100, 104), "a"), write(tmp_path, range(200, 240), "b")
    batches = pairs(paths, weights=(3.0, 1.0), seed=1)
    shades = np.array([shade for _ in range(10) for shade in shades_of(next(batches))])
    assert (shades < 150).mean() == pytest.approx(0.75, abs=0.01)


def test_a_view_is_a_share_of_the_area_within_the_picture():
    rng, shares = np.random.default_rng(0), []
    for _ in range(300):
        view = draw_view(rng, (0.25, 0.5), True)
        left, top, right, bottom = view.box(400, 300)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        shares.append((right - left) * (bottom - top) / 120_000)
        assert 0.7 < (right - left) / (bottom - top) < 1.4
    assert 0.24 < min(shares) < 0.27
    assert 0.48 < max(shares) < 0.51
    assert draw_view(rng, None, False) is None


def test_a_mirrored_part_of_a_picture_is_just_that():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert View(0.5, 1.0, 1.0, 0.0, False).box(4, 3) == (2, 0, 4, 2)
    part = View(0.5, 1.0, 1.0, 0.0, True).of(image)
    assert np.asarray(part).tolist() == [[3, 2], [7, 6]]
    assert np.asarray(View(1.0, 1.3, 0.2, 0.2, False).of(image)).shape == (3, 4)


def held(path, **settings):
    cfg = DataConfig(paths=(path,), batch_size=4, holdout=0.0)
    of_rows = functools.partial(HeldOutPairs, cfg, PAIRING, "all")
    shards = settings.get("shards", 1)
    return of_rows(shards, lambda n: list(range(n)), settings.get("most"))


def test_held_out_pairs_are_each_image_once_and_every_caption(tmp_path):
    pairs = held(write(tmp_path, range(100, 106), captions=3))
    batches = list(pairs)
    assert [shades_of(batch) for batch in batches] == [[100, 101, 102, 103], [104, 105, 100, 100]]
    firsts = [int(n) for batch in batches for n in batch["tokens"][:, 0]][: pairs.num_images]
    further = [int(n) for batch in pairs.further() for n in batch["tokens"][:, 0]][:12]
    assert firsts == [1000, 1010, 1020, 1030, 1040, 1050]
    assert further == [s * 10 + n for s in range(100, 106) for n in (1, 2)]
    assert pairs.owners.tolist() == [*range(6), *np.repeat(range(6), 2).tolist()]
    assert held(str(tmp_path / "data.jsonl"), most=1).num_images == 4


def test_fewer_pairs_than_a_batch_are_a_smaller_one(tmp_path):
    path = write(tmp_path, range(100, 103))
    assert (held(path).size, held(path, shards=2).size) == (3, 2)
    with pytest.raises(ValueError, match="3 pairs are held out, fewer than the 4 shards"):
        held(path, shards=4)


def test_pairs_in_a_tar_are_those_in_files(tmp_path):
    path = write(tmp_path, range(100, 104), captions=1)
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for line in (tmp_path / "data.jsonl").read_text().splitlines():
            record = json.loads(line)
            shard.add(tmp_path / record["image"], f"{record['image'][7:10]}.png")
            text = tarfile.TarInfo(f"{record['image'][7:10]}.txt")
            text.size = len(record["captions"][0])
            shard.addfile(text, io.BytesIO(record["captions"][0].encode()))
    of_files, of_tar = (next(pairs(str(p), shuffle=False)) for p in (path, tmp_path / "shard.tar"))
    assert all(np.array_equal(of_files[name], of_tar[name]) for name in ("tokens", "images"))


def test_what_is_no_pair_is_refused_by_its_line(tmp_path):
    path = write(tmp_path, range(100, 104))
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(ValueError, match=r"^\S+chat.jsonl:1: two towers are trained on images"):
        next(pairs(str(tmp_path / "chat.jsonl"), batch_size=1))
    (tmp_path / "images/102.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images/102.png[^\n]*$"):
        list(pairs(path, num_epochs=1))
    with pytest.raises(ValueError, match="random_crop are two shares"):
        pairs(path, random_crop=(0.5, 1.5))
