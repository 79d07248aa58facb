"""FLOPs of training, for MFU: analytic, and of what the model needs, not what is computed again.

For each token 2 for each weight forward, 2 backward to activations and 2 backward to a weight that
is trained, so 6N for full training and 4N + 6n for n adapter weights on N frozen ones; and causal
attention once, 4 * heads * head_dim * context a layer forward and twice that backward, for a mean
context of T / 2. Publications that count the masked half of attention too report a higher MFU for
the same speed. What images pass through counts by the image (`nn.work`), likewise; a tower that is
frozen is gone back through by nobody, and has 2N.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

from llmprep_jax.nn.work import Work
from llmprep_jax.train.state import path_name

# dense bf16 FLOP/s of one device, as its maker states it
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}

NO_WORK: Mapping[str, Work] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of training on one token, and on one image.

    Attributes:
      frozen, trained: weights that enter matrix products: an embedding table counts where it is
        also the output head and not where rows are only looked up.
      attention: num_layers * num_heads * head_dim.
      context: mean number of tokens that a token attends to; T / 2 for causal rows of T.
      seen, drawn: FLOPs beside its tokens of an image that is seen, and of a picture that is drawn.
    """

    frozen: int | float
    trained: int | float
    attention: int = 0
    context: float = 0.0
    seen: int | float = 0
    drawn: int | float = 0

    @property
    def per_token(self) -> float:
        """4 * frozen + 6 * trained + 3 * (4 * attention * context)."""
        return 4 * self.frozen + 6 * self.trained + 12 * self.attention * self.context

    def of(
        self, tokens: int | float, images: int | float = 0, drawn: int | float = 0
    ) -> int | float:
        """FLOPs of a batch, by the names of its metrics: of `images`, some are `drawn`."""
        return self.per_token * tokens + self.seen * (images - drawn) + self.drawn * drawn


def count_flops(
    cfg: Any, params: Any, frozen: Any, seq_len: int, work: Mapping[str, Work] = NO_WORK
) -> Flops | None:
    """The FLOPs of a model from its Config and its weights, trained and frozen; None of towers.

    Layers with a sliding window count as full ones. Of a composed model a token takes what its
    language model computes; the rest is in `work`.

    Args:
      cfg: its `decoder` has num_layers, num_heads, head_dim and tie_embeddings; and active_share,
        of the experts that compute for a token, where leaves are below "experts".
      params, frozen: trees of arrays or shapes; the tables are the leaves below "embed".
      seq_len: T.
      work: of an image, by the paths of a model's parts (`image_work`).
    """
    if cfg.decoder is None:
        return None
    is_composed, cfg = cfg.decoder is not cfg, cfg.decoder
    trained = _sizes(params)
    # a module that is trained whole computes in place of its base, which lies beside it
    frozen = {
        name: size
        for name, size in _sizes(frozen).items()
        if not (name[-2:-1] == ("base",) and (*name[:-2], "trained", name[-1]) in trained)
    }

    def in_products(sizes: Mapping[tuple[str, ...], int]) -> int | float:
        return sum(
            size * (cfg.active_share if "experts" in name else 1)
            for name, size in sizes.items()
            if (cfg.tie_embeddings or "embed" not in name)
            and (name[0] == "language" or not is_composed)
        )

    attention = cfg.num_layers * cfg.num_heads * cfg.head_dim
    images = [_of_images(work, trained, frozen, is_drawn) for is_drawn in (False, True)]
    return Flops(in_products(frozen), in_products(trained), attention, seq_len / 2, *images)


def _sizes(tree: Any) -> dict[tuple[str, ...], int]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(path_name(path).split(".")): leaf.size for path, leaf in flat}


def _of_images(
    work: Mapping[str, Work],
    trained: Mapping[tuple[str, ...], int],
    frozen: Mapping[tuple[str, ...], int],
    is_drawn: bool,
) -> int | float:
    """FLOPs of one image, seen or drawn."""

    def below(path: str, sizes: Mapping[tuple[str, ...], int]) -> int:
        start = tuple(path.split("."))
        others = [tuple(other.split(".")) for other in work if other.startswith(f"{path}.")]
        return sum(
            size
            for name, size in sizes.items()
            if name[: len(start)] == start and not any(name[: len(o)] == o for o in others)
        )

    total = 0
    for path, one in work.items():
        if one.is_drawn != is_drawn:
            continue
        own, rest = below(path, trained), below(path, frozen)
        is_back = bool(own) or any(
            ".".join(name).startswith(before) for before in one.behind for name in trained
        )
        products = (4 * rest + 6 * own if is_back else 2 * rest) * one.places
        total += products + 4 * one.attention * (3 if is_back else 1)
    return total


def peak_flops(stated: float | None = None) -> float | None:
    """FLOP/s of all devices together: as stated for one, or by its name; None where unknown."""
    kind = jax.devices()[0].device_kind
    names = [name for name in PEAK_FLOPS if kind.startswith(name)]
    # "TPU v5 lite" begins with "TPU v5", another chip
    of_device = PEAK_FLOPS[max(names, key=len)] if stated is None and names else stated
    return None if of_device is None else of_device * jax.device_count()
