"""Our families against transformers, in float32: a ladder from features to gradients and files.

Weights go through files: transformers saves, we load, so names, layouts and configs are tested too.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import llmprep_jax as lp
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.weights.table import entries
from tests.parity import torch_models

pytestmark = pytest.mark.parity
forward = jax.jit(lambda model, tokens, **where: model(tokens, **where).logits)


@pytest.fixture(scope="module", params=torch_models.CASES)
def pair(request, tmp_path_factory):
    """transformers' model and ours with its weights."""
    theirs = torch_models.make(request.param)
    folder = torch_models.save(theirs, tmp_path_factory.mktemp("hf"))
    return theirs, lp.load_model(folder)


def test_features_before_the_head_agree(pair):
    theirs, ours = pair
    tokens = torch_models.tokens()
    with torch.no_grad():
        expected = theirs.model(torch.tensor(tokens)).last_hidden_state.numpy()
    found = jax.jit(lambda model: model.features(tokens)[0])(ours)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_logits_agree(pair):
    theirs, ours = pair
    tokens = torch_models.tokens()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(forward(ours, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_rows_agree(pair, side):
    theirs, ours = pair
    tokens, mask = torch_models.tokens(), np.ones((2, 24), bool)
    mask[1, :7] = False
    if side == "right":
        mask = mask[:, ::-1].copy()
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        expected = theirs(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    found = np.asarray(forward(ours, tokens, mask=mask))
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-4)


def test_loss_and_every_gradient_agree(pair):
    theirs, ours = pair
    tokens = torch_models.tokens()
    theirs.zero_grad()
    expected = theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss
    expected.backward()
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 1),
        "loss_mask": np.ones(tokens.shape, np.float32),
    }
    batch["loss_mask"][:, -1] = 0

    def mean_loss(model):
        loss = next_token_loss(model, batch)
        return loss.total / loss.count

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(ours)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    references = torch_models.gradients(theirs)
    checked = 0
    for path, row in entries(ours, ours.weights).items():
        grad = grads
        for step in path.split("."):
            grad = getattr(grad, step)
        for place, hf_name in row.names().items():
            reference = references[hf_name]
            found = row.to_theirs(np.asarray(grad[...])[place])
            scale = max(np.abs(reference).max(), 1e-3)
            assert np.abs(found - reference).max() / scale < 1e-4, hf_name
            checked += 1
    assert checked == len(references)


def test_a_folder_that_we_save_loads_in_transformers(pair, tmp_path):
    theirs, ours = pair
    lp.save_model(ours, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    assert type(again) is type(theirs)
    tokens = torch.tensor(torch_models.tokens())
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_generation_is_token_for_token_the_same(pair, side):
    theirs, ours = pair
    tokens, mask = torch_models.tokens(3, 12), np.ones((3, 12), bool)
    mask[1, :5], mask[2, :9] = False, False
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, 12:].numpy()
    if side == "right":
        rolls = [(row[keep], keep) for row, keep in zip(tokens, mask, strict=True)]
        tokens = np.stack([np.pad(row, (0, 12 - len(row))) for row, _ in rolls])
        mask = np.stack([np.arange(12) < len(row) for row, _ in rolls])
    found = np.asarray(lp.generate_tokens(ours, tokens, mask, max_new_tokens=64))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_the_language_model_of_a_multimodal_gemma_loads(tmp_path, cap):
    _, fields = torch_models.CASES["gemma3"]
    fields = {**fields, "final_logit_softcapping": cap}  # which the multimodal class leaves alone
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**fields),
        vision_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        mm_tokens_per_image=4,
        image_token_index=95,
        boi_token_index=94,
        eoi_token_index=93,
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = lp.load_model(tmp_path)
    tokens = torch_models.tokens() % 90
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(forward(ours, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_bf16_follows_transformers_bf16_as_closely_as_rounding_lets_it(tmp_path, name):
    theirs = torch_models.make(name)
    tokens = torch_models.tokens()
    with torch.no_grad():
        exact = theirs(torch.tensor(tokens)).logits.numpy()
        folder = torch_models.save(theirs.to(torch.bfloat16), tmp_path)
        expected = theirs(torch.tensor(tokens)).logits.float().numpy()
    ours = lp.load_model(folder)
    assert ours.layers.mlp.up.w.dtype == jnp.bfloat16
    found = np.asarray(forward(ours, tokens))
    assert np.abs(found - expected).mean() < 0.02 * np.abs(expected).max()
    # and no further from float32 than theirs
    assert np.abs(found - exact).mean() < 1.5 * np.abs(expected - exact).mean()


def test_packed_documents_agree(pair):
    theirs, ours = pair
    tokens = torch_models.tokens()
    positions = np.array([[*range(7), *range(12), *range(5)]] * 2)
    segments = np.array([[1] * 7 + [2] * 12 + [3] * 5] * 2)
    with torch.no_grad():  # positions that begin anew are packed documents, where there is no cache
        place = torch.tensor(positions)
        expected = theirs(torch.tensor(tokens), position_ids=place, use_cache=False).logits
    found = forward(ours, tokens, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_a_config_in_the_spelling_of_transformers_4_is_the_same_model(pair, tmp_path):
    theirs, ours = pair
    folder = torch_models.save(theirs, tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    path.write_text(json.dumps(config))
    again, tokens = lp.load_model(folder), torch_models.tokens()
    np.testing.assert_array_equal(forward(again, tokens), forward(ours, tokens))
