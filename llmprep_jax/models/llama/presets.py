"""Every released size of the Llama family, by name.

Fields are those of the released config.json files; tests hold the parameter counts against the
published ones.
"""

from llmprep_jax.models.llama.config import Config
from llmprep_jax.nn.rope import RopeScaling


def _llama3_scaling(factor: float) -> RopeScaling:
    return RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


_LLAMA2 = dict(vocab_size=32000, max_seq_len=4096, norm_eps=1e-5, bos_id=1, eos_ids=(2,))
_LLAMA3 = dict(
    vocab_size=128256,
    max_seq_len=8192,
    rope_base=500_000.0,
    norm_eps=1e-5,
    bos_id=128000,
    eos_ids=(128001,),
)
_LLAMA31 = {**_LLAMA3, "max_seq_len": 131072, "rope_scaling": _llama3_scaling(8.0)}
_LLAMA32 = {**_LLAMA31, "rope_scaling": _llama3_scaling(32.0), "tie_embeddings": True}
_SMOLLM2 = dict(
    vocab_size=49152,
    max_seq_len=8192,
    rope_base=100_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    bos_id=1,
    eos_ids=(2,),
    pad_id=2,
)
_QWEN2 = dict(
    model_type="qwen2",
    vocab_size=152064,
    qkv_bias=True,
    max_seq_len=32768,
    rope_base=1_000_000.0,
    norm_eps=1e-6,
    bos_id=151643,
    eos_ids=(151645,),
)
_QWEN2_TIED = {**_QWEN2, "vocab_size": 151936, "tie_embeddings": True}
_QWEN3 = dict(
    model_type="qwen3",
    vocab_size=151936,
    head_dim=128,
    qk_norm=True,
    max_seq_len=40960,
    rope_base=1_000_000.0,
    norm_eps=1e-6,
    bos_id=151643,
    eos_ids=(151645,),
)
_QWEN3_TIED = {**_QWEN3, "tie_embeddings": True}
_R1_QWEN3 = {**_QWEN3, "max_seq_len": 131072, "rope_scaling": RopeScaling("yarn", 4.0, 32768)}
_MISTRAL = dict(
    model_type="mistral",
    vocab_size=32000,
    head_dim=128,
    max_seq_len=32768,
    norm_eps=1e-5,
    bos_id=1,
    eos_ids=(2,),
)
_MISTRAL_FULL = {**_MISTRAL, "vocab_size": 32768, "rope_base": 1_000_000.0}
_NEMO = {**_MISTRAL_FULL, "vocab_size": 131072, "max_seq_len": 128000}
_DEEPSEEK = dict(vocab_size=102400, max_seq_len=4096, bos_id=100000, eos_ids=(100001,))
_R1_QWEN = {**_QWEN2, "max_seq_len": 131072, "norm_eps": 1e-5, "eos_ids": (151643,)}


