"""The commands train and evaluate on tiny models and real files: outputs, errors, signals."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from experiments import evaluate, train
from llmprep_jax.config import load_config
from llmprep_jax.data import Batches
from llmprep_jax.models.deepseek.presets import V3_TINY
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.runs import build_model
from llmprep_jax.sharding import make_mesh
from llmprep_jax.train.checkpoint import all_steps, read_meta
from llmprep_jax.train.metrics import read_jsonl
from llmprep_jax.train.run import Trained, describe_data
from tests.train.runs import command, exit_of, losses, with_adapter


def test_pre_training_writes_all_its_outputs(files, run_folder, tmp_path):
    assert (run_folder / "checkpoints" / "6").is_dir()
    found = losses(run_folder)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert found[6] < found[1] - 0.2
    evaluations = [r for r in read_jsonl(run_folder / "metrics.jsonl") if "eval_loss" in r]
    assert [r["step"] for r in evaluations] == [3, 6]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    saved = json.loads((run_folder / "run.json").read_text())
    assert (saved["_type"], saved["steps"], saved["data"]["seq_len"]) == ("RunConfig", 6, 32)
    held_out = ["data.source.part=paragraph", "data.seq_len=32", "data.holdout=0.2"]
    result = tmp_path / "ppl.json"
    arguments = [str(run_folder), str(files / "text"), *held_out, "split=heldout", f"out={result}"]
    evaluate.main(arguments)  # the run's folder is a model, with its tokenizer
    nll = json.loads(result.read_text())["nll"]
    assert nll == pytest.approx(evaluations[1]["eval_loss"], rel=1e-6)


def test_the_folder_of_a_run_is_a_model_that_generates_and_is_saved(run_folder, tmp_path):
    model, prompt = lp.load_model(run_folder), np.array([[1, 2, 3]])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(model))
    expected = lp.generate_tokens(model, prompt, max_new_tokens=5)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    again = lp.load_model(lp.save_model(lp.load_model(run_folder, mesh=mesh), tmp_path / "saved"))
    np.testing.assert_array_equal(lp.generate_tokens(again, prompt, max_new_tokens=5), expected)


def check_adapter(files, out, adapter, method):
    """The losses of a run of four steps, its checkpoint's account, and the adapter beside it."""
    found = losses(out)
    assert found[4] < found[1]
    meta = read_meta(out)
    assert meta["base"] == str(files / "model")
    assert (meta["adapter"]["_type"], meta["adapter"]["rank"]) == (method, 2)
    adapted = lp.peft.load(lp.load_model(files / "model"), adapter)
    again = lp.load_model(out)
    assert bool(lp.quant.packed_layers(again)) == (method == "QLoRA")
    saved, of_run = (nnx.state(m, AdapterParam) for m in (adapted, again))
    chex.assert_trees_all_equal(saved, of_run)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(saved))  # lora_b began as zero


def test_an_adapter_is_trained_and_saved_for_peft(files, lora_run):
    check_adapter(files, lora_run, lora_run / "adapter", "LoRA")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("DoRA", marks=pytest.mark.grid),
        pytest.param("QLoRA", marks=pytest.mark.slow),
    ],
)
def test_an_adapter_of_each_kind_is_trained_and_saved_for_peft(files, tmp_path, method):
    outputs = train.main(command(files, tmp_path, *with_adapter(files, method), "steps=4"))
    check_adapter(files, tmp_path, outputs["adapter"], method)


@pytest.mark.slow  # two runs
def test_a_run_drops_what_its_adapter_asks_for(files, tmp_path):
    for name, rate in {"whole": 0.0, "dropped": 0.5}.items():
        keys = [*with_adapter(files, "LoRA"), "steps=4", f"adapter.dropout={rate}"]
        train.main(command(files, tmp_path / name, *keys))
    whole, dropped = losses(tmp_path / "whole"), losses(tmp_path / "dropped")
    assert dropped[1] == pytest.approx(whole[1], abs=1e-6)  # lora_b is zero
    assert abs(dropped[4] - whole[4]) > 1e-4


