"""config.json is fuzzed: loading a folder answers or raises one line, whatever the file holds."""

import json
import pathlib

import hypothesis
import jaxtyping
import numpy as np
import pytest
from hypothesis import strategies as st

import llmprep_jax as lp
from llmprep_jax.weights.safetensors import write_file

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = ("llama", "qwen2", "gemma3", "deepseek_v2", "deepseek_v3", "qwen3", "mistral")
WHOLE = [json.loads((GOLDEN / f"{name}.json").read_text()) for name in NAMES]
WHOLE.append({"model_type": "gemma3", "text_config": {k: WHOLE[2][k] for k in list(WHOLE[2])[:30]}})
SCALED = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
WHOLE.append(WHOLE[0] | {"rope_scaling": SCALED, "rope_theta": 1e4, "rope_parameters": None})
MORE = ["rope_scaling", "rope_parameters", "rope_theta", "quantization_config", "layer_types"]
MORE += ["text_config", "sliding_window", "use_sliding_window", "max_window_layers", "factor"]
MORE += ["full_attention", "rope_type", "eos_token_id", "head_dim", "sliding_window_pattern"]
FIELDS = sorted({name for config in WHOLE for name in config} | set(MORE))

numbers = st.integers() | st.sampled_from([0, -1, 1, 2, 10**5, 2**31, 10**400]) | st.floats()
words = st.text(max_size=5) | st.sampled_from(["sliding_attention", "yarn", "llama3", "1"])
plain = st.none() | st.booleans() | numbers | words
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=5,
)
configs = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=6),
    st.builds(
        lambda whole, changes: whole | changes,
        st.sampled_from(WHOLE),
        st.dictionaries(st.sampled_from(FIELDS), values, min_size=1, max_size=3),
    ),
)


@pytest.fixture(scope="module", autouse=True)
def as_users_run_it():
    """Without the tests' own check of types, which would answer before the reader's."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder that lacks all weights but one, so that no config loads."""
    folder = tmp_path_factory.mktemp("model")
    write_file(folder / "model.safetensors", {"strange": np.zeros(1, np.float32)})
    return folder


def refusal_of(folder: pathlib.Path, text: bytes) -> str:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011 any message, but one line of it
        lp.load_model(folder)
    assert is_one_line_about(folder, str(error.value))
    return str(error.value)


def is_one_line_about(folder: pathlib.Path, message: str) -> bool:
    return str(folder) in message and "\n" not in message


@hypothesis.given(configs)
@hypothesis.settings(max_examples=80, deadline=None)
def test_any_config_is_refused_in_one_line_that_names_the_folder(folder, config):
    assert is_one_line_about(folder, refusal_of(folder, json.dumps(config).encode()))


@hypothesis.given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_bytes_for_a_config_are_refused_in_one_line(folder, text):
    assert is_one_line_about(folder, refusal_of(folder, text))


@pytest.mark.parametrize("number", range(len(WHOLE)))
def test_a_whole_config_is_refused_for_its_weights_only(folder, number):
    message = refusal_of(folder, json.dumps(WHOLE[number]).encode())
    assert "strange" in message
    assert "embed_tokens.weight" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_key_value_heads", -2),
        ("max_position_embeddings", -1),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", "yes"),
        ("rope_theta", -1.0),
        ("hidden_size", 10**400),
        ("eos_token_id", "</s>"),
    ],
)
def test_a_number_that_no_model_has_is_refused(folder, field, value):
    config = WHOLE[0] | {"rope_parameters": None, field: value}
    assert "strange" not in refusal_of(folder, json.dumps(config).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_routed_experts", 2**31),
        ("num_experts_per_tok", 99),
        ("n_group", 3),
        ("moe_layer_freq", 0),
        ("first_k_dense_replace", -1),
        ("qk_rope_head_dim", 5),
        ("topk_method", "random"),
        ("routed_scaling_factor", "large"),
    ],
)
def test_a_number_that_no_deepseek_has_is_refused(folder, field, value):
    assert "strange" not in refusal_of(folder, json.dumps(WHOLE[4] | {field: value}).encode())
