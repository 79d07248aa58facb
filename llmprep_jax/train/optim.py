"""AdamW by optax: schedules, decay masks, clipping and LoRA+ learning rates.

Decay is decoupled and scaled by the learning rate, as in torch and optax: p -= lr_t * (m / (sqrt(v)
+ eps) + weight_decay * p) (Loshchilov and Hutter 2019 scale it by the schedule's multiplier alone).
"adamw8bit" is the same with moments that are rounded between steps (`adam8bit.py`). `moment_dtype`
is that of the first moment; the second stays float32, because a bf16 average with decay 0.95 no
longer sees changes below 1/256 of itself.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from llmprep_jax.config import settle
from llmprep_jax.peft.training import Rule, rules, wrap_optimizer
from llmprep_jax.train.adam8bit import scale_by_adam8bit
from llmprep_jax.train.offload import keep_on_host
from llmprep_jax.train.state import Split, merge, path_name

# last names of a model's own parameters: norms and biases, and of towers what all inputs share
NO_DECAY = ("scale", "b", "bias", "table", "class_token", "probe", "logit_scale", "logit_bias")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How parameters are updated.

    Attributes:
      lr: peak learning rate.
      schedule: after the warmup, "cosine" and "linear" fall to `final_ratio` of the peak at the
        last step; "wsd" stays and falls linearly over the last `decay_fraction` of the run.
      final_ratio: of the peak, what the rate falls to.
      decay_fraction: of the run, over which "wsd" falls.
      warmup_steps: steps of linear rise; the first has lr / warmup_steps.
      betas, eps: Adam's.
      weight_decay: decoupled, times the learning rate; not of norms and biases, nor of towers'
        positions, queries and scalars; of adapters what their method says (`peft.Method.decayed`).
      decay_embeddings: whether weight decay holds for embedding tables too.
      clip_norm: largest global norm of the gradient; None: no clipping.
      lora_plus: ratio of the learning rate of the factors that are zero at first, LoRA's B and of
        embeddings its A, to that of all others (LoRA+, Hayou et al. 2024, section 4); 1 is plain
        LoRA.
      optimizer: "adamw", or "adamw8bit" for moments of about 2 bytes a parameter in place of 8.
      moment_dtype: of adamw's first moment.
      offload: whether the moments are kept in host memory between updates.
      router_bias_rate: gamma, by which the biases of routers that have them follow the load
        (DeepSeek-V3, section 2.1.2). router_bias_until: the share of the run after which they stay
        (section 4.2: the last 500 of 14,800 billion tokens).
    """

    lr: float = 3e-4
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    final_ratio: float = 0.1
    decay_fraction: float = 0.2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    clip_norm: float | None = 1.0
    lora_plus: float = 1.0
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False
    router_bias_rate: float = 0.001
    router_bias_until: float = 0.966

    def __post_init__(self):
        settle(self)
        wrong = {
            "lr must be >= 0": self.lr < 0,
            "warmup_steps must be >= 0": self.warmup_steps < 0,
            "final_ratio must be in [0, 1]": not 0 <= self.final_ratio <= 1,
            "decay_fraction must be in (0, 1]": not 0 < self.decay_fraction <= 1,
            "betas must be in [0, 1)": not all(0 <= beta < 1 for beta in self.betas),
            "eps must be > 0": self.eps <= 0,
            "clip_norm must be > 0": self.clip_norm is not None and self.clip_norm <= 0,
            "lora_plus must be > 0": self.lora_plus <= 0,
            "router_bias_rate must be >= 0": self.router_bias_rate < 0,
            "router_bias_until must be in [0, 1]": not 0 <= self.router_bias_until <= 1,
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"{message}, not {getattr(self, message.split()[0])}")
        if self.optimizer == "adamw8bit" and self.moment_dtype != "float32":
            raise ValueError(
                f"moment_dtype={self.moment_dtype} is for optimizer=adamw; adamw8bit has its own"
            )


