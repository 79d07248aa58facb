"""CLIP and SigLIP against transformers, live and in float32, by way of folders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.train.contrastive import sum_pairs
from llmprep_jax.weights import table

pytestmark = pytest.mark.parity
_TEXT = dict(vocab_size=99, hidden_size=48, intermediate_size=72, num_hidden_layers=3)
_TEXT |= dict(num_attention_heads=4, max_position_embeddings=17)
_VISION = dict(hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=5)
_VISION |= dict(image_size=29, patch_size=7)  # a pixel is left over
_IDS = dict(bos_token_id=97, pad_token_id=98)
END = 98  # the greatest id, and what texts are padded with
CASES = {
    "clip-old-eos": ("clip", dict(**_TEXT, **_IDS, eos_token_id=2), _VISION, {}),
    "clip-openclip": (
        "clip",
        dict(**_TEXT, **_IDS, eos_token_id=END, hidden_act="gelu"),
        {**_VISION, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
        dict(projection_dim=24, logit_scale_init_value=1.5),
    ),
    # ends with an id that is not the greatest
    "clip-low-eos": (
        "clip",
        dict(**_TEXT, **_IDS, eos_token_id=5),
        {**_VISION, "image_size": 14},
        {},
    ),
    "siglip": ("siglip", {**_TEXT, "projection_size": 40}, _VISION, {}),
    "siglip-as-wide": (
        "siglip",
        {**_TEXT, "hidden_size": 40, "num_attention_heads": 2, "hidden_act": "gelu"},
        {**_VISION, "patch_size": 14, "num_hidden_layers": 1},
        {},
    ),
}


def make(name: str) -> transformers.PreTrainedModel:
    """A model whose weights are all random: norms, biases and scalars too."""
    kind, text, vision, more = CASES[name]
    classes = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }
    make_config, make_model = classes[kind]
    config = make_config(text_config=text, vision_config=vision, **more)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = make_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(name: str) -> dict[str, np.ndarray]:
    """Three texts of unlike lengths, padded on the right, and as many images."""
    rng, vision = np.random.default_rng(1), CASES[name][2]
    lengths, width = np.array([5, 9, 12])[:, None], 12
    tokens = rng.integers(10, 97, (3, width), dtype=np.int32)
    end = 5 if name == "clip-low-eos" else END
    columns = np.arange(width)
    tokens[columns >= lengths] = END
    np.put_along_axis(tokens, lengths - 1, end, 1)
    size = vision["image_size"]
    images = rng.normal(size=(3, size, size, 3)).astype(np.float32)
    return {"tokens": tokens, "images": images, "mask": columns < lengths}


def theirs_of(model, tokens, images, mask=None, **more):
    return model(
        input_ids=torch.tensor(tokens).long(),
        pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
        attention_mask=None if mask is None else torch.tensor(mask).long(),
        **more,
    )


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A case's name, transformers' model, and ours with its weights."""
    theirs, folder = make(request.param), tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return request.param, theirs, lp.load_model(folder)


@pytest.mark.parametrize("is_masked", [False, True], ids=["no-mask", "mask"])
def test_logits_and_unit_vectors_agree_under_right_padding(pair, is_masked):
    name, theirs, ours = pair
    given = inputs(name)
    mask = given.pop("mask") if is_masked else None
    given.pop("mask", None)
    with torch.no_grad():
        expected = theirs_of(theirs, **given, mask=mask)
    found = ours(**given, mask=mask)
    for field in ("logits_per_image", "text_embeds", "image_embeds"):
        np.testing.assert_allclose(
            getattr(found, field), getattr(expected, field).numpy(), atol=1e-4, err_msg=field
        )
    assert np.ptp(np.asarray(found.logits_per_image)) > 0.05


def test_every_layers_features_of_an_image_agree(pair):
    name, theirs, ours = pair
    images = inputs(name)["images"]
    with torch.no_grad():
        expected = theirs.vision_model(
            torch.tensor(images).permute(0, 3, 1, 2), output_hidden_states=True
        )
    layers = len(expected.hidden_states) - 1
    for stop in range(-layers + 1, 0):
        hidden = expected.hidden_states[stop - 1].numpy()
        np.testing.assert_allclose(ours.vision.features(images, stop), hidden, atol=1e-4)
    last = expected.last_hidden_state.numpy()
    np.testing.assert_allclose(ours.vision.features(images), last, atol=1e-4)
    np.testing.assert_allclose(ours.vision(images), expected.pooler_output.numpy(), atol=1e-4)


