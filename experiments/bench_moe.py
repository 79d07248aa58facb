"""Speed of a mixture of experts: us and transformers' DeepseekV3, in turn in one run.

    python -m experiments.bench_moe [work=step] [rounds=7] [out=FILE.json]

work: step (a training step of all weights by AdamW, 8 x 128 tokens) or decode (one row, 64 tokens
after 64, greedy). The model is the preset deepseek-v3-tiny without its multi-token prediction, with
random weights. transformers runs its experts in a loop ("eager", its reference) or grouped. A ratio
is the peer's median over ours.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "experiments.bench_moe:Settings", compile_cache=False)

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from experiments.bench.training import training_call
from experiments.study import contest
from llmprep_jax import cli
from llmprep_jax.config import only_overrides, override

ROWS, LENGTH, NEW = 8, 128, 64
PRESET = "deepseek-v3-tiny"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is timed; `rounds` timed calls of each contender."""

    work: Literal["step", "decode"] = "step"  # as above
    rounds: int = 7  # timed calls of each contender
    out: pathlib.Path | None = None  # a JSON file for the numbers


def draw_tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 49152, (rows, length), dtype=np.int32)


def config(**compute: str) -> Any:
    from llmprep_jax.models import registry
    from llmprep_jax.nn.param import Compute

    return dataclasses.replace(registry.preset(PRESET), num_mtp=0, compute=Compute(**compute))


def our_model(**compute: str) -> Any:
    import jax
    from flax import nnx

    from llmprep_jax.models import registry

    return jax.jit(lambda: registry.build(config(**compute), rngs=nnx.Rngs(0)))()


def our_step(operands: str) -> Callable[[], Any]:
    from llmprep_jax.nn.param import TRAINED

    tokens, mask = draw_tokens(ROWS, LENGTH + 1), np.ones((ROWS, LENGTH), np.float32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}
    step = training_call(our_model(matmul_dtype=operands), TRAINED, batch)
    return lambda: float(step())


def our_decode(dtype: str) -> Callable[[], Any]:
    import llmprep_jax as lp

    model, tokens = our_model(dtype=dtype, param_dtype=dtype), draw_tokens(1, 64)
    return lambda: np.asarray(lp.generate_tokens(model, tokens, max_new_tokens=NEW))


def their_model(dtype: str, experts: str) -> Any:
    import torch
    import transformers

    from llmprep_jax.models import registry

    cfg = config()
    fields = registry.to_hf(cfg)
    theirs = transformers.DeepseekV3Config(**fields, experts_implementation=experts)
    return transformers.DeepseekV3ForCausalLM(theirs).to(getattr(torch, dtype))


def their_step(dtype: str, experts: str) -> Callable[[], Any]:
    import torch

    model = their_model("float32", experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.tensor(draw_tokens(ROWS, LENGTH)).long()
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, dtype == "autocast")

    def call():
        with autocast():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return call


def their_decode(dtype: str, experts: str) -> Callable[[], Any]:
    import torch

    model = their_model(dtype, experts).eval()
    tokens = torch.tensor(draw_tokens(1, 64)).long()
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    def call():
        with torch.inference_mode():
            return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)

    return call


def contenders_of(work: str) -> dict[str, tuple[Callable, dict[str, str]]]:
    if work == "step":
        contenders = {
            f"ours, {x} operands": (our_step, dict(operands=x)) for x in ("float32", "bfloat16")
        }
        runs = [(their_step, dtype) for dtype in ("float32", "autocast")]
    else:
        contenders = {f"ours, {x}": (our_decode, dict(dtype=x)) for x in ("float32", "bfloat16")}
        runs = [(their_decode, dtype) for dtype in ("float32", "bfloat16")]
    for make, dtype in runs:
        for experts in ("eager", "grouped_mm"):
            contenders[f"transformers, {dtype}, {experts}"] = (
                make,
                dict(dtype=dtype, experts=experts),
            )
    return contenders


def main(arguments: list[str]) -> cli.Outputs:
    settings = override(Settings(), only_overrides(arguments))
    scores = contest.compete(contenders_of(settings.work), rounds=settings.rounds)
    tokens = ROWS * LENGTH if settings.work == "step" else NEW
    return contest.report(settings.out, f"{PRESET}, {settings.work}", tokens, scores)


if __name__ == "__main__":
    cli.run(main)
