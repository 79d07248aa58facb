"""Models that read images against transformers: logits, gradients, greedy tokens, folders."""

import copy
import functools

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.nn.param import Param
from llmprep_jax.train.losses import sum_losses
from llmprep_jax.weights import table
from tests.grids import cases
from tests.peft.test_methods import scattered

IMAGE, BEGIN, END, WORDS = 120, 121, 122, 119
_TEXT = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
)
_GEMMA = {**_TEXT, "sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20}
_TOWER = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=28
)
_PLAIN = {**_TOWER, "vision_use_head": False}


def gemma(text: dict, tower: dict, each: int):
    """transformers' Gemma 3, and how many tokens an image has."""
    cfg = transformers.Gemma3Config(
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=each,
        image_token_index=IMAGE,
        boi_token_index=BEGIN,
        eoi_token_index=END,
        tie_word_embeddings=text.get("tie_word_embeddings", True),
        attn_implementation="eager",
    )
    return transformers.Gemma3ForConditionalGeneration(cfg), each


def llava(text: dict, tower: dict, **fields):
    """transformers' LLaVA, likewise."""
    cfg = transformers.LlavaConfig(
        text_config=text,
        vision_config={"model_type": "clip_vision_model", **tower},
        image_token_index=IMAGE,
        **fields,
    )
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    is_full = fields.get("vision_feature_select_strategy") == "full"
    return transformers.LlavaForConditionalGeneration(cfg), patches + is_full


def deepseek_vl(text: dict, tower: dict, high: dict | None = None, **fields):
    """transformers' DeepSeek-VL, of one tower or of two."""
    kind = "DeepseekVL" if high is None else "DeepseekVLHybrid"
    more = {} if high is None else {"high_res_vision_config": {**_SAM, **high}}
    cfg = getattr(transformers, f"{kind}Config")(
        text_config={**text, "model_type": "llama"},
        vision_config={"model_type": "siglip_vision_model", **tower},
        image_token_id=IMAGE,
        **more,
        **fields,
    )
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(cfg)
    if high is not None:  # fixed at 24, which is what the release's sizes give
        model.model.high_res_vision_proj.output_size = int(patches**0.5)
    return model, patches


_SAM = dict(
    model_type="sam_vision_model",
    hidden_size=16,
    output_channels=8,
    num_hidden_layers=5,
    num_attention_heads=2,
    image_size=40,
    patch_size=4,
    window_size=4,
    global_attn_indexes=[1, 3],
    mlp_dim=40,
)


