"""Texts and images by weight in one run: the shares of rows hold, reading goes on with the same
rows on any number of processes, and one program serves all batches."""

import json

import jax
import numpy as np
import pytest

from llmprep_jax.data import DataConfig, build
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer, make_loss
from tests.data.corpora import same
from tests.data.pictured import asked, make_processor, write
from tests.models import seeing


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Paths of texts, and of conversations about up to three pictures; and their processor."""
    folder = tmp_path_factory.mktemp("mixture")
    talks = [asked(*("what is", 10 * i, "and", 20)[: 2 + 2 * (i % 2)]) for i in range(20)]
    seen = write(folder, [*talks, asked("all of", 30, 40, 50)])
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abcde "], 30)) for _ in range(40)]
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    return (str(texts), seen), make_processor(folder)


def batches(mixture, rows=None, **settings):
    paths, processor = mixture
    settings = {"weights": (7.0, 3.0), "batch_size": 4, "pack_window": 4, **settings}
    cfg = DataConfig(paths=paths, seq_len=40, max_images=4, prefetch=0, **settings)
    return build(cfg, **cfg.encoders(processor.tokenizer, processor), rows=rows)


def test_weights_are_the_shares_of_rows_that_each_kind_has(mixture):
    stream = batches(mixture)
    seen = np.concatenate([next(stream)["image_mask"].any(axis=1) for _ in range(60)])
    assert seen.mean() == pytest.approx(0.3, abs=0.01)
    # and early on too: each of 24 rows more holds seven or eight with pictures
    assert {int(part.sum()) for part in seen.reshape(10, 24)} <= {7, 8}
    sources = stream.report()["sources"]
    assert [sorted(name.rsplit("/", 1)[-1] for name in sources)] == [["data.jsonl", "texts.jsonl"]]


def test_a_mixture_goes_on_with_the_same_rows_on_any_number_of_processes(mixture):
    whole = batches(mixture)
    expected = [next(whole) for _ in range(12)]
    begun = batches(mixture)
    for _ in range(5):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))
    for rows in (None, [0, 1], [3]):
        resumed = batches(mixture, rows)
        resumed.set_state(state)
        for wanted in expected[5:]:
            part = slice(None) if rows is None else rows
            own = {k: v if k == "doc_ids" else v[part] for k, v in wanted.items()}
            assert same(next(resumed), own)
    with pytest.raises(ValueError, match="weights was"):
        batches(mixture, weights=(1.0, 1.0)).set_state(state)


def test_batches_with_any_number_of_pictures_are_trained_on_by_one_program(mixture):
    stream = batches(mixture, batch_size=1)
    drawn = [next(stream) for _ in range(30)]
    counts = {int(batch["image_mask"].sum()): batch for batch in drawn}
    assert len(counts) >= 4
    assert 0 in counts
    model = seeing.seeing("llama-tied-9-3-heads")
    cfg = FitConfig(steps=len(counts), optim=OptimConfig(lr=1e-3))
    loss_fn = make_loss(pixels=mixture[1].images.pixels)
    trainer = Trainer(jax.tree.map(jax.numpy.copy, model), None, cfg, loss_fn)
    losses = [float(metrics["loss"]) for metrics in trainer.steps(counts.values())]
    assert np.isfinite(losses).all()
    assert trainer.step._cache_size() == 1
