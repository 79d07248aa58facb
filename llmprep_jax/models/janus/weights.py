"""Names of Janus' tensors in Hugging Face checkpoints, in files as in memory."""

import dataclasses
from collections.abc import Iterator

from llmprep_jax.models import llama, siglip
from llmprep_jax.models.janus.config import Config
from llmprep_jax.weights.rows import Table

# where the tower's names are not SigLIP's
_OUT = (".self_attn.out_proj.", ".self_attn.projection_layer.")


def _linear(path: str, name: str) -> dict[str, tuple[str, str]]:
    return {f"{path}.w": (f"{name}.weight", "e d -> d e"), f"{path}.b": (f"{name}.bias", "e -> e")}


_BESIDE = Table(
    {
        **_linear("aligner.up", "model.aligner.fc1"),
        **_linear("aligner.down", "model.aligner.hidden_layers.0"),
        "drawing.codes.w": ("model.generation_embeddings.weight", "v z -> v z"),
        **_linear("drawing.aligner.up", "model.generation_aligner.fc1"),
        **_linear("drawing.aligner.down", "model.generation_aligner.hidden_layers.0"),
        **_linear("drawing.up", "model.generation_head.proj_out"),
        **_linear("drawing.down", "model.generation_head.vision_head"),
    }
)


def _conv(path: str, name: str) -> Iterator[tuple[str, tuple[str, str]]]:
    yield f"{path}.w", (f"{name}.weight", "o i p q -> p q i o")
    yield f"{path}.b", (f"{name}.bias", "o -> o")


def _norm(path: str, name: str) -> Iterator[tuple[str, tuple[str, str]]]:
    yield f"{path}.scale", (f"{name}.weight", "d -> d")
    yield f"{path}.bias", (f"{name}.bias", "d -> d")


def _block(path: str, name: str) -> Iterator[tuple[str, tuple[str, str]]]:
    for number in (1, 2):
        yield from _norm(f"{path}.norm{number}", f"{name}.norm{number}")
        yield from _conv(f"{path}.conv{number}", f"{name}.conv{number}")
    yield from _conv(f"{path}.short", f"{name}.nin_shortcut")


def _attention(path: str, name: str) -> Iterator[tuple[str, tuple[str, str]]]:
    yield from _norm(f"{path}.norm", f"{name}.norm")
    for ours, theirs in dict(q="q", k="k", v="v", o="proj_out").items():
        yield from _conv(f"{path}.{ours}", f"{name}.{theirs}")


def _half(path: str, name: str, levels: str, scale: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """Of an encoder or a decoder, whose levels are called so."""
    yield from _conv(f"{path}.first", f"{name}.conv_in")
    yield from _block(f"{path}.levels.blocks", f"{name}.{levels}.{{i}}.block.{{j}}")
    yield from _attention(f"{path}.levels.attns", f"{name}.{levels}.{{i}}.attn.{{j}}")
    yield from _conv(f"{path}.levels.scale", f"{name}.{levels}.{{i}}.{scale}.conv")
    yield from _block(f"{path}.middle.first", f"{name}.mid.block_1")
    yield from _attention(f"{path}.middle.attn", f"{name}.mid.attn_1")
    yield from _block(f"{path}.middle.second", f"{name}.mid.block_2")
    yield from _norm(f"{path}.norm", f"{name}.norm_out")
    yield from _conv(f"{path}.last", f"{name}.conv_out")


VQ = Table(
    {
        **dict(_half("encoder", "encoder", "down", "downsample")),
        **dict(_half("decoder", "decoder", "up", "upsample")),
        "codebook": ("quantize.embedding.weight", "v z -> v z"),
        **dict(_conv("narrow", "quant_conv")),
        **dict(_conv("widen", "post_quant_conv")),
    }
)


def table(cfg: Config) -> Table:
    """The table of a model."""
    words = {"model.": "model.language_model.", "lm_head.": "lm_head."}
    rows = llama.WEIGHTS.below("language", also=words)
    tower = {
        path: row._replace(name=row.name.replace(*_OUT))
        for path, row in siglip.VISION_WEIGHTS.items()
        if not path.startswith("pool.")
    }
    rows |= Table(tower).below("vision", "model.vision_model.") | _BESIDE
    return dataclasses.replace(
        rows | VQ.below("vq", "model.vqmodel."), ignored=(r"\.position_ids$",)
    )
