"""Generation speed: us, transformers and llama.cpp, in turn in one run on the same real weights.

    python -m experiments.bench_generate [work=decode] [rounds=5] [out=FILE.json]

work: decode (one row, 128 tokens after 64), prefill (one row of 512 tokens, to its first token),
batch (8 rows, 64 tokens after 64; without llama.cpp) or first (our first answer by dtype, compiled
and from a cache). Greedy. Weights: SmolLM2-135M-Instruct, or `model=` any GGUF file. llama.cpp
takes part where llama-cpp-python is installed, on float32 and bf16 copies of the file, written for
the run. A ratio is the peer's median over ours.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_generate:Settings", compile_cache=False)

import dataclasses
import importlib.util
import itertools
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from configs.data.shipped import DATA, find_smollm2
from experiments.bench import first
from experiments.study import contest
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed; `rounds` timed calls of each contender."""

    work: Literal["decode", "prefill", "batch", "first"] = "decode"  # as above
    model: str | None = None  # None: SmolLM2-135M-Instruct
    rounds: int = 5  # timed calls of each contender
    out: pathlib.Path | None = None  # a JSON file for the numbers


SIZES = {"decode": (1, 64, 128), "prefill": (1, 512, 1), "batch": (8, 64, 64)}  # rows, prompt, new


def ours(folder: str, dtype: str, tokens: np.ndarray, new: int) -> Callable[[], Any]:
    import llmprep_jax as lp

    loaded = lp.load_model(folder, dtype=dtype)
    return lambda: np.asarray(lp.generate_tokens(loaded, tokens, max_new_tokens=new))


def transformers(folder: str, dtype: str, tokens: np.ndarray, new: int) -> Callable[[], Any]:
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    inputs = torch.tensor(tokens, device=device).long()
    lengths = dict(max_new_tokens=new, min_new_tokens=new)
    settings = dict(lengths, do_sample=False, pad_token_id=0, attention_mask=inputs * 0 + 1)

    def call():
        with torch.inference_mode():
            return loaded.generate(inputs, **settings).cpu()

    return call


def llama_cpp(path: str, tokens: np.ndarray, new: int) -> Callable[[], Any]:
    from llama_cpp import Llama

    threads = dict.fromkeys(("n_threads", "n_threads_batch"), len(os.sched_getaffinity(0)))
    loaded = Llama(path, n_ctx=tokens.shape[1] + new, n_batch=512, **threads, verbose=False)

    def call():
        loaded.reset()
        loaded.eval(tokens[0].tolist())
        for _ in range(new - 1):
            loaded.eval([loaded.sample(temp=0.0)])
        return loaded.sample(temp=0.0)

    return call


def write_folder(source: str, target: pathlib.Path) -> str:
    """A Hugging Face folder of a GGUF file; transformers would keep the file's weights packed."""
    import llmprep_jax as lp

    return str(lp.save_model(lp.load_model(source), target))


def write_gguf(source: str, target: pathlib.Path, dtype: Literal["F32", "BF16"]) -> str:
    """A copy of a GGUF file with its matrices in another dtype."""
    import gguf

    reader = gguf.GGUFReader(source)
    kind = gguf.GGMLQuantizationType[dtype]
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            types = [*field.types, None]
            writer.add_key_value(name, field.contents(), types[0], sub_type=types[-2])
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        matrix = array.ndim == 2 and dtype == "BF16"
        data = gguf.quants.quantize(array, kind) if matrix else array
        writer.add_tensor(tensor.name, data, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(target)


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    model = settings.model or find_smollm2()
    if settings.work == "first":
        return first.compare(model, settings.out)
    rows, prompt, new = SIZES[settings.work]
    inputs = dict(tokens=prompts(model, rows, prompt), new=new)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        unpacked, contenders = write_folder(model, folder / "float32"), {}
        for make, dtype in itertools.product((ours, transformers), ("float32", "bfloat16")):
            own = dict(inputs, folder=unpacked, dtype=dtype)
            contenders[f"{make.__name__}, {dtype}"] = (make, own)
        if rows == 1 and importlib.util.find_spec("llama_cpp"):
            for dtype in ("F32", "BF16"):
                path = write_gguf(model, folder / f"{dtype}.gguf", dtype)
                contenders[f"llama.cpp, {dtype}"] = (llama_cpp, dict(inputs, path=path))
        scores = contest.compete(contenders, rounds=settings.rounds)
    tokens = rows * (prompt if settings.work == "prefill" else new)
    title = f"{settings.work}: {rows} x {prompt} tokens in, {new} out"
    return contest.report(settings.out, title, tokens, scores)


def prompts(model: str, rows: int, length: int) -> np.ndarray:
    """The first tokens of the data set that ships with us, [rows, length]."""
    import llmprep_jax as lp

    text = DATA.read_text(encoding="utf-8")[: 16 * rows * length]
    return lp.load_processor(model)(text)["tokens"][0, : rows * length].reshape(rows, length)


if __name__ == "__main__":
    cli.run(main)
