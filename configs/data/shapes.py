"""Pictures of coloured shapes with captions, drawn when a config first asks for their tokenizer.

960 pictures of 64 pixels, one of each combination of four shapes, six colours, two sizes, five
places and four grounds, in runs/data/shapes: `shapes.jsonl` has an image and two captions a line. A
model that has learnt the words reads combinations that it has not seen. Beside it lie tokenizers of
these captions, each with what an image processor of a small model needs.
"""

import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from PIL import Image, ImageDraw

FOLDER = pathlib.Path("runs/data/shapes")
FILE = FOLDER / "shapes.jsonl"
SIDE = 64
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 220),
    "yellow": (250, 210, 30),
    "purple": (148, 60, 189),
    "orange": (255, 127, 14),
}
SIZES = {"small": 7, "large": 14}  # half of a side, in pixels
PLACES = {
    "in the middle": (32, 32),
    "at the top left": (17, 17),
    "at the top right": (47, 17),
    "at the bottom left": (17, 47),
    "at the bottom right": (47, 47),
}
GROUNDS = {
    "white": (250, 250, 250),
    "grey": (128, 128, 128),
    "black": (16, 16, 16),
    "pink": (255, 200, 214),
}
SPECIAL = ("<pad>", "<s>", "<image_placeholder>", "</s>")  # the last is the greatest id, as CLIP's
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Assistant: ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<image_placeholder>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{{ eos_token if m.role == 'assistant' else '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def find_tokenizer(name: str, fields: Mapping[str, Any], **config: Any) -> str:
    """The folder of a tokenizer of the captions and of an image processor; the pictures are drawn
    too, where there are none.

    Args:
      name: of the folder, beside the pictures. fields: of preprocessor_config.json.
      config: more of tokenizer_config.json.
    """
    if not FILE.is_file():
        _write_whole(FOLDER, _write_pictures)
    folder = FOLDER.parent / f"shapes-{name}"
    if not (folder / "tokenizer.json").is_file():
        _write_whole(folder, lambda aside: _write_tokenizer(aside, fields, config))
    return str(folder)


def _write_whole(folder: pathlib.Path, write: Any) -> None:
    """Writes a folder aside and puts it in place, so that there is never half of one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = pathlib.Path(tempfile.mkdtemp(dir=folder.parent))
    write(aside)
    try:
        os.replace(aside, folder)
    except OSError:  # another process was first
        shutil.rmtree(aside)


def combinations() -> Iterable[tuple[str, str, str, str, str]]:
    """Shape, colour, size, place and ground of each picture."""
    return itertools.product(SHAPES, COLOURS, SIZES, PLACES, GROUNDS)


def captions(shape: str, colour: str, size: str, place: str, ground: str) -> list[str]:
    """What is said of a picture, in two ways."""
    article = "an" if colour == "orange" else "a"
    return [
        f"a {size} {colour} {shape} {place} on {ground}",
        f"on a {ground} ground, {place}: {article} {colour} {shape}, {size}",
    ]


def _write_pictures(folder: pathlib.Path) -> None:
    (folder / "images").mkdir()
    lines = []
    for number, kinds in enumerate(combinations()):
        name = f"images/{number:03}.png"
        draw(*kinds).save(folder / name)
        lines.append(json.dumps({"image": name, "captions": captions(*kinds)}) + "\n")
    (folder / "shapes.jsonl").write_text("".join(lines))


def draw(shape: str, colour: str, size: str, place: str, ground: str) -> Image.Image:
    """One picture."""
    image = Image.new("RGB", (SIDE, SIDE), GROUNDS[ground])
    pen, (x, y), r, fill = ImageDraw.Draw(image), PLACES[place], SIZES[size], COLOURS[colour]
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        pen.rectangle((x - r, y - r, x + r, y + r), fill)
    elif shape == "triangle":
        pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill)
    else:
        pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
        pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
    return image


def _write_tokenizer(
    folder: pathlib.Path, fields: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=380, initial_alphabet=sorted(alphabet), show_progress=False
    )
    core.train_from_iterator(
        [text for kinds in combinations() for text in captions(*kinds)], trainer
    )
    core.add_special_tokens(list(SPECIAL))
    core.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    roles |= {"chat_template": TEMPLATE, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(fields), indent=2) + "\n")
