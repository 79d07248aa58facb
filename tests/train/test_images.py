"""Training on rows with images: a row keeps its own, whatever cuts the batch, and bytes are
normalised on the device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.evaluate.perplexity import perplexity
from llmprep_jax.sharding import has_mesh, make_mesh, use_mesh
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.loop import fit
from llmprep_jax.train.losses import next_token_loss
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer, make_loss
from llmprep_jax.vision.normalize import Normalization
from tests.grids import cases
from tests.models import seeing
from tests.models.seeing import EACH, IMAGE, SIDE
from tests.train.toy import make_batch as make_text

PIXELS = {"images": Normalization((0.5, 0.4, 0.6), (0.5, 0.25, 0.5))}
NAME = "llama-tied-9-3-heads"
KINDS, ASK, FIRST = 4, 7, 10  # kinds of pictures, the question, the answer of the first kind
# two pictures, each followed by what it is
ROW = [IMAGE] * EACH + [ASK, -1] + [IMAGE] * EACH + [ASK, -1]
ANSWERS = [i for i, token in enumerate(ROW) if token < 0]


def make_batch(seed: int = 0, rows: int = 8) -> dict:
    """Pictures of four kinds, with noise, and the names of their kinds."""
    of_kinds = np.random.default_rng(99).integers(0, 200, (KINDS, SIDE, SIDE, 3))
    rng = np.random.default_rng(seed)
    kinds_BM = rng.integers(0, KINDS, (rows, 2))
    noise = rng.integers(0, 50, (rows, 2, SIDE, SIDE, 3))
    tokens = np.array([ROW] * rows, np.int32)
    tokens[:, ANSWERS] = FIRST + kinds_BM
    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    return {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": np.isin(targets, range(FIRST, FIRST + KINDS)).astype(np.float32),
        "images": (of_kinds[kinds_BM] + noise).astype(np.uint8),
        "image_mask": np.ones((rows, 2), bool),
    }


_steps = {}


def trainer_of(accumulate: int = 1, **settings) -> Trainer:
    """A trainer whose step is compiled once for all of as many microbatches."""
    model = jax.jit(functools.partial(seeing.make, NAME))()
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0)
    cfg = FitConfig(optim=optim, accumulate=accumulate, **settings)
    trainer = Trainer(model, cfg=cfg, loss_fn=make_loss(pixels=PIXELS))
    trainer.step = _steps.setdefault((accumulate, has_mesh()), trainer.step)
    return trainer


def blind(batch: dict) -> dict:
    return batch | {"images": np.zeros_like(batch["images"])}


def test_pictures_are_told_apart_and_without_them_nothing_is_learnt():
    trainer = trainer_of(steps=40)
    losses = {}
    for name, look in {"blind": blind, "seeing": dict}.items():
        state = trainer.start(jax.tree.map(jnp.copy, trainer.split.params))
        steps = trainer.steps((look(make_batch(i)) for i in range(40)), state)
        losses[name] = [float(metrics["loss"]) for metrics in steps]
    assert losses["seeing"][-1] < 0.2
    assert min(losses["blind"]) > 1.2  # ln 4 is 1.39, less the luck of 16 answers
    model = trainer.model(steps.state)
    unseen = [make_batch(1000)]
    assert perplexity(model, unseen, pixels=PIXELS).nll < 0.2
    assert perplexity(model, [blind(unseen[0])], pixels=PIXELS).nll > 1.2


@functools.cache
def after_a_step(accumulate: int, is_meshed: bool):
    mesh = make_mesh({"fsdp": 4, "tensor": 2}) if is_meshed else None
    with use_mesh(mesh):
        trainer = trainer_of(accumulate)
        step, state, frozen = trainer.step, trainer.start(), trainer.split.frozen
        grown = []
        for batch in (make_batch(), make_batch() | {"images": make_batch()["images"][::-1]}):
            arrays = place_batch(batch, accumulate)
            copy = jax.tree.map(jnp.copy, state)
            after, metrics = step(copy, frozen, arrays)
            grown.append(jax.device_get((after.opt_state, metrics)))
    return grown


@pytest.mark.parametrize(
    ("accumulate", "is_meshed"),
    cases([(2, True), (2, False), (1, True)], fast=[(2, True)]),
)
def test_rows_keep_their_images_when_a_batch_is_cut(accumulate, is_meshed):
    whole, shuffled = after_a_step(1, False)
    (moments, metrics), _ = after_a_step(accumulate, is_meshed)
    assert metrics["images"] == 16
    np.testing.assert_allclose(metrics["loss"], whole[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], whole[1]["grad_norm"], rtol=1e-4)
    # of the gradients; parameters of hardly any move by Adam's whole step this way or that
    chex.assert_trees_all_close(moments, whole[0], atol=1e-6, rtol=1e-3)
    # the same pictures in other rows are another batch
    assert abs(shuffled[1]["loss"] - whole[1]["loss"]) > 1e-3


def test_bytes_are_normalised_as_the_processor_does():
    batch = make_batch()
    loss = jax.jit(lambda model, batch: next_token_loss(model, batch, pixels=PIXELS).total)
    model = seeing.seeing(NAME)
    floats = batch | {"images": PIXELS["images"](batch["images"])}
    assert floats["images"].dtype == np.float32
    found, expected = loss(model, batch), loss(model, floats)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert abs(loss(model, blind(batch)) - expected) > 1e-2


class Seen:
    """An endless iterator over `make_batch(i)` whose place is a number."""

    def __init__(self):
        self.place = 0

    def __next__(self) -> dict:
        self.place += 1
        return make_batch(self.place - 1)

    def get_state(self) -> int:
        return self.place

    def set_state(self, state: int) -> None:
        self.place = state


def test_a_run_with_images_goes_on_bit_by_bit(tmp_path):
    whole = fit(trainer_of(steps=4), Seen(), out=tmp_path / "whole")
    fit(trainer_of(steps=2, schedule_steps=4), Seen(), out=tmp_path / "cut")
    resumed = fit(trainer_of(steps=4), Seen(), out=tmp_path / "cut")
    chex.assert_trees_all_equal(*[jax.tree.leaves(r.model) for r in (whole, resumed)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pictures": np.zeros((8, 2))}, "a batch has no 'pictures'"),
        ({"images": np.zeros((8, 4, 4, 3), np.uint8)}, "axes are rows, images, height, width, cha"),
        ({"images": np.zeros((9, 2, 4, 4, 3), np.uint8)}, "images are of 9 rows and tokens of 8"),
    ],
    ids=["name", "rank", "rows"],
)
def test_what_is_no_batch_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words) as error:
        place_batch(make_batch() | changes)
    assert "\n" not in str(error.value)


def test_bytes_without_a_mean_and_models_of_text_refuse_images():
    batch = {name: x for name, x in make_batch().items() if name != "image_mask"}
    with pytest.raises(ValueError, match="images are bytes, and nothing says how"):
        next_token_loss(seeing.seeing(NAME), batch)
    text = {name: x for name, x in make_text().items() if name != "doc_ids"}
    language = seeing.seeing(NAME).language
    with pytest.raises(ValueError, match="reads text only; leave images out"):
        next_token_loss(language, text | {"images": batch["images"]}, pixels=PIXELS)


def test_a_batch_without_images_runs_no_tower():
    """Texts alone, of which a loop of one's own need not make room for pictures."""
    model = jax.eval_shape(lambda: seeing.seeing(NAME))
    leaves = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]

    def used(batch: dict) -> set[str]:
        """Parts whose weights are in the program."""

        def loss(model, batch):
            return next_token_loss(model, batch, pixels=PIXELS).total

        jaxpr = jax.make_jaxpr(loss)(model, batch).jaxpr
        read = {id(x) for eqn in jaxpr.eqns for x in eqn.invars}
        weights = zip(leaves, jaxpr.invars[: len(leaves)], strict=True)
        return {
            path.strip(".[]'").split(".")[0].split("'")[0] for path, x in weights if id(x) in read
        }

    whole = make_batch()
    text = {name: x for name, x in whole.items() if name not in ("images", "image_mask")}
    assert used(text) == {"language"}
    assert used(whole) > {"language"}