@pytest.mark.slow  # compiles for eight devices, and Orbax slices arrays on them op by op
def test_an_adapter_trains_alike_on_a_mesh(files, tmp_path):
    train.main(command(files, tmp_path / "alone", *with_adapter(files)))
    train.main(command(files, tmp_path / "mesh", *with_adapter(files), "mesh=cpu_4x2"))
    alone, mesh = losses(tmp_path / "alone"), losses(tmp_path / "mesh")
    np.testing.assert_allclose(list(mesh.values()), list(alone.values()), rtol=1e-3)


def test_evaluate_prints_and_writes_the_perplexity(files, tmp_path, capsys):
    out = tmp_path / "new" / "result.json"
    arguments = [str(files / "model"), str(files / "text"), "data.seq_len=32", f"out={out}"]
    assert evaluate.main(arguments) == {"result": out}
    result = json.loads(out.read_text())
    assert result["perplexity"] == pytest.approx(np.exp(result["nll"]))
    assert result["nll"] == pytest.approx(np.log(416), abs=0.5)  # an untrained model
    assert result["settings"]["data"]["seq_len"] == 32
    assert f"perplexity {result['perplexity']:.3f}" in capsys.readouterr().out
    evaluate.main([*arguments, "mesh.fsdp=4", "mesh.tensor=2"])
    assert json.loads(out.read_text())["nll"] == pytest.approx(result["nll"], rel=1e-6)


