# %% [markdown]
# # Seeing: search photographs by words
#
# A small CLIP is trained here, from nothing, on crops of ten real photographs that scikit-image ships, and then finds
# crops that it has never seen by what is said of them. A released CLIP or SigLIP needs no training: with its folder or
# hub id, `lp.load_model("openai/clip-vit-base-patch32")` takes the place of everything up to "Search".

# %%
import importlib.util
import itertools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from PIL import Image, ImageOps

import llmprep_jax as lp
from llmprep_jax.evaluate.retrieval import recall
from llmprep_jax.models import clip, registry
from llmprep_jax.train.batches import normalize_images
from llmprep_jax.train.contrastive import HALF, ContrastiveLoss
from llmprep_jax.vision import open_image

SIDE, LENGTH = 48, 8
PICTURES = {
    "an astronaut": "astronaut.png",
    "a cat": "chelsea.png",
    "a cup of coffee": "coffee.png",
    "a rocket": "rocket.jpg",
    "a motorcycle": "motorcycle_left.png",
    "a retina": "retina.jpg",
    "galaxies": "hubble_deep_field.jpg",
    "old coins": "coins.png",
    "a brick wall": "brick.png",
    "the moon": "moon.png",
}
folder = pathlib.Path(importlib.util.find_spec("skimage").origin).parent / "data"
photographs = {what: Image.fromarray(open_image(folder / file)) for what, file in PICTURES.items()}

# %% [markdown]
# ## Crops and what is said of them
#
# A crop is any square part of a photograph, in one of four looks. A quarter of the pairs (what, look) are never trained
# on: "a cat upside down" must be understood from other cats and other things upside down.

# %%
LOOKS = {
    "": lambda image: image,
    "in red": lambda image: ImageOps.colorize(image.convert("L"), "black", (255, 80, 70)),
    "in blue": lambda image: ImageOps.colorize(image.convert("L"), "black", (70, 120, 255)),
    "upside down": ImageOps.flip,
}
pairs = list(itertools.product(PICTURES, LOOKS))
held_out = [pair for i, pair in enumerate(pairs) if i % 4 == (i // 4) % 4]
trained = [pair for pair in pairs if pair not in held_out]
words = sorted({word for pair in pairs for word in " ".join(pair).split()})
ids = {word: number for number, word in enumerate(words, 2)}  # 0 is padding, 1 the end


def crop(what, look, rng):
    image = photographs[what]
    edge = rng.uniform(0.5, 0.8) * min(image.size)
    left, top = rng.uniform(0, np.array(image.size) - edge)
    box = (left, top, left + edge, top + edge)
    return np.asarray(LOOKS[look](image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box)))


def encode(texts):
    rows = np.zeros((len(texts), LENGTH), np.int32)
    for row, text in zip(rows, texts, strict=True):
        tokens = [*(ids[word] for word in text.split()), 1]
        row[: len(tokens)] = tokens
    return rows


def batches(rows, seed):
    rng = np.random.default_rng(seed)
    while True:
        chosen = [trained[i] for i in rng.choice(len(trained), rows, replace=False)]
        images = np.stack([crop(*pair, rng) for pair in chosen])
        yield {"tokens": encode([" ".join(pair) for pair in chosen]), "images": images[:, None]}


rng = np.random.default_rng(1)
figure, all_axes = plt.subplots(1, 8, figsize=(9, 1.6), dpi=72, layout="constrained")
for axes, pair in zip(all_axes, pairs[::5], strict=False):
    axes.imshow(crop(*pair, rng))
    axes.set_title("\n".join(pair), fontsize=7)
    axes.axis("off")
plt.show()

# %% [markdown]
# ## Train
#
# Symmetric InfoNCE: each crop is to find its text among those of the batch, and each text its crop.

# %%
sizes = dict(dim=64, mlp_dim=256, num_heads=4)
text = clip.TextConfig(
    **sizes,
    vocab_size=2 + len(ids),
    num_layers=2,
    max_seq_len=LENGTH,
    bos_id=None,
    eos_id=1,
    pad_id=0,
)
vision = clip.VisionConfig(**sizes, num_layers=3, image_size=SIDE, patch_size=8)
cfg = clip.Config(text, vision, projection_dim=64)
model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))()
STEPS = 160
optim = lp.train.OptimConfig(lr=1e-3, warmup_steps=20, weight_decay=0.05)
fit = lp.train.FitConfig(steps=STEPS, optim=optim)
trainer = lp.train.Trainer(model, cfg=fit, loss_fn=ContrastiveLoss())
run = trainer.steps(batches(len(trained), 0))
losses = [float(next(run)["loss"]) for _ in range(STEPS)]
model = trainer.model(run.state)
print(
    f"loss {losses[0]:.2f} (ln {len(trained)} = {np.log(len(trained)):.2f}) -> {np.mean(losses[-10:]):.2f}"
)

# %% [markdown]
# ## Search
#
# Four crops of each held-out pair, all texts of them; R@1 is how often the first that is found is right.

# %%
crops = np.stack([crop(*pair, rng) for pair in held_out for _ in range(4)])
images_IE = model.encode_image(normalize_images(jnp.asarray(crops), HALF, HALF))
texts_TE = model.encode_text(encode([" ".join(pair) for pair in held_out]))
found = recall(images_IE[::4], texts_TE, ks=(1, 3))
print(
    "crop to text:",
    found.image_to_text,
    " text to crop:",
    found.text_to_image,
    f" chance: {1 / len(held_out):.2f}",
)

# %%
queries = [" ".join(pair) for pair in held_out[:6]]
scores = np.asarray(model.encode_text(encode(queries)) @ images_IE.T)
figure, grid = plt.subplots(len(queries), 5, figsize=(6, 7), dpi=64, layout="constrained")
for row, query, own in zip(grid, queries, scores, strict=True):
    row[0].text(1, 0.5, query, ha="right", va="center", fontsize=8)
    row[0].axis("off")
    for axes, best in zip(row[1:], np.argsort(-own), strict=False):
        axes.imshow(crops[best])
        axes.axis("off")
plt.show()
