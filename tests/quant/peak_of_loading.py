"""A process of its own that loads a folder and prints, as JSON, the bytes of it and of the loading.

`peak` is the most anonymous memory beyond what was there before: JAX's buffers and whatever the
loader makes, but not the mapped files. The folder is loaded twice and the second time counts, since
the first compiles.
"""

import ctypes
import gc
import json
import sys
import threading

import jax
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.quant import packed_layers


def anonymous() -> int:
    """Bytes of the process that are no file's."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def sample(until: threading.Event, peak: list[int]) -> None:
    while not until.wait(0.0005):
        peak[0] = max(peak[0], anonymous())


def load(folder: str, dtype: str) -> nnx.Module:
    return jax.block_until_ready(lp.load_model(folder, None if dtype == "stored" else dtype))


def main(folder: str, dtype: str) -> None:
    load(folder, dtype)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, done = anonymous(), threading.Event()
    peak = [before]
    thread = threading.Thread(target=sample, args=(done, peak))
    thread.start()
    model = load(folder, dtype)
    done.set()
    thread.join()
    layers = [layer.packed for layer in packed_layers(model).values()]
    found = {
        "linear": sum(x.nbytes for layer in layers for x in layer.arrays().values()),
        "whole": sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))),
        "peak": max(peak[0], anonymous()) - before,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
