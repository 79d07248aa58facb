"""The released sizes of DeepSeek-VL2, by name.

Fields are those of the released config.json files; tests hold the parameter counts of the parts
against the published ones.
"""

from llmprep_jax.models import deepseek, siglip
from llmprep_jax.models.deepseek_vl2.config import Config
from llmprep_jax.nn.balance import Balance
from llmprep_jax.nn.moe import Routing

# in tiles across and down, in the order of the released files, which decides ties
_TILES = "11 12 21 13 31 14 22 41 15 51 16 23 32 61 17 71 18 24 42 81 19 33 91"
_RESOLUTIONS = tuple((384 * int(across), 384 * int(down)) for across, down in _TILES.split())
_SO400M = siglip.VisionConfig(
    dim=1152,
    mlp_dim=4304,
    num_heads=16,
    num_layers=27,
    image_size=384,
    patch_size=14,
)
_MOE = dict(num_shared=2, num_dense=1, q_rank=None, max_seq_len=4096, rope_scaling=None)
_MOE |= dict(balance=Balance(expert=0.001))
_NEW_WORDS = dict(vocab_size=129280, bos_id=0, eos_ids=(1,), pad_id=2)


def _config(**language) -> Config:
    cfg = deepseek.Config(**_MOE, **language)
    image_id = 128815 if cfg.vocab_size == 129280 else None
    return Config(cfg, _SO400M, image_id=image_id, resolutions=_RESOLUTIONS)


PRESETS: dict[str, Config] = {
    "deepseek-vl2-tiny": _config(
        dim=1280,
        mlp_dim=6848,
        expert_dim=896,
        num_layers=12,
        num_heads=10,
        attention="heads",
        routing=Routing(64, 6),
        model_type="deepseek_v2",
        **_NEW_WORDS,
    ),
    "deepseek-vl2-small": _config(
        vocab_size=102400,
        dim=2048,
        mlp_dim=10944,
        expert_dim=1408,
        num_layers=27,
        num_heads=16,
        routing=Routing(64, 6),
        model_type="deepseek_v2",
        bos_id=100000,
        eos_ids=(100001,),
    ),
    "deepseek-vl2": _config(
        dim=2560,
        mlp_dim=12288,
        expert_dim=1536,
        num_layers=30,
        num_heads=32,
        routing=Routing(72, 6, score="sigmoid", has_bias=True, normalize=True, scale=2.0),
        model_type="deepseek_v3",
        **_NEW_WORDS,
    ),
}
