"""The commands on a model that sees: trained on a file of conversations, stopped, gone on with,
evaluated."""

import json
import shutil

import pytest

from experiments import evaluate, train
from tests.data.pictured import asked, write
from tests.models.test_deepseek_vl2 import FOLDER, IMAGE
from tests.models.test_deepseek_vl2_processor import RESOLUTIONS, write_tokenizer
from tests.train.runs import losses

CONFIG = """
import pathlib
from llmprep_jax.data import DataConfig
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig

HERE = pathlib.Path(__file__).parent

def get_config():
    return RunConfig(
        model=str(HERE / "model"),
        data=DataConfig(
            paths=(str(HERE / "data.jsonl"),), seq_len=96, batch_size=4, max_images=6, holdout=0.2
        ),
        optim=OptimConfig(lr=3e-3),
        steps=4,
        out=HERE / "run",
    )
"""


def make_files(folder):
    shutil.copytree(FOLDER / "mha_greedy", folder / "model")
    cfg = json.loads((folder / "model/config.json").read_text()) | {"image_token_id": IMAGE}
    (folder / "model/config.json").write_text(json.dumps(cfg))
    write_tokenizer(folder / "model")
    fields = {
        "processor_class": "DeepseekVLV2Processor",
        "candidate_resolutions": RESOLUTIONS,
        "image_token": "<image>",
    }
    (folder / "model/processor_config.json").write_text(json.dumps(fields))
    write(folder, [asked(10 * i, "what is it") for i in range(20)])
    (folder / "config.py").write_text(CONFIG)


@pytest.mark.slow
def test_a_model_that_sees_is_trained_gone_on_with_and_evaluated(tmp_path, capsys):
    make_files(tmp_path)
    config = str(tmp_path / "config.py")
    train.main([config, f"out={tmp_path / 'whole'}"])
    train.main([config, f"out={tmp_path / 'cut'}", "steps=2", "schedule_steps=4"])
    train.main([config, f"out={tmp_path / 'cut'}", "schedule_steps=4"])
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert whole == cut
    assert whole[4] < whole[1]
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert next(r["images"] for r in records if "images" in r) > 0
    settings = ["data.seq_len=96", "data.max_images=6", f"out={tmp_path / 'result.json'}"]
    evaluate.main([str(tmp_path / "cut"), str(tmp_path / "data.jsonl"), *settings])
    assert json.loads((tmp_path / "result.json").read_text())["perplexity"] > 1
