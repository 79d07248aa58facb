"""A Llama-3-8B of few layers that generates: prefill and decode, beside transformers'."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.bench.checks import Check
from experiments.bench.llama import DEPTHS, config, hf_fields, need
from experiments.bench.results import Row
from experiments.bench.timing import Contender, in_turn
from experiments.bench.training import batch_of


def decode_checks(contender: str, size: str) -> list[Check]:
    """Prefill and decode of one row, and of many."""
    prompt, new, rows = (2048, 64, (1, 16)) if size == "full" else (32, 8, (1, 2))
    make = functools.cache(functools.partial(_generator, contender, config(size, DEPTHS[1])))
    return [
        Check(
            f"generation, {contender}, {count} rows",
            functools.partial(time_generation, contender, make, size, (count, prompt, new)),
        )
        for count in rows
    ]


def time_generation(
    contender: str, make: Callable[[], Any], size: str, numbers: tuple[int, int, int]
) -> Iterator[Row]:
    """A row of prefill's and decode's speed: of the time of one new token, and what more take."""
    rows, prompt, new = numbers
    generate, cfg = make(), config(size, DEPTHS[1])
    tokens = batch_of(rows, prompt, cfg.vocab_size)["tokens"]
    calls = {
        count: Contender(functools.partial(generate, tokens, count), lambda _: None)
        for count in (1, new + 1)
    }
    seconds = in_turn(calls, rounds=3, at_once=0.0)
    step = (seconds[new + 1] - seconds[1]) / new
    row: Row = {"section": "generation", "contender": contender, "rows": rows}
    row = row | {"layers": cfg.num_layers, "prefill, ms": seconds[1] * 1e3}
    row |= {"prefill, tokens/s": rows * prompt / seconds[1]}
    if step <= 0:
        yield row | {"note": "more tokens took no longer: noise, and no speed"}
        return
    yield row | {
        "decode, ms a step": step * 1e3,
        "decode, tokens/s": rows / step,
        "decode, GB/s": step_bytes(cfg, rows, prompt + new // 2) / step / 1e9,
    }


def step_bytes(cfg: Any, rows: int, length: int) -> int:
    """That a decode step must read: weights in products, and the keys and values of all rows."""
    from flax import nnx

    from llmprep_jax.models import registry
    from llmprep_jax.nn.param import Param
    from llmprep_jax.train.flops import count_flops

    itemsize = 2 if cfg.compute.dtype == "bfloat16" else 4
    weights = count_flops(cfg, nnx.state(registry.abstract(cfg), Param), {}, 0).trained
    cache = 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * rows * length
    return itemsize * (weights + cache)


def _generator(contender: str, cfg: Any) -> Callable[[np.ndarray, int], Any]:
    """generate(tokens [B, T], number of new ones), done when it returns."""
    if contender == "ours":
        import jax
        from flax import nnx

        import llmprep_jax as lp
        from llmprep_jax.models import registry

        model = jax.jit(lambda: registry.build(cfg, rngs=nnx.Rngs(0)))()
        return lambda tokens, new: np.asarray(
            lp.generate_tokens(model, tokens, max_new_tokens=new, temperature=0.0)
        )
    need("torch", "transformers")
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        config = LlamaConfig(**hf_fields(cfg), attn_implementation="sdpa")
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cfg.compute.dtype))

    def generate(tokens: np.ndarray, new: int) -> Any:
        inputs = torch.tensor(tokens, device=device).long()
        settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            mask = torch.ones_like(inputs)
            return model.generate(inputs, attention_mask=mask, **settings).cpu()

    return generate