def make_bias_schedule(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
    """The step of routers' biases at each step, counted from 0."""
    until = cfg.router_bias_until * num_steps
    return lambda step: jnp.where(step < until, cfg.router_bias_rate, 0.0)


def make_schedule(cfg: OptimConfig, num_steps: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0, of a run of `num_steps`.

    Raises:
      ValueError: the warmup is longer than the run.
    """
    if cfg.warmup_steps > num_steps:
        raise ValueError(f"warmup_steps={cfg.warmup_steps} is more than the run's {num_steps}")

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) + 1.0
        rise = jnp.minimum(done / max(cfg.warmup_steps, 1), 1.0)
        fall = num_steps - cfg.warmup_steps
        if cfg.schedule == "wsd":
            fall = min(fall, round(cfg.decay_fraction * num_steps))
        progress = jnp.clip((done - (num_steps - fall)) / max(fall, 1), 0.0, 1.0)
        if cfg.schedule == "cosine":
            progress = 0.5 - 0.5 * jnp.cos(jnp.pi * progress)
        if cfg.schedule == "constant":
            progress = jnp.zeros_like(progress)
        return cfg.lr * rise * (1.0 - (1.0 - cfg.final_ratio) * progress)

    return schedule


def decay_mask(
    params: Any, decay_embeddings: bool = True, of_adapters: Mapping[str, Rule] | None = None
) -> Any:
    """True for the leaves that weight decay holds for: no norm, no bias, embeddings on request.

    Args:
      of_adapters: the rules of what adapters brought, which go before names.
    """
    of_adapters = of_adapters or {}

    def is_decayed(path, _):
        name = path_name(path)
        parts, rule = name.split("."), of_adapters.get(name)
        decays = parts[-1] not in NO_DECAY if rule is None else rule.decays
        return decays and (decay_embeddings or "embed" not in parts)

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_optimizer(cfg: OptimConfig, params: Any, num_steps: int) -> optax.GradientTransformation:
    """AdamW for what is trained over a run of `num_steps`.

    Args:
      params: a model that was split, whose adapters say how they are updated, or a tree of arrays
        or shapes without adapters.

    Raises:
      ValueError: LoRA+ is asked for and there is nothing to speed up, a schedule or an adapter does
        not fit the run, or offload is asked for and the backend cannot address the host's memory.
    """
    model = None
    if isinstance(params, Split):
        model, params = merge(params.graphdef, params.params, params.frozen), params.params
    of_adapters = {} if model is None else rules(model)
    decay = decay_mask(params, cfg.decay_embeddings, of_adapters)
    clips = cfg.clip_norm is not None
    # of moments in 8 bits by quotients: they round alike wherever the moments lie
    clip = _clip if cfg.optimizer == "adamw" else optax.clip_by_global_norm
    parts = [
        # at its place either way, so that the state stays the same when a run goes on with another
        clip(cfg.clip_norm) if clips else optax.identity(),
        _scale_by_moments(cfg),
        optax.add_decayed_weights(cfg.weight_decay, decay),
        optax.scale_by_learning_rate(make_schedule(cfg, num_steps)),
    ]
    if cfg.lora_plus != 1.0:
        parts.append(_hasten(cfg.lora_plus, params, of_adapters))
    tx = _with_float32_state(optax.chain(*parts))
    if model is not None:
        tx = wrap_optimizer(model, tx, params, num_steps)
    return keep_on_host(tx) if cfg.offload else tx


def _clip(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by one factor for all.

    Its quotient of each number and the norm is dear enough for XLA's CPU compiler to keep, a copy
    of all gradients that is written and read: 4 % of a step that trains SmolLM2's 135 M weights.
    """

    def update(updates, state, params=None):
        del params
        scale = max_norm / jnp.maximum(optax.global_norm(updates), max_norm)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _hasten(
    ratio: float, params: Any, of_adapters: Mapping[str, Rule]
) -> optax.GradientTransformation:
    """LoRA+: the factors that are zero at first at a multiple of the rate."""
    if not any(rule.is_hastened for rule in of_adapters.values()):
        raise ValueError(
            f"lora_plus={ratio}, but nothing trained is a factor of LoRA; leave it at 1"
        )
    is_hastened = jax.tree_util.tree_map_with_path(
        lambda path, _: of_adapters.get(path_name(path), Rule()).is_hastened, params
    )
    return optax.masked(optax.scale(ratio), is_hastened)


def _scale_by_moments(cfg: OptimConfig) -> optax.GradientTransformation:
    if cfg.optimizer == "adamw8bit":
        return scale_by_adam8bit(*cfg.betas, cfg.eps)
    return optax.scale_by_adam(*cfg.betas, cfg.eps, mu_dtype=jnp.dtype(cfg.moment_dtype))


def _with_float32_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps moments in float32 (but for `mu_dtype`) where parameters are bf16."""

    def init(params):
        return tx.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    return optax.GradientTransformation(init, tx.update)
