# %% [markdown]
# # Latent attention and experts
#
# What DeepSeek-V2 and V3 do differently from a Llama: they cache one latent a token in place of keys and values, and
# they send each token to a few of many experts. Shapes are those of the releases, computed without any weights; what
# is computed with numbers is a small model of the same kind.

# %%

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import deepseek, registry
from llmprep_jax.nn.moe import Routing

# %% [markdown]
# ## What is cached
#
# Bytes of the cache for one token, in bfloat16. `registry.abstract` gives a model of shapes alone, so the sizes of
# 671 B parameters cost nothing.


# %%
def cache_bytes(name):
    model = registry.abstract(registry.preset(name))
    one, two = (
        jax.eval_shape(
            lambda model, length=length: model.init_cache(1, length, jnp.bfloat16), model
        )
        for length in (1024, 2048)
    )
    count = lambda cache: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    return (count(two) - count(one)) / 1024


for name in ("llama-3.1-70b", "llama-3.1-405b", "deepseek-v2", "deepseek-v3"):
    layers = registry.preset(name).num_layers
    print(
        f"{name:15s} {cache_bytes(name) / 1024:6.1f} KiB a token, {cache_bytes(name) / layers:6.0f} bytes a layer"
    )

# %% [markdown]
# 576 numbers a layer and token: a latent of 512 and a rotary key of 64, whatever the number of heads. Keys and values
# of V3's 128 heads would be 40,960.
#
# ## The same answers, cached or not
#
# A small V3 with random weights: 8 experts, of which each token sees 2 and one that is shared.

# %%
cfg = deepseek.Config(
    vocab_size=256,
    dim=64,
    mlp_dim=128,
    expert_dim=32,
    num_layers=3,
    num_heads=4,
    kv_rank=16,
    q_rank=24,
    nope_dim=16,
    rope_dim=8,
    value_dim=16,
    routing=Routing(8, 2, score="sigmoid", has_bias=True, normalize=True),
    max_seq_len=128,
)
model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))()
tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
whole = model(tokens).logits
cache, steps = model.init_cache(2, 24), []
for t in range(24):
    out = model(tokens[:, t : t + 1], cache=cache)
    cache = out.cache
    steps.append(out.logits)
print("largest difference:", float(np.abs(np.concatenate(steps, 1) - whole).max()))

# %% [markdown]
# ## Experts and their load
#
# Trained on text without balance, a few experts do most of the work. V3 balances without a loss: after each step the
# bias of a busy expert's router goes down a little, and that of an idle one up. `max_vio` is by how much the busiest
# expert is above the mean.

# %%
text = np.frombuffer(open("../configs/data/devils_dictionary.jsonl", "rb").read(), np.uint8)


def batches(seed, rows=8, length=48):
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - length - 1, rows)
        both = np.stack([text[s : s + length + 1] for s in starts]).astype(np.int32)
        yield {
            "tokens": both[:, :-1],
            "targets": both[:, 1:],
            "loss_mask": np.ones((rows, length), np.float32),
        }


def train(rate, steps=70):
    model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))()
    optim = lp.train.OptimConfig(lr=3e-3, warmup_steps=10, router_bias_rate=rate)
    trainer = lp.train.Trainer(model, cfg=lp.train.FitConfig(steps=steps, optim=optim))
    run = trainer.steps(batches(0))
    metrics = [next(run) for _ in range(steps)]
    return {key: [float(m[key]) for m in metrics] for key in ("loss", "max_vio")}


runs = {"no balance": train(0.0), "biases": train(0.02)}

# %%
figure, both = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for name, run in runs.items():
    for axes, key in zip(both, ("loss", "max_vio"), strict=True):
        axes.plot(run[key], label=name)
        axes.set(xlabel="step", ylabel=key)
both[1].legend(frameon=False)
plt.show()
for name, run in runs.items():
    print(
        f"{name:10s} loss {np.mean(run['loss'][-20:]):.3f}, max_vio {np.mean(run['max_vio'][-20:]):.2f}"
    )
