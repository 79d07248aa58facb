"""A small CLIP and a small SigLIP, and how they are trained and tested on scenes of photographs."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from flax import nnx

from experiments.seeing.photographs import SIDE, Photograph, Scene, crops, draw_scenes
from llmprep_jax.evaluate.retrieval import Recall, recall
from llmprep_jax.models import clip, registry, siglip
from llmprep_jax.train.batches import normalize_images
from llmprep_jax.train.contrastive import HALF, ContrastiveLoss
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer

Kind = Literal["clip", "siglip"]
LENGTH = 18  # tokens of a caption, padding too; the longest has 17
PAD, END = 0, 1  # not 2, which CLIP's config takes for the greatest id
RATES = {"clip": 2e-3, "siglip": 2e-3}  # learning rates


class Words:
    """A tokenizer whose tokens are the words of some captions."""

    def __init__(self, captions: Sequence[str]):
        words = sorted({word for caption in captions for word in caption.split()})
        self.ids = {word: number for number, word in enumerate(words, END + 1)}

    @property
    def size(self) -> int:
        return END + 1 + len(self.ids)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """Ids [captions, LENGTH]: words, the end, padding."""
        rows = np.full((len(captions), LENGTH), PAD, np.int32)
        for row, caption in zip(rows, captions, strict=True):
            ids = [*(self.ids[word] for word in caption.split()), END]
            row[: len(ids)] = ids
        return rows


def make_model(kind: Kind, vocab_size: int, seed: int, dim: int = 64) -> nnx.Module:
    """Towers of three layers of images and two of texts, with random weights."""
    sizes = dict(dim=dim, mlp_dim=4 * dim, num_heads=4)
    text = dict(**sizes, vocab_size=vocab_size, num_layers=2, max_seq_len=LENGTH)
    vision = dict(**sizes, num_layers=3, image_size=SIDE, patch_size=12)
    if kind == "clip":
        ids = dict(bos_id=None, eos_id=END, pad_id=PAD)
        towers = clip.TextConfig(**text, **ids), clip.VisionConfig(**vision)
        cfg = clip.Config(*towers, projection_dim=dim)
    else:
        cfg = siglip.Config(siglip.TextConfig(**text), siglip.VisionConfig(**vision))
    return jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(seed)))()


@dataclasses.dataclass(frozen=True)
class Album:
    """Photographs, all their scenes, and the tokenizer of the captions."""

    photographs: Mapping[str, Photograph]
    scenes: Sequence[Scene]
    words: Words

    @property
    def held_out(self) -> list[Scene]:
        return [scene for scene in self.scenes if scene.is_held_out]

    def batches(self, rows: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
        """Crops and captions of scenes that are trained on."""
        trained = [scene for scene in self.scenes if not scene.is_held_out]
        rng = np.random.default_rng([seed, 1])
        for scenes in draw_scenes(trained, rows, seed):
            tokens = self.words([scene.caption for scene in scenes])
            yield {"tokens": tokens, "images": crops(self.photographs, scenes, rng)[:, None]}


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Held-out scenes, a crop of each, the unit vectors of both sides, and how well they meet."""

    scenes: Sequence[Scene]
    images: np.ndarray
    image_vectors: np.ndarray
    text_vectors: np.ndarray
    recall: Recall


def meet(model: nnx.Module, album: Album, seed: int = 0) -> Meeting:
    """Each held-out crop against all held-out captions, and each caption against all crops."""
    scenes = album.held_out
    images = crops(album.photographs, scenes, np.random.default_rng([seed, 2]))
    tokens = album.words([scene.caption for scene in scenes])
    images_IE = np.asarray(model.encode_image(normalize_images(jnp.asarray(images), HALF, HALF)))
    texts_IE = np.asarray(model.encode_text(tokens))
    return Meeting(scenes, images, images_IE, texts_IE, recall(images_IE, texts_IE, ks=(1, 5)))


def train(
    model: nnx.Module, kind: Kind, album: Album, steps: int, rows: int, seed: int
) -> tuple[nnx.Module, list[float]]:
    """The model after `steps` batches, and the loss of each."""
    optim = OptimConfig(lr=RATES[kind], warmup_steps=min(20, steps), weight_decay=0.05)
    trainer = Trainer(model, cfg=FitConfig(steps=steps, optim=optim), loss_fn=ContrastiveLoss())
    run, losses = trainer.steps(album.batches(rows, seed)), []
    for _ in rich.progress.track(range(steps), f"training {kind}", transient=True):
        losses.append(next(run)["loss"])
    return trainer.model(run.state), [round(float(loss), 4) for loss in losses]
