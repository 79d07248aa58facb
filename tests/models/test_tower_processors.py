"""Processors of CLIP and SigLIP: ids of released tokenizers, pixels, and folders both ways."""

import json
from pathlib import Path

import numpy as np
import pytest

import llmprep_jax as lp
from llmprep_jax.models import clip, registry, siglip
from llmprep_jax.text.towers import canonical
from tests.random_modules import fill
from tests.text.samples import train_sentencepiece

MERGES = Path(__file__).parent.parent / "golden" / "clip_merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"
SIDES = {"height": 9, "width": 9}


def printable_bytes() -> list[str]:
    """GPT-2's letters for bytes, in the order of CLIP's ids."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(x) for x in shown] + [chr(256 + i) for i in range(256 - len(shown))]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """The released tokenizer, but only the merges that these texts can have, at their numbers."""
    folder = tmp_path_factory.mktemp("clip")
    letters = printable_bytes()
    vocab = {x: i for i, x in enumerate([*letters, *[f"{x}</w>" for x in letters]])}
    merges = [line.split(" ") for line in MERGES.read_text(encoding="utf-8").splitlines()]
    vocab |= {left + right: 512 + int(number) for number, left, right in merges}
    vocab |= {START: 49406, END: 49407}
    pairs = "\n".join(f"{left} {right}" for _, left, right in merges)
    write(folder, "vocab.json", vocab)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{pairs}\n", encoding="utf-8")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizerFast"})
    sizes = {"size": {"shortest_edge": 9}, "crop_size": SIDES}
    write(
        folder, "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor", **sizes}
    )
    write(folder, "config.json", {"model_type": "clip", "text_config": {}})
    return folder


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    """A small SentencePiece model as released ones are."""
    folder = tmp_path_factory.mktemp("siglip")
    train_sentencepiece(
        folder, model_type="unigram", vocab_size=200, eos_id=1, unk_id=2, pad_id=0, bos_id=-1
    ).rename(folder / "spiece.model")
    write(folder, "tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer"})
    write(folder, "preprocessor_config.json", {"size": SIDES})
    write(folder, "config.json", {"model_type": "siglip", "text_config": {"vocab_size": 200}})
    return folder


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def noise(width=20, height=12):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("text", "ids", "shown"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368], "a photo of a cat"),
        ("Hello World", [3306, 1002], "hello world"),
        ("don't stop!! 2024", [847, 713, 1691, 748, 273, 271, 273, 275], "don 't stop !! 2 0 2 4"),
        ("café  naïve", [15304, 1097, 35689, 563], "café naïve"),
        ("照片", [163, 227, 100, 163, 231, 485], "照片"),
        ("😀 ok", [7334, 2481], "😀 ok"),
    ],
)
def test_clips_ids_are_those_of_the_released_tokenizer(clip_folder, text, ids, shown):
    processor = lp.load_processor(clip_folder)
    tokens = processor(text)["tokens"]
    row = [49406, *ids, 49407]
    assert tokens.tolist() == [row + [49407] * (16 - len(row))]
    assert processor.decode(tokens) == [shown]


def test_clips_rows_widen_by_steps_up_to_77_and_long_texts_keep_their_end(clip_folder):
    processor = lp.load_processor(clip_folder)
    widths = [processor("cat " * words)["tokens"].shape[1] for words in (1, 14, 15, 60, 63, 200)]
    assert widths == [16, 16, 32, 64, 77, 77]
    tokens = processor(["cat " * 200, "a cat"])["tokens"]
    assert (tokens[:, 0] == 49406).all()
    assert (tokens[:, 76] == 49407).all()
    assert tokens[0, 75] == 2368
    assert processor.encode("cat", width=5).tolist() == [[49406, 2368, 49407, 49407, 49407]]


def test_siglip_reads_lower_case_without_punctuation_and_pads_all_64(siglip_folder):
    processor = lp.load_processor(siglip_folder)
    plain, loud = processor(["the cat sat", " The CAT,\t\n'sat'!! "])["tokens"]
    np.testing.assert_array_equal(plain, loud)
    assert plain.shape == (64,)
    end = plain.tolist().index(1)
    assert 0 < end < 20
    assert (plain[end:] == 1).all()
    assert processor.decode(plain) == "the cat sat"
    long = processor("the cat sat " * 60)["tokens"][0]
    assert long[63] == 1
    assert long[62] != 1


def test_siglip_2_keeps_punctuation(siglip_folder):
    """Its tokenizer is Gemma's, whose end of a text is spelt otherwise."""
    processor = lp.load_processor(siglip_folder)
    processor.tokenizer.encode = lambda text, **_: [len(text), *map(ord, text)]
    assert processor("A Cat!")["tokens"][0, :5].tolist() == [5, *map(ord, "a ca")]
    processor.tokenizer.special_tokens["eos_token"] = "<eos>"
    processor.tokenizer._core.add_special_tokens(["<eos>"])
    assert processor("A Cat!")["tokens"][0, :7].tolist() == [6, *map(ord, "a cat!")]


