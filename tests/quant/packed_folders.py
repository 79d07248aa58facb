"""Tiny Hugging Face folders of packed weights, made by numpy from each format's published layout.

`make(method)` gives config.json's fields, the tensors, and the matrices that they stand for, had by
direct dequantisation here. The numbers are random codes and scales, so nothing of our quantisers is
in them; which tensors bitsandbytes writes, tests/parity/test_quant.py holds against it.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmprep_jax.quant import nf4
from llmprep_jax.quant.bitsandbytes_format import to_tensors
from llmprep_jax.weights.safetensors import write_file

DIM, KV, MLP, VOCAB, LAYERS, GROUP = 32, 16, 64, 24, 2, 16
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
}
SHAPES = {
    "self_attn.q_proj": (DIM, DIM),
    "self_attn.k_proj": (KV, DIM),
    "self_attn.v_proj": (KV, DIM),
    "self_attn.o_proj": (DIM, DIM),
    "mlp.gate_proj": (MLP, DIM),
    "mlp.up_proj": (MLP, DIM),
    "mlp.down_proj": (DIM, MLP),
}
AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
METHODS: dict[str, dict[str, Any]] = {
    "nf4": BITSANDBYTES,
    "nf4 double": BITSANDBYTES,
    "fp4": BITSANDBYTES,
    "int8": {"load_in_8bit": True},  # as old configs, which do not name the method
    "gptq": GPTQ,
    "gptq_v2": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "gptq desc_act": {**GPTQ, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "GEMM"},
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [GROUP, GROUP]},
}
BLOCK4 = 64  # numbers of a scale of bitsandbytes' 4 bits


@dataclasses.dataclass
class Folder:
    """What a folder holds, before it is written, and what its packed layers stand for."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    values: dict[str, np.ndarray]

    def write(self, path: Path) -> Path:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.config))
        write_file(path / "model.safetensors", self.tensors)
        return path

    def dense(self) -> "Folder":
        """The same model without packed layers."""
        config = {k: v for k, v in self.config.items() if k != "quantization_config"}
        layers = tuple(name.removesuffix(".weight") + "." for name in self.values)
        rest = {k: v for k, v in self.tensors.items() if not k.startswith(layers)}
        return Folder(config, rest | self.values, {})


def make(method: str) -> Folder:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    tensors = {
        "model.embed_tokens.weight": normal(VOCAB, DIM),
        "lm_head.weight": normal(VOCAB, DIM),
        "model.norm.weight": normal(DIM),
    }
    values = {}
    for layer in range(LAYERS):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(DIM)
        for name, shape in SHAPES.items():
            full = f"model.layers.{layer}.{name}"
            parts, values[f"{full}.weight"] = _MAKERS[method.split()[0]](method, shape, rng)
            tensors |= {f"{full}.{part}": value for part, value in parts.items()}
    return Folder({**CONFIG, "quantization_config": METHODS[method]}, tensors, values)


def _bitsandbytes4(method, shape, rng):
    kind, *double = method.split()
    size, nested, offset = shape[0] * shape[1], None, None
    codes = rng.integers(0, 256, size // 2, np.uint8)
    absmax = magnitudes = rng.uniform(0.5, 2, size // BLOCK4).astype(np.float32)
    if double:
        absmax, nested = rng.integers(0, 256, absmax.size, np.uint8), np.array([0.5], np.float32)
        offset = np.array(1.5, np.float32)
        magnitudes = nf4.NESTED_MAP[absmax] * nested + offset
    packed = nf4.Block4(codes, absmax, nested, offset, shape, kind, BLOCK4)
    values = nf4.CODES[kind][np.stack([codes >> 4, codes & 15], axis=1)].reshape(-1, BLOCK4)
    values = (values * magnitudes[:, None]).reshape(shape)
    return to_tensors(packed, "weight", "float32"), values


def _int8(method, shape, rng):
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    magnitudes = rng.uniform(0.5, 2, shape[0]).astype(np.float32)
    parts = {"weight": codes, "SCB": magnitudes, "weight_format": np.zeros((), np.uint8)}
    return parts, codes * (magnitudes / np.float32(127))[:, None]


def _integers(shape, rng):
    """Codes [I, O], zeros and scales [G, O]."""
    outs, inputs = shape
    groups = inputs // GROUP
    scales = rng.uniform(0.01, 0.1, (groups, outs)).astype(np.float16)
    return rng.integers(0, 16, (inputs, outs)), rng.integers(0, 16, (groups, outs)), scales


def _value(codes, zeros, scales, group_of):
    return ((codes - zeros[group_of]) * scales.astype(np.float32)[group_of]).astype(np.float32).T


def _words(rows, order=range(8)):
    """Eight numbers along the last axis an int32, that at order[i] in bits 4i to 4i + 3."""
    eights = np.asarray(rows, np.uint32).reshape(*rows.shape[:-1], -1, 8)
    words = sum(eights[..., place] << np.uint32(4 * i) for i, place in enumerate(order))
    return words.astype(np.uint32).view(np.int32)


def _minus_ones(words):
    """As GPTQ's first version stores zeros: one less each, of the word as a whole."""
    return (words.view(np.uint32) - np.uint32(0x11111111)).view(np.int32)


def _gptq(method, shape, rng):
    codes, zeros, scales = _integers(shape, rng)
    group_of = np.arange(len(codes)) // GROUP
    if "desc_act" in method:
        group_of = rng.permutation(group_of)
    parts = {
        "qweight": np.ascontiguousarray(_words(codes.T).T),
        "qzeros": _words(zeros) if "v2" in method else _minus_ones(_words(zeros)),
        "scales": scales,
        "g_idx": group_of.astype(np.int32),
    }
    return parts, _value(codes, zeros, scales, group_of)


def _awq(method, shape, rng):
    codes, zeros, scales = _integers(shape, rng)
    qweight, qzeros = _words(codes, AWQ_OUTPUTS), _words(zeros, AWQ_OUTPUTS)
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    return parts, _value(codes, zeros, scales, np.arange(len(codes)) // GROUP)


def _fp8(method, shape, rng):
    weight = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, [size // GROUP for size in shape]).astype(np.float32)
    value = weight.astype(np.float32) * scale.repeat(GROUP, 0).repeat(GROUP, 1)
    return {"weight": weight, "weight_scale_inv": scale}, value


_MAKERS = {
    "nf4": _bitsandbytes4,
    "fp4": _bitsandbytes4,
    "int8": _int8,
    "gptq": _gptq,
    "gptq_v2": _gptq,
    "awq": _awq,
    "fp8": _fp8,
}
