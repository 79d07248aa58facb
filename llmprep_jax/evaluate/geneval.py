"""GenEval's scoring half: from detected objects and their colours to verdicts and six scores.

Ghosh et al., arXiv 2310.11513, section 3, by the rules of the released script (djghosh13/geneval).
An object detector is not here: the paper's is Mask2Former with a Swin-S on COCO's classes. The
colours of objects are told by CLIP ViT-L/14, whose two encoders `ColorClassifier` takes.

A prompt's `metadata` are as in GenEval's file of prompts:

    {"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "brown"},
                                      {"class": "cup", "count": 1, "position": ["above", 0]}],
     "exclude": [{"class": "dog", "count": 2}], "prompt": "..."}

all of `include` must hold and none of `exclude`; a position is relative to the objects of the
clause of that number.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llmprep_jax.evaluate.grounding import Box
from llmprep_jax.evaluate.retrieval import unit
from llmprep_jax.evaluate.zero_shot import class_vectors
from llmprep_jax.types import Array

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_MOST = 16  # objects of a class
_GREY = "#999"  # around an object whose colour is asked


class Detection(NamedTuple):
    """An object of a class that is given beside it.

    box: (left, top, right, bottom) in pixels; score: the detector's, in [0, 1]; mask: bool [H, W]
    of the picture's size, None: the whole box; color: where it is known already.
    """

    box: Box
    score: float
    mask: np.ndarray | None = None
    color: str | None = None


class Verdict(NamedTuple):
    """Whether one image is right, and why not; tag and prompt (its metadata as JSON) group it."""

    tag: str
    prompt: str
    correct: bool
    reason: str


class Scores(NamedTuple):
    """tasks: of the images of each task, how many are right; overall: the mean of the tasks;
    images, prompts: right ones of all images, and prompts of which any image is right."""

    tasks: dict[str, float]
    overall: float
    images: float
    prompts: float


Objects = Mapping[str, Sequence[Detection]]
Colors = Callable[[str, Sequence[Detection]], list[str | None]]


def certain(objects: Objects, tag: str) -> dict[str, list[Detection]]:
    """Of each class the detections above 0.3 (for counting 0.9), at most 16, surest first.

    Counts and positions go by this order. Overlapping ones stay: the script's suppression is off.
    """
    least = 0.9 if tag == "counting" else 0.3
    kept = {}
    for name, found in objects.items():
        sure = sorted((d for d in found if d.score > least), key=lambda d: -d.score)
        if sure:
            kept[name] = sure[:_MOST]
    return kept


def judge(metadata: Mapping[str, Any], objects: Objects, colors: Colors | None = None) -> Verdict:
    """Judges an image by all objects that were found in it, by class name.

    Args:
      colors: from a class name and objects of it to their colours; None: those of the objects.
    """
    objects = certain(objects, metadata["tag"])
    colors = colors or (lambda _, found: [d.color for d in found])
    reasons, groups = [], []  # groups: objects by clause; None where it does not hold
    for clause in metadata.get("include", []):
        name, count = clause["class"], clause["count"]
        found = objects.get(name, [])[:count]
        reason = ""
        if len(found) < count:
            reason = f"expected {name}>={count}, found {len(found)}"
        if not reason and "color" in clause:
            reason = _color_fault(clause, colors(name, found))
        if not reason and "position" in clause:
            reason = _position_fault(clause, found, groups)
        groups.append(None if reason else found)
        reasons += [reason] if reason else []
    for clause in metadata.get("exclude", []):
        found = len(objects.get(clause["class"], []))
        if found >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {found}")
    prompt = json.dumps(metadata, sort_keys=True)
    return Verdict(metadata["tag"], prompt, not reasons, "\n".join(reasons))


def relative_position(a: Box, b: Box, tolerance: float = 0.1) -> set[str]:
    """Where box `a` lies as seen from box `b`: "left of", "right of", "above", "below", or none.

    The offset o of the centres shrinks on both axes by a tenth of the two boxes' widths (heights),
    down to 0; what is left, divided by the length of the *whole* offset, must be above 0.5. So
    boxes may be in two relations (at 45 degrees), or in none though they are apart.
    """
    boxes = np.array([a, b], np.float64).reshape(2, 2, 2)
    centre_a, centre_b = boxes.mean(1)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    offset = centre_a - centre_b
    rest = np.maximum(np.abs(offset) - tolerance * sizes, 0) * np.sign(offset)
    if np.all(np.abs(rest) < 1e-3):
        return set()
    x, y = rest / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, is_so in holds.items() if is_so}


def summarise(verdicts: Sequence[Verdict]) -> Scores:
    """GenEval's scores; tasks of which there is no image are left out of all of them.

    Raises:
      ValueError: no verdicts.
    """
    if not verdicts:
        raise ValueError("no images were judged")
    tasks, prompts = {}, {}
    for verdict in verdicts:
        tasks.setdefault(verdict.tag, []).append(verdict.correct)
        prompts.setdefault(verdict.prompt, []).append(verdict.correct)
    order = [*filter(tasks.__contains__, TASKS), *(tag for tag in tasks if tag not in TASKS)]
    means = {tag: float(np.mean(tasks[tag])) for tag in order}
    return Scores(
        tasks=means,
        overall=float(np.mean(list(means.values()))),
        images=float(np.mean([verdict.correct for verdict in verdicts])),
        prompts=float(np.mean([any(each) for each in prompts.values()])),
    )


class ColorClassifier:
    """Names objects' colours by CLIP, zero-shot among ten.

    `functools.partial(classifier, image)` is what `judge` takes.

    Args:
      encode_text: embeds a list of prompts, [P, D]; encode_image: of pictures, [M, D].
    """

    def __init__(
        self,
        encode_text: Callable[[list[str]], Array],
        encode_image: Callable[[list[Image.Image]], Array],
    ):
        self._encode_text, self._encode_image = encode_text, encode_image
        self._classes = {}  # class name: vectors of its ten colours

    def __call__(
        self, image: Image.Image, name: str, found: Sequence[Detection]
    ) -> list[str | None]:
        if name not in self._classes:
            templates = (f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}")
            templates = (*templates, "a photo of a {} object")
            self._classes[name] = class_vectors(self._encode_text, COLORS, templates)
        crops_MD = unit(self._encode_image([cut_out(image, d) for d in found]))
        return [COLORS[i] for i in np.argmax(crops_MD @ self._classes[name].T, axis=-1)]


def cut_out(image: Image.Image, detection: Detection) -> Image.Image:
    """The box of an object; grey where its mask is not."""
    image = image.convert("RGB")
    if detection.mask is not None:
        grey = Image.new("RGB", image.size, _GREY)
        image = Image.composite(image, grey, Image.fromarray(np.asarray(detection.mask, bool)))
    left, top, right, bottom = map(round, detection.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _color_fault(clause: Mapping[str, Any], colors: Sequence[str | None]) -> str:
    name, count, wanted = clause["class"], clause["count"], clause["color"]
    if colors.count(wanted) >= count:
        return ""
    seen = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
    return f"expected {wanted} {name}>={count}, found {seen or 'no colour'}"


def _position_fault(
    clause: Mapping[str, Any], found: Sequence[Detection], groups: Sequence[Any]
) -> str:
    wanted, number = clause["position"]
    if groups[number] is None:
        return f"no target for {clause['class']} to be {wanted}"
    for detection in found:
        for target in groups[number]:
            true = relative_position(detection.box, target.box)
            if wanted not in true:
                seen = " and ".join(sorted(true)) or "no side of"
                return f"expected {clause['class']} {wanted} target, found {seen} target"
    return ""
