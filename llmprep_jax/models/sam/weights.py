"""Names of the tensors of SAM's encoder in Hugging Face checkpoints; q, k and v are in one.

Blocks that attend within windows and those that attend to all have tables of other lengths, so
they are two stacks, and the table lists which numbers each holds.
"""

from llmprep_jax.models.sam.config import Config
from llmprep_jax.weights.rows import Row, Table

_QKV = "attn.qkv"
_BLOCK = {
    "attn_norm.scale": ("layer_norm1.weight", "d -> d"),
    "attn_norm.bias": ("layer_norm1.bias", "d -> d"),
    "attn.q.w": (f"{_QKV}.weight", "(n h) d -> d n h", (0, 3)),
    "attn.k.w": (f"{_QKV}.weight", "(n h) d -> d n h", (1, 3)),
    "attn.v.w": (f"{_QKV}.weight", "(n h) d -> d n h", (2, 3)),
    "attn.q.b": (f"{_QKV}.bias", "(n h) -> n h", (0, 3)),
    "attn.k.b": (f"{_QKV}.bias", "(n h) -> n h", (1, 3)),
    "attn.v.b": (f"{_QKV}.bias", "(n h) -> n h", (2, 3)),
    "attn.o.w": ("attn.proj.weight", "d (n h) -> n h d"),
    "attn.o.b": ("attn.proj.bias", "d -> d"),
    "attn.rows": ("attn.rel_pos_h", "r h -> r h"),
    "attn.columns": ("attn.rel_pos_w", "r h -> r h"),
    "mlp_norm.scale": ("layer_norm2.weight", "d -> d"),
    "mlp_norm.bias": ("layer_norm2.bias", "d -> d"),
    "mlp.up.w": ("mlp.lin1.weight", "f d -> d f"),
    "mlp.up.b": ("mlp.lin1.bias", "f -> f"),
    "mlp.down.w": ("mlp.lin2.weight", "d f -> f d"),
    "mlp.down.b": ("mlp.lin2.bias", "d -> d"),
}


def tower_weights(cfg: Config) -> Table:
    """The table of an encoder with these blocks, its own neck included."""
    numbers = range(cfg.num_layers)
    stacks = {
        "window_layers": [i for i in numbers if i not in cfg.global_layers],
        "global_layers": list(cfg.global_layers),
    }
    rows = {
        "patches.w": ("patch_embed.projection.weight", "d c p q -> p q c d"),
        "patches.b": ("patch_embed.projection.bias", "d -> d"),
        "positions": ("pos_embed", "1 y x d -> y x d"),
    }
    for path, layers in stacks.items():
        listed = f"layers.{{l:{','.join(map(str, layers))}}}"
        of_block = {ours: Row(*row) for ours, row in _BLOCK.items() if layers}
        rows |= {
            f"{path}.{ours}": row._replace(name=f"{listed}.{row.name}")
            for ours, row in of_block.items()
        }
    return Table(rows) | neck_weights().below("neck", "neck.")


def neck_weights() -> Table:
    """The table of a neck."""
    return Table(
        {
            "narrow.w": ("conv1.weight", "o i 1 1 -> 1 1 i o"),
            "narrow_norm.scale": ("layer_norm1.weight", "o -> o"),
            "narrow_norm.bias": ("layer_norm1.bias", "o -> o"),
            "smooth.w": ("conv2.weight", "o i p q -> p q i o"),
            "smooth_norm.scale": ("layer_norm2.weight", "o -> o"),
            "smooth_norm.bias": ("layer_norm2.bias", "o -> o"),
        }
    )
