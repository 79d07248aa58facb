"""Files of conversations about pictures, and a processor of the smallest kind that reads them."""

import json
import pathlib

import numpy as np
import tokenizers
from PIL import Image

from llmprep_jax.text.image_text import ImageTextProcessor
from llmprep_jax.text.tokenizer import Tokenizer
from llmprep_jax.vision.kinds import Square, Tiled
from tests.models.seeing import EACH, IMAGE, SIDE

CHARS = "abcdefghijklmnopqrstuvwxyz .,?\n"
TEMPLATE = (
    "{% for m in messages %}{{ 'U' if m.role == 'user' else 'A' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}{% endif %}<eos>{% endfor %}"
)


def write_tokenizer(folder: pathlib.Path) -> None:
    """One of single characters, whose <image> is the tiny model's."""
    texts = ["<pad>", "<eos>", "U", "A", *CHARS]
    vocab = {text: i for i, text in enumerate(texts)}
    vocab |= {f"<{i}>": i for i in range(len(texts), IMAGE)} | {"<image>": IMAGE}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<pad>"))
    core.add_special_tokens(["<pad>", "<eos>", "<image>"])
    core.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_processor(folder: pathlib.Path, is_tiled: bool = False) -> ImageTextProcessor:
    """Pictures of 4 x 4 with four tokens each; or tiles of them, up to ten of a picture."""
    write_tokenizer(folder)
    if is_tiled:
        sizes = [[SIDE * w, SIDE * h] for w in range(1, 10) for h in range(1, 10) if w * h < 10]
        images = Tiled({"candidate_resolutions": sizes, "patch_size": 1})
    else:
        images = Square({"size": {"height": SIDE, "width": SIDE}}, tokens=EACH)
    return ImageTextProcessor(Tokenizer.from_folder(folder), images, "<image>")


def draw(path: pathlib.Path, shade: int, size: tuple[int, int] = (SIDE, SIDE)) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(path)


def asked(*parts: str | int) -> list[dict]:
    """What a user says, with image parts where there are numbers, and a short answer."""
    content = [
        {"type": "image", "image": f"images/{part}.png"}
        if isinstance(part, int)
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "ab"}]


def write(folder: pathlib.Path, conversations: list[list[dict]], shades=range(0, 250, 10)) -> str:
    """A file of conversations beside pictures named by their shades."""
    for shade in shades:
        draw(folder / f"images/{shade}.png", shade)
    lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations]
    (folder / "data.jsonl").write_text("".join(lines))
    return str(folder / "data.jsonl")
