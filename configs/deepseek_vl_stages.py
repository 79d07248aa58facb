"""What the three stages of DeepSeek-VL have in common (2403.05525, section 3.2 and figure 3).

Each is a config of its own: deepseek_vl_stage1.py, deepseek_vl_stage2.py, deepseek_vl_stage3.py.

| stage | learns | stays as it is |
|---|---|---|
| 1 | the projector | both towers, the language model |
| 2 | the projector, the language model | both towers |
| 3 | the projector, the language model, SigLIP | SAM's tower, for want of memory |

The model here is small and of random weights, and its pictures are shapes (configs/data/shapes.py):
to see the stages at work. Stages 2 and 3 begin from the folder of the run before. With released
weights a stage is `model=FOLDER architecture=none tokenizer=none data.paths=...`, for 7B on eight
H100s `mesh=h100_8 compute.dtype=bfloat16 compute.remat=full`; the 1.3B has no tower of SAM, so its
third stage freezes nothing (`freeze=`).
"""

from typing import Any

from configs.data.shapes import FILE, find_tokenizer
from llmprep_jax.data import DataConfig
from llmprep_jax.models import deepseek_vl, llama, sam, siglip
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig

FREEZE = {1: ("language", "vision"), 2: ("vision",), 3: ("high",)}
MODEL = deepseek_vl.Config(
    language=llama.Config(
        vocab_size=384,
        dim=128,
        mlp_dim=344,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        max_seq_len=256,
    ),
    vision=siglip.VisionConfig(64, 128, 3, 4, image_size=32, patch_size=8, has_pool=False),
    high=sam.Config(
        64, 128, 3, 4, image_size=64, patch_size=8, out_dim=16, window=4, global_layers=(1, 2)
    ),
    image_id=358,
    model_type="deepseek_vl_hybrid",
)


def find_processor() -> str:
    """The tokenizer of the shapes' captions, with pictures of 32 and 64 pixels."""
    fields = {
        "image_processor_type": "DeepseekVLHybridImageProcessor",
        "size": {"height": 32, "width": 32},
        "high_res_size": {"height": 64, "width": 64},
        "num_image_tokens": 16,
    }
    return find_tokenizer("deepseek-vl", fields)


def stage(number: int, **settings: Any) -> RunConfig:
    """The run of a stage; `settings` are fields of RunConfig.

    Args:
      number: 1, 2 or 3.
    """
    data = dict(seq_len=96, batch_size=16, max_images=2, holdout=0.05)
    own = dict(
        tokenizer=find_processor if number == 1 else None,  # later ones find it in the run before
        freeze=FREEZE[number],
        eval_every=100,
        checkpoint=CheckpointConfig(every=100, keep_last=2),
        out=f"runs/deepseek_vl_stage{number}",
    )
    own |= settings
    own["data"] = DataConfig(**{"paths": (str(FILE),), **data, **own.pop("data", {})})
    return RunConfig(optim=OptimConfig(**own.pop("optim")), **own)
