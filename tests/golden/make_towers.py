"""Writes golden vectors of two towers: tiny random transformers models, and what they compute.

Run it with the parity extra installed: `python -m tests.golden.make_towers`. Each `<name>.npz` has
the checkpoint's tensors under their Hugging Face names (`weight/...`), tokens padded on the right,
a mask, images, logits without the mask and with it (`masked`), unit vectors, loss and some
gradients (`grad/...`) without it; `<name>.json` is the config.json.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

FOLDER = Path(__file__).parent
_TEXT = dict(vocab_size=40, hidden_size=12, intermediate_size=20, num_hidden_layers=2)
_TEXT |= dict(num_attention_heads=3, max_position_embeddings=9)
_VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
_VISION |= dict(image_size=9, patch_size=4)
_END = 39
_SOME = (
    *("logit_scale", "logit_bias", "class_embedding", "patch_embedding.weight", "head.probe"),
    *("token_embedding.weight", "text_projection.weight", "text_model.head.bias"),
    *("vision_model.encoder.layers.1.self_attn.q_proj.weight", "in_proj_weight", "in_proj_bias"),
    *("text_model.embeddings.position_embedding.weight", "pre_layrnorm.bias"),
    *("vision_model.encoder.layers.0.mlp.fc1.bias", "post_layernorm.weight"),
)


def build(name: str) -> transformers.PreTrainedModel:
    """A model whose weights are all random."""
    if name == "clip":
        ids = dict(bos_token_id=38, eos_token_id=2, pad_token_id=_END)
        config = transformers.CLIPConfig(
            text_config={**_TEXT, **ids}, vision_config=_VISION, projection_dim=10
        )
    else:
        text = {**_TEXT, "projection_size": 16}
        config = transformers.SiglipConfig(text_config=text, vision_config=_VISION)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def compute(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Three texts of 4, 6 and 8 tokens, and three images."""
    rng, lengths = np.random.default_rng(0), np.array([4, 6, 8])[:, None]
    tokens = np.where(np.arange(8) < lengths - 1, rng.integers(3, 38, (3, 8)), _END)
    images = rng.normal(size=(3, 9, 9, 3)).astype(np.float32)
    mask = np.arange(8) < lengths
    given = dict(
        input_ids=torch.tensor(tokens), pixel_values=torch.tensor(images).permute(0, 3, 1, 2)
    )
    with torch.no_grad():
        masked = model(**given, attention_mask=torch.tensor(mask).long()).logits_per_image
    out = model(**given, return_loss=True)
    out.loss.backward()
    return {
        "tokens": tokens.astype(np.int32),
        "mask": mask,
        "images": images,
        "masked": masked.numpy(),
        "loss": np.float32(out.loss.item()),
        **{
            name: getattr(out, name).detach().numpy()
            for name in ("logits_per_image", "text_embeds", "image_embeds")
        },
        **{f"weight/{name}": x.detach().numpy() for name, x in model.named_parameters()},
        **{
            f"grad/{name}": x.grad.numpy()
            for name, x in model.named_parameters()
            if name.endswith(_SOME)
        },
    }


def main() -> None:
    for name in ("clip", "siglip"):
        model = build(name)
        arrays = compute(model)
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
        (FOLDER / f"{name}.json").write_text(model.config.to_json_string(), encoding="utf-8")
        size = (FOLDER / f"{name}.npz").stat().st_size
        print(f"{FOLDER / name}.npz: {len(arrays)} arrays, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
