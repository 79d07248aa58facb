# %% [markdown]
# # Drawing with Janus
#
# Janus draws as it writes: a picture is a row of codes, which a language model says one after another, and a VQ
# autoencoder turns codes to pixels. A tiny one learns here, from nothing, to draw six shapes from their names: first
# the autoencoder, then the language model. With released weights it is one line,
# `lp.generate_images(lp.load_model("deepseek-community/Janus-Pro-1B"), processor, "a red apple")`.

# %%
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tokenizers
from flax import nnx
from PIL import Image, ImageDraw

import llmprep_jax as lp
from llmprep_jax.models import janus, llama, registry, siglip
from llmprep_jax.models.janus.processor import Processor

SIDE, SCALE = 32, 4
CODES = (SIDE // SCALE) ** 2
SHAPES = ("disc", "square", "triangle")
COLORS = {"red": (220, 50, 40), "blue": (40, 80, 220)}
CAPTIONS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]


def draw(caption):
    _, color, shape = caption.split()
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen, box = ImageDraw.Draw(image), (6, 6, SIDE - 7, SIDE - 7)
    if shape == "disc":
        pen.ellipse(box, fill=COLORS[color])
    elif shape == "square":
        pen.rectangle(box, fill=COLORS[color])
    else:
        pen.polygon([(SIDE // 2, 5), (5, SIDE - 7), (SIDE - 6, SIDE - 7)], fill=COLORS[color])
    return np.asarray(image)


def show(rows, names):
    _, grid = plt.subplots(
        len(rows), len(CAPTIONS), figsize=(9, 1.7 * len(rows)), layout="constrained"
    )
    for line, name, pictures in zip(np.atleast_2d(grid), names, rows, strict=True):
        line[0].set_ylabel(name)
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
    for axes, caption in zip(np.atleast_2d(grid)[0], CAPTIONS, strict=True):
        axes.set_title(caption, fontsize=8)
    plt.show()


pictures = np.stack([draw(caption) for caption in CAPTIONS])
show([pictures], ["drawn"])

# %% [markdown]
# ## The model
#
# Its tokens are the words; `<image>` stands for a code.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
special = ["<pad>", "<bos>", "<eos>", "<image>", "<begin>", "<end>"]
vocabulary = {
    text: i
    for i, text in enumerate([*special, *sorted({w for c in CAPTIONS for w in c.split()}), "<unk>"])
}
core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
core.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
core.save(str(folder / "tokenizer.json"))
template = (
    "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
)
(folder / "tokenizer_config.json").write_text(
    json.dumps(
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "image_token": "<image>",
            "boi_token": "<begin>",
            "eoi_token": "<end>",
            "chat_template": template,
        }
    )
)
fields = {"image_processor_type": "JanusImageProcessor", "size": {"height": SIDE, "width": SIDE}}
fields |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "num_image_tokens": CODES}
(folder / "preprocessor_config.json").write_text(json.dumps(fields))
processor = Processor.from_path(folder)

sizes = dict(dim=96, mlp_dim=256, num_heads=4, num_layers=2)
language = llama.Config(
    **sizes, num_kv_heads=4, head_dim=24, vocab_size=len(vocabulary), max_seq_len=128
)
vision = siglip.VisionConfig(**sizes, image_size=SIDE, patch_size=SCALE, act="gelu", has_pool=False)
vq = janus.VQConfig(
    num_codes=64, code_dim=8, latent_dim=32, base_dim=32, multipliers=(1, 1, 1), num_blocks=1
)
cfg = janus.Config(language, vision, vq, image_id=vocabulary["<image>"])
model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))()

# %% [markdown]
# ## Pictures to codes and back
#
# The autoencoder is trained on the six pictures at all offsets: what comes out is compared with what went in, through
# the nearest codes, past which gradients go straight.

# %%
values = jnp.asarray(pictures, jnp.float32) / 127.5 - 1
graph, weights = nnx.split(model.vq)
tx = optax.adam(2e-3)