def test_a_result_lies_beside_the_model_and_never_over_another(files, tmp_path):
    model = shutil.copytree(files / "model", tmp_path / "model")
    arguments = [str(model), str(files / "text"), "data.seq_len=32", "max_batches=1"]
    first = evaluate.main(arguments)["result"]
    assert first == model / "perplexity-text.json"
    assert evaluate.main(arguments)["result"] == first  # the same measurement again
    before = first.read_text()
    second = evaluate.main([*arguments, "data.batch_size=4"])["result"]
    assert (second.name, first.read_text()) == ("perplexity-text-2.json", before)
    assert lp.load_model(model).cfg.vocab_size == 416


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["optim.lrr=1"], 2, "unknown key optim.lrr; did you mean optim.lr?"),
        (["rank=8"], 2, "unknown key rank; did you mean adapter.rank?"),
        (["out="], 2, "out=: wanted a path"),
        (["epochs=0"], 2, "epochs must be at least 1, not 0"),
        (["adapter=LoRa"], 1, "adapter=LoRa: there is no adapter_config.json; give a folder"),
        (["steps=many"], 2, "steps=many: wanted a whole number"),
        (["accumulate=3"], 2, "data.batch_size=8 is no multiple of accumulate=3"),
        (["compute.dtype=bfloat"], 2, "compute.dtype='bfloat'; the dtypes are float32"),
        (["mesh=v5e_9"], 2, "unknown mesh v5e_9; did you mean v5e_8"),
        (["mesh=v5e_16"], 2, "mesh=v5e_16: a mesh of {'fsdp': 16} does not fit 8 devices"),
        (["mesh=v5e_16"], 2, "JAX_NUM_CPU_DEVICES=N makes N of a CPU"),
        (["architecture=llama-3.1-9b"], 1, "unknown preset 'llama-3.1-9b'; did you mean"),
        (["model=nowhere"], 2, "give either model (weights) or architecture"),
        (["architecture=none", "model=nowhere"], 1, "no file or folder nowhere"),
        (["data.paths=nowhere.txt"], 1, "nowhere.txt"),
        (["optim.warmup_steps=7"], 2, "warmup_steps=7 is more than the run's 6"),
        (["optim.lora_plus=2"], 2, "optim.lora_plus is for LoRA adapters"),
        (["architecture.vocab_size=300"], 1, "the model's vocabulary ends at 299"),
        (["mesh=cpu_8", "data.batch_size=4"], 1, "4 rows does not part over the mesh fsdp=8"),
        (["data.batch_size=0"], 2, "batch_size must be at least 1"),
        (["--resume"], 2, "unknown flag --resume"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_an_exit_code(files, tmp_path, capsys, overrides, code, message):
    arguments = command(files, tmp_path / "run", *overrides)
    got, error = exit_of(capsys, train.main, arguments)
    assert (got, error.count("\n")) == (code, 1), error
    assert error.startswith("error: ")
    assert message in error


def test_a_transport_that_cpus_lack_is_refused_in_one_line(files):
    architecture = dataclasses.replace(V3_TINY, transport="ragged")
    cfg = load_config(files / "config.py")
    with pytest.raises(ValueError, match=r"^architecture\.transport=ragged needs an all-to-all"):
        build_model(dataclasses.replace(cfg, architecture=architecture), None)


def test_a_run_ends_by_saying_what_became_of_its_documents(run_text):
    out, text = run_text
    pattern = r"data: trained on ([\d,]+) tokens, ([\d,]+) of them targets, of \d+ documents; "
    found = re.search(pattern + r"padding (\d+\.\d)%;", text)
    assert found, text
    steps = [r for r in read_jsonl(out / "metrics.jsonl") if "loss" in r]
    read, targets = (sum(r[name] for r in steps) for name in ("input_tokens", "tokens"))
    assert [int(number.replace(",", "")) for number in found.groups()[:2]] == [read, targets]
    assert float(found[3]) == pytest.approx(100 * (1 - read / (6 * 8 * 32)), abs=0.05)
    assert re.search(r"read ahead up to \d+ documents of [\d,]+ tokens;", text)


def test_a_run_says_what_a_step_is_and_only_what_differs_from_the_defaults(run_text):
    _, text = run_text
    assert "a step: 8 rows of 32 tokens" in text
    assert "optim.warmup_steps = 2" in text
    assert "optim.betas" not in text
    assert re.search(r"memory of a step: [\d.,]+ MiB of weights", text), text


def test_the_report_tells_of_documents_that_were_too_long():
    counts = dict.fromkeys(("split", "truncated", "lost", "dropped", "empty"), 0)
    yielded = {"documents": 376, "tokens": 5000, "targets": 4000}
    report = {"documents": 1234, "tokens": 56789, "yielded": yielded, **counts}
    assert describe_data(report, Trained(5000, 4000, 0.042)) == (
        "data: trained on 5,000 tokens, 4,000 of them targets, of 376 documents; padding 4.2%; "
        "read ahead up to 1,234 documents of 56,789 tokens; longer than the context: none"
    )
    report |= {"truncated": 2, "lost": 30, "dropped": 1, "empty": 4}
    assert describe_data(report, None) == (
        "data: read ahead up to 1,234 documents of 56,789 tokens; longer than the context: "
        "2 truncated, 1 dropped (30 targets lost); without a target: 4"
    )


def test_a_non_finite_loss_is_one_line_and_keeps_the_earlier_checkpoint(
    files, tmp_path, capsys, monkeypatch
):
    class Poisoned(Batches):
        def __next__(self):
            batch = super().__next__()
            if self.report()["rows"] == 16:
                batch["loss_mask"] = np.where(batch["loss_mask"] > 0, np.inf, 0).astype(np.float32)
            return batch

    monkeypatch.setattr("llmprep_jax.data.pipeline.Batches", Poisoned)
    code, error = exit_of(capsys, train.main, command(files, tmp_path, "checkpoint.every=1"))
    assert (code, error.count("\n")) == (1, 1), error
    pattern = r"error: step 2: loss nan, gradient norm nan; documents of its batch: \d+ \(\S+a\.txt"
    assert re.match(pattern, error), error
    assert error.endswith(f"last good checkpoint: {tmp_path / 'checkpoints' / '1'}\n")
    assert (all_steps(tmp_path), read_meta(tmp_path)["step"]) == ([1], 1)


def test_a_missing_config_and_an_unwritable_folder_are_told_apart(files, tmp_path, capsys):
    code, error = exit_of(capsys, train.main, [str(files / "confg.py")])
    assert (code, "did you mean config.py?" in error) == (2, True)
    (tmp_path / "file").write_text("")
    code, error = exit_of(capsys, train.main, command(files, tmp_path / "file" / "run"))
    assert (code, "Not a directory" in error) == (1, True)
    assert exit_of(capsys, train.main, [])[0] == 2


def test_epochs_are_counted_and_end_the_run(files, tmp_path, capsys):
    settings = ["optim.warmup_steps=1", "data.holdout=0", "checkpoint.every=none"]
    train.main(command(files, tmp_path, "epochs=1", *settings))
    text = " ".join(capsys.readouterr().out.split())
    steps = int(re.search(r"epochs=1: (\d+) steps", text)[1])
    saved = json.loads((tmp_path / "run.json").read_text())
    assert (saved["epochs"], saved["steps"], saved["data"]["num_epochs"]) == (1, steps, 1)
    assert list(losses(tmp_path)) == list(range(1, steps + 1))
    assert all_steps(tmp_path)[-1] == steps
    read = sum(r["input_tokens"] for r in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in r)
    assert f"trained on {int(read):,} tokens" in text
    first = losses(tmp_path)
    train.main(command(files, tmp_path, "epochs=2", *settings))
    text = " ".join(capsys.readouterr().out.split())
    assert "changed since the run began: epochs: 1 -> 2" in text
    assert f"schedule over {steps} steps" in text
    more = losses(tmp_path)
    assert len(more) >= 1.5 * len(first)
    assert {step: more[step] for step in first} == first


def start(files, out, cache) -> subprocess.Popen:
    kept = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *command(files, out, "steps=40")],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(process, out, step) -> None:
    path = pathlib.Path(out) / "metrics.jsonl"
    begin = time.monotonic()
    while process.poll() is None and time.monotonic() - begin < 300:
        text = path.read_text() if path.exists() else ""
        if re.search(rf'"step": {step}\b', text):
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {process.communicate()[0][-3000:]}")


