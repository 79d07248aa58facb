"""Prompts with images against transformers' processors: token sequences, masks and pixel values."""

import json

import numpy as np
import pytest
import tokenizers
import transformers
from PIL import Image

import llmprep_jax as lp

CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:?!\n0123456789'"
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ '<turn>' + message['role'] + '\\n' }}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'MARKER' }}\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '</turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"""
SPECIAL = ["<bos>", "<eos>", "<pad>", "<turn>", "</turn>"]


def tokenizer(special: list[str], marker: str, **extra: str):
    """Of single characters, but for two newlines and three, which join as Gemma's do."""
    words = [*SPECIAL, *special, *CHARS, "\n\n", "\n\n\n", "@"]
    vocab = {text: i for i, text in enumerate(words)}
    merges = [("\n", "\n"), ("\n\n", "\n")]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="@"))
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens([*SPECIAL, *special])
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=TEMPLATE.replace("MARKER", marker),
        extra_special_tokens=extra,
    )


def gemma3(scans: bool):
    names = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    extra = dict(zip(("boi_token", "eoi_token", "image_token"), names, strict=True))
    images = transformers.Gemma3ImageProcessorPil(
        size={"height": 28, "width": 28},
        do_pan_and_scan=scans,
        pan_and_scan_min_crop_size=10,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    return transformers.Gemma3Processor(
        images, tokenizer(names, names[0], **extra), image_seq_length=4
    ), names[0]


def llava():
    images = transformers.LlavaImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    return transformers.LlavaProcessor(
        images,
        tokenizer(["<image>"], "<image>", image_token="<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ), "<image>"


def deepseek_vl(name: str, **sizes):
    marker = "<image_placeholder>"
    images = getattr(transformers, f"{name}ImageProcessorPil")(**sizes)
    words = tokenizer([marker], marker, image_token=marker)
    return getattr(transformers, f"{name}Processor")(images, words, num_image_tokens=5), marker


def janus(has_system: bool):
    names = ["<begin_of_image>", "<end_of_image>", "<image_placeholder>"]
    extra = dict(zip(("boi_token", "eoi_token", "image_token"), names, strict=True))
    images = transformers.JanusImageProcessorPil(size=SMALL, image_mean=[0.5] * 3)
    words = tokenizer(names, names[2], **extra)
    kind = dict(use_default_system_prompt=has_system, num_image_tokens=5)
    return transformers.JanusProcessor(images, words, **kind), names[2]


SMALL, LARGE = {"height": 28, "width": 28}, {"height": 42, "width": 42}
CASES = {
    "gemma3": ("gemma3", lambda: gemma3(False)),
    "gemma3-pan-and-scan": ("gemma3", lambda: gemma3(True)),
    "llava": ("llava", llava),
    "deepseek-vl": ("deepseek_vl", lambda: deepseek_vl("DeepseekVL", size=SMALL)),
    "janus": ("janus", lambda: janus(False)),
    "janus-system-sentence": ("janus", lambda: janus(True)),
    "deepseek-vl-hybrid": (
        "deepseek_vl_hybrid",
        lambda: deepseek_vl("DeepseekVLHybrid", size=SMALL, high_res_size=LARGE),
    ),
}


def pictures() -> list[Image.Image]:
    rng, sizes = np.random.default_rng(0), ((40, 30), (90, 30), (31, 70))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    kind, make = CASES[request.param]
    theirs, marker = make()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    return theirs, lp.load_processor(tmp_path), marker, tmp_path


def compare(theirs: dict, ours: dict, atol: float = 1e-6):
    np.testing.assert_array_equal(ours["tokens"], theirs["input_ids"])
    np.testing.assert_array_equal(ours["mask"], theirs["attention_mask"])
    names = {"images": "pixel_values", "images_high": "high_res_pixel_values"}
    found = [name for name in names if name in ours]
    assert [names[name] for name in found] == [x for x in names.values() if x in theirs]
    for name in found:
        rows = np.concatenate([row for row in ours[name]])
        rows = rows[np.any(rows != 0, axis=(1, 2, 3))]  # what rows have, one after another
        expected = np.asarray(theirs[names[name]]).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(rows, expected, atol=atol)


def test_texts_and_their_images_agree(pair):
    theirs, ours, marker, _ = pair
    images = pictures()
    texts = [f"What is {marker} and {marker}?\n\nSay it.", f"{marker}\nthis"]
    by_text = [images[:2], images[2:]]
    kind = dict(padding=True, return_tensors="np")
    if not _pans(ours):
        compare(theirs(text=texts, images=by_text, **kind), ours(texts, images=by_text))
        return
    # theirs takes a folder's pan and scan back, so its parts are put together here
    seen = theirs.image_processor(images, do_pan_and_scan=True, return_tensors="np")
    counts = iter(seen["num_crops"])
    one = "\n\n<start_of_image>" + 4 * "<image_soft_token>" + "<end_of_image>\n\n"
    whole = "Here is the original image {} and here are some crops to help you see better {}"

    def written(text: str) -> str:
        first, *rest = text.split(marker)
        for part in rest:
            first += whole.format(one, " ".join([one] * int(next(counts)))) + part
        return first

    expected = theirs.tokenizer([written(text) for text in texts], **kind)
    compare({**expected, "pixel_values": seen["pixel_values"]}, ours(texts, images=by_text))


@pytest.mark.parametrize("opening", ["{{ bos_token }}", ""], ids=["with BOS", "without"])
def test_conversations_with_images_agree(pair, opening):
    theirs, ours, marker, folder = pair
    template = TEMPLATE.replace("MARKER", marker).replace("{{ bos_token }}", opening)
    (folder / "other.jinja").write_text(template)
    ours.tokenizer.read_chat_template(folder / "other.jinja")
    first, second, _ = pictures()
    parts = lambda *content: [  # noqa: E731
        {"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x}
        for x in content
    ]
    chat = [
        {"role": "user", "content": parts("Look\n", first, "\nwhat is it?")},
        {"role": "assistant", "content": parts("A dog.")},
        {"role": "user", "content": parts(second, "And this?")},
    ]
    kind = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np")
    found = ours(chat)
    # which theirs takes back, or puts before BOS
    if not _pans(ours) and not (opening and getattr(ours, "system", "")):
        compare(theirs.apply_chat_template(chat, chat_template=template, **kind), found)
    assert (found["tokens"][found["mask"]] == ours.tokenizer.bos_id).sum() == 1
    # the template shows nothing of a text that is no part
    plain = [chat[0], {"role": "assistant", "content": "A dog."}, chat[2]]
    np.testing.assert_array_equal(ours(plain)["tokens"], found["tokens"])


@pytest.mark.parametrize("has_system", [False, True])
def test_prompts_of_pictures_agree(tmp_path, has_system):
    theirs, _ = janus(has_system)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "janus"}))
    ours = lp.load_processor(tmp_path)
    template = TEMPLATE.replace("MARKER", "x").replace("{{ bos_token }}", "")
    (tmp_path / "other.jinja").write_text(template)
    ours.tokenizer.read_chat_template(tmp_path / "other.jinja")
    prompts = ["a red house", "a cat,\n\nasleep"]
    turns = [[{"role": "user", "content": [{"type": "text", "text": x}]}] for x in prompts]
    kind = dict(chat_template=template, add_generation_prompt=True)
    texts = [theirs.apply_chat_template(turn, **kind) for turn in turns]
    expected = theirs(text=texts, generation_mode="image", padding=True, return_tensors="np")
    for given in (prompts, turns):
        compare(expected, ours.for_drawing(given))
    assert theirs.decode(expected["input_ids"][0]).endswith("<turn>model\n<begin_of_image>")
    with pytest.raises(ValueError, match="prompt 1 holds an image"):
        ours.for_drawing(["a cat", "like <image_placeholder>"])


def test_a_saved_processor_is_read_by_both_as_it_was(pair, tmp_path):
    _, ours, marker, folder = pair
    ours.save(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text((folder / "config.json").read_text())
    again = lp.load_processor(tmp_path / "again")
    text, image = f"{marker} is", pictures()[:1]
    for (name, x), (_, y) in zip(
        ours(text, images=image).items(), again(text, images=image).items(), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=name)


def test_a_marker_without_an_image_is_refused_in_numbers(pair):
    _, ours, marker, _ = pair
    with pytest.raises(ValueError, match=r"text 0 has 2 .* markers and 1 images"):
        ours(f"{marker} and {marker}", images=pictures()[:1])
    with pytest.raises(ValueError, match=r"text 0 has 0 .* markers and 1 images"):
        ours("none", images=pictures()[:1])


def _pans(ours) -> bool:
    return bool(ours.images.fields().get("do_pan_and_scan"))