def vq_loss(weights, images):
    vq = nnx.merge(graph, weights)
    latents = vq.latents(images)
    chosen = vq.look_up(vq.quantize(jax.lax.stop_gradient(latents)))
    straight = latents + jax.lax.stop_gradient(chosen - latents)
    match = jnp.mean(jnp.square(jax.lax.stop_gradient(latents) - chosen))
    commit = jnp.mean(jnp.square(latents - jax.lax.stop_gradient(chosen)))
    return jnp.mean(jnp.square(vq.draw(straight) - images)) + match + 0.25 * commit


@jax.jit
def vq_step(weights, state, key):
    shifts = jax.random.randint(key, (len(values), 2), -4, 5)
    images = jax.vmap(lambda image, by: jnp.roll(image, by, (0, 1)))(values, shifts)
    loss, gradients = jax.value_and_grad(vq_loss)(weights, images)
    updates, state = tx.update(gradients, state)
    return optax.apply_updates(weights, updates), state, loss


state = tx.init(weights)
for i in range(150):
    weights, state, loss = vq_step(weights, state, jax.random.key(i))
nnx.update(model.vq, weights)
codes = np.asarray(model.encode_codes(values))
back = np.asarray(model.decode_codes(codes))
print(f"error {float(loss):.3f}, {len(np.unique(codes))} codes in use")
show([pictures, np.clip((back + 1) / 2, 0, 1)], ["given", "through codes"])

# %% [markdown]
# ## Captions to codes
#
# A row is the caption, the token that begins an image, and one `<image>` for each code; what follows each is learnt
# from the codes of the picture. One caption in eight is left out, in the way that guidance will ask for at the end.

# %%
prompts = processor.for_drawing(CAPTIONS)["tokens"]
start = prompts.shape[1]
tokens = np.concatenate([prompts, np.full((len(CAPTIONS), CODES), cfg.image_id)], axis=1).astype(
    np.int32
)
blank = tokens.copy()
blank[:, 1 : start - 1] = processor.pad_id
rng = np.random.default_rng(0)


def batches(repeats=2):
    while True:
        drop = rng.random((repeats, len(CAPTIONS), 1)) < 1 / 8
        rows = np.where(drop, blank, tokens).reshape(-1, tokens.shape[1])
        yield {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "loss_mask": np.zeros(rows[:, 1:].shape, np.float32),
            "images": np.concatenate([pictures] * repeats)[:, None],
            "image_mask": np.ones((len(rows), 1), bool),
            "drawn": np.ones((len(rows), 1), bool),
        }


STEPS = 150
optim = lp.train.OptimConfig(lr=2e-3, warmup_steps=10)
loss_fn = lp.train.make_loss(pixels=processor.images.pixels)
trainer = lp.train.Trainer(model, cfg=lp.train.FitConfig(steps=STEPS, optim=optim), loss_fn=loss_fn)
run = trainer.steps(batches())
losses = [float(next(run)["loss"]) for _ in range(STEPS)]
model = trainer.model(run.state)
print(f"nats a code: {losses[0]:.2f} (ln 64 = {np.log(64):.2f}) -> {np.mean(losses[-10:]):.3f}")

# %% [markdown]
# ## Draw
#
# Each picture is read in a pair of rows, with its caption and without; `guidance` is how far from the second it is
# drawn, and 1 leaves the second out.

# %%
rows = {
    f"guidance {g}": lp.generate_images(model, processor, CAPTIONS, guidance=g, seed=1)
    for g in (1, 3)
}
show(list(rows.values()), list(rows))
for name, drawn in rows.items():
    nearest = np.abs(drawn[:, None].astype(float) - pictures[None]).mean((2, 3, 4)).argmin(1)
    print(
        f"{name}: {np.mean(nearest == np.arange(len(CAPTIONS))):.0%} are nearest to the picture of their caption"
    )
