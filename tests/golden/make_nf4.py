"""Writes nf4.npz: small weights, and what bitsandbytes 0.50.2 makes of them on a CPU.

Run it with the parity extra installed: `python -m tests.golden.make_nf4`. Names are
`<weight>/<kind>/<tensor>`; weights have a short last block, an odd number of elements, a block of
zeros and values halfway between codes. `nested/absmax` and `nested/offset` belong to double
quantisation, `absmax` to that without.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

FOLDER = Path(__file__).parent


def weights() -> dict[str, np.ndarray]:
    """Weights by name; float16 holds them exactly."""
    rng = np.random.default_rng(0)
    ragged = rng.normal(size=(100, 200)).astype(np.float16)
    ragged[:2] = 0
    return {
        "ragged": ragged,
        "odd": rng.normal(size=(5, 7)).astype(np.float16),
        "halfway": (np.arange(-32, 32).reshape(1, 64) / 32).astype(np.float16),
    }


def compute(w: np.ndarray, kind: str) -> dict[str, np.ndarray]:
    """Codes, blocks' magnitudes and values, with and without double quantisation."""
    tensor = torch.tensor(w.astype(np.float32))
    codes, state = bnb.quantize_4bit(tensor, quant_type=kind)
    _, nested = bnb.quantize_4bit(tensor, quant_type=kind, compress_statistics=True)
    return {
        "codes": codes.numpy(),
        "absmax": state.absmax.numpy(),
        "values": bnb.dequantize_4bit(codes, state).numpy(),
        "nested/absmax": nested.absmax.numpy(),
        "nested/nested_absmax": nested.state2.absmax.numpy(),
        "nested/offset": nested.offset.numpy(),
        "nested/values": bnb.dequantize_4bit(codes, nested).numpy(),
    }


def main() -> None:
    arrays = {
        f"map/{kind}": bnb.get_4bit_type(kind, device="cpu").numpy() for kind in ("nf4", "fp4")
    }
    arrays["map/nested"] = bnb.create_dynamic_map().numpy()
    for name, w in weights().items():
        arrays[f"{name}/w"] = w
        for kind in ("nf4", "fp4"):
            found = compute(w, kind)
            arrays |= {f"{name}/{kind}/{key}": value for key, value in found.items()}
    np.savez_compressed(FOLDER / "nf4.npz", **arrays)
    size = (FOLDER / "nf4.npz").stat().st_size
    print(f"{FOLDER / 'nf4.npz'}: {len(arrays)} arrays, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
