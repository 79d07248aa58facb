"""A config.json and a Config say the same: thousands of each, over every field of every family."""

import dataclasses
import json

import hypothesis
import jaxtyping
import pytest

from llmprep_jax.models import registry
from llmprep_jax.models.hf_config import check_numbers
from llmprep_jax.models.model_config import ComposedConfig, LanguageConfig
from tests.models.config_files import COMPOSED, OPTIONAL, configs, files
from tests.models.tiny import CONFIGS, ODD_CONFIGS

LANGUAGE = [family for family in registry.FAMILIES if issubclass(family.Config, LanguageConfig)]
FAMILIES = {family.__name__.split(".")[-1]: family for family in LANGUAGE}
MODEL_TYPES = [kind for family in LANGUAGE for kind in family.MODEL_TYPES]
many = hypothesis.settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it():
    """Without the tests' own check of types, which draws random numbers inside strategies."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def layers_of(cfg):
    """Which layers are local, where a family says so in two ways."""
    return cfg.local_layers() if hasattr(cfg, "is_local") else None


def test_every_model_type_is_fuzzed():
    assert set(OPTIONAL) == set(MODEL_TYPES)
    composed = [x for x in registry.FAMILIES if issubclass(x.Config, ComposedConfig)]
    types = {kind for family in composed for kind in family.MODEL_TYPES}
    assert set(COMPOSED) == types - {"deepseek_vl_v2", "multi_modality"}  # have tests of their own


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *COMPOSED])
@hypothesis.given(data=hypothesis.strategies.data())
@many
@pytest.mark.filterwarnings("ignore:config.json has a rope_scaling")
def test_a_file_that_is_read_written_and_read_again_is_the_same_config(model_type, data):
    family = registry.family_of_type(model_type)
    cfg = family.from_hf(data.draw(files(model_type)))
    check_numbers(cfg)
    written = json.loads(json.dumps(registry.to_hf(cfg)))
    again = registry.family_of_type(written["model_type"]).from_hf(written)
    assert again == cfg


@pytest.mark.parametrize("name", FAMILIES)
@hypothesis.given(data=hypothesis.strategies.data())
@many
def test_a_config_is_written_whole_or_refused_by_the_field(name, data):
    family = FAMILIES[name]
    try:
        cfg = data.draw(configs(family.Config, family.MODEL_TYPES))
    except ValueError:  # no config either
        hypothesis.reject()
    try:
        again = family.from_hf(registry.to_hf(cfg))
    except ValueError as error:
        message = str(error)
        assert f"model_type {cfg.model_type!r} cannot hold" in message
        assert "\n" not in message
        return
    fields = dataclasses.fields(cfg)
    differ = {field.name for field in fields if field.metadata.get("is_saved", True)}
    differ = {name for name in differ if getattr(again, name) != getattr(cfg, name)}
    is_ntk = cfg.rope_scaling is not None and cfg.rope_scaling.kind == "ntk"
    assert differ <= ({"rope_base", "rope_scaling"} if is_ntk else set())
    assert layers_of(again) == layers_of(cfg)


@pytest.mark.parametrize(
    ("name", "changes", "lost"),
    [
        ("llama-tied-9-3-heads", {"window": 5}, "window=5"),
        ("llama-tied-9-3-heads", {"qkv_bias": True}, "out_bias=False"),
        ("qwen2-window", {"qkv_bias": False}, "qkv_bias=False"),
        ("qwen2-window", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen2-window", {"qk_norm": True}, "qk_norm=True"),
        ("qwen2-window", {"model_type": "qwen3"}, "out_bias=False, qk_norm=False"),
        ("qwen3-window-in-turns", {"model_type": "mistral"}, "has_window="),
        ("deepseek-v3", {"model_type": "deepseek_v2"}, "topk_method='noaux_tc'"),
    ],
)
def test_what_no_config_json_can_say_is_named(name, changes, lost):
    cfg = dataclasses.replace((CONFIGS | ODD_CONFIGS)[name], **changes)
    with pytest.raises(ValueError, match=lost):
        registry.to_hf(cfg)
