"""How far a kernel's results may be from its reference's, and how far they are."""

from collections.abc import Mapping
from typing import Any

import numpy as np

LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, float]:
    """The error of the outputs, and the worst of the gradients."""
    errors = {}
    for name, value in found.items():
        x, y = [np.asarray(a, np.float64) for a in (value, wanted[name])]
        if name == "lse":  # a query that sees nothing
            x, y = [np.where(a < -1e38, 0.0, a) for a in (x, y)]
        # no number is the worst error
        error = np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-3)
        errors[name] = float(error) if np.isfinite(error) else float("inf")
    outputs = {f"error of {name}": errors[name] for name in ("o", "lse", "y") if name in errors}
    gradients = [error for name, error in errors.items() if name.startswith("d")]
    return outputs | ({"worst gradient's": max(gradients)} if gradients else {})
