"""DeepSeek-VL in DeepSeek's own form: names of tensors, sizes by names of towers, prompts."""

import dataclasses
import functools
import json

import chex
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file

import llmprep_jax as lp
from llmprep_jax.models import deepseek_vl, registry, sam, siglip
from llmprep_jax.models.deepseek_vl import released
from llmprep_jax.models.deepseek_vl.processor import SYSTEM
from llmprep_jax.weights import table
from llmprep_jax.weights.safetensors import SafetensorsFile
from tests.models.test_deepseek_vl2_processor import write_tokenizer
from tests.models.test_seeing import CONFIGS
from tests.peft.test_methods import scattered
from tests.random_modules import random_module

HIGH = "vision_model.vision_tower_high.vision_tower."
# Hugging Face's beginnings of names, and what DeepSeek's files have there
NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.aligner.linear1.": "aligner.layers.0.",
    "model.aligner.linear2.": "aligner.layers.2.",
    "model.aligner.high_res_vision_proj.": "aligner.high_up_proj.",
    "model.aligner.vision_proj.": "aligner.low_up_proj.",
    "model.aligner.proj.": "aligner.layers.1.",
    "model.high_res_vision_alpha": f"{HIGH}hd_alpha_downsamples",
    "model.high_res_vision_proj.conv1.": f"{HIGH}downsamples.0.",
    "model.high_res_vision_proj.conv2.": f"{HIGH}downsamples.1.",
    "model.high_res_vision_neck.": f"{HIGH}neck_hd.",
    "model.high_res_vision_model.vision_encoder.": HIGH,
}
OF_SAM = {
    "patch_embed.projection": "patch_embed.proj",
    "layers.": "blocks.",
    "layer_norm": "norm",
    **{
        f"neck.{name}.": f"neck.{i}." for i, name in enumerate(["conv1", "norm1", "conv2", "norm2"])
    },
    **{
        f"neck_hd.{name}.": f"neck_hd.{i}."
        for i, name in enumerate(["conv1", "norm1", "conv2", "norm2"])
    },
}
OF_SIGLIP = {
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "encoder.layers.": "blocks.",
    "self_attn.out_proj": "attn.proj",
    "layer_norm": "norm",
    "post_norm": "norm",
    "post_layernorm": "norm",
    "head.attention.out_proj": "attn_pool.proj",
    "head.layernorm": "attn_pool.norm",
    "head.mlp": "attn_pool.mlp",
    "head.probe": "attn_pool.latent",
}


def replaced(name: str, pairs: dict) -> str:
    for theirs, own in pairs.items():
        name = name.replace(theirs, own)
    return name


def own_tensors(tensors: dict, low: str) -> dict:
    """Hugging Face's tensors as DeepSeek's files have them; `low` is before SigLIP's names."""
    own, tower = {}, {}
    for name, x in tensors.items():
        if name.startswith("model.vision_model."):
            tower[name.removeprefix("model.vision_model.")] = x
            continue
        start = next(start for start in NAMES if name.startswith(start))
        name = NAMES[start] + name.removeprefix(start)
        own[replaced(name, OF_SAM) if name.startswith(HIGH) else name] = x
    layers = len({name.split(".")[2] for name in tower if name.startswith("encoder.")})
    for kind in ("weight", "bias"):
        for layer in range(layers):
            start = f"encoder.layers.{layer}.self_attn."
            parts = [tower.pop(f"{start}{part}_proj.{kind}") for part in "qkv"]
            own[f"{low}blocks.{layer}.attn.qkv.{kind}"] = np.concatenate(parts)
        if f"head.attention.in_proj_{kind}" in tower:
            q, k, v = np.split(tower.pop(f"head.attention.in_proj_{kind}"), 3)
            own[f"{low}attn_pool.q.{kind}"] = q
            own[f"{low}attn_pool.kv.{kind}"] = np.concatenate([k, v])
    own[f"{low}pos_embed"] = tower.pop("embeddings.position_embedding.weight")[None]
    return own | {low + replaced(name, OF_SIGLIP): x for name, x in tower.items()}


def part(kind: str, **params) -> dict:
    return {"cls": kind, "params": params}


def own_config(cfg: deepseek_vl.Config) -> dict:
    hf = registry.to_hf(cfg)
    text = {k: v for k, v in hf["text_config"].items() if k != "tie_word_embeddings"}
    low = {"image_size": cfg.vision.image_size, "model_name": "tiny", "select_layer": -1}
    if cfg.high is None:
        vision, projector = part("CLIPVisionTower", **low), "mlp_gelu"
    else:
        high = {"image_size": cfg.high.image_size, "model_name": "small", "select_layer": -1}
        vision = part("HybridVisionTower", low_res_cfg=low, high_res_cfg=high)
        projector = "low_high_hybrid_split_mlp_gelu"
    return {
        "model_type": "multi_modality",
        "language_config": text,
        "vision_config": vision,
        "aligner_config": part("MlpProjector", projector_type=projector, depth=2),
    }


