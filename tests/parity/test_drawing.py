"""Janus' way of drawing against transformers: codes of pictures and back, logits of codes, and
pictures that are drawn with guidance."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from llmprep_jax.generate.images import decode, generate_codes
from llmprep_jax.nn.param import Param
from llmprep_jax.train.losses import cross_entropy
from llmprep_jax.weights import table
from tests.parity.test_seeing import BEGIN, make

CASES = ("janus", "janus-tied")


@functools.cache
def made(name: str, folder: str):
    theirs, ours, *_ = make(name, folder)
    return theirs, ours


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    return made(request.param, str(tmp_path_factory.getbasetemp() / f"drawing-{request.param}"))


def some_codes(ours, rows: int = 2) -> np.ndarray:
    cfg, rng = ours.cfg, np.random.default_rng(1)
    return rng.integers(0, cfg.vq.num_codes, (rows, cfg.tokens_per_image), dtype=np.int32)


def their_logits(theirs, codes: np.ndarray) -> torch.Tensor:
    x = theirs.prepare_embeddings_for_image_generation(torch.tensor(codes).long())
    hidden = theirs.model.language_model(inputs_embeds=x).last_hidden_state
    return theirs.model.generation_head(hidden)


def test_logits_of_codes_agree(pair):
    theirs, ours = pair
    codes = some_codes(ours)
    with torch.no_grad():
        expected = their_logits(theirs, codes).numpy()
    np.testing.assert_allclose(ours.image_logits(codes), expected, atol=1e-4)


def test_gradients_of_what_draws_agree(pair):
    theirs, ours = pair
    codes = some_codes(ours)
    theirs.zero_grad()
    logits = their_logits(theirs, codes)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(
        logits, torch.tensor(codes[:, 1:]).long().flatten()
    ).backward()
    names = {name: x.grad for name, x in theirs.named_parameters() if x.grad is not None}

    graph, params, rest = nnx.split(ours, Param, ...)

    def loss(params):
        model = nnx.merge(graph, params, rest)
        return cross_entropy(model.image_logits(codes)[:, :-1], codes[:, 1:]).mean()

    grads = nnx.merge(graph, jax.jit(jax.grad(loss))(params), rest)
    found = dict(table.export(grads, ours.weights))
    assert {name for name in names if "generation_" in name} == {
        "model.generation_embeddings.weight",
        *(
            f"model.generation_{layer}.{kind}"
            for layer in (
                *("aligner.fc1", "aligner.hidden_layers.0"),
                *("head.proj_out", "head.vision_head"),
            )
            for kind in ("weight", "bias")
        ),
    }
    for name, expected in names.items():
        scale = max(float(expected.abs().max()), 1e-6)
        atol = 2e-4 * scale + 1e-7
        np.testing.assert_allclose(found[name], expected.numpy(), atol=atol, err_msg=name)


def test_pictures_of_codes_agree(pair):
    theirs, ours = pair
    codes, size = some_codes(ours), ours.cfg.vision.image_size
    with torch.no_grad():
        expected = theirs.decode_image_tokens(torch.tensor(codes).long()).numpy()
    found = np.asarray(ours.decode_codes(codes))
    assert found.shape == (2, size, size, 3)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_codes_of_pictures_agree(pair):
    theirs, ours = pair
    size = ours.cfg.vision.image_size
    images = np.random.default_rng(2).uniform(-1, 1, (4, size, size, 3)).astype(np.float32)
    vq, table_VZ = theirs.model.vqmodel, theirs.model.vqmodel.quantize.embedding.weight
    whole = table_VZ.detach().clone()
    with torch.no_grad():
        # theirs takes distances of what is not normalised, which differ unless rows have length 1
        table_VZ.copy_(torch.nn.functional.normalize(whole, dim=-1))
        encoded = vq.encode(torch.tensor(images.transpose(0, 3, 1, 2)), return_dict=True)
        table_VZ.copy_(whole)
    found = np.asarray(ours.encode_codes(images))
    np.testing.assert_array_equal(found, encoded.image_tokens.reshape(4, -1))
    assert len(np.unique(found)) > 5


def test_what_is_quantised_of_faint_pictures_agrees(pair):
    theirs, ours = pair
    size = ours.cfg.vision.image_size
    # so faint that the eps of the norms shows
    images = 0.01 * np.random.default_rng(3).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    vq = theirs.model.vqmodel
    with torch.no_grad():
        x = vq.quant_conv(vq.encoder(torch.tensor(images.transpose(0, 3, 1, 2))))
        expected = torch.nn.functional.normalize(x, dim=1).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(ours.vq.latents(images), expected, atol=5e-3)


BOS, PAD = 1, 2


@pytest.mark.parametrize("guidance", [1.5, 5.0])
def test_pictures_drawn_with_guidance_agree_code_by_code(pair, guidance):
    theirs, ours = pair
    rows = [[BOS, 9, 17, 33, 5, BEGIN], [BOS, 40, BEGIN], [BOS, 8, 8, 60, BEGIN]]
    width = max(map(len, rows))
    tokens = np.array([[PAD] * (width - len(row)) + row for row in rows])
    mask = np.array([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    config = transformers.GenerationConfig(
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=None, do_sample=False
    )
    config.generation_kwargs = {"boi_token_id": BEGIN}
    config.guidance_scale = guidance
    expected = theirs.generate(
        torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        generation_mode="image",
        generation_config=config,
    )
    settings = dict(pad_id=PAD, guidance=guidance, temperature=0.0)
    found = generate_codes(ours, tokens, mask, **settings)
    np.testing.assert_array_equal(found, expected)
    assert len({tuple(row) for row in np.asarray(found).tolist()}) >= 2
    with torch.no_grad():
        pictures = theirs.decode_image_tokens(expected)
    # theirs by its image processor: mean and std of a half
    bytes_of = np.clip((pictures.numpy() * 0.5 + 0.5) * 255, 0, 255).astype(np.uint8)
    assert np.abs(decode(ours, found).astype(int) - bytes_of.astype(int)).max() <= 1
