"""GenEval's verdicts and scores by hand, and colours by a stand-in for CLIP."""

import functools

import numpy as np
import pytest
from PIL import Image

from llmprep_jax.evaluate import geneval
from llmprep_jax.evaluate.geneval import COLORS, ColorClassifier, Detection, Verdict, judge

UNIT = (0, 0, 10, 10)


def found(*boxes, score=0.95, color=None):
    return [Detection(box, score, color=color) for box in boxes]


def at(x, y, size=10):
    return (x, y, x + size, y + size)


@pytest.mark.parametrize(
    ("box", "relations"),
    [
        (at(-30, 0), {"left of"}),
        (at(30, 0), {"right of"}),
        (at(0, -30), {"above"}),
        (at(0, 30), {"below"}),
        (at(30, 30), {"right of", "below"}),
        (at(0, 0), set()),
        (at(2, 0), set()),  # a tenth of both widths
        (at(3, 0), set()),  # a third of the offset is left
        (at(5, 0), {"right of"}),
        (at(20, 9), {"right of"}),
        (at(-7, 6), {"left of"}),  # (-5, 4) of a length of 9.2
        (at(4, 4), set()),  # (2, 2) of 5.7: apart, in no relation
        (at(-30, -20, size=50), set()),  # its centre is 10 to the left, a tenth of the widths 6
    ],
)
def test_positions_shrink_by_the_sizes(box, relations):
    assert geneval.relative_position(box, UNIT) == relations


def test_detections_are_kept_by_score():
    boxes = [Detection(UNIT, score) for score in (0.3, 0.4, 0.9, 0.31, 0.95)]
    kept = geneval.certain({"cat": boxes, "dog": boxes[:1]}, "colors")
    assert [d.score for d in kept["cat"]] == [0.95, 0.9, 0.4, 0.31]
    assert set(kept) == {"cat"}
    assert [d.score for d in geneval.certain({"cat": boxes}, "counting")["cat"]] == [0.95]
    assert len(geneval.certain({"cat": found(*[UNIT] * 20)}, "colors")["cat"]) == 16


def test_counts_must_be_met_and_not_passed():
    prompt = {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
    }
    assert judge(prompt, {"cat": found(UNIT, UNIT)}).correct
    few = judge(prompt, {"cat": found(UNIT) + found(UNIT, score=0.8)})
    assert (few.correct, few.reason) == (False, "expected cat>=2, found 1")
    many = judge(prompt, {"cat": found(UNIT, UNIT, UNIT), "dog": found(UNIT)})
    assert (many.correct, many.reason) == (False, "expected cat<3, found 3")
    assert judge(prompt, {}).reason == "expected cat>=2, found 0"


def test_colours_are_asked_of_the_surest_objects():
    prompt = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
    red, blue = found(UNIT, score=0.9, color="red"), found(UNIT, score=0.8, color="blue")
    assert judge(prompt, {"cup": blue + red}).correct
    dim = judge(prompt, {"cup": found(UNIT, score=0.7, color="red") + blue})
    assert (dim.correct, dim.reason) == (False, "expected red cup>=1, found 1 blue")
    two = {"tag": "colors", "include": [{"class": "cup", "count": 2, "color": "red"}]}
    assert not judge(two, {"cup": red + blue}).correct
    assert judge(two, {"cup": red + red}).correct


def test_positions_are_of_all_pairs_and_of_targets_that_are_there():
    prompt = {
        "tag": "position",
        "include": [
            {"class": "cat", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
    }
    assert judge(prompt, {"cat": found(at(50, 0)), "dog": found(UNIT)}).correct
    wrong = judge(prompt, {"cat": found(UNIT), "dog": found(at(50, 0))})
    assert wrong.reason == "expected dog left of target, found right of target"
    alone = judge(prompt, {"dog": found(UNIT)}).reason.split("\n")
    assert alone == ["expected cat>=1, found 0", "no target for dog to be left of"]
    prompt["include"][0]["count"] = 2
    assert not judge(prompt, {"cat": found(at(50, 0), at(-50, 0)), "dog": found(UNIT)}).correct


def test_scores_are_means_of_tasks_and_prompts_need_one_image():
    def verdicts(tag, prompt, *right):
        return [Verdict(tag, prompt, is_right, "") for is_right in right]

    scores = geneval.summarise(
        [
            *verdicts("colors", "a", True, False, False, False),
            *verdicts("colors", "b", False, False, False, False),
            *verdicts("single_object", "c", True, True, True, False),
        ]
    )
    assert scores.tasks == {"single_object": 0.75, "colors": 0.125}
    assert list(scores.tasks) == ["single_object", "colors"]
    assert (scores.overall, scores.images) == (0.4375, pytest.approx(4 / 12))
    assert scores.prompts == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="no images"):
        geneval.summarise([])


def test_equal_prompts_are_told_apart_by_their_metadata():
    one = {"tag": "colors", "prompt": "x", "include": []}
    assert judge(one, {}).prompt == judge(dict(reversed(one.items())), {}).prompt
    assert judge(one, {}).prompt != judge(one | {"prompt": "y"}, {}).prompt


def mean_color(images):
    return np.array([np.asarray(image, float).mean((0, 1)) / 255 for image in images])


def named_color(prompts):
    """Embeds a prompt as the colour it names."""
    rgb = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
    words = [prompt.replace("-colored", "").split() for prompt in prompts]
    return np.array([next((rgb[w] for w in word if w in rgb), (1, 1, 1)) for word in words], float)


def test_colours_are_told_by_the_nearest_prompt():
    prompts = []
    classifier = ColorClassifier(
        lambda texts: prompts.extend(texts) or named_color(texts), mean_color
    )
    image = Image.new("RGB", (40, 20), "blue")
    image.paste((250, 10, 10), (0, 0, 20, 20))
    objects = found((0, 0, 20, 20), (20, 0, 40, 20))
    assert classifier(image, "cup", objects) == ["red", "blue"]
    assert classifier(image, "cup", objects[1:]) == ["blue"]
    assert len(prompts) == 3 * len(COLORS)  # once a class
    assert prompts[:3] == [
        "a photo of a red cup",
        "a photo of a red-colored cup",
        "a photo of a red object",
    ]
    prompt = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
    assert judge(prompt, {"cup": objects}, functools.partial(classifier, image)).correct


def test_an_object_is_cut_out_by_its_box_and_mask():
    image = Image.new("RGB", (4, 3), "red")
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = True
    crop = geneval.cut_out(image, Detection((1.2, 0.4, 2.8, 3.0), 1.0, mask))
    red, grey = (255, 0, 0), (153, 153, 153)
    assert crop.size == (2, 3)
    assert [crop.getpixel((x, y)) for y in range(3) for x in range(2)] == [
        *(grey, grey), *(red, grey), *(red, grey),
    ]  # fmt: skip
    assert geneval.cut_out(image, Detection((1, 1, 1, 1), 1.0)).size == (1, 1)