@functools.cache
def make(cfg: deepseek_vl.Config) -> deepseek_vl.Model:
    return random_module(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))


@pytest.fixture(params=["deepseek-vl", "deepseek-vl-hybrid"])
def folder(request, tmp_path, monkeypatch):
    """A model, and a folder of it in DeepSeek's own form."""
    cfg = CONFIGS[request.param].with_decoder(tie_embeddings=False)
    cfg = dataclasses.replace(cfg, vision=dataclasses.replace(cfg.vision, has_pool=True))
    cfg = dataclasses.replace(cfg, image_id=100015)
    model = make(cfg)
    is_hybrid = cfg.high is not None
    low = "vision_model.vision_tower_low.vision_tower." if is_hybrid else None
    tensors = own_tensors(
        dict(table.export(model, model.weights)), low or "vision_model.vision_tower."
    )
    if is_hybrid:  # in the files, and in no model
        tensors["vision_model.high_layer_norm.weight"] = np.ones(4, np.float32)
        tensors["vision_model.low_layer_norm.bias"] = np.ones(4, np.float32)
        monkeypatch.setitem(released.HIGH, "small", sam.write(cfg.high))
    tower = {k: v for k, v in siglip.write_vision(cfg.vision).items() if k != "image_size"}
    monkeypatch.setitem(released.LOW, "tiny", {**tower, "vision_use_head": False})
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(own_config(cfg)))
    return model, tmp_path


def test_folders_of_deepseeks_own_form_give_the_same_model_and_are_saved_in_hugging_faces(
    folder, tmp_path
):
    model, path = folder
    loaded = lp.load_model(path)
    assert loaded.cfg == model.cfg
    want, found = (dict(table.export(x, x.weights)) for x in (model, loaded))
    assert want.keys() == found.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    alone = lp.load_model(path, only="language")
    np.testing.assert_array_equal(alone.embed.w[...], model.language.embed.w[...])

    saved = lp.save_model(loaded, tmp_path / "saved")
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == model.cfg.model_type
    again = lp.load_model(saved)
    assert set(dict(table.export(again, again.weights))) == set(want)


def test_adapters_are_named_as_deepseeks_own_modules_where_the_base_is_their_folder(
    folder, tmp_path
):
    model, path = folder
    base = lp.load_model(path)
    is_hybrid = model.cfg.high is not None
    aligner = "vision_proj" if is_hybrid else "linear1"
    targets = ("q_proj", "k_proj", "v_proj", "fc1", aligner)
    adapted = scattered(lp.peft.inject(base, lp.peft.LoRA(rank=2, targets=targets)))
    lp.peft.save(adapted, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert "q_proj" in config["target_modules"]  # which no module of their towers is called
    names = SafetensorsFile(tmp_path / "own" / "adapter_model.safetensors").names
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names}
    stored = SafetensorsFile(path / "model.safetensors").names
    assert modules <= {name.removesuffix(".weight") for name in stored}
    low = "vision_model.vision_tower_low" if is_hybrid else "vision_model"
    assert modules >= {
        "language_model.model.layers.0.self_attn.q_proj",
        f"{low}.vision_tower.blocks.0.attn.qkv",
        "aligner.low_up_proj" if is_hybrid else "aligner.layers.0",
    }
    # and in Hugging Face's names for Hugging Face's folder: both are read onto both
    whole = lp.save_model(base, tmp_path / "whole")
    lp.peft.save(adapted, tmp_path / "theirs", base_model=str(whole))
    names = SafetensorsFile(tmp_path / "theirs" / "adapter_model.safetensors").names
    assert {name.split(".")[2] for name in names} == {"model"}
    expected = dict(table.export(lp.peft.merge(adapted), adapted.weights))
    for one in (base, lp.load_model(whole)):
        for name in ("own", "theirs"):
            merged = lp.peft.merge(lp.peft.load(one, tmp_path / name))
            found = dict(table.export(merged, merged.weights))
            chex.assert_trees_all_close(found, expected, atol=2e-5)


def change(name: str, value, path):
    config = json.loads((path / "config.json").read_text())
    *steps, last = name.split(".")
    place = config
    for step in steps:
        place = place[step]
    place[last] = value
    (path / "config.json").write_text(json.dumps(config))