def _size(
    family: dict, dim: int, mlp_dim: int, num_layers: int, num_heads: int, num_kv_heads: int, **more
) -> Config:
    sizes = dict(dim=dim, mlp_dim=mlp_dim, num_layers=num_layers, num_heads=num_heads)
    return Config(
        **{"head_dim": dim // num_heads, **family, "num_kv_heads": num_kv_heads, **sizes, **more}
    )


PRESETS: dict[str, Config] = {
    "llama-2-7b": _size(_LLAMA2, 4096, 11008, 32, 32, 32),
    "llama-2-13b": _size(_LLAMA2, 5120, 13824, 40, 40, 40),
    "llama-2-70b": _size(_LLAMA2, 8192, 28672, 80, 64, 8),
    "llama-3-8b": _size(_LLAMA3, 4096, 14336, 32, 32, 8),
    "llama-3-70b": _size(_LLAMA3, 8192, 28672, 80, 64, 8),
    "llama-3.1-8b": _size(_LLAMA31, 4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _size(_LLAMA31, 8192, 28672, 80, 64, 8),
    "llama-3.1-405b": _size(_LLAMA31, 16384, 53248, 126, 128, 8),
    "llama-3.2-1b": _size(_LLAMA32, 2048, 8192, 16, 32, 8),
    "llama-3.2-3b": _size(_LLAMA32, 3072, 8192, 28, 24, 8),
    "llama-3.3-70b": _size(_LLAMA31, 8192, 28672, 80, 64, 8),
    "smollm2-135m": _size(_SMOLLM2, 576, 1536, 30, 9, 3),
    "smollm2-360m": _size(_SMOLLM2, 960, 2560, 32, 15, 5),
    "smollm2-1.7b": _size(_SMOLLM2, 2048, 8192, 24, 32, 32, rope_base=130_000.0),
    "qwen2-0.5b": _size(_QWEN2_TIED, 896, 4864, 24, 14, 2),
    "qwen2-1.5b": _size(_QWEN2_TIED, 1536, 8960, 28, 12, 2),
    "qwen2-7b": _size(_QWEN2, 3584, 18944, 28, 28, 4),
    "qwen2-72b": _size(_QWEN2, 8192, 29568, 80, 64, 8),
    "qwen2.5-0.5b": _size(_QWEN2_TIED, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _size(_QWEN2_TIED, 1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _size(_QWEN2_TIED, 2048, 11008, 36, 16, 2),
    "qwen2.5-7b": _size(_QWEN2, 3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _size(_QWEN2, 5120, 13824, 48, 40, 8, norm_eps=1e-5),
    "qwen2.5-32b": _size(_QWEN2, 5120, 27648, 64, 40, 8, norm_eps=1e-5),
    "qwen2.5-72b": _size(_QWEN2, 8192, 29568, 80, 64, 8, norm_eps=1e-5),
    "qwen3-0.6b": _size(_QWEN3_TIED, 1024, 3072, 28, 16, 8),
    "qwen3-1.7b": _size(_QWEN3_TIED, 2048, 6144, 28, 16, 8),
    "qwen3-4b": _size(_QWEN3_TIED, 2560, 9728, 36, 32, 8),
    "qwen3-8b": _size(_QWEN3, 4096, 12288, 36, 32, 8),
    "qwen3-14b": _size(_QWEN3, 5120, 17408, 40, 40, 8),
    "qwen3-32b": _size(_QWEN3, 5120, 25600, 64, 64, 8),
    "mistral-7b-v0.1": _size(_MISTRAL, 4096, 14336, 32, 32, 8, window=4096),
    "mistral-7b-v0.3": _size(_MISTRAL_FULL, 4096, 14336, 32, 32, 8),
    "mistral-nemo-12b": _size(_NEMO, 5120, 14336, 40, 32, 8),
    "deepseek-llm-7b": _size(_DEEPSEEK, 4096, 11008, 30, 32, 32),
    "deepseek-llm-67b": _size(_DEEPSEEK, 8192, 22016, 95, 64, 8),
    "deepseek-r1-distill-qwen-1.5b": _size(
        _R1_QWEN, 1536, 8960, 28, 12, 2, vocab_size=151936, norm_eps=1e-6, rope_base=10_000.0
    ),
    "deepseek-r1-distill-qwen-7b": _size(
        _R1_QWEN, 3584, 18944, 28, 28, 4, norm_eps=1e-6, rope_base=10_000.0
    ),
    "deepseek-r1-distill-qwen-14b": _size(_R1_QWEN, 5120, 13824, 48, 40, 8),
    "deepseek-r1-distill-qwen-32b": _size(_R1_QWEN, 5120, 27648, 64, 40, 8),
    "deepseek-r1-distill-llama-8b": _size(_LLAMA31, 4096, 14336, 32, 32, 8),
    "deepseek-r1-distill-llama-70b": _size(_LLAMA31, 8192, 28672, 80, 64, 8),
    "deepseek-r1-0528-qwen3-8b": _size(_R1_QWEN3, 4096, 12288, 36, 32, 8),
}
