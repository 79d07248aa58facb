"""config.json as released, in every spelling, and what is refused rather than computed wrongly."""

import dataclasses

import numpy as np
import pytest

from llmprep_jax.models import registry
from llmprep_jax.models.gemma3_text.config import Config as Gemma3Config
from llmprep_jax.models.llama.config import Config as LlamaConfig
from llmprep_jax.nn.rope import RopeScaling, rope_frequencies

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3 = {  # DeepSeek-R1-0528-Qwen3-8B, without its scaling of RoPE
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "max_position_embeddings": 131072,
    "max_window_layers": 36,
    "sliding_window": None,
    "use_sliding_window": False,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
GEMMA = {  # what the multimodal 4B's file says, and no more
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def read(hf, **changes):
    hf = {**hf, **changes}
    return registry.family_of_type(hf["model_type"]).from_hf(hf)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}},
        {"rope_scaling": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_ROPE}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3_ROPE}},
    ],
    ids=["old", "older", "theta-inside", "new", "mixed"],
)
def test_both_spellings_of_rope_are_read(rope):
    cfg = read(LLAMA, **rope)
    assert cfg.rope_base == 500_000.0
    assert cfg.rope_scaling == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "base"),
    [
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}}, 1e6),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6}}, 1e6),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 1e6),
        ({"rope_scaling": {**YARN, "rope_theta": 5e5}, "rope_theta": 1e6}, 5e5),
        ({"rope_parameters": None}, 1e4),
    ],
)
def test_a_rope_scaling_added_by_hand_takes_the_place_of_rope_parameters(rope, base):
    cfg = read(QWEN | {"rope_theta": None, "rope_scaling": YARN} | rope)
    assert (cfg.rope_base, cfg.rope_scaling) == (base, RopeScaling("yarn", 4.0, 64))


def test_a_base_that_goes_with_the_fields_it_stood_in_is_told_of():
    rope = {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN}
    with pytest.warns(UserWarning, match=r"rope_theta 1000000.0 in it: the base is 10000"):
        assert read(QWEN, **rope).rope_base == 1e4


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"original_max_position_embeddings": None}, 131072),
        ({"original_max_position_embeddings": 4096}, 4096),
    ],
)
def test_a_context_that_stands_beside_the_scaling_counts_for_more(fields, expected):
    assert read(QWEN, rope_scaling=YARN | fields).rope_scaling.original_max_seq_len == expected
    cfg = read(QWEN, rope_scaling=YARN | fields, original_max_position_embeddings=32)
    assert cfg.rope_scaling.original_max_seq_len == 32


def test_a_factor_of_null_is_that_of_the_two_contexts_for_yarn():
    cfg = read(QWEN, rope_scaling=YARN | {"factor": None})
    assert cfg.rope_scaling.factor == 131072 / 64


def test_zero_turns_are_yarns_usual_borders():
    cfg = read(QWEN, rope_scaling=YARN | {"beta_fast": 0, "beta_slow": 0})
    assert (cfg.rope_scaling.beta_fast, cfg.rope_scaling.beta_slow) == (32.0, 1.0)


def test_gemmas_rope_scaling_is_laid_over_that_of_global_layers():
    kinds = {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}
    for scaling in ({"rope_type": "linear", "factor": 8.0}, {"type": "linear", "factor": 8.0}):
        cfg = read(GEMMA["text_config"], rope_parameters=kinds, rope_scaling=scaling)
        assert (cfg.rope_base, cfg.rope_scaling) == (5e5, RopeScaling("linear", 8.0, 131072))
    local = {"sliding_attention": {"rope_theta": 2e4}}
    cfg = read(GEMMA["text_config"], rope_parameters=local, rope_theta=3e5, rope_scaling=None)
    assert (cfg.rope_base, cfg.rope_local_base, cfg.rope_scaling) == (3e5, 2e4, None)


