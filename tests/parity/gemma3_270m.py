"""Gemma 3 270M with its real weights: the text of transformers, and the LoRA run of its config.

    make parity-gemma3

The weights are Google's under the Gemma Terms of Use and no part of this project, so pytest does
not collect this file by itself; configs/gemma3_270m_lora.py says how whoever accepts the terms
installs them.
"""

import pathlib

import numpy as np
import pytest
import torch
import transformers

import llmprep_jax as lp
from configs.data.shipped import find_gemma3
from configs.gemma3_270m_lora import get_config
from experiments.train import train
from llmprep_jax.config import look_up, override
from llmprep_jax.train.metrics import read_jsonl
from llmprep_jax.train.monitor import METRICS_FILE

pytestmark = pytest.mark.parity

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a fox who",
    "def fibonacci(n):",
    "Die Donau ist der zweitlängste Fluss Europas und",
    "Water boils at 100 degrees because",
)


def test_greedy_text_is_that_of_transformers():
    path = pathlib.Path(find_gemma3())
    file = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**file)
    expected, ids = [], []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            new = theirs.generate(**inputs, max_new_tokens=48, do_sample=False)
        ids.append(inputs["input_ids"].numpy())
        expected.append(tokenizer.decode(new[0, ids[-1].shape[1] :], skip_special_tokens=True))
    del theirs
    model, processor = lp.load_model(path), lp.load_processor(path)
    for prompt, theirs in zip(PROMPTS, ids, strict=True):
        np.testing.assert_array_equal(processor(prompt)["tokens"], theirs)
    found = [lp.generate(model, processor, prompt, max_new_tokens=48) for prompt in PROMPTS]
    assert found == expected


def test_the_lora_run_of_its_config_learns(tmp_path):
    overrides = [f"out={tmp_path / 'run'}", "steps=16", "eval_every=8", "optim.warmup_steps=2"]
    cfg = override(look_up(get_config()), overrides)
    cfg.out.mkdir(parents=True)
    result = train(cfg, mesh=None)
    losses = [row["loss"] for row in read_jsonl(cfg.out / METRICS_FILE) if "loss" in row]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.2
    adapter = lp.peft.save(result.model, tmp_path / "adapter", base_model=cfg.model)
    again = lp.peft.load(lp.load_model(cfg.model, compute=cfg.compute), adapter)
    tokens = np.arange(2, 34, dtype=np.int32)[None]
    np.testing.assert_allclose(again(tokens).logits, result.model(tokens).logits, atol=1e-4)
