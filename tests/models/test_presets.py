"""Every released size, without its weights: parameter counts are the published ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import deepseek, registry

COUNTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "deepseek-llm-7b": 6_910_365_696,
    "deepseek-llm-67b": 67_425_001_472,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "deepseek-r1-distill-qwen-14b": 14_770_033_664,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352,
    "deepseek-r1-distill-llama-8b": 8_030_261_248,
    "deepseek-r1-distill-llama-70b": 70_553_706_496,
    "deepseek-r1-0528-qwen3-8b": 8_190_735_360,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "gemma3-4b-multimodal": 4_300_079_472,
    "gemma3-12b-multimodal": 12_187_325_040,
    "gemma3-27b-multimodal": 27_432_406_640,
    "llava-1.5-7b": 7_063_427_072,
    "deepseek-vl-1.3b": 1_962_640_384,
    "deepseek-vl-7b": 7_331_390_721,
    "janus-pro-1b": 2_076_636_811,
    "janus-pro-7b": 7_407_773_323,
    "llava-1.5-13b": 13_351_494_656,
    "deepseek-v2-tiny": 14_888_320,
    "deepseek-v3-tiny": 15_649_376,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200 + 11_610_068_224,  # and its multi-token prediction module
    "deepseek-vl2-tiny": 3_370_501_440,
    "deepseek-vl2-small": 16_148_349_504,
    "deepseek-vl2": 27_480_134_248,
    "clip-vit-base-patch32": 151_277_313,
    "clip-vit-base-patch16": 149_620_737,
    "clip-vit-large-patch14": 427_616_513,
    "clip-vit-large-patch14-336": 427_944_193,
    "siglip-base-patch16-224": 203_155_970,
    "siglip-base-patch16-256": 203_202_050,
    "siglip-base-patch16-256-multilingual": 370_626_050,
    "siglip-base-patch16-384": 203_447_810,
    "siglip-base-patch16-512": 203_791_874,
    "siglip-large-patch16-256": 652_150_786,
    "siglip-large-patch16-384": 652_478_466,
    "siglip-so400m-patch14-384": 877_960_498,
    "siglip2-base-patch32-256": 376_856_066,
    "siglip2-base-patch16-224": 375_187_970,
    "siglip2-base-patch16-256": 375_234_050,
    "siglip2-base-patch16-384": 375_479_810,
    "siglip2-base-patch16-512": 375_823_874,
    "siglip2-large-patch16-256": 881_526_786,
    "siglip2-large-patch16-384": 881_854_466,
    "siglip2-large-patch16-512": 882_313_218,
    "siglip2-so400m-patch14-224": 1_135_463_602,
    "siglip2-so400m-patch14-384": 1_136_008_498,
    "siglip2-so400m-patch16-256": 1_135_670_962,
    "siglip2-so400m-patch16-384": 1_136_039_602,
    "siglip2-so400m-patch16-512": 1_136_555_698,
    "siglip2-giant-opt-patch16-256": 1_871_393_906,
    "siglip2-giant-opt-patch16-384": 1_871_885_426,
}


@functools.cache
def model_of(name: str) -> nnx.Module:
    """Without its weights."""
    return jax.eval_shape(lambda: registry.build(registry.preset(name), rngs=nnx.Rngs(0)))


def test_every_preset_has_an_expected_count():
    names = {name for family in registry.FAMILIES for name in family.PRESETS}
    assert names == set(COUNTS)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseek-v2-lite", 15.706, 2.661),
        ("deepseek-v2", 235.741, 21.376),
        ("deepseek-v3", 671.026, 37.552),
    ],
)
def test_a_token_passes_through_the_published_share_of_the_experts(name, total, active):
    cfg, state = registry.preset(name), nnx.to_flat_state(nnx.state(model_of(name)))
    sizes = {path: x.size for path, x in state if "mtp" not in path}
    assert sum(sizes.values()) / 1e9 == pytest.approx(total, abs=5e-4)
    shares = {path: cfg.active_share if "experts" in path else 1 for path in sizes}
    assert sum(sizes[p] * shares[p] for p in sizes) / 1e9 == pytest.approx(active, abs=5e-4)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"])
def test_a_token_caches_576_numbers_a_layer(name):
    model = model_of(name)
    shapes = jax.eval_shape(lambda: model.init_cache(2, 10).streams)
    assert sum(x.size for x in shapes) == 576 * model.cfg.num_layers * 2 * 10


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_the_published_number_of_parameters(name):
    sizes = (int(np.prod(x.shape)) for x in jax.tree.leaves(nnx.state(model_of(name))))
    assert sum(sizes) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_survives_the_way_to_config_json_and_back(name):
    cfg = registry.preset(name)
    family = registry.family_of(cfg)
    again = family.from_hf(registry.to_hf(cfg))
    if family is deepseek:  # of training, and no field of theirs but for one
        again = dataclasses.replace(again, balance=cfg.balance)
    assert again == cfg


@pytest.mark.parametrize(
    ("dim", "scale"), [(640, 25.25), (1152, 34.0), (2560, 50.5), (3840, 62.0), (5376, 73.5)]
)
def test_gemmas_embedding_scale_is_rounded_to_bf16(dim, scale):
    assert float(jnp.asarray(dim**0.5, jnp.bfloat16)) == scale


def test_five_local_layers_come_before_a_global_one():
    local = registry.preset("gemma3-1b").local_layers()
    assert local[:12] == (True,) * 5 + (False,) + (True,) * 5 + (False,)
    assert sum(not each for each in local) == 4


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match="llama-3.1-8b"):
        registry.preset("llama-3.1-8")
    with pytest.raises(ValueError, match="did you mean qwen3 or qwen2"):
        registry.family_of_type("qwen4")