def test_a_token_id_of_null_is_none():
    cfg = read(GEMMA["text_config"], bos_token_id=None, eos_token_id=None, pad_token_id=None)
    assert (cfg.bos_id, cfg.eos_ids, cfg.pad_id) == (None, (), None)


def test_llama_is_read_with_its_defaults():
    cfg = read(LLAMA)
    assert cfg == LlamaConfig(
        vocab_size=128256,
        dim=4096,
        mlp_dim=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_seq_len=131072,
        rope_base=10_000.0,
        norm_eps=1e-5,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )
    short = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    assert read(short).num_kv_heads == 32
    assert read(short).norm_eps == 1e-6
    assert read(LLAMA, head_dim=64).head_dim == 64
    assert read(LLAMA, attention_bias=True, mlp_bias=True).out_bias


def test_qwen_has_biases_on_queries_keys_and_values_alone():
    cfg = read(QWEN)
    assert (cfg.qkv_bias, cfg.out_bias, cfg.mlp_bias) == (True, False, False)
    assert cfg.window is None
    assert cfg.eos_ids == (151643,)
    assert not cfg.tie_embeddings
    # a null is as many as query heads, an absent field is transformers' default
    assert read(QWEN, num_key_value_heads=None).num_kv_heads == 12
    wide = {k: v for k, v in QWEN.items() if k != "num_key_value_heads"}
    assert read(wide, num_attention_heads=64).num_kv_heads == 32


@pytest.mark.parametrize(
    ("changes", "window", "first"),
    [
        ({"use_sliding_window": True}, 4096, 21),
        ({"use_sliding_window": True, "max_window_layers": 28}, None, 0),
        ({"use_sliding_window": True, "sliding_window": None}, None, 0),
        ({"layer_types": ["full_attention"] * 28}, None, 0),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 25}, 4096, 3),
    ],
    ids=["on", "beyond-the-last-layer", "no-size", "all-full", "by-layer"],
)
def test_qwens_window_holds_from_a_layer_on(changes, window, first):
    cfg = read(QWEN, **changes)
    assert (cfg.window, cfg.first_window_layer) == (window, first)