def test_special_tokens_that_users_spell_are_text(siglip_folder):
    tokens = lp.load_processor(siglip_folder)("the </s> cat")["tokens"][0]
    ends = np.flatnonzero(tokens == 1)
    assert (np.diff(ends) == 1).all()
    assert ends[-1] == 63


@pytest.mark.parametrize(
    ("text", "expected"),
    [("A,b  C", "ab c"), ("\t x-y\n", "xy"), ("ÉCLAIR!", "éclair"), ("...", ""), ("a_b", "ab")],
)
def test_canonical_texts(text, expected):
    assert canonical(text) == expected


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_what_a_processor_gives_a_model_takes(name, request, tmp_path):
    """Text, images and both; and the folder that a model is saved into with it is whole."""
    folder = request.getfixturevalue(f"{name}_folder")
    family, processor = {"clip": clip, "siglip": siglip}[name], lp.load_processor(folder)
    small = dict(dim=8, mlp_dim=8, num_layers=1, num_heads=2)
    words = 49408 if name == "clip" else 200
    length = {} if name == "clip" else {"max_seq_len": 64}
    cfg = family.Config(
        family.TextConfig(vocab_size=words, **small, **length),
        family.VisionConfig(image_size=9, patch_size=4, **small),
    )
    model = fill(registry.abstract(cfg))
    inputs = processor(["a photo of a cat", "a cat"], [noise(), noise(9, 30), noise(9, 9)])
    out = model(**inputs)
    assert out.logits_per_image.shape == (3, 2)
    np.testing.assert_allclose(
        model.encode_text(**processor(["a photo of a cat", "a cat"])), out.text_embeds, atol=1e-6
    )
    one = model.encode_image(**processor(images=noise()))
    np.testing.assert_allclose(one[0], out.image_embeds[0], atol=1e-6)
    lp.save_model(model, tmp_path / "saved", processor=processor)
    again = lp.load_processor(tmp_path / "saved")
    for key, value in again(["a photo of a cat", "a cat"], noise()).items():
        np.testing.assert_array_equal(value, processor(["a photo of a cat", "a cat"], noise())[key])
    assert again.max_len == processor.max_len
    assert not (tmp_path / "saved" / "generation_config.json").exists()


def test_pixels_are_bytes_and_normalised_as_the_model_was_released(clip_folder):
    processor = lp.load_processor(clip_folder)
    pixels = processor.pixels(noise(9, 9))
    np.testing.assert_array_equal(pixels[0], noise(9, 9))
    images = processor(images=noise(9, 9))["images"]
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(images, (pixels / 255 - mean) / std, atol=1e-6)
    assert images.dtype == np.float32


def test_wrong_inputs_are_refused_in_one_line(clip_folder, tmp_path):
    processor = lp.load_processor(clip_folder)
    with pytest.raises(ValueError, match="give texts, images or both"):
        processor()
    with pytest.raises(ValueError, match="no messages"):
        processor([{"role": "user", "content": "a cat"}])
    for name in ("vocab.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip_folder / name).read_bytes())
    (tmp_path / "merges.txt").write_text("#version: 0.2\nx\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab.json: no tokenizer with merges.txt \([^\n]*$"):
        clip_processor(tmp_path)


def clip_processor(folder):
    (folder / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    return lp.load_processor(folder)
