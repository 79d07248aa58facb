"""Convolutions of small kernels, where there are few places as one product: what each place of the
kernel sees is laid side by side, so that dtypes, gradients and meshes are those of any other
product. `WideConv` is for many places: of a picture of 384 x 384 with 128 channels that would be
680 MB.

Letters of this file: Y and X rows and columns, P and Q those of the kernel, C channels in.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from llmprep_jax.nn.linear import Projection
from llmprep_jax.nn.param import Compute, add_bias
from llmprep_jax.sharding import has_mesh, spec
from llmprep_jax.types import Array, Float


class Conv(Projection):
    """A square kernel over [B, Y, X, C], with zeros beyond the edges so that a stride of 1 keeps
    the size."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        width: int,
        *,
        stride: int = 1,
        bias: bool = False,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.width, self.stride = width, stride
        shape, axes = (width, width, channels, out_channels), (None, None, None, "embed")
        out_axes = ("batch", None, None, "act_embed")
        kind = dict(bias=bias, compute=compute, rngs=rngs)
        super().__init__("BYXPQC,PQCD->BYXD", shape, axes, out_axes, **kind)

    @jax.named_scope("conv")
    def __call__(self, x_BYXC: Float[Array, "B Y X C"]) -> Float[Array, "B V W D"]:
        edge, (Y, X), step = self.width // 2, x_BYXC.shape[1:3], self.stride
        if edge:
            x_BYXC = jnp.pad(x_BYXC, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        rows = [
            jnp.stack([x_BYXC[:, p : p + Y : step, q : q + X : step] for q in range(self.width)], 3)
            for p in range(self.width)
        ]
        return super().__call__(jnp.stack(rows, 3))


class WideConv(Conv):
    """The same over pictures of many places, without a copy for each place of the kernel.

    A stride of 2 has its zeros beyond the right and lower edges alone.
    """

    @jax.named_scope("conv")
    def __call__(self, x_BYXC: Float[Array, "B Y X C"]) -> Float[Array, "B V W D"]:
        w, edge = self.w[...], self.width // 2
        if has_mesh():  # whole on each device: rows are shared out, and nothing else
            w = jax.reshard(w, jax.P(*[None] * w.ndim))
            x_BYXC = jax.reshard(x_BYXC, spec("batch", None, None, None, shape=x_BYXC.shape))
        y = jax.lax.conv_general_dilated(
            x_BYXC.astype(self.dtype),
            w.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=[(edge if self.stride == 1 else 0, edge)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).astype(x_BYXC.dtype)
        return y if self.b is None else add_bias(y, self.b[...])