REFUSED = {
    "janus": ("gen_vision_config", {}, "Janus in DeepSeek's own form.*janus|Janus-Pro"),
    "projector": ("aligner_config.params.projector_type", "linear", "projector_type is 'linear'"),
    "tower": ("vision_config.cls", "Other", "vision_config.cls is 'Other'; known are CLIPVision"),
    "no-language": ("language_config", None, "language_config is None"),
    "no-parameters": ("vision_config", {"cls": "CLIPVisionTower"}, "must hold cls and params"),
}


@pytest.mark.parametrize(("name", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_what_no_release_has_is_refused_by_the_field(folder, name, value, message):
    _, path = folder
    change(name, value, path)
    with pytest.raises(ValueError, match=message) as error:
        lp.load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tower_of_unknown_size_is_refused_by_its_name(folder):
    model, path = folder
    steps = "vision_config.params." + ("low_res_cfg." if model.cfg.high is not None else "")
    change(f"{steps}model_name", "siglip_huge", path)
    with pytest.raises(ValueError, match="'siglip_huge'; known are siglip_large_patch16_384"):
        lp.load_model(path)


def test_released_sizes_are_the_presets():
    low = {"image_size": 384, "model_name": "siglip_large_patch16_384"}
    text = dict(vocab_size=102400, max_position_embeddings=16384, model_type="llama")
    seven = {
        "model_type": "multi_modality",
        "language_config": {**text, "num_hidden_layers": 30},
        "vision_config": part(
            "HybridVisionTower",
            low_res_cfg=low,
            high_res_cfg={"image_size": 1024, "model_name": "sam_b_downsample"},
        ),
        "aligner_config": part("MlpProjector", projector_type="low_high_hybrid_split_mlp_gelu"),
    }
    assert deepseek_vl.from_hf(seven) == deepseek_vl.PRESETS["deepseek-vl-7b"]
    sizes = dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16
    )
    one = {
        **seven,
        "language_config": {**text, **sizes},
        "vision_config": part("CLIPVisionTower", **low),
        "aligner_config": part("MlpProjector", projector_type="mlp_gelu", depth=2),
    }
    assert deepseek_vl.from_hf(one) == deepseek_vl.PRESETS["deepseek-vl-1.3b"]


IMAGES = {
    "image_processor_type": "VLMImageProcessor",
    "image_size": 1024,
    "min_size": 14,
    "do_normalize": False,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 0.00392156862745098,
    "processor_class": "VLChatProcessor",
}


@pytest.fixture
def processor(folder):
    _, path = folder
    write_tokenizer(path)
    (path / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return lp.load_processor(path), path


def test_prompts_are_those_of_deepseeks_own_code(processor):
    ours, _ = processor
    user = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": "What is it? "}],
    }
    answer = {"role": "assistant", "content": " A cat."}
    ask = {"role": "user", "content": "Why?"}
    first = f"{SYSTEM}\n\nUser: <image_placeholder>What is it?\n\nAssistant:"
    chat = ours.tokenizer.chat
    assert chat.apply([user], add_generation_prompt=True) == first
    assert (
        chat.apply([user, answer, ask], add_generation_prompt=True)
        == f"{first} A cat.<eos>User: Why?\n\nAssistant:"
    )
    system = {"role": "system", "content": "Be short."}
    assert (
        chat.apply([system, ask], add_generation_prompt=True)
        == "Be short.\n\nUser: Why?\n\nAssistant:"
    )


def test_large_pictures_and_small_ones_are_normalised_as_in_the_model(processor, tmp_path):
    ours, path = processor
    white = Image.fromarray(np.full((64, 128, 3), 255, np.uint8))
    inputs = ours("<image_placeholder> x", images=[white])
    if "Hybrid" not in (path / "config.json").read_text():
        assert "images_high" not in inputs
        return
    assert inputs["images"].shape == (1, 1, 384, 384, 3)
    assert inputs["images_high"].shape == (1, 1, 1024, 1024, 3)
    np.testing.assert_allclose(inputs["images"][0, 0, 192, 192], [1, 1, 1])
    mean, std = np.array(IMAGES["image_mean"]), np.array(IMAGES["image_std"])
    np.testing.assert_allclose(inputs["images_high"][0, 0, 512, 512], (1 - mean) / std, rtol=1e-5)
    bars = (np.floor(mean * 255) / 255 - mean) / std
    np.testing.assert_allclose(inputs["images_high"][0, 0, 0, 0], bars, rtol=1e-4, atol=1e-5)
    assert (inputs["tokens"] == ours.image_id).sum() == 576

    ours.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "deepseek_vl_hybrid"}')
    again = lp.load_processor(tmp_path / "saved")("<image_placeholder> x", images=[white])
    for name, x in inputs.items():
        np.testing.assert_array_equal(again[name], x)
