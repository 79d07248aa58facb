"""The feed-forward layers: gated (Shazeer 2020, GLU Variants: SwiGLU, GeGLU) and plain.

The one thing a reader would get wrong: `jax.nn.gelu` is the tanh form by default; here "gelu" is
the exact (erf) one and "gelu_tanh" the approximation, as the checkpoints mean them.
"""

import functools
from collections.abc import Callable

import jax
from flax import nnx

from llmprep_jax.nn.linear import Einsum, Init, fan_in_normal
from llmprep_jax.nn.param import Compute
from llmprep_jax.nn.remat import MLP_HIDDEN, keep
from llmprep_jax.types import Array, Float

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}

_ACT_AXES, _OUT_AXES = ("batch", "seq", "mlp"), ("batch", "seq", "act_embed")


class GatedMlp(nnx.Module):
    """down(act(gate(x)) * up(x)): SwiGLU with "silu", GeGLU with a GELU."""

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        *,
        act: str = "silu",
        bias: bool = False,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.act = act
        make = functools.partial(Einsum, bias=bias, compute=compute, rngs=rngs)
        self.gate = make("BTD,DF->BTF", (dim, mlp_dim), ("embed", "mlp"), _ACT_AXES)
        self.up = make("BTD,DF->BTF", (dim, mlp_dim), ("embed", "mlp"), _ACT_AXES)
        self.down = make("BTF,FD->BTD", (mlp_dim, dim), ("mlp", "embed"), _OUT_AXES)

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_BTF, up_BTF = keep((self.gate(x_BTD), self.up(x_BTD)), MLP_HIDDEN)
        return self.down(_gated(self.act)(gate_BTF, up_BTF))


@functools.cache
def _gated(act: str) -> Callable[[Array, Array], Array]:
    """act(gate) * up, of which the backward pass keeps these two alone.

    Autodiff would keep the activation's inner values too, each as large as the gates.
    """

    def multiply(gate_BTF: Array, up_BTF: Array) -> Array:
        return ACTIVATIONS[act](gate_BTF) * up_BTF

    return jax.checkpoint(multiply, prevent_cse=False)


class Mlp(nnx.Module):
    """down(act(up(x))), the original feed-forward layer (Vaswani et al. 2017, section 3.3).

    `inits` are of the weights of up and down.
    """

    def __init__(
        self,
        dim: int,
        mlp_dim: int,
        *,
        act: str = "gelu",
        bias: bool = True,
        inits: tuple[Init, Init] = (fan_in_normal, fan_in_normal),
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.act = act
        make = functools.partial(Einsum, bias=bias, compute=compute, rngs=rngs)
        ups, downs = ("embed", "mlp"), ("mlp", "embed")
        self.up = make("BTD,DF->BTF", (dim, mlp_dim), ups, _ACT_AXES, init=inits[0])
        self.down = make("BTF,FD->BTD", (mlp_dim, dim), downs, _OUT_AXES, init=inits[1])

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.act](keep(self.up(x_BTD), MLP_HIDDEN)))
