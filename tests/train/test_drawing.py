"""Training on pictures that are drawn: the parts that learn, and the commands from data to a
picture."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import llmprep_jax as lp
from experiments import generate, train
from llmprep_jax.nn.param import Frozen
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer
from tests.models.drawing import model, write_processor
from tests.models.test_janus import make_batch
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
            paths=(str(HERE / "data.jsonl"),), seq_len=64, batch_size=4, max_images=2,
            drop_prompts=0.1,
        ),
        optim=OptimConfig(lr=1e-2),
        steps=60,
        out=HERE / "run",
    )
"""
COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255)}


def test_steps_teach_what_draws_and_leave_the_vq_as_it_is():
    ours = jax.tree.map(lambda x: x.copy(), model())
    before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(ours, Frozen))]
    cfg = FitConfig(steps=4, optim=OptimConfig(lr=1e-2, weight_decay=0.1, warmup_steps=0))
    trainer, batch = Trainer(ours, cfg=cfg), make_batch()
    steps = trainer.steps([batch] * 4)
    metrics = list(steps)
    first, last = metrics[0], metrics[-1]
    for name in ("loss", "text_loss", "code_loss"):
        assert float(last[name]) < float(first[name]), name
    words = float(batch["loss_mask"].sum())
    whole = words * float(first["text_loss"]) + 64 * float(first["code_loss"])
    assert float(first["tokens"]) == words + 64
    np.testing.assert_allclose(first["loss"], whole / (words + 64), rtol=1e-5)
    after = jax.tree.leaves(nnx.state(trainer.model(steps.state), Frozen))
    assert len(after) == len(before) > 50
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_model_is_trained_to_draw_and_draws_by_command(tmp_path):
    (tmp_path / "images").mkdir()
    lines = []
    for name, color in COLORS.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / f"images/{name}.png")
        image = {"type": "image", "image": f"images/{name}.png"}
        turns = [{"role": "user", "content": name}, {"role": "assistant", "content": [image]}]
        lines += [json.dumps({"messages": turns}) + "\n"] * 4
    (tmp_path / "data.jsonl").write_text("".join(lines))
    (tmp_path / "config.py").write_text(CONFIG)
    write_processor(lp.save_model(model(), tmp_path / "model"))
    train.main([str(tmp_path / "config.py")])
    found = losses(tmp_path / "run")
    assert found[max(found)] < 0.2 * found[1]
    again, processor = lp.load_model(tmp_path / "run"), lp.load_processor(tmp_path / "run")
    settings = dict(temperature=0.0, guidance=1.0)
    pictures = lp.generate_images(again, processor, list(COLORS), **settings)
    values = [np.full((1, 8, 8, 3), color, np.float32) / 127.5 - 1 for color in COLORS.values()]
    expected = again.decode_codes(again.encode_codes(np.concatenate(values)))
    expected = np.clip((np.asarray(expected) + 1) * 127.5, 0, 255)
    assert np.abs(pictures - expected).max() <= 1  # what the VQ makes of the colours, code by code
    out = tmp_path / "red.png"
    generate.main([str(tmp_path / "run"), "red", f"out={out}", "temperature=0", "guidance=1"])
    np.testing.assert_array_equal(np.asarray(Image.open(out)), pictures[0])
