"""Mixture of experts as DeepSeek builds it (DeepSeekMoE, 2401.06066; DeepSeek-V2, section 2.1.3 to
2.1.5; DeepSeek-V3, section 2.1.2).

Every token goes to a few of many small experts and to shared ones: y = shared(x) + sum_a g_a
E_a(x). Softmax gates (V2) or sigmoid gates (V3); experts may be limited to the best groups, which
bounds how many devices a token is sent to. V3's bias takes part in the choice of experts alone,
neither in the weights of what they say nor in any gradient.

Letters of this file: E experts, A experts that a token goes to, G groups of experts, M rows of
tokens sorted by expert.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llmprep_jax.kernels.grouped_matmul.api import grouped_matmul
from llmprep_jax.nn.balance import NO_BALANCE, Balance, Load, measure
from llmprep_jax.nn.dispatch import run_experts
from llmprep_jax.nn.linear import PRODUCT, Einsum
from llmprep_jax.nn.mlp import GatedMlp
from llmprep_jax.nn.param import Compute, RouterBias, param
from llmprep_jax.nn.remat import MLP_HIDDEN, keep
from llmprep_jax.sharding import spec
from llmprep_jax.types import Array, Bool, Float, Int

EXPERT_AXES = {
    "gate": ("expert", "embed", "mlp"),
    "up": ("expert", "embed", "mlp"),
    "down": ("expert", "mlp", "embed"),
}


@dataclasses.dataclass(frozen=True)
class Routing:
    """How tokens choose experts.

    Attributes:
      num_experts: E. num_active: A.
      score: "softmax" over all experts (V2) or a "sigmoid" of each (V3).
      num_groups, num_active_groups: G, and how many of them a token's experts may be of; a group is
        as good as its best expert (softmax), or as its two best together (sigmoid).
      has_bias: whether a bias, moved by the load, is added to the scores that experts are chosen
        by.
      normalize: whether a token's weights are divided by their sum.
      scale: of the weights.
    """

    num_experts: int
    num_active: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    num_active_groups: int = 1
    has_bias: bool = False
    normalize: bool = False
    scale: float = 1.0

    def __post_init__(self):
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts={self.num_experts} do not part into num_groups={self.num_groups}"
            )
        if not 0 < self.num_active_groups <= self.num_groups:
            raise ValueError(
                f"num_active_groups={self.num_active_groups} of num_groups={self.num_groups}"
            )
        among = self.num_experts // self.num_groups * self.num_active_groups
        if not 0 < self.num_active <= among:
            raise ValueError(f"num_active={self.num_active} experts of {among} that may be chosen")


class Choice(NamedTuple):
    """The experts of each token, their weights (float32), and all experts' scores (float32)."""

    experts_BTA: Int[Array, "B T A"]
    weights_BTA: Float[Array, "B T A"]
    scores_BTE: Float[Array, "B T E"]


class Router(nnx.Module):
    """Scores of all experts in float32, and the choice among them."""

    def __init__(self, dim: int, routing: Routing, *, compute: Compute, rngs: nnx.Rngs):
        self.routing = routing
        shape, init = (dim, routing.num_experts), jax.nn.initializers.normal(0.02)
        self.w = param(rngs, shape, ("embed", None), init, compute.param_dtype)
        self.bias = RouterBias(jnp.zeros(routing.num_experts)) if routing.has_bias else None

    @jax.named_scope("router")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Choice:
        # float32 and no less: a rounded score sends a token elsewhere
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD.astype(jnp.float32),
            self.w[...].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
            out_sharding=spec("batch", "seq", None, shape=(*x_BTD.shape[:2], self.w.shape[1])),
        )
        bias = None if self.bias is None else self.bias[...]
        return choose(logits_BTE, bias, self.routing)


def choose(logits_BTE: Float[Array, "B T E"], bias_E: Array | None, routing: Routing) -> Choice:
    """The A best experts of the best groups (DeepSeek-V3, eq. 13 to 16), and their weights."""
    is_softmax = routing.score == "softmax"
    scores_BTE = (jax.nn.softmax if is_softmax else jax.nn.sigmoid)(logits_BTE)
    merit_BTE = jax.lax.stop_gradient(scores_BTE)
    if bias_E is not None:
        merit_BTE += bias_E
    if routing.num_groups > 1:
        merit_BTE = _within_groups(merit_BTE, routing)
    _, experts_BTA = jax.lax.top_k(merit_BTE, routing.num_active)
    weights_BTA = jnp.take_along_axis(scores_BTE, experts_BTA, axis=-1)
    if routing.normalize:
        weights_BTA = weights_BTA / (jnp.sum(weights_BTA, axis=-1, keepdims=True) + 1e-20)
    return Choice(experts_BTA, weights_BTA * routing.scale, scores_BTE)