def janus(text: dict, tower: dict, vq: dict, **fields):
    """transformers' Janus; what draws is in it too, and has a file of its own."""
    width = text["hidden_size"]
    patches = (tower["image_size"] // tower["patch_size"]) ** 2
    cfg = transformers.JanusConfig(
        text_config={**text, "model_type": "llama"},
        vision_config={**tower, "projection_dim": width, "num_image_tokens": patches},
        vq_config={**_VQ, "projection_dim": width, "image_token_embed_dim": width, **vq},
        image_token_id=IMAGE,
        **fields,
    )
    return transformers.JanusForConditionalGeneration(cfg), patches


_VQ = dict(
    base_channels=32,
    channel_multiplier=[1, 2, 1],
    num_res_blocks=1,
    num_embeddings=40,
    embed_dim=4,
    latent_channels=20,
)

CASES = {
    "gemma3-4-tokens": lambda: gemma(_GEMMA, {**_PLAIN, "patch_size": 7}, 4),
    "gemma3-unused-pooling": lambda: gemma(
        {**_GEMMA, "num_key_value_heads": 1, "sliding_window": 16},
        {**_TOWER, "patch_size": 4, "num_hidden_layers": 2},
        49,
    ),
    "gemma3-untied-window-below-an-image": lambda: gemma(
        {**_GEMMA, "sliding_window": 3, "tie_word_embeddings": False},
        {**_PLAIN, "patch_size": 7, "layer_norm_eps": 1e-3},
        16,
    ),
    "llava": lambda: llava({**_TEXT, "model_type": "llama"}, {**_TOWER, "patch_size": 7}),
    "llava-full-qwen2": lambda: llava(
        {**_TEXT, "model_type": "qwen2", "num_attention_heads": 4, "head_dim": 8},
        {**_TOWER, "patch_size": 14, "hidden_act": "gelu"},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
    ),
    "deepseek-vl": lambda: deepseek_vl(
        _TEXT, {**_PLAIN, "patch_size": 7, "hidden_act": "gelu"}, tie_word_embeddings=False
    ),
    "deepseek-vl-tied-unused-pooling": lambda: deepseek_vl(_TEXT, {**_TOWER, "patch_size": 14}),
    "deepseek-vl-hybrid": lambda: deepseek_vl(
        _TEXT, {**_PLAIN, "patch_size": 7, "hidden_act": "gelu"}, {}, tie_word_embeddings=False
    ),
    "deepseek-vl-hybrid-whole-windows": lambda: deepseek_vl(
        _TEXT,
        {**_PLAIN, "patch_size": 9},
        {"window_size": 5, "global_attn_indexes": [0, 4], "qkv_bias": False},
        tie_word_embeddings=False,
    ),
    "janus": lambda: janus(
        _TEXT, {**_TOWER, "patch_size": 4, "mlp_ratio": 40 / 24}, {}, tie_word_embeddings=False
    ),
    "janus-tied": lambda: janus(
        {**_TEXT, "num_key_value_heads": 4, "rms_norm_eps": 1e-2},
        {**_TOWER, "patch_size": 2, "image_size": 12, "layer_norm_eps": 1e-3},
        {"channel_multiplier": [1, 2]},
    ),
    "llava-first-block": lambda: llava(
        {**_TEXT, "model_type": "llama", "tie_word_embeddings": True},
        {**_TOWER, "patch_size": 9},
        vision_feature_layer=1,
        multimodal_projector_bias=False,
        tie_word_embeddings=True,
    ),
}


@functools.cache
def make(name: str, folder: str):
    """transformers' model, ours with its weights, and inputs of two rows with unlike images."""
    torch.manual_seed(0)
    theirs, each = CASES[name]()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(folder)
    rng = np.random.default_rng(0)
    run = [BEGIN, *[IMAGE] * each, END]
    words = lambda n: rng.integers(3, WORDS, n).tolist()  # noqa: E731
    rows = [words(3) + run + words(2) + run + words(4), words(5) + run + words(each + 6)]
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    mask = np.array([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    ours = lp.load_model(folder)
    images = {
        name: rng.normal(size=(3, size, size, 3)).astype(np.float32)
        for name, size in ours.image_sizes.items()
    }
    return theirs, ours, tokens, mask, images


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return make(request.param, str(tmp_path_factory.getbasetemp() / request.param))


def some(*fast: str):
    """These of the cases, and the rest of them under the mark `grid`."""
    return pytest.mark.parametrize("case", cases(CASES, fast=fast), indirect=True)


# all cases have logits and folders of their own; what is dearer is of each family and kind of tower
FAMILIES = ("gemma3-4-tokens", "llava", "deepseek-vl-hybrid", "janus")


def forward(ours, tokens, mask, images) -> np.ndarray:
    """Our logits, compiled; which images are of which row is seen in the tokens."""
    run = jax.jit(lambda ours, images: ours(tokens, **images, mask=mask).logits)
    return np.asarray(run(ours, images))


THEIRS = {"images": "pixel_values", "images_high": "high_res_pixel_values"}


def their_inputs(theirs, tokens, mask, images):
    types = {"token_type_ids": torch.tensor(tokens == IMAGE).long()}
    return (types if theirs.config.model_type == "gemma3" else {}) | dict(
        input_ids=torch.tensor(tokens).long(),
        attention_mask=torch.tensor(mask).long(),
        **{THEIRS[name]: torch.tensor(x.transpose(0, 3, 1, 2)) for name, x in images.items()},
    )


def test_logits_agree(case):
    theirs, ours, tokens, mask, images = case
    with torch.no_grad():
        expected = theirs(**their_inputs(theirs, tokens, mask, images)).logits.numpy()
    found = forward(ours, tokens, mask, images)
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-4)


@some(*FAMILIES, "llava-full-qwen2", "deepseek-vl")
def test_gradients_of_all_parts_agree(case):
    theirs, ours, tokens, mask, images = case
    inputs = their_inputs(theirs, tokens, mask, images)
    labels = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], -100)
    theirs.zero_grad()
    loss = theirs(**inputs, labels=labels).loss
    loss.backward()
    names = {name: x.grad for name, x in theirs.named_parameters() if x.grad is not None}
    media = ours.by_row(tokens, images)
    targets = np.where(mask[:, 1:], tokens[:, 1:], 0)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": targets,
        "loss_mask": mask[:, 1:].astype(np.float32),
        "segment_ids": mask[:, :-1].astype(np.int32),
    }

    graph, params, rest = nnx.split(ours, Param, ...)
    grads = jax.jit(jax.grad(lambda p: _loss(nnx.merge(graph, p, rest), batch, media)))(params)
    model = nnx.merge(graph, grads, rest)
    found = dict(table.export(model, ours.weights))
    compared = 0
    for name, value in found.items():
        expected = names.get(ours.weights.module_name(name))
        if expected is None:  # read, and used by nobody
            continue
        compared += 1
        scale = max(float(expected.abs().max()), 1e-6)
        np.testing.assert_allclose(value, expected.numpy(), atol=2e-4 * scale + 1e-7, err_msg=name)
    assert compared == len(names)


