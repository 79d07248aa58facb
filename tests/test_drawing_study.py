"""The parts of the study of a model that draws: its gallery, its autoencoder, its pictures."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from experiments import drawing_study
from experiments.drawing import autoencoder, report
from experiments.drawing.drawer import SIDE, make_drawer
from experiments.drawing.gallery import CHOICES, LENGTH, write_gallery


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    return write_gallery(tmp_path_factory.mktemp("drawing"))


def test_held_out_pictures_are_of_kinds_that_are_learnt_two_by_two(gallery):
    learnt, held_out = (gallery.numbers(held_out=held) for held in (False, True))
    assert (len(learnt), len(held_out)) == (96, 24)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs = {(gallery.kinds[i][a], gallery.kinds[i][b]) for i in learnt}
        assert len(pairs) == len(CHOICES[a]) * len(CHOICES[b])
    lines = (gallery.folder / "train.jsonl").read_text().splitlines()
    images = {json.loads(line)["messages"][1]["content"][0]["image"] for line in lines}
    assert (len(lines), len(images)) == (192, 96)
    assert not images & {f"images/{i:03}.png" for i in held_out}


def test_places_are_whole_codes_apart(gallery):
    numbers = {kinds: i for i, kinds in enumerate(gallery.kinds)}
    left, right = (
        gallery.pictures[numbers["circle", "red", f"at the top {side}"]]
        for side in ("left", "right")
    )
    np.testing.assert_array_equal(np.roll(left, SIDE // 2, axis=1), right)


def test_rows_hold_the_longest_caption_and_its_picture(gallery):
    texts = [gallery.caption(i) for i in range(len(gallery.kinds))]
    prompts = gallery.processor.for_drawing(texts)["tokens"]
    model = jax.eval_shape(lambda: make_drawer(gallery.processor, 0))
    # an end of the image and of the turn, of which the last is only a target
    assert prompts.shape[1] + model.tokens_per_image + 2 - 1 <= LENGTH
    (unknown,) = gallery.processor.tokenizer.encode("<unk>", add_special=False)
    assert unknown not in prompts


def test_what_is_drawn_is_told_by_its_nearest_picture(gallery):
    numbers = gallery.numbers(held_out=True)
    noisy = gallery.pictures[numbers].astype(int) + np.arange(SIDE)[:, None, None]
    found = gallery.nearest(np.clip(noisy, 0, 255).astype(np.uint8))
    assert found == numbers
    assert set(gallery.score(numbers, found).values()) == {1.0}
    shifted = [(i + 1) % len(gallery.kinds) for i in numbers]  # the next place
    score = gallery.score(numbers, shifted)
    assert (score["all"], score["place"]) == (0.0, 0.0)
    assert score["shape"] > score["colour"] > 0.5


def test_vectors_that_are_spread_are_all_different():
    corners = np.repeat(np.eye(4), [50, 3, 1, 1], axis=0)
    assert sorted(autoencoder.spread(corners, 4).argmax(1).tolist()) == [0, 1, 2, 3]


@pytest.mark.slow
def test_gradients_go_past_the_choice_of_codes_to_the_encoder(gallery):
    vq = make_drawer(gallery.processor, 0, dim=16, layers=1, codes=16).vq
    graph, weights = nnx.split(vq)

    def loss(weights):
        return autoencoder.loss_of(weights, gallery.values([0, 50]), graph=graph, is_free=False)[0]

    gradients = nnx.merge(graph, jax.jit(jax.grad(loss))(weights))
    assert float(np.abs(gradients.encoder.first.w[...]).max()) > 1e-4
    assert float(np.abs(gradients.codebook[...]).max()) > 1e-4


def test_green_frames_are_where_the_nearest_picture_is_the_captions(gallery):
    numbers = gallery.numbers(held_out=True)
    drawn = {report.BEST: gallery.pictures[numbers], "drawn": gallery.pictures[numbers][::-1]}
    nearest = {name: gallery.nearest(pictures) for name, pictures in drawn.items()}
    sheet = report.drawing_sheet(gallery, numbers, drawn, nearest, count=6)
    colors = [item.outline for item in sheet.items if hasattr(item, "outline")]
    assert (
        colors.count(report.RIGHT) == colors.count(report.WRONG) == colors.count(report.PLAIN) == 6
    )
    assert len(sheet.pictures) == 18
    assert all(x + image.width < sheet.width for image, x, _ in sheet.pictures)
    assert all(y + image.height < sheet.height for image, _, y in sheet.pictures)


def test_what_is_not_learnt_to_draw_is_an_error():
    one = {"code_losses": [5.0, 0.01], "same_codes": 16, "codes": 16}
    scores = {report.LEARNT: {report.BEST: {"all": 0.1}, "drawn": {"all": 0.6}}}
    cfg, results = drawing_study.Settings(least=0.5), {"one": one, "scores": scores}
    drawing_study.check(cfg, results)
    for part in ({"same_codes": 15}, {"code_losses": [0.01, 0.06]}):
        with pytest.raises(RuntimeError, match="one picture: code_loss is"):
            drawing_study.check(cfg, results | {"one": one | part})
    with pytest.raises(RuntimeError, match="of the captions .* not 0.7"):
        drawing_study.check(drawing_study.Settings(least=0.7), results)


@pytest.mark.grid  # a minute
def test_the_study_draws_and_says_what_came_of_it(tmp_path):
    sizes = ["vq_steps=4", "one_steps=2", "steps=2", "least=0", "most_loss=100", "codes=8"]
    with pytest.raises(RuntimeError, match="of 16 codes are drawn back"):
        drawing_study.main([*sizes, f"out={tmp_path}"])
    results = json.loads((tmp_path / "drawing.json").read_text())["results"]
    ways = {report.BEST, "guidance 1", "guidance 3"}
    assert {which: set(of) for which, of in results["scores"].items()} == {
        report.LEARNT: ways,
        report.NEW: ways,
    }
    assert len(results["code_losses"]) == 2
    with Image.open(tmp_path / "drawing.png") as image:
        assert image.width > 1000
    assert (tmp_path / "model" / "config.json").is_file()
