"""Released sizes of SigLIP and of SigLIP 2 with a fixed resolution, by name.

Fields are those of the released config.json files.
"""

from llmprep_jax.models.siglip.config import Config, TextConfig, VisionConfig

_LARGE = dict(dim=1024, mlp_dim=4096, num_layers=24, num_heads=16)
_SO400M = dict(dim=1152, mlp_dim=4304, num_layers=27, num_heads=16)
_GIANT = dict(dim=1536, mlp_dim=6144, num_layers=40, num_heads=16)
_WORDS2 = 256000  # Gemma's tokenizer


def _size(
    image_size: int, patch_size: int = 16, text: dict | None = None, words: int = 32000, **more
) -> Config:
    """Towers alike but for what `text` says."""
    sides = dict(image_size=image_size, patch_size=patch_size)
    text = more if text is None else text
    return Config(TextConfig(vocab_size=words, **text), VisionConfig(**more, **sides))


PRESETS: dict[str, Config] = {
    "siglip-base-patch16-224": _size(224),
    "siglip-base-patch16-256": _size(256),
    "siglip-base-patch16-256-multilingual": _size(256, words=250000),
    "siglip-base-patch16-384": _size(384),
    "siglip-base-patch16-512": _size(512),
    "siglip-large-patch16-256": _size(256, **_LARGE),
    "siglip-large-patch16-384": _size(384, **_LARGE),
    "siglip-so400m-patch14-384": _size(384, 14, **_SO400M),
    "siglip2-base-patch32-256": _size(256, 32, words=_WORDS2),
    "siglip2-base-patch16-224": _size(224, words=_WORDS2),
    "siglip2-base-patch16-256": _size(256, words=_WORDS2),
    "siglip2-base-patch16-384": _size(384, words=_WORDS2),
    "siglip2-base-patch16-512": _size(512, words=_WORDS2),
    "siglip2-large-patch16-256": _size(256, words=_WORDS2, **_LARGE),
    "siglip2-large-patch16-384": _size(384, words=_WORDS2, **_LARGE),
    "siglip2-large-patch16-512": _size(512, words=_WORDS2, **_LARGE),
    "siglip2-so400m-patch14-224": _size(224, 14, words=_WORDS2, **_SO400M),
    "siglip2-so400m-patch14-384": _size(384, 14, words=_WORDS2, **_SO400M),
    "siglip2-so400m-patch16-256": _size(256, words=_WORDS2, **_SO400M),
    "siglip2-so400m-patch16-384": _size(384, words=_WORDS2, **_SO400M),
    "siglip2-so400m-patch16-512": _size(512, words=_WORDS2, **_SO400M),
    "siglip2-giant-opt-patch16-256": _size(
        256, text={**_SO400M, "projection_dim": 1536}, words=_WORDS2, **_GIANT
    ),
    "siglip2-giant-opt-patch16-384": _size(
        384, text={**_SO400M, "projection_dim": 1536}, words=_WORDS2, **_GIANT
    ),
}
