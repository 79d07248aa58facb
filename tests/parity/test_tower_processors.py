"""Processors of CLIP and SigLIP against transformers', of the same folders and of saved ones."""

import numpy as np
import pytest
import transformers
from PIL import Image

import llmprep_jax as lp
from tests.models.test_tower_processors import clip_folder, noise, siglip_folder  # noqa: F401

pytestmark = pytest.mark.parity
TEXTS = ["a photo of a cat", "Hello World", "don't stop!! 2024", "café  naïve", "照片", "😀 ok"]
MORE = [" leading space", "- dash first", "tab\there", "ÉTÉ", "the CAT sat. on; the mat?", "?"]


def check(ours, theirs, texts, **options):
    for text in texts:
        ids = theirs(text=[text], truncation=True, **options)["input_ids"][0]
        row = ours([text])["tokens"][0]
        assert row[: len(ids)].tolist() == list(ids), text


@pytest.mark.parametrize("is_saved", [False, True], ids=["released", "saved"])
def test_clips_ids_and_pixels_agree(clip_folder, tmp_path, is_saved):  # noqa: F811
    ours, folder = lp.load_processor(clip_folder), clip_folder
    if is_saved:
        ours.save(tmp_path)
        folder = tmp_path
    tokenizer = transformers.CLIPTokenizer if not is_saved else transformers.AutoTokenizer
    theirs = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil.from_pretrained(folder),
        tokenizer.from_pretrained(folder),
    )
    check(ours, theirs, [*TEXTS, "cat " * 100], max_length=77)
    pixels = theirs(images=Image.fromarray(noise()), return_tensors="np")["pixel_values"]
    found = ours(images=noise())["images"]
    np.testing.assert_allclose(found, pixels.transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("is_saved", [False, True], ids=["released", "saved"])
def test_siglips_ids_and_pixels_agree(siglip_folder, tmp_path, is_saved):  # noqa: F811
    ours, folder = lp.load_processor(siglip_folder), siglip_folder
    if is_saved:
        ours.save(tmp_path)
        folder = tmp_path
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"))
    images = transformers.SiglipImageProcessorPil.from_pretrained(folder)
    theirs = transformers.SiglipProcessor(images, tokenizer)
    texts = [*TEXTS, *MORE, "the cat " * 100]
    check(ours, theirs, texts, padding="max_length", max_length=64)
    pixels = theirs(images=Image.fromarray(noise()), return_tensors="np")["pixel_values"]
    found = ours(images=noise())["images"]
    np.testing.assert_allclose(found, pixels.transpose(0, 2, 3, 1), atol=1e-6)
