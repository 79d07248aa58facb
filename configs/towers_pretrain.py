"""What two towers that learn from pictures of coloured shapes have in common.

Each is a config of its own: clip_pretrain.py, siglip_pretrain.py.
"""

from typing import Any

from configs.data.shapes import FILE
from llmprep_jax.data import DataConfig
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig

TEXT = dict(vocab_size=384, dim=96, mlp_dim=384, num_layers=3, num_heads=4, max_seq_len=24)
VISION = dict(dim=96, mlp_dim=384, num_layers=3, num_heads=4, image_size=32, patch_size=8)


def learn_shapes(name: str, *, beta2: float, **settings: Any) -> RunConfig:
    """The run of a name; `settings` are fields of RunConfig."""
    return RunConfig(
        data=DataConfig(paths=(str(FILE),), batch_size=64, holdout=0.1),
        optim=OptimConfig(lr=1e-3, warmup_steps=20, weight_decay=0.2, betas=(0.9, beta2)),
        eval_every=100,
        checkpoint=CheckpointConfig(every=100, keep_last=2),
        out=f"runs/{name}",
        **settings,
    )