@pytest.mark.slow  # five processes, each of which imports and compiles anew
def test_the_command_survives_sigterm_ctrl_c_and_kill_9_to_the_bit(files, tmp_path):
    cache, whole, parts = tmp_path / "cache", tmp_path / "whole", tmp_path / "parts"
    first = start(files, whole, cache)
    text = first.communicate(timeout=600)[0]
    assert first.returncode == 0, text
    stopped = start(files, parts, cache)
    wait_for_step(stopped, parts, 5)
    stopped.send_signal(signal.SIGTERM)
    text = stopped.communicate(timeout=300)[0]
    assert stopped.returncode == 0, text
    assert "stopped by SIGTERM; the same command goes on from here" in text
    assert 5 <= all_steps(parts)[-1] < 40
    interrupted = start(files, parts, cache)
    wait_for_step(interrupted, parts, all_steps(parts)[-1] + 3)
    interrupted.send_signal(signal.SIGINT)
    text = interrupted.communicate(timeout=300)[0]
    assert interrupted.returncode == 130, text
    assert text.count("Ctrl-C: saving after the step under way; again ends at once") == 1
    said = f"interrupted and saved at step {all_steps(parts)[-1]}; to go on: python -m experiments"
    assert said in text.splitlines()[-1]
    assert "Traceback" not in text
    killed = start(files, parts, cache)
    wait_for_step(killed, parts, all_steps(parts)[-1] + 7)
    killed.kill()
    killed.communicate()
    ended = start(files, parts, cache)
    text = ended.communicate(timeout=600)[0]
    assert ended.returncode == 0, text
    assert re.search(r"resumed from step \d+", text)
    assert losses(parts) == losses(whole)
    assert len(losses(parts)) == 40