def test_loss_and_every_gradient_agree(pair):
    name, theirs, ours = pair
    given = inputs(name)
    del given["mask"]
    theirs.zero_grad()
    expected = theirs_of(theirs, **given, return_loss=True).loss
    expected.backward()
    kind = "softmax" if ours.logit_bias is None else "sigmoid"

    @jax.jit
    def loss_and_grads(model):
        def loss(model):
            out = model(**given)
            return sum_pairs(out.image_embeds, out.text_embeds, *model.similarity(), kind) / 3

        return jax.value_and_grad(loss)(model)

    loss, grads = loss_and_grads(ours)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    found = dict(table.export(grads, ours.weights))
    references = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    assert found.keys() == references.keys()
    for key, reference in references.items():
        scale = max(np.abs(reference).max(), 1e-3)
        assert np.abs(found[key] - reference).max() / scale < 1e-4, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folders_go_both_ways_bit_by_bit(pair, tmp_path, dtype):
    name, theirs, _ = pair
    theirs = make(name).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = lp.load_model(tmp_path / "theirs")
    lp.save_model(ours, tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert again.dtype == theirs.dtype
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    given = {key: value for key, value in inputs(name).items() if key != "mask"}
    if dtype == "float32":
        with torch.no_grad():
            again.config._attn_implementation = "eager"
            logits = theirs_of(again.eval(), **given).logits_per_image
        np.testing.assert_allclose(ours(**given).logits_per_image, logits.numpy(), atol=1e-4)


def test_legacy_fields_of_towers_count_for_more(tmp_path):
    """As OpenAI's large models are on the hub: what they leave out is the class's default."""
    theirs = make("clip-old-eos")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["text_config_dict"] = {
        key: config["text_config"][key]
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    } | {"num_hidden_layers": 3, "max_position_embeddings": 17}
    config["vision_config_dict"] = dict(config["vision_config"])
    config["text_config"] = {**config["text_config"], "hidden_size": 512}
    path.write_text(json.dumps(config))
    expected = transformers.CLIPConfig.from_pretrained(tmp_path).text_config
    ours = lp.load_model(tmp_path)
    assert (ours.cfg.text.eos_id, ours.cfg.text.dim) == (expected.eos_token_id, 48)
    assert expected.eos_token_id == 49407


@pytest.mark.parametrize("name", ["clip-openclip", "siglip"])
def test_bf16_follows_transformers_bf16_as_closely_as_rounding_lets_it(tmp_path, name):
    theirs, given = make(name), inputs(name)
    del given["mask"]
    with torch.no_grad():
        exact = theirs_of(theirs, **given).logits_per_image.numpy()
        theirs.to(torch.bfloat16).save_pretrained(tmp_path)
        pixels = torch.tensor(given["images"]).permute(0, 3, 1, 2).bfloat16()
        tokens = torch.tensor(given["tokens"]).long()
        expected = theirs(tokens, pixels).logits_per_image.float().numpy()
    ours = lp.load_model(tmp_path)
    assert ours.vision.layers.mlp.up.w.dtype == jnp.bfloat16
    found = np.asarray(ours(**given).logits_per_image)
    assert np.abs(found - exact).mean() < 1.5 * np.abs(expected - exact).mean() + 0.01


PRESETS = [
    name
    for family in registry.FAMILIES
    if family.__name__.endswith(("clip", "siglip"))
    for name in family.PRESETS
]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_of_the_size_that_transformers_makes_of_them(name):
    cfg = registry.preset(name)
    hf = registry.to_hf(cfg)
    make_config = transformers.CLIPConfig if cfg.model_type == "clip" else transformers.SiglipConfig
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(make_config(**hf))
    expected = {key: tuple(p.shape) for key, p in theirs.named_parameters()}
    ours = registry.abstract(cfg)
    rows = table.entries(ours, ours.weights).values()
    found = {key: row.their_shape() for row in rows for key in row.names().values()}
    assert found == expected


def test_dtypes_of_all_parts_are_set_together():
    cfg = registry.preset("siglip-base-patch16-224")
    compute = dataclasses.replace(cfg.compute, dtype="bfloat16")
    changed = cfg.with_compute(compute)
    assert changed.text.compute == changed.vision.compute == changed.compute == compute
    assert nnx.state(registry.abstract(changed))


NAMES = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
REGEX = r"vision_model\.encoder.*(out_proj|fc1)"
# of SigLIP PEFT's "all-linear" has a matrix of torch's attention in one piece, which is none here
TARGETS = [("clip-openclip", NAMES), ("clip-openclip", REGEX), ("clip-openclip", "all-linear")]
TARGETS += [("siglip", NAMES), ("siglip", REGEX)]


@pytest.mark.parametrize(("name", "targets"), TARGETS)
def test_peft_folders_go_both_ways(name, targets, tmp_path):
    given = inputs(name)
    del given["mask"]
    make(name).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    theirs = peft.get_peft_model(make(name), config).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        expected = theirs_of(theirs, **given).logits_per_image.numpy()
        plain = theirs_of(make(name), **given).logits_per_image.numpy()
    assert np.abs(expected - plain).max() > 0.01
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lp.peft.load(lp.load_model(tmp_path / "base"), tmp_path / "theirs")
    np.testing.assert_allclose(ours(**given).logits_per_image, expected, atol=1e-4)
    lp.peft.save(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(make(name), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        found = theirs_of(again, **given).logits_per_image.numpy()
    np.testing.assert_array_equal(found, expected)
    merged = lp.peft.merge(ours)
    np.testing.assert_allclose(merged(**given).logits_per_image, expected, atol=1e-4)