def _loss(model, batch, media):
    x_BTD = model.embed_inputs(batch["tokens"], **media)
    more = {**batch, "spans": model.spans(batch["tokens"])}
    total, count, _ = model.next_token_terms(
        x_BTD, more, functools.partial(sum_losses, model.decoder, 0.0)
    )
    return total / count


@some(*FAMILIES, "gemma3-untied-window-below-an-image")
def test_greedy_tokens_agree(case):
    theirs, ours, tokens, mask, images = case
    row, two = tokens[:1, : int(mask[0].sum())], {name: x[:2] for name, x in images.items()}
    inputs = their_inputs(theirs, row, np.ones_like(row, bool), two)
    with torch.no_grad():
        expected = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    found = lp.generate_tokens(ours, row, max_new_tokens=8, media=two)
    np.testing.assert_array_equal(found[0], expected[0, row.shape[1] :])


def test_folders_agree_bit_by_bit_both_ways(case, tmp_path):
    theirs, ours, *_ = case
    folder = lp.save_model(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(folder)
    ours_of = again.state_dict()
    assert theirs.state_dict().keys() == ours_of.keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours_of[name]), name
    family = registry.family_of(ours.cfg)
    assert family.from_hf(again.config.to_dict(), tuple(ours_of)) == ours.cfg


@some(*FAMILIES, "llava-full-qwen2")
def test_the_language_model_alone_is_loaded_by_name_and_saved_as_one(case, tmp_path):
    _theirs, ours, tokens, _mask, _ = case
    row = np.where(tokens[1:2] == IMAGE, 5, tokens[1:2])
    alone = lp.load_model(ours.source.path, only="language")
    folder = lp.save_model(alone, tmp_path / "text")
    text = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = text(torch.tensor(row).long()).logits.numpy()
    np.testing.assert_allclose(alone(row).logits, expected, atol=1e-4)
    np.testing.assert_array_equal(alone(row).logits, ours.language(row).logits)


@some("gemma3-4-tokens", "llava", "deepseek-vl-hybrid")
def test_adapters_of_all_linear_layers_go_both_ways(case, tmp_path):
    theirs, ours, tokens, mask, images = case
    method = lp.peft.LoRA(rank=3, alpha=6, targets="all-linear")
    adapted = scattered(lp.peft.inject(ours, method))
    folder = lp.peft.save(adapted, tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder).eval()
    with torch.no_grad():
        expected = wrapped(**their_inputs(theirs, tokens, mask, images)).logits.numpy()
    found = forward(adapted, tokens, mask, images)
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-4)
    assert np.abs(found - forward(ours, tokens, mask, images)).max() > 1e-2

    wrapped.save_pretrained(tmp_path / "theirs")
    again = lp.peft.load(ours, tmp_path / "theirs")
    np.testing.assert_allclose(forward(again, tokens, mask, images), found, atol=1e-5)
