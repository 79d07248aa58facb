"""What we write into a config.json transformers reads as the file that we had read, and both rotate
by the same angles."""

import copy
import json

import hypothesis
import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from llmprep_jax.models import registry
from llmprep_jax.nn.mla import _temperature
from llmprep_jax.nn.rope import rope_frequencies
from tests.models.config_files import NEEDED, OPTIONAL, SLIDING, files

# of the fields that we read, those that transformers has no use for in some model types
UNUSED = {
    "deepseek_v2": {"num_key_value_heads", "moe_layer_freq", "aux_loss_alpha"},
    "deepseek_v3": {"num_key_value_heads", "moe_layer_freq", "aux_loss_alpha"},
    # in force in layers that its class derives from it, and only with a window
    "qwen2": {"max_window_layers"},
    "qwen3": {"max_window_layers"},
    "gemma3_text": {"sliding_window_pattern"},
}
GROUPS = ("n_group", "topk_group", "topk_method")


def theirs_of(hf):
    """The config that transformers makes of a file; what its own classes refuse is no case."""
    try:
        return AutoConfig.for_model(**copy.deepcopy(hf))
    except (StrictDataclassError, KeyError):
        hypothesis.reject()


def values_of(config):
    """Its fields as they are used, without those of RoPE."""
    kind = config.model_type
    names = {*NEEDED, *OPTIONAL[kind], "layer_types"} - UNUSED.get(kind, set())
    values = {name: getattr(config, name, None) for name in names}
    if isinstance(values["eos_token_id"], int):
        values["eos_token_id"] = [values["eos_token_id"]]
    if values["layer_types"] is not None and SLIDING not in values["layer_types"]:
        values |= dict.fromkeys(("sliding_window", "use_sliding_window"))
    if kind == "deepseek_v2" and (config.topk_method == "greedy" or config.n_group == 1):
        values |= dict.fromkeys(GROUPS)
    if kind == "qwen2":
        values["head_dim"] = values["head_dim"] or config.hidden_size // config.num_attention_heads
    return values


def angles_of(config, kind=None):
    """Frequencies and factor of their RoPE, of one kind of layer where that makes a difference."""
    rope = config.rope_parameters if kind is None else config.rope_parameters[kind]
    if rope["rope_type"] == "default":
        size = getattr(config, "head_dim", None)
        size = size or config.hidden_size // config.num_attention_heads
        exponents = np.arange(0, size, 2, dtype=np.float32) / size
        return 1 / np.float32(rope["rope_theta"]) ** exponents, 1.0
    if getattr(config, "head_dim", 0) is None:  # theirs takes the null for a number, and fails
        hypothesis.reject()
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", None, kind)
    return frequencies.numpy(), factor


def our_angles_of(cfg):
    size = cfg.rope_dim if cfg.model_type.startswith("deepseek") else cfg.head_dim
    return rope_frequencies(size, cfg.rope_base, cfg.rope_scaling)


def local_angles_of(cfg):
    return rope_frequencies(cfg.head_dim, cfg.rope_local_base)


@pytest.mark.parametrize("model_type", OPTIONAL)
@hypothesis.given(data=hypothesis.strategies.data())
@hypothesis.settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore:config.json has a rope_scaling")
def test_transformers_reads_what_we_write_as_what_we_read(model_type, data):
    hf = data.draw(files(model_type))
    family = registry.family_of_type(model_type)
    # of the old name transformers loses sight where layers of two kinds have RoPE of their own
    hypothesis.assume(model_type != "gemma3_text" or '"type"' not in json.dumps(hf))
    before = theirs_of(hf)
    # sliding layers without a window: theirs cannot be called
    hypothesis.assume(
        SLIDING not in (getattr(before, "layer_types", None) or ()) or before.sliding_window
    )
    cfg = family.from_hf(hf)
    after = theirs_of(registry.to_hf(cfg))
    assert values_of(after) == values_of(before)
    # theirs may be incomplete for a kind of layer that does not occur
    kinds = set(before.layer_types) if model_type == "gemma3_text" else {None}
    for config in (before, after):
        for kind in kinds:
            frequencies, factor = angles_of(config, kind)
            is_local = kind == SLIDING
            ours = local_angles_of(cfg) if is_local else our_angles_of(cfg)
            np.testing.assert_allclose(frequencies, ours[0], rtol=1e-5)
            assert factor == pytest.approx(ours[1])
        if model_type.startswith("deepseek"):
            scale = yarn_apply_mscale(config.rope_parameters, 1.0)
            assert scale == pytest.approx(_temperature(cfg.rope_scaling) ** 2)
