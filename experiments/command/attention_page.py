"""Keeps true what docs/attention.md shows: pictures of masks, counts of tiles, backends' limits.

    python -m experiments.command.attention_page

Each block of the page between `<!-- made: NAME -->` and `<!-- end -->` is made anew from the code.
"""

import contextlib
import functools
import importlib
import re
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.attention import ONLY
from experiments.command.source import ROOT
from experiments.study.report import table
from llmprep_jax.kernels import flash_attention
from llmprep_jax.kernels.flash_attention.api import IMPLS
from llmprep_jax.kernels.flash_attention.chunked import K_BLOCK, Q_BLOCK
from llmprep_jax.kernels.flash_attention.masks import Places, Rule, may_see, ranges, visible

PAGE = ROOT / "docs" / "attention.md"
SEEN, HIDDEN = "#", "."
LIBRARIES = ("_library", "_operation")  # what finds an adapter's, which may not be here
HEAD = 128  # width of the heads whose tiles are counted


def refreshed(text: str) -> str:
    """The page with its blocks made anew."""
    block = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}{match[3]}", text)


def pictures() -> str:
    """Small masks side by side: a row is a query, a column a key."""
    columns = np.arange(10)
    documents, image = (
        np.array([1, 1, 1, 1, 2, 2, 2, 2, 0, 0]),
        np.array([0, 0, 1, 1, 1, 1, 0, 0, 0, 0]),
    )
    zigzag = np.array([0, 1, 2, 3, 4, 15, 16, 17, 18, 19])
    pictured = {
        "causal": _picture(Rule()),
        "window 4": _picture(Rule(window=4)),
        "both ways, 3": _picture(Rule(causal=False, window=3)),
        "documents": _picture(Rule(), segments=documents),
        "an image": _picture(Rule(), spans=image),
        "a shard": _picture(Rule(), q=dict(positions=zigzag), k=dict(positions=2 * columns)),
    }
    lines = ["   ".join(f"{name:{len(columns) + 3}}" for name in pictured)]
    for rows in zip(*pictured.values(), strict=True):
        lines.append("   ".join(f"{row:{len(columns) + 3}}" for row in rows))
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```\n"


def _picture(rule: Rule, q: Any = None, k: Any = None, **both: np.ndarray) -> list[str]:
    """A line for each of ten queries."""
    sides = [
        Places(**{name: jnp.asarray(x)[None] for name, x in (side or both).items()})
        for side in (q, k)
    ]
    columns = jnp.arange(10)
    seen_TS = np.asarray(visible(*sides, rule, columns, columns))[0]
    return ["".join(SEEN if seen else HIDDEN for seen in row) for row in seen_TS]


def tiles() -> str:
    """Tiles that a loop over blocks visits, and the bytes of keys and values that they read."""
    rows = []
    for length in (4096, 16384, 65536):
        documents = np.repeat(np.arange(1, 5), length // 4)[None]
        for name, rule, values in (
            ("causal", Rule(), {}),
            ("window 1,024", Rule(window=1024), {}),
            ("four documents", Rule(), {"segments": jnp.asarray(documents)}),
        ):
            visited, total, pairs = count_tiles(length, rule, Places(**values))
            read = visited * K_BLOCK * 2 * HEAD * 2
            # N^2 d^2 / M words with M / d rows of queries at a time, of the pairs that are seen
            formula = pairs * 2 * HEAD * 2 / Q_BLOCK
            cells = (f"{x / 2**20:,.1f}" for x in (read, formula, 8 * length**2))
            rows.append([name, f"{length:,}", f"{visited:,} of {total:,}", *cells])
    names = ["mask", "tokens", "tiles", "keys and values read, MiB", "by the formula, MiB"]
    return table([*names, "scores of plain attention, MiB"], rows)


def count_tiles(length: int, rule: Rule, places: Places) -> tuple[int, int, int]:
    """(tiles visited, all tiles, pairs of tokens that see each other)."""
    sides = ranges(places, length, Q_BLOCK), ranges(places, length, K_BLOCK)
    seen_IJ = np.asarray(may_see(*sides, rule))[0]
    # of a causal mask, with a window or in equal documents
    reach = min(rule.window or length, length // 4 if places.segments is not None else length)
    rows = length // 4 if places.segments is not None else length
    pairs = int(np.minimum(np.arange(1, rows + 1), reach).sum()) * (length // rows)
    return int(seen_IJ.sum()), seen_IJ.size, pairs


class Probe(NamedTuple):
    """An attention that a backend is asked whether it can do."""

    T: int = 512
    S: int = 512
    K: int = 8
    H: int = 128
    U: int = 128
    dtype: str = "bfloat16"
    rule: Rule = Rule()


PROBES = {
    "causal": Probe(),
    "all see all": Probe(rule=Rule(causal=False)),
    "a window": Probe(rule=Rule(window=100)),
    "a soft cap": Probe(rule=Rule(soft_cap=30.0)),
    "a bias by function": Probe(rule=Rule(bias=lambda head, i, j: (i - j) * 0.1)),
    "positions": Probe(rule=Rule(given=("positions",))),
    "segments": Probe(rule=Rule(given=("segments",))),
    "spans": Probe(rule=Rule(given=("spans",))),
    "grouped heads": Probe(K=2),
    "500 tokens": Probe(T=500, S=500),
    "one query, a cache": Probe(T=1, rule=Rule(given=("positions", "segments"))),
    "width 64": Probe(H=64, U=64),
    "width 72": Probe(H=72, U=72),
    "width 256": Probe(H=256, U=256),
    "widths 192/128": Probe(H=192),
    "widths 576/512, one key head": Probe(K=1, H=576, U=512),
    "one query, pages of 64": Probe(T=1, S=64, rule=Rule(stored=("pages",))),
    "one query, 8-bit keys": Probe(T=1, rule=Rule(stored=("scales",))),
    "float32": Probe(dtype="float32"),
    "float16": Probe(dtype="float16"),
}


def capabilities() -> str:
    """What each backend says of each probe, and its reasons below."""
    reasons: list[str] = []
    rows = []
    for name, probe in PROBES.items():
        rows.append([name, *(_cell(impl, probe, reasons) for impl in IMPLS)])
    notes = "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))
    return table(["", *(f"`{impl}`" for impl in IMPLS)], rows) + "\n" + notes


def _cell(impl: str, probe: Probe, reasons: list[str]) -> str:
    """ "both", "forward" or "no", and the number of the reason."""
    forward, backward = [_refusal(impl, probe, x) for x in (False, True)]
    if forward is None and probe.rule.stored:
        return "forward"  # which the seam says for all
    reason = forward or backward
    if reason is None:
        return "both"
    reason = f"`{impl}`: {reason}"
    if reason not in reasons:
        reasons.append(reason)
    return f"{'no' if forward else 'forward'} ({reasons.index(reason) + 1})"


def _refusal(impl: str, probe: Probe, backward: bool) -> str | None:
    """As on the platform that a backend is for, with the library that it calls."""
    module = importlib.import_module(f"{flash_attention.__name__}.{impl}")
    with contextlib.ExitStack() as stack:
        for name in LIBRARIES:
            if impl in ("cudnn", "tokamax") and hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name))
        if ONLY.get(impl, impl) in ("gpu", "tokamax") and hasattr(module, "platform"):
            stack.enter_context(mock.patch.object(module, "platform", return_value="gpu"))
        return _ask(module, probe, backward)


def _ask(module: ModuleType, probe: Probe, backward: bool) -> str | None:
    sizes = (8, probe.T, probe.H), (probe.K, probe.S, probe.H), (probe.K, probe.S, probe.U)
    heads = [jax.ShapeDtypeStruct((1, *size), jnp.dtype(probe.dtype)) for size in sizes]
    told: list[str | None] = []
    ask = functools.partial(module.refusal, rule=probe.rule, backward=backward)
    jax.eval_shape(lambda *arrays: told.append(ask(*arrays)), *heads)
    return told[0]


BLOCKS = {"pictures": pictures, "tiles": tiles, "capabilities": capabilities}


def main() -> None:
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
