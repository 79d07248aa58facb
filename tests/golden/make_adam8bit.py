"""Writes adam8bit.npz: blocks of values and the codes that bitsandbytes gives them.

Run it with bitsandbytes 0.50.2 and torch installed: `python -m tests.golden.make_adam8bit`. For
`signed` and `unsigned` it holds `map` [256], `x` [blocks, 256], `codes` of the same shape and
`absmax` [blocks]. The values are handed over in float64, for which bitsandbytes takes the nearest
code; its float32 kernel for CPUs gives 59 % of these unsigned values another one, up to 7 away.
"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional

PATH = Path(__file__).parent / "adam8bit.npz"
BLOCKS, LENGTH = 16, 256


def make(signed: bool) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    spread = 10.0 ** (-4 * torch.rand(BLOCKS, LENGTH))
    x = torch.randn(BLOCKS, LENGTH) * spread
    x = x if signed else x.square()
    values = functional.create_dynamic_map(signed=signed)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x.double(), values, LENGTH)
    arrays = {"map": values, "x": x, "codes": codes.reshape(x.shape), "absmax": absmax}
    return {name: array.numpy() for name, array in arrays.items()}


def main() -> None:
    arrays = {}
    for name, signed in (("signed", True), ("unsigned", False)):
        arrays |= {f"{name}/{key}": array for key, array in make(signed).items()}
    np.savez_compressed(PATH, **arrays)
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
