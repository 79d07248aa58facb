"""Conversations in which the assistant draws: what is learnt, and which prompts are dropped."""

import numpy as np
import pytest

from llmprep_jax.data import DataConfig, build
from llmprep_jax.text.image_text import ImageTextProcessor, replace_markers
from llmprep_jax.vision.kinds import Square
from tests.data.pictured import asked, draw, make_processor, write
from tests.models.seeing import EACH, IMAGE, SIDE

PAD, END, U, A = range(4)  # of the tokenizer


class Drawing(ImageTextProcessor):
    """As Janus': an image between what begins and ends it, and a sentence before what is said."""

    draws, pad_id = True, PAD

    def wrapped(self, pictures):
        return ["c<image>d"] * len(pictures)

    def opened(self, text):
        return "zz" + text, 2


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    plain = make_processor(tmp_path_factory.mktemp("processor"))
    return Drawing(plain.tokenizer, plain.images, "<image>")


def config(path, **fields):
    defaults = dict(seq_len=32, batch_size=1, num_epochs=1, shuffle=False, max_images=2, prefetch=0)
    return DataConfig(paths=(path,), **(defaults | fields))


def batches(cfg, processor, **settings):
    return list(build(cfg, **cfg.encoders(processor.tokenizer, processor), **settings))


def drawn(prompt: str, shade: int, before: str = "") -> list[dict]:
    """What a user asks for, and the assistant's picture."""
    image = {"type": "image", "image": f"images/{shade}.png"}
    parts = [{"type": "text", "text": before}, image] if before else [image]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": parts}]


def ids_of(processor, text: str) -> list[int]:
    return processor.tokenizer.encode(text)


@pytest.mark.parametrize("mask", ["answers", "all"])
def test_a_picture_of_the_assistants_is_drawn_right_behind_its_header(tmp_path, processor, mask):
    # the template writes what is before the picture, which here is spaces
    path = write(tmp_path, [drawn("ab", 10, before="  ")])
    (batch,) = batches(config(path, mask=mask), processor)
    a, b, c, d = (ids_of(processor, x)[0] for x in "abcd")
    ids = [U, a, b, END, A, c, *[IMAGE] * EACH, d, END]
    assert batch["tokens"][0, : len(ids) - 1].tolist() == ids[:-1]
    # neither its codes' places nor what begins and ends it are words to be learnt
    words = {"answers": [len(ids) - 1], "all": [1, 2, 3, 4, len(ids) - 1]}[mask]
    assert (np.flatnonzero(batch["loss_mask"][0]) + 1).tolist() == words
    assert batch["drawn"].tolist() == [[True, False]]
    assert batch["image_mask"].tolist() == [[True, False]]
    assert batch["images"][0, 0, 0, 0, 0] == 10


def test_a_picture_of_the_users_is_seen_and_the_sentence_comes_first(tmp_path, processor):
    path = write(tmp_path, [asked("a", 10)])
    (batch,) = batches(config(path), processor)
    a, b, c, d, z = (ids_of(processor, x)[0] for x in "abcdz")
    ids = [z, z, U, a, c, *[IMAGE] * EACH, d, END, A, a, b, END]
    assert batch["tokens"][0, : len(ids) - 1].tolist() == ids[:-1]
    learnt = np.flatnonzero(batch["loss_mask"][0]) + 1
    assert learnt.tolist() == [len(ids) - 3, len(ids) - 2, len(ids) - 1]
    assert batch["drawn"].tolist() == [[False, False]]


def test_a_picture_seen_and_one_drawn_are_told_apart_in_a_row(tmp_path, processor):
    both = [asked("a", 10)[0], {"role": "assistant", "content": drawn("", 20)[1]["content"]}]
    path = write(tmp_path, [both, drawn("b", 30)])
    (batch,) = batches(config(path, max_images=3, seq_len=48), processor)
    assert batch["drawn"].tolist() == [[False, True, True]]
    assert batch["images"][0, :, 0, 0, 0].tolist() == [10, 20, 30]


