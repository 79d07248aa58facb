"""What comes out of runs: averages, adapters that are trained on, and bases that are merged."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from experiments import convert, evaluate, train
from llmprep_jax.config import load_config
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.runs import build_model
from tests.models.tiny import forward
from tests.train.runs import command


def test_the_folders_of_an_adapter_and_of_its_average_hold_what_they_are_named_after(
    files, lora_run
):
    for folder, ema in {"adapter": False, "adapter_ema": True}.items():
        saved = lp.peft.load(lp.load_model(files / "model"), lora_run / folder)
        of_run = lp.load_model(lora_run, ema=ema)
        saved, of_run = (nnx.state(m, AdapterParam) for m in (saved, of_run))
        chex.assert_trees_all_equal(saved, of_run)
    both = [lp.load_model(lora_run, ema=ema) for ema in (False, True)]
    weights, average = (nnx.to_pure_dict(nnx.state(m, AdapterParam)) for m in both)
    differences = jax.tree.map(lambda a, b: np.abs(np.subtract(a, b)).max(), weights, average)
    assert max(jax.tree.leaves(differences)) > 5e-4


def test_training_goes_on_from_an_adapter(files, lora_run, tmp_path):
    keys = ["architecture=none", f"model={files / 'model'}", "tokenizer=none", "data.holdout=0"]
    keys += ["optim.lr=0", "optim.warmup_steps=0", "steps=1"]
    first = nnx.state(lp.load_model(lora_run), AdapterParam)
    # of PEFT's format, without its run beside it
    alone = shutil.copytree(lora_run / "adapter", tmp_path / "adapter")
    cfg = load_config(files / "config.py", [*keys, f"adapter={alone}"])
    begun, method = build_model(cfg, None)
    chex.assert_trees_all_equal(nnx.state(begun, AdapterParam), first)
    assert (type(method), method.rank) == (lp.peft.LoRA, 2)
    outputs = train.main(command(files, tmp_path / "on", *keys, f"adapter={lora_run}"))
    on = nnx.state(lp.load_model(tmp_path / "on"), AdapterParam)
    chex.assert_trees_all_equal(on, first)
    assert (outputs["adapter"] / "adapter_config.json").is_file()


def test_an_adapter_is_merged_and_said_before_all_weights_are_trained(
    files, lora_run, tmp_path, capsys
):
    keys = ["architecture=none", f"model={lora_run}", "data.holdout=0", "steps=1", "optim.lr=0"]
    train.main(command(files, tmp_path, *keys, "optim.warmup_steps=0"))
    text = " ".join(capsys.readouterr().out.split())
    assert f"the adapter of {lora_run} is merged into its base, and training begins" in text
    assert "(100.00%)" in text
    model = lp.load_model(tmp_path)
    assert not lp.peft.is_adapted(model)
    tokens = np.array([[1, 2, 3]])
    expected = forward(lp.load_model(lora_run), tokens)
    np.testing.assert_allclose(forward(model, tokens), expected, atol=1e-5)


def test_the_average_of_a_run_is_loaded_evaluated_and_exported_by_one_word(
    files, averaged_run, tmp_path
):
    weights, average = (lp.load_model(averaged_run, ema=ema).embed.w[...] for ema in (False, True))
    begun = lp.load_model(averaged_run / "checkpoints" / "1").embed.w[...]
    assert float(np.abs(weights - average).max()) > 1e-2
    # an adapter on the average would be put on the weights by who loads the run
    named = [lp.load_model(averaged_run, ema=ema).source.path for ema in (False, True)]
    assert named == [str(averaged_run), None]
    assert float(np.abs(weights - begun).max()) > 1e-2
    convert.main([str(averaged_run), str(tmp_path / "average"), "ema=true"])
    convert.main([str(averaged_run), str(tmp_path / "weights")])
    for name, expected in {"average": average, "weights": weights}.items():
        found = lp.load_model(tmp_path / name).embed.w[...]
        np.testing.assert_array_equal(found, expected)
    measured = {}
    for ema in ("false", "true"):
        out = tmp_path / f"{ema}.json"
        arguments = [str(averaged_run), str(files / "text"), "data.seq_len=32", "max_batches=1"]
        evaluate.main([*arguments, f"ema={ema}", f"out={out}"])
        measured[ema] = json.loads(out.read_text())["nll"]
    assert measured["true"] != measured["false"]


def test_an_average_that_was_not_kept_is_refused(files, run_folder):
    with pytest.raises(ValueError, match="keeps no running average: it was trained without ema_de"):
        lp.load_model(run_folder, ema=True)
    with pytest.raises(ValueError, match="is no run: only runs keep a running average"):
        lp.load_model(files / "model", ema=True)
