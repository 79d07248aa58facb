"""A run folder: whose it is, and what may change when the run goes on."""

import datetime
import json
import shutil

import pytest

from experiments import train
from llmprep_jax.config import UsageError, load_config
from llmprep_jax.train.loop import lock_folder
from llmprep_jax.train.run import claim_folder
from tests.train.runs import command, exit_of


def test_a_folder_of_another_run_is_refused_and_left_alone(files, run_folder, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run_folder, out)
    before = (out / "run.json").read_text()
    for setting in ("data.seed=1", "optim.optimizer=adamw8bit"):
        code, error = exit_of(capsys, train.main, command(files, out, setting))
        assert code == 2
        assert "holds a run with another config (" in error
        assert (out / "run.json").read_text() == before
    assert "(optim.optimizer was 'adamw', is 'adamw8bit')" in error
    cfg = load_config(files / "config.py", [f"out={out}", "checkpoint.every=3"])
    _, changes = claim_folder(cfg)  # of where, how long and how often: it is the same run
    assert changes[:1] == ["checkpoint.every: 2 -> 3"]
    assert changes[1].startswith("out: ")
    assert json.loads((out / "run.json").read_text())["checkpoint"]["every"] == 3
    (out / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged; delete it to go on"):
        claim_folder(cfg)


def claim(files, out, *overrides):
    """What a command with these overrides makes of the folder: the config, and its words."""
    return claim_folder(load_config(files / "config.py", [f"out={out}", *overrides]))


def test_a_run_of_another_length_keeps_its_rates_unless_it_is_told_otherwise(
    files, run_folder, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(run_folder, out)
    cfg, words = claim(files, out, "steps=9")
    assert (cfg.steps, cfg.horizon) == (9, 6)
    assert "steps: 6 -> 9" in words
    assert words[-1] == (
        "the learning rate keeps its cosine schedule over 6 steps; schedule_steps=9 lays it over "
        "all 9"
    )
    assert claim(files, out, "steps=9")[0].horizon == 6  # again: as run.json has it by now
    cfg, words = claim(files, out, "steps=9", "schedule_steps=9")
    assert cfg.horizon == 9
    assert words[-1] == "the learning rate of step 7: 0.001 -> 0.00269"


def test_optimizer_settings_may_change_when_a_run_goes_on_and_the_new_rate_is_said(
    files, run_folder, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(run_folder, out)
    cfg, words = claim(files, out, "optim.lr=0.1", "optim.weight_decay=0", "skip_nonfinite=3")
    assert cfg.optim.lr == 0.1
    assert "optim.lr: 0.01 -> 0.1" in words
    assert words[-1] == "the learning rate of step 7: 0.001 -> 0.01"


def rewrite(out, change) -> None:
    """run.json as another version would have written it."""
    path = out / "run.json"
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json.dumps(run))


def test_a_run_of_an_older_version_goes_on_with_the_defaults_of_what_is_new(
    files, run_folder, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(run_folder, out)

    def older(run):
        del run["z_loss"], run["data"]["overlong"], run["optim"]["lora_plus"]
        del run["architecture"]["norm_eps"]
        run["colour"], run["optim"]["warm"] = "red", 3

    rewrite(out, older)
    _, words = claim(files, out)
    assert words[-2:] == [
        "settings that the run began without have their defaults: optim.lora_plus=1.0,"
        " architecture.norm_eps=1e-06, data.overlong=None, z_loss=0.0",
        "settings that there are no more have no effect: colour='red', optim.warm=3",
    ]
    assert len(claim(files, out)[1]) == 0  # run.json is of this version by now


def test_what_is_new_since_a_run_began_may_not_be_other_than_its_default(
    files, run_folder, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(run_folder, out)
    rewrite(out, lambda run: run.pop("z_loss"))
    with pytest.raises(UsageError, match=r"another config \(z_loss was 0.0, is 0.5\)"):
        claim(files, out, "z_loss=0.5")
    rewrite(out, lambda run: run["data"].pop("paths"))  # which no version lacked
    assert "data.paths: None -> " in " ".join(claim(files, out)[1])


def test_a_folder_with_other_files_is_refused(files, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, error = exit_of(capsys, train.main, command(files, tmp_path))
    assert (code, f"{tmp_path} holds thesis.tex, no run" in error) == (2, True)
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["thesis.tex"]


def test_a_command_that_is_refused_leaves_a_live_run_alone(files, tmp_path, capsys):
    with lock_folder(tmp_path):
        (tmp_path / "run.json").write_text("of the live run")
        code, error = exit_of(capsys, train.main, command(files, tmp_path, "steps=3"))
    assert (code, "is in use by another run" in error) == (1, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "run.json"]
    assert (tmp_path / "run.json").read_text() == "of the live run"


def test_the_date_of_chat_templates_is_that_of_the_runs_first_day(files, tmp_path, monkeypatch):
    path, today = tmp_path / "new" / "run.json", datetime.date.today().isoformat()
    cfg, _ = claim(files, tmp_path / "new")
    assert cfg.data.date == json.loads(path.read_text())["data"]["date"] == today
    given, _ = claim(files, tmp_path / "given", "data.date=2024-02-29")
    assert given.data.date == "2024-02-29"
    # as if the run had begun on another day
    path.write_text(path.read_text().replace(today, "2024-02-28"))
    monkeypatch.setattr("llmprep_jax.train.run.all_steps", lambda out: [3])
    cfg, changes = claim(files, tmp_path / "new")
    assert (cfg.data.date, changes) == ("2024-02-28", [])