def test_codes_are_counted_among_the_targets(tmp_path, processor):
    path = write(tmp_path, [drawn("a", 10), drawn("b", 20)])
    cfg = config(path)
    data = build(cfg, **cfg.encoders(processor.tokenizer, processor))
    list(data)
    assert data.report()["targets"] == 2 * (EACH + 1)


def test_prompts_are_dropped_as_often_as_is_said_and_anew_in_each_epoch(tmp_path, processor):
    path = write(tmp_path, [drawn("ab", shade) for shade in range(0, 200, 10)])
    cfg = config(path, num_epochs=20, drop_prompts=0.25, packing="padded")
    dropped = np.array([batch["tokens"][0, 1] == PAD for batch in batches(cfg, processor)])
    assert 70 < dropped.sum() < 130  # 100 of 400
    by_epoch = dropped.reshape(20, 20)
    assert (by_epoch[0] != by_epoch[1]).any()
    np.testing.assert_array_equal(  # and alike whenever it is read
        dropped, [batch["tokens"][0, 1] == PAD for batch in batches(cfg, processor)]
    )
    (first, *_) = batches(config(path, drop_prompts=1.0, packing="padded", mask="all"), processor)
    c, d = (ids_of(processor, x)[0] for x in "cd")
    ids = [U, PAD, PAD, PAD, PAD, c, *[IMAGE] * EACH, d, END]
    assert first["tokens"][0, : len(ids) - 1].tolist() == ids[:-1]
    assert (np.flatnonzero(first["loss_mask"][0]) + 1).tolist() == [len(ids) - 1]


def test_prompts_of_pictures_that_are_seen_are_not_dropped(tmp_path, processor):
    path = write(tmp_path, [asked("a", 10)])
    (batch,) = batches(config(path, drop_prompts=1.0), processor)
    assert batch["tokens"][0, 3] == ids_of(processor, "a")[0]
    with pytest.raises(ValueError, match=r"drop_prompts must be in \[0, 1\], not 1.5"):
        config(path, drop_prompts=1.5)


def test_spaces_before_a_marker_go_with_it_where_it_is_joined():
    text, moved = replace_markers("A:  # b # c", "#", ["[x]", "[y]"], joined=(True, False))
    assert text == "A:[x] b [y] c"
    before, after = "A:  # b # c", "A:[x] b [y] c"
    for place in (*range(3), *range(5, 9), *range(9, 12)):
        same = before[place : place + 1] == after[moved(place) : moved(place) + 1]
        assert same or place in (2, 8), place
    assert (moved(2), moved(3), moved(4), moved(8)) == (2, 2, 2, 8)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_mean": [0.48, 0.45, 0.4]}, r"image_mean=\[0.48, 0.45, 0.4\] and image_std=\[0.5,"),
        ({"image_std": [0.5, 0.5, 0.27]}, r"image_std=\[0.5, 0.5, 0.27\] do not make"),
        ({"do_rescale": False}, "do_rescale and do_normalize to true"),
        ({"do_normalize": False}, r"image_mean=\[0.0, 0.0, 0.0\]"),
    ],
)
def test_pictures_are_drawn_of_the_values_that_codes_are_of(tmp_path, processor, fields, words):
    images = Square({"size": {"height": SIDE, "width": SIDE}, **fields}, tokens=EACH)
    other = Drawing(processor.tokenizer, images, "<image>")
    path = write(tmp_path, [drawn("a", 10)])
    with pytest.raises(ValueError, match=rf"^\S+data.jsonl:1: [^\n]*{words}[^\n]*$"):
        batches(config(path), other)
    assert batches(config(write(tmp_path, [asked("a", 10)])), other)  # seen, they may have others


def test_a_file_of_no_picture_is_named(tmp_path, processor):
    path = write(tmp_path, [drawn("a", 10)])
    (tmp_path / "images/10.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="10.png"):
        batches(config(path), processor)
    draw(tmp_path / "images/10.png", 10, (SIDE, SIDE))
