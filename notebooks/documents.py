# %% [markdown]
# # Documents with DeepSeek-VL2
#
# How a page becomes tokens, by the released rule, and a tiny model of the same shape that is taught a handful of pages
# here. It learns these by heart: what it takes to read pages that were never seen is in `make demo-vision`. Released
# weights need no training: `lp.load_model("deepseek-ai/deepseek-vl2-tiny")`, and the processor of the same name.

# %%
import dataclasses
import json
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import tokenizers
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.data import synthetic_documents
from llmprep_jax.evaluate.anls import anls
from llmprep_jax.models import deepseek_vl2, registry
from llmprep_jax.models.deepseek_vl2.layout import count_tokens
from llmprep_jax.models.deepseek_vl2.processor import Processor
from llmprep_jax.nn.moe import Routing
from llmprep_jax.vision import ImageProcessor

# %% [markdown]
# ## Pages with questions
#
# Generated from a seed: each page comes with its text, the boxes of its words, and questions with answers.

# %%
settings = synthetic_documents.Settings(
    kind=("receipt", "letter", "menu"), language=("en",), seed=1
)
figure, row = plt.subplots(1, 3, figsize=(10, 4.5), dpi=72, layout="constrained")
for i, axes in enumerate(row):
    page = synthetic_documents.generate(settings, i)
    axes.imshow(page.image)
    axes.set_title(f"{page.questions[0].text}\n{page.questions[0].answers[0]}", fontsize=8)
    axes.axis("off")
plt.show()

# %% [markdown]
# ## Tiles
#
# A picture is laid on that grid of 384-pixel tiles which keeps most of it, and is seen once more as a whole. Each tile is
# 14 x 14 tokens, with a newline after each row and a separator between the two views.

# %%
released = registry.preset("deepseek-vl2-tiny")
fields = {
    "candidate_resolutions": [list(sides) for sides in released.resolutions],
    "patch_size": released.vision.patch_size,
    "downsample_ratio": 2,
}
tiler = ImageProcessor.from_fields(fields, "deepseek_vl_v2")
for width, height in ((300, 300), (800, 600), (600, 1200), (2480, 3508), (4000, 500)):
    pixels = tiler(np.zeros((height, width, 3), np.uint8))
    (grid,) = pixels.grids.tolist()
    tokens = int(count_tokens(pixels.grids, tiler.side).sum())
    print(f"{width} x {height}: {grid[0]} x {grid[1]} tiles of {tiler.edge}, {tokens} tokens")

# %% [markdown]
# ## A tiny one
#
# Everything the released model has, at a width of 96: a SigLIP tower, the projector, and a language model with experts.
# Its pages are 96 pixels wide and hold a few large words; its tokens are words, and digits one by one.

# %%
SIDE, PAGES = 96, 12
folder = pathlib.Path(tempfile.mkdtemp())
tiny = synthetic_documents.Settings(
    kind=("receipt", "sign"), language=("en",), level="tiny", width=SIDE
)
asked = []
for i in range(PAGES):
    page = synthetic_documents.generate(tiny, i)
    page.image.save(folder / f"{i}.png")
    question = page.questions[0]
    asked.append((f"{i}.png", question.text, question.answers))


lines = [json.dumps({"image": image, "question": q, "answers": a}) for image, q, a in asked]
(folder / "train.jsonl").write_text("\n".join(lines))


def write_processor():
    special = ["<bos>", "<eos>", "<pad>", "<image>", "<unk>"]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    pieces = tokenizers.Regex(r" ?[A-Za-z]+|[0-9]|\s|[^A-Za-z0-9\s]")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(pieces, "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, show_progress=False
    )
    texts = [*(q for _, q, _ in asked), *(a for *_, answers in asked for a in answers)]
    core.train_from_iterator([*texts, "<|User|>: Assistant\n"], trainer)
    core.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    own = {
        "processor_class": "DeepseekVLV2Processor",
        "image_token": "<image>",
        "downsample_ratio": 2,
    }
    own |= {"candidate_resolutions": [[SIDE, SIDE]], "patch_size": SIDE // 8}
    own |= {"image_mean": [1.0] * 3, "image_std": [0.25] * 3}  # white is 0
    (folder / "processor_config.json").write_text(json.dumps(own))
    return Processor.from_path(folder)


processor = write_processor()
ids = {
    name: processor.tokenizer.encode(f"<{name}>", add_special=False)[0]
    for name in ("bos", "eos", "pad", "image")
}
language = dataclasses.replace(
    released.language,
    vocab_size=processor.tokenizer.vocab_size,
    dim=96,
    mlp_dim=288,
    expert_dim=96,
    num_layers=2,
    num_heads=4,
    routing=Routing(4, 2),
    max_seq_len=512,
    bos_id=ids["bos"],
    eos_ids=(ids["eos"],),
    pad_id=ids["pad"],
)
vision = dataclasses.replace(
    released.vision,
    dim=64,
    mlp_dim=256,
    num_layers=2,
    num_heads=4,
    image_size=SIDE,
    patch_size=SIDE // 8,
    has_pool=False,
)
cfg = deepseek_vl2.Config(language, vision, image_id=ids["image"], resolutions=((SIDE, SIDE),))
model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))()
print(
    f"{sum(x.size for x in jax.tree.leaves(model)):,} parameters; {len(processor(asked[0][1])['tokens'][0])} tokens of a question without its page"
)

# %% [markdown]
# ## Taught by heart
#
# A blank page in place of each shows how much the questions alone give away.

# %%
STEPS = 60
batches = lp.load_data(
    processor, folder / "train.jsonl", seq_len=96, batch_size=PAGES, max_images=2, packing="padded"
)
optim = lp.train.OptimConfig(lr=3e-3, warmup_steps=10)
loss_fn = lp.train.make_loss(pixels=processor.images.pixels)
trainer = lp.train.Trainer(model, cfg=lp.train.FitConfig(steps=STEPS, optim=optim), loss_fn=loss_fn)
run = trainer.steps(batches)
losses = [float(next(run)["loss"]) for _ in range(STEPS)]
batches.close()
model = trainer.model(run.state)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}")

# %%
prompts = [
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    for _, question, _ in asked
]
images = [[folder / image] for image, *_ in asked]
answers = lp.generate(model, processor, prompts, images=images, max_new_tokens=16)
blank = lp.generate(
    model,
    processor,
    prompts,
    images=[[np.full((SIDE, SIDE, 3), 255, np.uint8)]] * PAGES,
    max_new_tokens=16,
)
for name, given in {"with their pages": answers, "with blank pages": blank}.items():
    scores = [anls(text.strip(), right) for text, (*_, right) in zip(given, asked, strict=True)]
    print(f"ANLS {name}: {np.mean(scores):.2f}")

figure, row = plt.subplots(1, 4, figsize=(10, 3), layout="constrained")
for axes, (image, question, _), answer in zip(row, asked, answers, strict=False):
    axes.imshow(plt.imread(folder / image))
    axes.set_title(f"{question}\n{answer.strip()}", fontsize=8)
    axes.axis("off")
plt.show()
