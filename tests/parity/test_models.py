"""Our families against transformers, in float32: a ladder from features to gradients and files.

Weights go through files: transformers saves, we load, so names, layouts and configs are tested too.
"""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.train.losses import sum_losses
from llmprep_jax.weights.table import entries
from tests.grids import cases
from tests.parity import torch_models

pytestmark = pytest.mark.parity
forward = jax.jit(lambda model, tokens, **where: model(tokens, **where).logits)
TOKENS = torch_models.tokens()
BATCH = {
    "tokens": TOKENS,
    "targets": np.roll(TOKENS, -1, 1),
    "loss_mask": np.pad(np.ones((2, 23), np.float32), ((0, 0), (0, 1))),
}


@pytest.fixture(scope="module", params=torch_models.CASES)
def pair(request, pair_of):
    """transformers' model and ours with its weights."""
    return pair_of(request.param)


# every case has features, logits, loss and gradients of its own; what compiles further programs is
# of each family, with and without a window, a tied table and experts
TELLING = ("llama", "llama-tied-mqa", "qwen2-window", "qwen3-layer-types", "mistral")
TELLING += ("gemma3", "gemma3-mqa-untied", "deepseek-v2", "deepseek-v3")
telling = pytest.mark.parametrize("pair", cases(torch_models.CASES, fast=TELLING), indirect=True)


@jax.jit
def rungs(model):
    """Loss, with hidden states and logits, and every gradient: one program for three rungs."""

    def mean_loss(model):
        hidden = model.features(model.embed_inputs(TOKENS))[0]
        total = sum_losses(model, 0.0, hidden, BATCH["targets"], BATCH["loss_mask"])
        return total / BATCH["loss_mask"].sum(), (hidden, model.unembed(hidden))

    return jax.value_and_grad(mean_loss, has_aux=True)(model)


@pytest.fixture(scope="module")
def found(pair):
    """What `rungs` gives for our model."""
    return rungs(pair[1])


def test_features_before_the_head_agree(pair, found):
    theirs, _ = pair
    with torch.no_grad():
        expected = theirs.model(torch.tensor(TOKENS)).last_hidden_state.numpy()
    ((_, (hidden, _)), _) = found
    np.testing.assert_allclose(hidden, expected, atol=1e-4)


def test_logits_agree(pair, found):
    theirs, _ = pair
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(expected).max() > 1
    ((_, (_, logits)), _) = found
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@telling
def test_logits_of_packed_documents_and_of_padded_rows_agree(pair):
    """Two rows of three documents, two padded left and two right."""
    theirs, ours = pair
    lengths = [[7, 12, 5]] * 2 + [[24], [17], [24], [17]]
    positions, segments = np.zeros((2, 6, 24), np.int32)
    for row, documents in enumerate(lengths):
        start = 7 if row == 3 else 0
        end = start + sum(documents)
        positions[row, start:end] = np.concatenate([*map(np.arange, documents)])
        segments[row, start:end] = np.repeat(np.arange(len(documents)) + 1, documents)
    tokens = np.concatenate([TOKENS] * 3)
    logits = np.asarray(forward(ours, tokens, positions=positions, segment_ids=segments))
    for rows, is_packed in ((slice(0, 2), True), (slice(2, 6), False)):
        places = {"position_ids": torch.tensor(positions[rows]).long()}
        if is_packed:  # positions that begin anew are packed documents, where there is no cache
            places["use_cache"] = False
        else:
            places["attention_mask"] = torch.tensor(segments[rows]).long()
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens[rows]), **places).logits.numpy()
        real = segments[rows] > 0
        np.testing.assert_allclose(logits[rows][real], expected[real], atol=1e-4)


def test_loss_and_every_gradient_agree(pair, found):
    theirs, ours = pair
    tokens = torch.tensor(TOKENS).long()
    theirs.zero_grad()
    expected = theirs(tokens, labels=tokens).loss
    expected.backward()
    ((loss, _), grads) = found
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    references = torch_models.gradients(theirs)
    checked = 0
    for path, row in entries(ours, ours.weights).items():
        grad = grads
        for step in path.split("."):
            grad = getattr(grad, step)
        grad = np.asarray(grad[...])
        for place, hf_name in row.names().items():
            reference = references[hf_name]
            scale = max(np.abs(reference).max(), 1e-3)
            assert np.abs(row.to_theirs(grad[place]) - reference).max() / scale < 1e-4, hf_name
            checked += 1
    assert checked == len(references)


@telling
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


@telling
def test_greedy_generation_is_token_for_token_the_same(pair):
    """Rows of three lengths, padded left as theirs have to be, and then right."""
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
    rows = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
    tokens = np.concatenate([tokens, [np.pad(row, (0, 12 - len(row))) for row in rows]])
    mask = np.concatenate([mask, [np.arange(12) < len(row) for row in rows]])
    tokens = lp.generate_tokens(ours, tokens, mask, max_new_tokens=64)
    np.testing.assert_array_equal(tokens, np.concatenate([expected] * 2))


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
    ours = lp.load_model(tmp_path, only="language")
    tokens = torch_models.tokens() % 90
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(forward(ours, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
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
    again = lp.load_model(folder)
    assert again.cfg == ours.cfg
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(ours))
