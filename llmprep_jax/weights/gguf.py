"""GGUF files (llama.cpp's format) as checkpoints: config.json's fields, Hugging Face's tensors.

The package `gguf` dequantises; names, shapes and layouts become Hugging Face's here. The one thing
a reader would get wrong: llama.cpp interleaves the rotary halves of Llama's q and k (undone per
head here, Qwen's and Gemma's are as released) and stores Gemma's norms as 1 + w. A Mistral is a
Llama there, without the window that version 0.1 has of 4,096 tokens.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmprep_jax.weights.folder import Checkpoint
from llmprep_jax.weights.gguf_file import GgufFile, GgufTensor
from llmprep_jax.weights.safetensors import one_line, quoted

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_ROPE = {
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


class GgufCheckpoint(Checkpoint):
    """A GGUF file, with the interface of a `Checkpoint`; every tensor comes out in float32.

    Raises:
      ValueError: the file is damaged, of an unknown architecture or one of several parts, or the
        package `gguf` is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._gguf = _import_gguf(self.path)
        self._file = GgufFile(self.path)
        self._fields = self._file.metadata
        self.arch = self._fields.get("general.architecture")
        if not isinstance(self.arch, str) or self.arch not in _MODEL_TYPES:
            known = ", ".join(_MODEL_TYPES)
            raise ValueError(f"{self.path} holds a {quoted(self.arch)} model; supported: {known}")
        if self._fields.get("split.count", 1) not in (0, 1):
            raise ValueError(
                f"{self.path} is one of several parts; merge them with llama.cpp's"
                " llama-gguf-split --merge"
            )
        stored = dict(self._file.tensors)
        self._rope_factors = stored.pop(_ROPE_FACTORS, None)
        self._tensors = {self._hf_name(name): tensor for name, tensor in stored.items()}
        try:
            self.config = self._config()
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f"{self.path} lacks metadata of a {self.arch} model ({one_line(error)});"
                " download it again"
            ) from error

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype("float32")

    def file(self, name: str) -> Path:
        return self.path

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32, in Hugging Face's layout."""
        array = self._dequantise(self._tensors[name])
        if self.arch == "llama" and re.search(r"self_attn\.[qk]_proj\.", name):
            heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            return self._put_halves_back(array, self.config[heads])
        if self.arch == "gemma3" and name.endswith("norm.weight"):
            return array - np.float32(1)
        return array

    def _put_halves_back(self, array: np.ndarray, heads: int) -> np.ndarray:
        if array.ndim == 0 or heads < 1 or len(array) % (2 * heads):
            shape = list(array.shape)
            raise ValueError(f"{self.path}: a q or k of shape {shape} does not fit {heads} heads")
        halves = array.reshape(heads, -1, 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)

    def _dequantise(self, tensor: GgufTensor) -> np.ndarray:
        label = f"{self.path}: tensor {quoted(tensor.name)}"
        try:
            kind = self._gguf.GGMLQuantizationType(tensor.kind)
        except ValueError:
            raise ValueError(
                f"{label} is of the unknown type {tensor.kind}; get an F16 file"
            ) from None
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        shape = tensor.shape or (1,)
        if shape[-1] % block:
            raise ValueError(
                f"{label} has rows of {shape[-1]} values, {kind.name} has {block} a block"
            )
        row = shape[-1] // block * size
        data = self._file.data(tensor, math.prod(shape[:-1]) * row)
        if not data.size:
            return np.zeros(tensor.shape, np.float32)
        try:
            array = self._gguf.quants.dequantize(data.reshape(*shape[:-1], row), kind)
        except NotImplementedError:
            raise ValueError(
                f"{label} is {kind.name}, which gguf cannot read; get a Q8_0 or F16 file"
            ) from None
        return array.reshape(tensor.shape)

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match is None:
            return _TOP_NAMES.get(name, name)
        layer, part, kind = match.groups()
        names = _LAYER_NAMES | (_GEMMA_NAMES if self.arch == "gemma3" else {})
        return f"model.layers.{layer}.{names[part]}.{kind}" if part in names else name

    def _get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the architecture's own; without a default it must be there."""
        key = f"{self.arch}.{key}"
        value = self._fields.get(key, default)
        if value is None:
            raise KeyError(key)
        if not isinstance(value, kind):
            raise TypeError(f"{key} is {quoted(value)}")
        return value

    def _config(self) -> dict[str, Any]:
        """config.json's fields."""
        embed = self.shape("model.embed_tokens.weight")
        heads = self._get("attention.head_count", int)
        base = 1e6 if self.arch == "gemma3" else 1e4
        config = {
            "model_type": _MODEL_TYPES[self.arch],
            "vocab_size": embed[0] if embed else 0,
            "hidden_size": self._get("embedding_length", int),
            "intermediate_size": self._get("feed_forward_length", int),
            "num_hidden_layers": self._get("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv", int, heads),
            "head_dim": self._get("attention.key_length", int, 0)
            or self._get("embedding_length", int) // heads,
            "max_position_embeddings": self._get("context_length", int),
            "rope_theta": self._get("rope.freq_base", (int, float), base),
            "rms_norm_eps": _decimal(self._get("attention.layer_norm_rms_epsilon", float, 1e-6)),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **self._token_ids(),
        }
        config["rope_scaling"] = self._rope_scaling(config)
        own = {"llama": self._llama_config, "gemma3": self._gemma_config}.get(self.arch)
        return config | (own(config) if own else {})

    def _llama_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        parts = {"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.up_proj"}
        return {
            field: f"model.layers.0.{part}.bias" in self._tensors for field, part in parts.items()
        }

    def _gemma_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # llama.cpp hard-codes what it does not store: the 5:1 pattern, and 27B's query scale
        is_27b = config["num_hidden_layers"] == 62
        width = config["hidden_size"] // config["num_attention_heads"]
        pattern = self._get("attention.sliding_window_pattern", (int, list), 6)
        layers = {"sliding_window_pattern": pattern}
        if isinstance(pattern, list):
            names = ["sliding_attention" if local else "full_attention" for local in pattern]
            layers = {"layer_types": names}
        cap = self._get("final_logit_softcapping", (int, float), 0)
        return {
            "sliding_window": self._get("attention.sliding_window", int),
            "rope_local_base_freq": self._get("rope.freq_base_swa", (int, float), 1e4),
            "query_pre_attn_scalar": width if is_27b else config["head_dim"],
            "final_logit_softcapping": cap or None,
            **layers,
        }

    def _rope_scaling(self, config: Mapping[str, Any]) -> dict[str, Any] | None:
        if self._rope_factors is not None:
            return self._llama3_scaling(config, self._dequantise(self._rope_factors))
        kind = self._get("rope.scaling.type", str, "none")
        if kind == "none":
            return None
        original = self._get("rope.scaling.original_context_length", int, 0)
        scaling = {"rope_type": kind, "factor": self._get("rope.scaling.factor", (int, float), 1.0)}
        return scaling | ({"original_max_position_embeddings": original} if original else {})

    def _llama3_scaling(self, config: Mapping[str, Any], divisors: np.ndarray) -> dict[str, Any]:
        """Llama 3.1 and later: of the four parameters, a GGUF has only the divisors they make."""
        factor = float(divisors.max(initial=1))
        if divisors.shape != (config["head_dim"] // 2,) or not np.allclose(
            divisors, _llama3_divisors(divisors.size, config["rope_theta"], factor), rtol=1e-3
        ):
            raise ValueError(
                f"{self.path}: {_ROPE_FACTORS} is not what a Llama 3 model has; use the model's"
                " safetensors and config.json"
            )
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}

    def _token_ids(self) -> dict[str, int | None]:
        names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
        stored = {theirs: f"tokenizer.ggml.{ours}_token_id" for ours, theirs in names.items()}
        ids = {name: self._fields[key] for name, key in stored.items() if key in self._fields}
        # where the file has none there is none, whatever a family has by default
        return {"bos_token_id": None, "eos_token_id": None, **ids}


def _import_gguf(path: Path):
    try:
        import gguf
    except ImportError:
        raise ValueError(
            f'{path}: reading GGUF needs the package gguf: pip install "llmprep_jax[demo]"'
        ) from None
    return gguf


def _llama3_divisors(half: int, base: float, factor: float) -> np.ndarray:
    """What the released Llama 3 models divide their rotary frequencies by."""
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    wavelengths = 2 * np.pi * np.float64(base) ** (np.arange(half) / half)
    turns = _LLAMA3_ROPE["original_max_position_embeddings"] / wavelengths
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - share) / factor + share)


def _decimal(value: float) -> float:
    """A float32 as the decimal that was meant: 9.9999997e-06 is 1e-05."""
    return float(f"{value:.6g}")