def test_qwens_windows_may_lie_in_turns():
    cfg = read(QWEN3, layer_types=["sliding_attention", "full_attention"] * 18, sliding_window=64)
    assert cfg.windows() == (64, None) * 18
    few = read(
        QWEN3,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=64,
    )
    assert few.windows() == (None, 64) * 2
    for changes, message in (
        ({"has_window": (False,) * 6 + (True,) * 30}, "not all those from some first one on"),
        ({"has_window": (True, False)}, "has_window has 2 of 36 layers"),
        ({"model_type": "qwen4"}, "model_type is 'qwen4'; this family has llama, qwen2, qwen3"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(cfg, **changes)


def test_qwen3_norms_its_heads_and_has_biases_on_request():
    cfg = read(QWEN3)
    assert (cfg.qk_norm, cfg.head_dim, cfg.qkv_bias, cfg.out_bias) == (True, 128, False, False)
    cfg = read(QWEN3, attention_bias=True, mlp_bias=True)
    assert (cfg.qkv_bias, cfg.out_bias, cfg.mlp_bias) == (True, True, False)
    narrow = {name: x for name, x in QWEN3.items() if name != "head_dim"}
    assert read(narrow, hidden_size=1024).head_dim == 128  # of the class, not 1024 / 32


def test_mistrals_window_holds_on_all_layers():
    cfg = read(MISTRAL)
    assert (cfg.qk_norm, cfg.qkv_bias, cfg.head_dim) == (False, False, 128)
    assert cfg.windows() == (None,) * 40
    assert read(MISTRAL, sliding_window=4096).windows() == (4096,) * 40
    rest = {name: x for name, x in MISTRAL.items() if "window" not in name and "key" not in name}
    cfg = read(rest, head_dim=None, attention_bias=True)
    assert (cfg.window, cfg.num_kv_heads, cfg.head_dim, cfg.qkv_bias) == (4096, 8, 160, False)


def test_a_factor_that_transformers_does_not_read_is_told():
    fields = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    with pytest.warns(UserWarning, match="attn_factor=0.878, which transformers does not read"):
        cfg = read(QWEN3, rope_scaling=fields | {"attn_factor": 0.878})
    assert cfg == registry.preset("deepseek-r1-0528-qwen3-8b")
    assert read(MISTRAL) == registry.preset("mistral-nemo-12b")
    _, factor = rope_frequencies(cfg.head_dim, cfg.rope_base, cfg.rope_scaling)
    assert factor == pytest.approx(1.1386294)  # 0.1 ln 4 + 1


def test_layers_that_slide_have_transformers_window_where_none_is_given():
    hf = {name: value for name, value in QWEN.items() if name != "sliding_window"}
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 25
    cfg = read(hf, layer_types=kinds, use_sliding_window=True)
    assert (cfg.window, cfg.first_window_layer) == (4096, 3)


@pytest.mark.parametrize(
    ("model_type", "bos", "eos"),
    [
        ("llama", 1, (2,)),
        ("qwen2", None, ()),
        ("qwen3", None, ()),
        ("mistral", 1, (2,)),
        ("deepseek_v2", 1, (2,)),
        ("deepseek_v3", 0, (1,)),
    ],
)
def test_token_ids_that_a_file_leaves_out_are_transformers(model_type, bos, eos):
    hf = {"model_type": model_type, "num_experts_per_tok": 2}
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    hf |= {name: LLAMA[name] for name in (*sizes, "num_attention_heads")}
    cfg = read(hf)
    assert (cfg.bos_id, cfg.eos_ids, cfg.pad_id) == (bos, eos, None)
    cfg = read(hf, bos_token_id=None, eos_token_id=None)
    assert (cfg.bos_id, cfg.eos_ids) == (None, ())


def test_gemma_takes_what_its_file_omits_from_transformers():
    whole = read(GEMMA)
    assert whole == registry.preset("gemma3-4b-multimodal").with_decoder(eos_ids=(1, 106))
    cfg = whole.language
    assert cfg == Gemma3Config(
        vocab_size=262208,
        dim=2560,
        mlp_dim=10240,
        num_layers=34,
        num_heads=8,
        num_kv_heads=4,
        window=1024,
        rope_scaling=RopeScaling("linear", 8.0, 131072),
        eos_ids=(1, 106),
    )
    assert sum(not local for local in cfg.local_layers()) == 5


def test_the_multimodal_gemma_caps_no_logits():
    text = {**GEMMA["text_config"], "final_logit_softcapping": 30.0}
    assert read(GEMMA, text_config=text).language.logits_soft_cap is None
    assert read(text).logits_soft_cap == 30.0


def test_gemmas_rope_is_read_per_kind_of_layer():
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    old = {"rope_theta": 5e5, "rope_local_base_freq": 2e4}
    old["rope_scaling"] = {"type": "linear", "factor": 4.0}
    for rope in ({"rope_parameters": nested}, old):
        cfg = read(GEMMA["text_config"], **{"rope_scaling": None, **rope})
        assert (cfg.rope_base, cfg.rope_local_base) == (5e5, 2e4)
        assert cfg.rope_scaling == RopeScaling("linear", 4.0, 131072)


def test_gemmas_pattern_may_be_another_or_said_layer_by_layer():
    text = {**GEMMA["text_config"], "num_hidden_layers": 4}
    assert read(text, sliding_window_pattern=2).local_layers() == (True, False, True, False)
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert read(text, layer_types=kinds).local_layers() == (False, True, True, False)


@pytest.mark.parametrize(
    ("hf", "changes", "message"),
    [
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic'"),
        (LLAMA, {"rope_scaling": {"type": "yarn"}}, "'yarn' with no factor; say by how many"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": None}}, "'linear' with no factor"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": "4"}}, "the factor '4'"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 0.0}}, "the factor 0.0"),
        (LLAMA, {"rope_scaling": "yarn"}, "rope_scaling='yarn'; it must hold RoPE fields"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "by kind of layer .full_attention"),
        (
            LLAMA,
            {"rope_scaling": YARN | {"original_max_position_embeddings": -1}},
            "original_max_position_embeddings=-1",
        ),
        (
            GEMMA["text_config"],
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
            "factor, rope_type in rope_parameters, which are by kind of layer",
        ),
        (LLAMA, {"num_key_value_heads": 5}, "no multiple of num_kv_heads"),
        (LLAMA, {"hidden_size": "4096"}, "hidden_size='4096'"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
        (QWEN, {"layer_types": ["full_attention"] * 27}, "of 28 layers; each must be"),
        (QWEN3, {"layer_types": ["chunked_attention"] * 36}, "chunked_attention"),
        (MISTRAL, {"layer_types": ["full_attention"] * 40}, "layer_types="),
        (MISTRAL, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (GEMMA["text_config"], {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        (GEMMA["text_config"], {"use_bidirectional_attention": True}, "use_bidirectional"),
        (GEMMA["text_config"], {"layer_types": ["chunked_attention"] * 34}, "chunked_attention"),
        (GEMMA["text_config"], {"layer_types": ["full_attention"]}, "is_local has 1 of 34 layers"),
        (
            GEMMA["text_config"],
            {
                "rope_parameters": {
                    "full_attention": {},
                    "sliding_attention": {"type": "linear", "factor": 2.0},
                }
            },
            "scales the RoPE of local layers",
        ),
    ],
)
def test_what_is_not_computed_is_refused(hf, changes, message):
    with pytest.raises(ValueError, match=message):
        read(hf, **changes)


def test_missing_sizes_are_named_together():
    with pytest.raises(ValueError, match="lacks vocab_size, hidden_size, intermediate_size"):
        read({"model_type": "llama"})


@pytest.mark.parametrize(
    "cfg",
    [
        read(LLAMA, rope_scaling={"type": "llama3", **LLAMA3_ROPE}),
        read(LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        read(
            LLAMA,
            rope_scaling={
                "type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "truncate": False,
            },
        ),
        read(LLAMA, rope_scaling={"type": "yarn", "factor": 4.0, "attention_factor": 1.25}),
        read(LLAMA, rope_scaling={"type": "yarn", "factor": 4.0, "mscale_all_dim": 0.707}),
        read(LLAMA, rope_scaling={"type": "linear", "factor": 2.0}, eos_token_id=None),
        read(QWEN, use_sliding_window=True),
        read(QWEN, layer_types=["sliding_attention", "full_attention"] * 14),
        read(MISTRAL, sliding_window=4096),
        read(GEMMA["text_config"], final_logit_softcapping=30.0, query_pre_attn_scalar=168),
    ],
    ids=[
        "llama3",
        "biases",
        "yarn",
        "yarn-factor",
        "one-mscale",
        "linear",
        "qwen-window",
        "windows-in-turns",
        "mistral-window",
        "gemma3",
    ],
)
def test_a_config_survives_the_way_to_config_json_and_back(cfg):
    family = registry.family_of(cfg)
    assert family.from_hf(registry.to_hf(cfg)) == cfg


def test_an_ntk_scaling_is_written_as_the_base_that_it_amounts_to():
    cfg = read(LLAMA, rope_scaling={"type": "ntk", "factor": 4.0})
    again = registry.family_of(cfg).from_hf(registry.to_hf(cfg))
    assert again.rope_scaling is None
    ours, theirs = (
        rope_frequencies(cfg.head_dim, c.rope_base, c.rope_scaling)[0] for c in (cfg, again)
    )
    np.testing.assert_array_equal(ours, theirs)