def _within_groups(merit_BTE: Array, routing: Routing) -> Float[Array, "B T E"]:
    """-inf for experts that are not of the best groups."""
    G = routing.num_groups
    merit_BTGE = merit_BTE.reshape(*merit_BTE.shape[:-1], G, -1)
    best = 1 if routing.score == "softmax" else min(2, merit_BTGE.shape[-1])
    group_BTG = jnp.sum(jax.lax.top_k(merit_BTGE, best)[0], axis=-1)
    _, chosen = jax.lax.top_k(group_BTG, routing.num_active_groups)
    is_chosen_BTG = jnp.any(chosen[..., None] == jnp.arange(G), axis=-2)
    merit_BTGE = jnp.where(is_chosen_BTG[..., None], merit_BTGE, -jnp.inf)
    return merit_BTGE.reshape(merit_BTE.shape)


class ExpertWeights(Einsum):
    """The same layer of all experts, [E, in, out], which `Experts` multiplies by group.

    As an einsum it is that of the slots of each expert, which is how adapters see it.
    """


class Experts(nnx.Module):
    """SwiGLU experts: down_e(silu(gate_e x) * up_e x), for rows sorted by expert."""

    def __init__(
        self, dim: int, expert_dim: int, num_experts: int, *, compute: Compute, rngs: nnx.Rngs
    ):
        self.dtype = compute.operand_dtype

        def make(name: str, ins: int, outs: int) -> ExpertWeights:
            shape, axes = (num_experts, ins, outs), EXPERT_AXES[name]
            out = "mlp" if axes[-1] == "mlp" else "act_embed"
            out_axes, kind = ("expert", None, out), dict(compute=compute, rngs=rngs)
            return ExpertWeights("ECD,EDF->ECF", shape, axes, out_axes, **kind)

        self.gate, self.up = make("gate", dim, expert_dim), make("up", dim, expert_dim)
        self.down = make("down", expert_dim, dim)

    def weights(self) -> dict[str, Array]:
        """The weights of each layer, with adapters in them."""
        return {name: getattr(self, name).weight() for name in EXPERT_AXES}

    def apply(
        self, x_MD: Float[Array, "M D"], sizes_E: Int[Array, "E"], weights: dict[str, Array]
    ) -> Float[Array, "M D"]:
        """The experts' results; `sizes_E` rows for each, with these weights."""

        def product(x, name):
            y = grouped_matmul(x, weights[name], sizes_E, dtype=self.dtype)
            return checkpoint_name(y, PRODUCT)

        with jax.named_scope("experts"):
            gate_MF, up_MF = keep((product(x_MD, "gate"), product(x_MD, "up")), MLP_HIDDEN)
            return product(jax.nn.silu(gate_MF) * up_MF, "down")


class MoE(nnx.Module):
    """Routed experts beside shared ones, which are one MLP of `num_shared` times an expert's width.

    Args:
      dim: D. expert_dim: F, the hidden width of an expert. num_shared: 0 for none.
      transport: how tokens go to experts on other devices (`nn.dispatch`).
      buffer_factor: room for what a device receives, as a multiple of an even load, in training
        (`with_bounded_buffers`); there is room for the worst case otherwise.
    """

    def __init__(
        self,
        dim: int,
        expert_dim: int,
        num_shared: int,
        routing: Routing,
        *,
        balance: Balance = NO_BALANCE,
        transport: str | None = None,
        buffer_factor: float | None = None,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.routing, self.balance = routing, balance
        self.transport, self.buffer_factor, self.is_bounded = transport, buffer_factor, False
        kind: dict[str, Any] = dict(compute=compute, rngs=rngs)
        self.router = Router(dim, routing, **kind)
        self.experts = Experts(dim, expert_dim, routing.num_experts, **kind)
        self.shared = GatedMlp(dim, num_shared * expert_dim, **kind) if num_shared else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Load]:
        """The result, and the load; `mask_BT` is False for padding, which goes to no expert."""
        choice = self.router(x_BTD)
        y_BTD, dropped = run_experts(
            x_BTD,
            choice.experts_BTA,
            choice.weights_BTA,
            self.experts.weights(),
            EXPERT_AXES,
            self.experts.apply,
            num_experts=self.routing.num_experts,
            mask_BT=mask_BT,
            transport=self.transport,
            buffer_factor=self.buffer_factor if self.is_bounded else None,
        )
        groups = self.routing.num_groups, self.routing.num_active_groups
        load = measure(choice.experts_BTA, choice.scores_BTE, mask_BT, self.balance, *groups)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return y_BTD, load._replace(dropped=dropped)


def with_bounded_buffers(model: nnx.Module) -> nnx.Module:
    """The model as it is trained: its layers' buffers have the room that `buffer_factor` says.

    Experts drop what does not fit, so evaluation and generation take the model itself.
    """
    layers = []

    def visit(_: tuple, node: Any) -> Any:
        if isinstance(node, MoE):
            node.is_bounded = True
            layers.append(node)
        return node

    bounded = nnx.recursive_map(visit, model)
    return bounded if layers else model
