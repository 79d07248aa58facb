"""Released sizes of CLIP, by name; fields are those of the released config.json files."""

from llmprep_jax.models.clip.config import GREATEST, Config, TextConfig, VisionConfig

# ids of hub files, which do not mean what they say
_IDS = dict(bos_id=0, eos_id=GREATEST, pad_id=1)
_BASE_TEXT = TextConfig(**_IDS)
_LARGE_TEXT = TextConfig(dim=768, mlp_dim=3072, num_heads=12, **_IDS)
_LARGE = dict(dim=1024, mlp_dim=4096, num_layers=24, num_heads=16, patch_size=14)

PRESETS: dict[str, Config] = {
    "clip-vit-base-patch32": Config(_BASE_TEXT, VisionConfig()),
    "clip-vit-base-patch16": Config(_BASE_TEXT, VisionConfig(patch_size=16)),
    "clip-vit-large-patch14": Config(_LARGE_TEXT, VisionConfig(**_LARGE), 768),
    "clip-vit-large-patch14-336": Config(_LARGE_TEXT, VisionConfig(**_LARGE, image_size=336), 768),
}
