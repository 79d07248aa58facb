"""DeepSeek-VL2's prompts as the released code writes them, with pictures in them, and answers."""

import json

import numpy as np
import pytest
import tokenizers
from PIL import Image

import llmprep_jax as lp
from llmprep_jax.models.deepseek_vl2.processor import Processor
from llmprep_jax.text.chat import encode_chat
from tests.models.test_deepseek_vl2 import IMAGE, load

CHARS = "abcdefghijklmnopqrstuvwxyz .,:?!\n[]0123456789<>|/_"
SPECIAL = ["<bos>", "<eos>", "<pad>", "<image>"]
RESOLUTIONS = [[56, 56], [56, 112], [56, 168], [112, 56], [168, 56]]


def write_tokenizer(folder):
    """A tokenizer of single characters, whose <image> is the golden models' 3."""
    vocab = {text: i for i, text in enumerate([*SPECIAL, *CHARS, "@"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="@"))
    core.decoder = tokenizers.decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    core.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_processor(folder):
    """The files of a processor for the golden models."""
    write_tokenizer(folder)
    fields = {
        "processor_class": "DeepseekVLV2Processor",
        "candidate_resolutions": RESOLUTIONS,
        "patch_size": 14,
        "downsample_ratio": 2,
        "image_token": "<image>",
        "sft_format": "deepseek",
    }
    (folder / "processor_config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vl2")
    write_processor(folder)
    return Processor.from_path(folder)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def said(processor, inputs, row=0):
    """What a row spells, with each run as its length."""
    ids = inputs["tokens"][row][inputs["mask"][row]].tolist()
    text, run = "", 0
    for i in [*ids, None]:
        if i == IMAGE:
            run += 1
            continue
        text, run = text + (f"({run})" if run else ""), 0
        text += "" if i is None else processor.tokenizer.token_of(i)
    return text


ASK = [
    {"role": "system", "content": " be brief. "},
    {"role": "user", "content": "<image>\nwhat is it? "},
    {"role": "assistant", "content": " a cat "},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and this?"}]},
]


def test_a_conversation_is_written_as_released(processor):
    inputs = processor(ASK, images=[picture(112, 56), picture(60, 120)])
    # 2 x 1 tiles are 6 + 1 + 2 (2 2 + 1) tokens, 1 x 2 are 6 + 1 + 4 (2 + 1)
    assert said(processor, inputs) == (
        "<bos>be brief.<|User|>: (17)\nwhat is it?\n\n<|Assistant|>:a cat<eos>"
        "<|User|>: (19)\nand this?\n\n<|Assistant|>:"
    )
    assert inputs["grids"].tolist() == [[[2, 1], [1, 2]]]
    assert inputs["images"].shape == (1, 6, 56, 56, 3)
    assert inputs["images"].dtype == np.float32
    assert np.abs(inputs["images"]).max() <= 1


def test_special_tokens_that_a_tokenizer_lacks_are_added_in_the_released_order(processor):
    names = ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>"]
    names.append("<|Assistant|>")
    first = len(SPECIAL) + len(CHARS) + 1
    assert [processor.tokenizer.id_of(name) for name in names] == list(range(first, first + 7))
    assert processor.image_id == IMAGE


def test_more_than_two_pictures_are_not_tiled(processor):
    wide = [picture(112, 56, seed) for seed in range(3)]
    two = processor("<image><image>", images=wide[:2])
    three = processor("<image>, <image>, <image>", images=wide)
    assert two["grids"].tolist() == [[[2, 1]] * 2]
    assert three["grids"].tolist() == [[[1, 1]] * 3]
    assert said(processor, three) == "(13), (13), (13)"


def test_rows_are_padded_on_the_left_and_their_tiles_at_the_end(processor):
    wide = picture(112, 56)
    texts = ["no picture", "<image> one"]
    inputs = processor(texts, images=[None, [wide]])
    assert inputs["tokens"].shape == (2, 21)
    assert inputs["mask"][0].tolist() == [False] * 11 + [True] * 10
    assert inputs["grids"].tolist() == [[[0, 0]], [[2, 1]]]
    assert not inputs["images"][0].any()
    alone = processor(texts[1], images=wide)
    np.testing.assert_array_equal(inputs["images"][1:], alone["images"])
    assert set(processor("no picture")) == {"tokens", "mask"}


def test_parts_may_bring_their_pictures_along_in_order(processor):
    first, second = picture(112, 56, 1), picture(56, 56, 2)
    parts = [{"type": "image", "image": first}, {"type": "text", "text": "or <image>"}]
    found = processor([{"role": "user", "content": parts}], images=[second])
    expected = processor([{"role": "user", "content": "<image>\nor <image>"}], [first, second])
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_markers_that_users_spell_are_text_where_only_the_template_may_write_them(processor):
    parts = [{"type": "image"}, {"type": "text", "text": "<image>"}]
    given = [{"role": "user", "content": parts}]
    inputs = processor(given, images=[picture(56, 56)], special_tokens="template")
    tokens = inputs["tokens"][0].tolist()
    assert tokens.count(IMAGE) == 13
    assert processor.tokenizer.decode(tokens).count("<image>") == 1
    with pytest.raises(ValueError, match="conversation 0 has 2 <image> markers and 1 images"):
        processor(given, images=[picture(56, 56)])


@pytest.mark.parametrize(
    ("prompt", "images", "problem"),
    [
        ("<image>", None, "text 0 has 1 <image> markers and 0 images"),
        ("words", [picture(9, 9)], "text 0 has 0 <image> markers and 1 images"),
        (["a", "<image>"], [picture(9, 9)], "images of 2 prompts are a list of 2.*got 1"),
        (["a", "<image>"], [None, [picture(9, 9)] * 2], "text 1 has 1 <image> markers and 2"),
        ([{"role": "user", "content": [{"type": "audio"}]}], None, "parts of type text and image"),
        ([{"role": "tool", "content": "x"}], None, "roles are user and assistant"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(processor, prompt, images, problem):
    with pytest.raises(ValueError, match=problem) as error:
        processor(prompt, images)
    assert "\n" not in str(error.value)


def test_answers_alone_are_learnt(processor):
    messages = [{"role": "user", "content": "<image>who?"}, {"role": "assistant", "content": "me"}]
    ids, is_answer = encode_chat(processor.tokenizer, messages)
    learnt = [i for i, answers in zip(ids, is_answer, strict=True) if answers]
    assert processor.tokenizer.decode(learnt, skip_special=False) == "me<eos>"


def test_a_saved_processor_makes_the_same_of_a_prompt(processor, tmp_path):
    processor.save(tmp_path)
    again = Processor.from_path(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    assert json.loads((tmp_path / "processor_config.json").read_text())["sft_format"] == "deepseek"
    images = [picture(112, 56), picture(60, 120)]
    found, expected = again(ASK, images), processor(ASK, images)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_picture_is_asked_about_from_end_to_end(processor, tmp_path):
    processor.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_vl_v2"}))
    model, loaded = load(), lp.load_processor(tmp_path)
    assert type(loaded) is Processor
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    settings = dict(max_new_tokens=4, stop_ids=())
    answer = lp.generate(model, loaded, ask, images=[picture(112, 56)], **settings)
    inputs = loaded(ask, images=[picture(112, 56)])
    tokens = inputs.pop("tokens")
    media = {name: inputs[name] for name in ("images", "grids")}
    ids = lp.generate_tokens(model, tokens, max_new_tokens=4, media=media)
    assert answer == loaded.decode(np.asarray(ids)[0])
    other = lp.generate_tokens(
        model, tokens, max_new_tokens=4, media={**media, "images": -media["images"]}
    )
    assert not np.array_equal(ids, other)


def test_places_are_shown_in_answers(processor):
    text = "<|ref|>a cat<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"
    ids = processor.tokenizer.encode(f"{text}<eos>")
    assert processor.decode(ids) == text
