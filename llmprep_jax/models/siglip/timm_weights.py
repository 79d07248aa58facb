"""Names of a SigLIP tower's tensors as timm has them: DeepSeek's own folders hold their towers so.

Queries, keys and values are one tensor, and so are keys and values of the pooling.
"""

from llmprep_jax.weights.rows import Table

_BLOCK = "blocks.{l}"


def _linear(ours: str, theirs: str, part: tuple[int, int] = (0, 1)) -> dict[str, tuple]:
    return {
        f"{ours}.w": (f"{theirs}.weight", "f d -> d f", part),
        f"{ours}.b": (f"{theirs}.bias", "f -> f", part),
    }


def _heads(ours: str, theirs: str, part: tuple[int, int] = (0, 1)) -> dict[str, tuple]:
    return {
        f"{ours}.w": (f"{theirs}.weight", "(n h) d -> d n h", part),
        f"{ours}.b": (f"{theirs}.bias", "(n h) -> n h", part),
    }


def _output(ours: str, theirs: str) -> dict[str, tuple]:
    return {
        f"{ours}.w": (f"{theirs}.weight", "d (n h) -> n h d"),
        f"{ours}.b": (f"{theirs}.bias", "d -> d"),
    }


def _norm(ours: str, theirs: str) -> dict[str, tuple]:
    return {
        f"{ours}.scale": (f"{theirs}.weight", "d -> d"),
        f"{ours}.bias": (f"{theirs}.bias", "d -> d"),
    }


_TOWER = {
    "patches.w": ("patch_embed.proj.weight", "d c p q -> p q c d"),
    "patches.b": ("patch_embed.proj.bias", "d -> d"),
    "positions.table": ("pos_embed", "1 i d -> i d"),
    **_norm("layers.attn_norm", f"{_BLOCK}.norm1"),
    **_heads("layers.attn.q", f"{_BLOCK}.attn.qkv", (0, 3)),
    **_heads("layers.attn.k", f"{_BLOCK}.attn.qkv", (1, 3)),
    **_heads("layers.attn.v", f"{_BLOCK}.attn.qkv", (2, 3)),
    **_output("layers.attn.o", f"{_BLOCK}.attn.proj"),
    **_norm("layers.mlp_norm", f"{_BLOCK}.norm2"),
    **_linear("layers.mlp.up", f"{_BLOCK}.mlp.fc1"),
    **_linear("layers.mlp.down", f"{_BLOCK}.mlp.fc2"),
    **_norm("norm", "norm"),
}
_POOL = {
    "probe": ("latent", "1 o d -> o d"),
    **_heads("q", "q"),
    **_heads("k", "kv", (0, 2)),
    **_heads("v", "kv", (1, 2)),
    **_output("o", "proj"),
    **_norm("norm", "norm"),
    **_linear("mlp.up", "mlp.fc1"),
    **_linear("mlp.down", "mlp.fc2"),
}
TIMM_VISION_WEIGHTS = Table(_TOWER) | Table(_POOL).below("pool", "attn_pool.")
