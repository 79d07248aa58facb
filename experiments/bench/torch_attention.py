"""Attention by torch's kernels and by the package flash-attn, as contenders of ours."""

import functools
from collections.abc import Callable
from typing import Any

from experiments.bench.checks import Absent, Unfit
from experiments.bench.shapes import Shape, Work
from experiments.bench.timing import Contender

PEERS = ("sdpa", "sdpa flash", "sdpa cudnn", "flash-attn")


def contender(shape: Shape, work: Work, dtype: str, kernel: str) -> Contender:
    """torch's attention by one of its kernels, or that of the package flash-attn.

    Args:
      kernel: "sdpa" for torch's own choice, "sdpa flash", "sdpa cudnn" or "flash-attn".

    Raises:
      Unfit: it cannot do it, or is not installed.
    """
    try:
        import torch
    except ImportError:
        raise Absent("torch is not here") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = functools.partial(torch.randn, device=device, dtype=getattr(torch, dtype))
    queries = 1 if work == "decode" else shape.T
    q = draw(shape.B, queries, shape.N, shape.H)
    k, v = [draw(shape.B, shape.T, shape.K, width) for width in (shape.H, shape.U)]
    v = k[..., : shape.U] if shape.latent else v
    # a decode step sees all keys, which torch's causal mask of one query would hide
    attend = _torch_function(kernel, shape.causal and work != "decode", shape.window)

    def call():
        with torch.inference_mode():
            return attend(q, k, v)

    if work == "backward":
        inputs = [x.requires_grad_() for x in (q, k, v)]
        o = attend(*inputs)
        do = torch.randn_like(o)
        call = functools.partial(torch.autograd.grad, o, inputs, do, retain_graph=True)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    return Contender(call, lambda _: wait())


def _torch_function(kernel: str, causal: bool, window: int | None) -> Callable[..., Any]:
    """attention(q, k, v) of [B, T, heads, width]."""
    import torch

    if kernel == "flash-attn":
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            raise Absent("flash-attn is not here") from None
        windows = (-1, -1) if window is None else (window - 1, 0)
        return functools.partial(flash_attn_func, causal=causal, window_size=windows)
    kinds = {"sdpa flash": "FLASH_ATTENTION", "sdpa cudnn": "CUDNN_ATTENTION"}
    if kernel in kinds and not torch.cuda.is_available():
        raise Absent("needs a GPU")
    if window is not None:
        raise Unfit("has no window")

    def attend(q, k, v):
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        sdpa = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, is_causal=causal, enable_gqa=True
        )
        if kernel not in kinds:
            return sdpa(*heads)
        kind = getattr(torch.nn.attention.SDPBackend, kinds[kernel])
        with torch.nn.attention.sdpa_kernel(kind):
            return sdpa(*heads)

    return attend
