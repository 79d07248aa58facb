"""The ten lines of docs/training.md, on a model and a text of a moment."""

import pathlib
import re

import pytest

import llmprep_jax as lp
from tests.train.runs import losses

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "training.md"


def ten_lines(model: pathlib.Path, text: pathlib.Path, adapter: pathlib.Path) -> str:
    """The page's loop, with paths of the test in place of its own."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) == 10
    paths = {"path/to/folder": model, "my_text.jsonl": text, '"adapter"': f'"{adapter}"'}
    for name, path in paths.items():
        assert name in code
        code = code.replace(name, str(path))
    fast = "steps=100, optim=lp.train.OptimConfig(lr=1e-1)"
    code = code.replace("seq_len=256", "seq_len=32").replace("rank=16", "rank=2")
    return code.replace("steps=100", fast).replace("num_epochs=1", "num_epochs=4")


def test_ten_lines_of_python_train_an_adapter(files, tmp_path, capsys):
    model, adapter = files / "model", tmp_path / "adapter"
    exec(ten_lines(model, files / "text", adapter), {})  # what a reader would paste
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(number) for number, _ in printed] == list(range(1, len(printed) + 1))
    first, last = (float(loss) for _, loss in (printed[0], printed[-1]))
    assert last < first - 0.02  # a random base, of which little is adapted
    trained = lp.peft.load(lp.load_model(model), adapter)
    assert lp.peft.is_adapted(trained)


def test_fit_takes_the_same_steps_and_saves_them(files, tmp_path):
    model = lp.load_model(files / "model")
    processor = lp.load_processor(files / "model")
    batches = lp.load_data(processor, [files / "text"], seq_len=32, batch_size=4)
    cfg = lp.train.FitConfig(steps=3, optim=lp.train.OptimConfig(lr=1e-2))
    result = lp.train.fit(lp.train.Trainer(model, cfg=cfg), batches, out=tmp_path)
    assert (result.step, list(losses(tmp_path))) == (3, [1, 2, 3])


def test_data_that_are_not_there_are_named(files):
    processor = lp.load_processor(files / "model")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        lp.load_data(processor, "nowhere.jsonl")
