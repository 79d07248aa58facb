"""The command on two towers, by the config files themselves at a small size: trained, stopped, gone
on with, and the run's folder a model."""

import json
import pathlib
import shutil

import chex
import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

import llmprep_jax as lp
from experiments import train
from llmprep_jax.config import load_config
from llmprep_jax.runs import open_data, open_processor
from llmprep_jax.train.metrics import read_jsonl
from tests.quick_compile import quick_compile
from tests.train.runs import exit_of, losses

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SIZES = [
    f"architecture.{tower}.{size}"
    for tower in ("text", "vision")
    for size in ("num_layers=1", "dim=32", "mlp_dim=32")
]
SMALL = ["data.batch_size=16", "data.prefetch=0", "eval_batches=1", "checkpoint.every=none"]
SMALL += ["optim.warmup_steps=1", "optim.lr=0.01"]


@pytest.fixture(scope="module", autouse=True)
def quickly(tmp_path_factory):
    with quick_compile(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(name, *settings)`: the config in a folder of its own, where the shapes are drawn."""
    monkeypatch.chdir(tmp_path)
    # fields of a config are functions until they are looked up
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def run(name, *settings):
        sizes = SIZES if "architecture=none" not in settings else []
        train.main([str(CONFIGS / f"{name}.py"), *sizes, *SMALL, *settings])

    return run


@pytest.mark.slow
def test_a_clip_is_trained_and_its_folder_is_a_model_that_encodes(run, tmp_path, capsys):
    run("clip_pretrain", "out=run", "steps=2", "data.random_crop=0.5,1", "data.random_flip=true")
    text = " ".join(capsys.readouterr().out.split())
    assert "a step: 16 pairs" in text
    assert "data: trained on 32 pairs; read ahead up to" in text
    assert losses(tmp_path / "run")[1] < 4  # ln 16 is 2.77, and random vectors are not quite alike
    last = read_jsonl(tmp_path / "run/metrics.jsonl")[-1]
    assert {"eval_loss", "eval_image_to_text_r1", "eval_text_to_image_r1"} < set(last)
    (line,) = (tmp_path / "runs/data/shapes/shapes.jsonl").read_text().splitlines()[:1]
    assert json.loads(line)["captions"][0] == "a small red circle in the middle on white"
    model, processor = lp.load_model(tmp_path / "run"), lp.load_processor(tmp_path / "run")
    image = Image.open(tmp_path / "runs/data/shapes/images/000.png")
    out = model(**processor(["a small red circle", "a large blue square"], images=[image]))
    assert out.logits_per_image.shape == (1, 2)
    batch = next(lp.load_data(processor, "runs/data/shapes/shapes.jsonl", batch_size=3))
    assert (batch["tokens"].shape, batch["images"].shape) == ((3, 24), (3, 1, 32, 32, 3))


def test_views_of_pictures_are_refused_where_tokens_stand_for_them(files):
    cfg = load_config(files / "config.py", ["data.random_flip=true"])
    with pytest.raises(ValueError, match=r"random_flip are for models of two towers"):
        open_data(cfg, open_processor(cfg))


@pytest.mark.slow  # three runs
def test_a_run_of_pairs_goes_on_to_the_bit_and_in_another_form_too(run, tmp_path):
    views = ["data.random_crop=0.5,1", "data.random_flip=true"]
    run("clip_pretrain", "out=whole", "steps=4", *views)
    run("clip_pretrain", "out=cut", "steps=2", "schedule_steps=4", *views)
    shutil.copytree("cut", "ring")
    for out, form in {"cut": "gather", "ring": "ring"}.items():
        more = [f"out={out}", "steps=4", "schedule_steps=4", f"contrastive.form={form}"]
        run("clip_pretrain", *more, *views)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert losses(tmp_path / "ring") == pytest.approx(losses(tmp_path / "cut"), 1e-4)
    model, processor = lp.load_model(tmp_path / "cut"), lp.load_processor(tmp_path / "cut")
    saved = lp.load_model(lp.save_model(model, tmp_path / "saved", processor=processor))
    chex.assert_trees_all_equal(*(jax.device_get(jax.tree.leaves(m)) for m in (saved, model)))


@pytest.mark.slow  # two runs, and a process
def test_a_siglip_is_tuned_with_a_locked_tower_and_decoded_by_a_process(run, tmp_path):
    run("siglip_pretrain", "out=first", "steps=2")
    settings = ["architecture=none", "tokenizer=none", "model=first", "freeze=vision", "steps=6"]
    run("siglip_pretrain", "out=lit", *settings, "data.decoders=1")
    found = losses(tmp_path / "lit")
    assert found[6] < found[1]
    before, after = (lp.load_model(tmp_path / name) for name in ("first", "lit"))
    chex.assert_trees_all_equal(*(jax.device_get(m.vision) for m in (before, after)))
    assert not np.array_equal(before.text.head.w[...], after.text.head.w[...])


@pytest.mark.parametrize(("settings", "words"), [
    (["accumulate=2"], "accumulate=2: a contrastive loss holds each row of a batch against"),
    (["contrastive.kind=sigmoid"], "the sigmoid loss needs a bias, which this model has not"),
    (["contrastive.chunk=4"], "chunk=4 with form=gather; texts at a time of a ring"),
    (["freeze=visio"], "near names: vision"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused_in_one_line(run, capsys, settings, words):
    def main(arguments):
        run("clip_pretrain", *arguments)

    code, error = exit_of(capsys, main, [*settings, "steps=1"])
    assert (code in (1, 2), error.count("\n")) == (True, 1), error
    assert words in error
