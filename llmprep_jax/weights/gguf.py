"""GGUF files (llama.cpp's format) as checkpoints: metadata to config.json's fields, tensors dequantised.

The package `gguf` reads the file and dequantises; names, shapes and layouts become Hugging Face's here. The
one thing a reader would get wrong: llama.cpp interleaves the rotary halves of Llama's q and k (undone per
head here, Qwen2's and Gemma's are as released) and stores Gemma's norms as 1 + w.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "gemma3": "gemma3_text"}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufCheckpoint:
    """A GGUF file, with the interface of a `Checkpoint`; tensors come out in float32 (or float16/bf16).

    Raises:
      ValueError: the file is damaged, of an unknown architecture, or the package `gguf` is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._reader = _open(self.path)
        self._fields = {name: field.contents() for name, field in self._reader.fields.items()}
        self.arch = self._fields.get("general.architecture")
        if self.arch not in _MODEL_TYPES:
            known = ", ".join(_MODEL_TYPES)
            raise ValueError(f"{self.path} holds a {self.arch!r} model; supported: {known}")
        stored = {tensor.name: tensor for tensor in self._reader.tensors}
        self._rope_factors = stored.pop(_ROPE_FACTORS, None)
        self._tensors = {self._hf_name(name): tensor for name, tensor in stored.items()}
        self.config = self._config()

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> np.dtype:
        return np.dtype("float32")

    def file(self, name: str) -> Path:
        return self.path

    def read(self, name: str) -> np.ndarray:
        """The tensor, dequantised to float32, in Hugging Face's layout."""
        tensor = self._tensors[name]
        array = _dequantise(tensor, self.path).reshape(self.shape(name))
        if self.arch == "llama" and re.search(r"self_attn\.[qk]_proj\.", name):
            heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            halves = array.reshape(self.config[heads], -1, 2, *array.shape[1:])
            return halves.swapaxes(1, 2).reshape(array.shape)
        if self.arch == "gemma3" and name.endswith("norm.weight"):
            return array - np.float32(1)
        return array

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match is None:
            return _TOP_NAMES.get(name, name)
        layer, part, kind = match.groups()
        names = _LAYER_NAMES | (_GEMMA_NAMES if self.arch == "gemma3" else {})
        return f"model.layers.{layer}.{names[part]}.{kind}" if part in names else name

    def _config(self) -> dict[str, Any]:
        """config.json's fields."""
        get = lambda key, default=None: self._fields.get(f"{self.arch}.{key}", default)  # noqa: E731
        try:
            heads = get("attention.head_count")
            embed = self.shape("model.embed_tokens.weight")
            config = {
                "model_type": _MODEL_TYPES[self.arch],
                "vocab_size": embed[0],
                "hidden_size": embed[1],
                "intermediate_size": get("feed_forward_length"),
                "num_hidden_layers": get("block_count"),
                "num_attention_heads": heads,
                "num_key_value_heads": get("attention.head_count_kv", heads),
                "head_dim": get("attention.key_length") or get("embedding_length") // heads,
                "max_position_embeddings": get("context_length"),
                "rope_theta": get("rope.freq_base", 10_000.0),
                "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon", 1e-6)),
                "tie_word_embeddings": "lm_head.weight" not in self._tensors,
                "rope_scaling": self._rope_scaling(),
                **self._token_ids(),
            }
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(
                f"{self.path} lacks metadata of a {self.arch} model ({error!r}); download it again"
            ) from error
        return config | (self._gemma_config(config) if self.arch == "gemma3" else {})

    def _gemma_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # llama.cpp hard-codes what it does not store: local base 10k, and 27B's query scale
        is_27b = config["num_hidden_layers"] == 62
        width = config["hidden_size"] // config["num_attention_heads"]
        return {
            "sliding_window": self._fields["gemma3.attention.sliding_window"],
            "rope_local_base_freq": 10_000.0,
            "query_pre_attn_scalar": width if is_27b else config["head_dim"],
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        if self._rope_factors is not None:  # Llama 3.1 and later: a divisor for each frequency
            factor = float(_dequantise(self._rope_factors, self.path).max())
            names = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
            released = dict(zip(names, (8192, 1.0, 4.0), strict=True))
            return {"rope_type": "llama3", "factor": factor, **released}
        kind = self._fields.get(f"{self.arch}.rope.scaling.type")
        if kind in (None, "none"):
            return None
        factor = self._fields.get(f"{self.arch}.rope.scaling.factor", 1.0)
        original = self._fields.get(f"{self.arch}.rope.scaling.original_context_length")
        scaling = {"rope_type": kind, "factor": factor}
        return scaling | ({"original_max_position_embeddings": original} if original else {})

    def _token_ids(self) -> dict[str, int]:
        names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
        stored = {theirs: f"tokenizer.ggml.{ours}_token_id" for ours, theirs in names.items()}
        return {name: self._fields[key] for name, key in stored.items() if key in self._fields}


def _open(path: Path):
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f'{path}: reading GGUF needs the package gguf: pip install "llmprep_jax[demo]"'
        ) from error
    try:
        reader = gguf.GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # the reader indexes into whatever the bytes say
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path} is no whole GGUF file ({reason}); download it again") from error
    size = path.stat().st_size
    for tensor in reader.tensors:
        if tensor.data_offset + tensor.n_bytes > size:
            raise ValueError(f"{path} ends before tensor {tensor.name}; download it again")
    return reader


def _dequantise(tensor, path: Path) -> np.ndarray:
    import gguf

    try:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise ValueError(
            f"{path}: tensor {tensor.name} is {kind}, which gguf cannot read"
        ) from error


def _short(value: float) -> float:
    """A float32 as the decimal that was meant: 9.9999997e-06 is 1e-05."""
    return float(f"{value:.6g}")
