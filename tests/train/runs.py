"""A config, a tokenizer, text and a model of a moment, and the commands on them."""

import pathlib

import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.cli import run
from llmprep_jax.models.llama.config import Config
from llmprep_jax.models.llama.model import Model
from llmprep_jax.train.metrics import read_jsonl
from tests.random_modules import random_module
from tests.text.samples import make_inputs

CONFIG = """
import pathlib
from llmprep_jax.data import DataConfig, SourceOptions
from llmprep_jax.models.llama.config import Config
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig

HERE = pathlib.Path(__file__).parent
SOURCE = SourceOptions(part="paragraph")

def get_config():
    return RunConfig(
        architecture=Config(416, 16, 32, 2, 4, 2, 4, max_seq_len=64, tie_embeddings=True),
        tokenizer=str(HERE / "tokenizer"),
        data=DataConfig(
            paths=(str(HERE / "text"),), source=SOURCE, seq_len=32, batch_size=8, holdout=0.2
        ),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        steps=6,
        eval_every=3,
        checkpoint=CheckpointConfig(every=2),
        out=HERE / "run",
    )
"""


def make_files(folder: pathlib.Path) -> None:
    """As `make_inputs`, with a config of one process and a Hugging Face model."""
    make_inputs(folder, CONFIG)
    cfg = Config(416, 16, 32, 2, 4, 2, 4, max_seq_len=64, tie_embeddings=True)
    model = random_module(lambda: Model(cfg, rngs=nnx.Rngs(0)))
    processor = lp.load_processor(folder / "tokenizer")
    lp.save_model(model, folder / "model", processor=processor)


def command(files, out, *overrides) -> list[str]:
    return [str(files / "config.py"), f"out={out}", *overrides]


def losses(out) -> dict[int, float]:
    records = read_jsonl(pathlib.Path(out) / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def exit_of(capsys, main, arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        run(main, arguments)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return stop.value.code, err


def with_adapter(files, method: str = "DoRA") -> list[str]:
    keys = ["architecture=none", f"model={files / 'model'}", "tokenizer=none"]
    keys += [f"adapter._type={method}", "adapter.rank=2"]
    return [*keys, "optim.lora_plus=4", "optim.lr=0.02", "data.holdout=0", "checkpoint.every=none"]
