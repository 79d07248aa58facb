"""The legend of dimension letters and the array aliases that public signatures use.

Local arrays carry their dimensions as a suffix (`q_BTNH`), and einsum strings use the same
capitals, so this table says what a letter means; a file with further ones lists them at its top. T
counts query tokens and S key tokens; they differ as soon as there is a cache.

    B  batch (rows)              N  query heads
    T  query tokens              K  key/value heads
    S  key tokens (cache slots)  G  query heads a key/value head, N = K * G
    D  model width               H  head width
    F  hidden width of an MLP    V  vocabulary
    L  layers                    R  rank of an adapter
    U  width of values, where heads have another
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

# what functions take: arrays come from either library, and go out as JAX's
Array = jax.Array | np.ndarray

__all__ = ["Array", "Bool", "Float", "Int", "Shaped"]
