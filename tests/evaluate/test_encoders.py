"""Zero-shot classification and retrieval of encoders that know little, on drawn pictures."""

import json

import numpy as np
import pytest

from llmprep_jax.data.refs import Ref
from llmprep_jax.evaluate.encoders import Embedder, classify, retrieve
from llmprep_jax.evaluate.pictures import Picture, read_captioned, read_labelled
from llmprep_jax.vision.open import open_image
from tests.data.pictured import draw


class Shades:
    """A processor and model in one: a picture is its shade, and so is a text that ends with one;
    its calls are counted."""

    def __init__(self):
        self.rows = []

    def __call__(self, texts=None, images=None):
        if images is not None:
            return {"images": [open_image(file)[0, 0, 0] for file in images]}
        return {"tokens": [int(text.rstrip(" .").rsplit(" ", 1)[-1]) for text in texts]}

    def encode_image(self, shades):
        self.rows.append(len(shades))
        angle = np.asarray(shades) / 255
        return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)

    encode_text = encode_image


def embedder(batch_size=4):
    shades = Shades()
    return Embedder(shades, shades, batch_size), shades


def drawn(folder, *named):
    pictures = []
    for number, (shade, *texts) in enumerate(named):
        draw(folder / f"{number}.png", shade)
        pictures.append(Picture(f"p{number}", Ref(str(folder), f"{number}.png"), tuple(texts)))
    return pictures


def test_a_class_is_the_nearest_of_its_names(tmp_path):
    pictures = drawn(tmp_path, (10, "10"), (90, "100"), (60, "10"), (200, "250"), (240, "250"))
    run, shades = embedder()
    outcome = classify(run, pictures, ["a photo of {}.", "shade {}"])
    # 60 lies between 10 and 100, and nearer to the second; 200 nearer to 250
    assert outcome.report.per_example == (1, 1, 0, 1, 1)
    assert outcome.numbers == {"top_1": 0.8, "chance": 1 / 3, "classes": 3}
    assert outcome.report.by_split["10"].score == 0.5
    wrong = outcome.examples[2]
    assert (wrong.answers, wrong.prediction, wrong.name) == (("10",), "100", "p2")
    assert wrong.images == (Ref(str(tmp_path), "2.png"),)
    assert shades.rows == [4, 4, 4, 4]  # filled up: 6 prompts and 5 pictures


def test_a_class_alone_is_no_choice(tmp_path):
    with pytest.raises(ValueError, match="all of the class '10'"):
        classify(embedder()[0], drawn(tmp_path, (10, "10"), (20, "10")))


def test_retrieval_finds_captions_and_ranks_each_picture(tmp_path):
    pictures = drawn(tmp_path, (10, "at 200", "at 11"), (100, "at 150"), (160, "at 131"))
    outcome = retrieve(embedder(batch_size=2)[0], pictures)
    numbers = outcome.numbers
    # 100: nearest are 131, then 150; 160: nearest are 150, then 131
    assert numbers["image_to_text_r1"] == pytest.approx(1 / 3)
    assert numbers["image_to_text_r5"] == 1.0
    # 200, 150 and 131 are nearest to 160, and 11 to 10
    assert numbers["text_to_image_r1"] == (0 + 1 + 0 + 1) / 4
    assert (numbers["images"], numbers["captions"]) == (3, 4)
    assert outcome.report.per_example == (1.0, 0.5, 0.5)
    assert outcome.examples[1].prediction == "at 131"


def test_captions_that_are_all_alike_share_a_rank(tmp_path):
    pictures = drawn(tmp_path, (10, "at 50"), (100, "at 50"), (160, "at 50"))
    assert retrieve(embedder()[0], pictures).report.per_example == (0.5, 0.5, 0.5)


def test_a_folder_of_classes_is_read(tmp_path):
    for name in ("red_fox/1.png", "red_fox/2.JPG", "cat/3.png", "cat/4.png", "cat/notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no picture")
        else:
            draw(tmp_path / name.lower(), 10)
    pictures = read_labelled(tmp_path)
    assert [p.texts for p in pictures] == [("cat",)] * 2 + [("red fox",)] * 2
    assert pictures[0].name == "cat/3.png"
    assert [p.texts for p in read_labelled(tmp_path, limit=2)] == [("cat",), ("red fox",)]
    (tmp_path / "cat/3.png").write_bytes(b"broken picture")
    with pytest.raises(ValueError, match=r"cat/3\.png: begins with"):
        read_labelled(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no folders with pictures"):
        read_labelled(tmp_path / "empty")


def test_labels_and_captions_are_read_from_lines(tmp_path):
    draw(tmp_path / "images/1.png", 10)
    lines = [
        {"image": "images/1.png", "label": " cat ", "captions": ["a cat", "an animal"]},
        {"image": "images/1.png", "label": "dog", "caption": "a dog"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [p.texts for p in read_labelled(tmp_path / "data.jsonl")] == [("cat",), ("dog",)]
    assert [p.texts for p in read_captioned(tmp_path / "data.jsonl")] == [
        ("a cat", "an animal"),
        ("a dog",),
    ]
    assert len(read_captioned(tmp_path / "data.jsonl", limit=1)) == 1


@pytest.mark.parametrize(
    ("read", "record", "message"),
    [
        (read_labelled, {"image": "1.png"}, r"data\.jsonl:1: \"label\" is None"),
        (read_labelled, {"label": "x"}, r"data\.jsonl:1: an image part names no file"),
        (read_labelled, {"image": "2.png", "label": "x"}, r"data\.jsonl:1: no picture .*2\.png"),
        (read_captioned, {"image": "1.png"}, r"data\.jsonl:1: has no captions"),
        (read_captioned, {"image": "1.png", "captions": []}, "has no captions"),
        (read_captioned, None, r"data\.jsonl: holds no pictures"),
    ],
    ids=["label", "image", "missing", "captions", "empty", "nothing"],
)
def test_what_cannot_be_read_is_named_by_its_line(tmp_path, read, record, message):
    draw(tmp_path / "1.png", 10)
    text = "" if record is None else json.dumps(record)
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "data.jsonl")
