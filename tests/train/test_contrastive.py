"""Losses over all pairs of a batch: each form is the full loss, on one device and on eight."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llmprep_jax.nn.param import Param
from llmprep_jax.sharding import make_mesh, spec, use_mesh
from llmprep_jax.train.batches import place_batch
from llmprep_jax.train.contrastive import (
    ContrastiveLoss,
    all_but,
    hold,
    make_loss,
    normalize_images,
    sum_pairs,
)
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer
from tests.grids import cases
from tests.models.towers import make_images, make_texts, make_towers
from tests.sharding.collectives import collectives

B, E = 32, 12
MESHES = {"none": None, "data8": {"data": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2}}
FORMS = {"gather": ("gather", None), "ring": ("ring", None), "chunks": ("ring", 2)}
KEY = jax.random.key(0)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def vectors():
    """Images and texts that agree a little, so that own pairs stand out."""
    rng = np.random.default_rng(0)
    common, own = rng.normal(size=(B, E)), rng.normal(size=(2, B, E))
    return unit(common + own[0]), unit(common + own[1])


def full_loss(images, texts, factor, bias, kind):
    """By the papers' formulas, of the matrix of all logits."""
    z = factor * images @ texts.T + bias
    if kind == "sigmoid":
        return -jnp.sum(jax.nn.log_sigmoid((2 * jnp.eye(B) - 1) * z)) / B
    own = [jnp.diag(jax.nn.log_softmax(z, axis)) for axis in (0, 1)]
    return -(jnp.mean(own[0]) + jnp.mean(own[1])) / 2


def scalars(kind):
    return jnp.float32(7.0), jnp.float32(-3.0 if kind == "sigmoid" else 0.0)


def loss_of(kind, form, chunk):
    def loss(images, texts, factor, bias):
        bias = bias if kind == "sigmoid" else None
        return sum_pairs(images, texts, factor, bias, kind, form, chunk) / B

    return loss


@pytest.mark.parametrize(
    ("kind", "form", "mesh"),
    cases(
        [
            (kind, form, mesh)
            for kind in ("softmax", "sigmoid")
            for form in FORMS
            for mesh in MESHES
        ],
        fast=[
            ("softmax", "gather", "mixed"),
            ("softmax", "chunks", "mixed"),
            ("sigmoid", "chunks", "data8"),
            ("sigmoid", "chunks", "none"),
            ("softmax", "chunks", "none"),
        ],
    ),
)
def test_each_form_is_the_full_loss_with_gradients_of_all_it_is_of(kind, form, mesh):
    """Scale and bias too, which sums over devices that are summed again get n-fold."""
    args = (*vectors(), *scalars(kind))
    by_all = (0, 1, 2, 3) if kind == "sigmoid" else (0, 1, 2)
    expected = jax.value_and_grad(full_loss, by_all)(*args, kind)
    with use_mesh(None if MESHES[mesh] is None else make_mesh(MESHES[mesh])):
        rows = spec("batch", None)
        placed = [jax.device_put(x, rows) if rows else x for x in args[:2]]
        run = jax.jit(jax.value_and_grad(loss_of(kind, *FORMS[form]), by_all))
        found = jax.device_get(run(*placed, *args[2:]))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for grad, wanted in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(grad, wanted, atol=2e-6 * max(1, np.abs(wanted).max()))
    assert abs(expected[1][2]) > 0.01


def compiled(form, chunk):
    """The text, and what is sent, of a loss and its gradients on eight devices."""
    with use_mesh(make_mesh({"data": 8})):
        args = [jax.device_put(x, spec("batch", None)) for x in vectors()]
        run = jax.jit(jax.value_and_grad(loss_of("softmax", form, chunk), (0, 1, 2)))
        lowered = run.lower(*args, *scalars("softmax"))
        return lowered.compile().as_text(), collectives(lowered)


def pairs_held(text):
    """The most numbers of a float array with a side of images and a side of texts."""
    shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"f32\[(\d+,\d+)\]", text)]
    return max((a * b for a, b in shapes if E not in (a, b)), default=0)


def test_the_ring_holds_a_piece_of_the_pairs_at_a_time_and_talks_to_neighbours_alone():
    text, sent = compiled("ring", 2)
    assert pairs_held(text) == B // 8 * 2  # a device's images by two texts
    assert {c.op for c in sent if c.num_bytes > 4} == {"collective-permute"}
    text, sent = compiled("gather", None)
    assert pairs_held(text) == B // 8 * B
    assert ("all-gather", (B, E)) in {(c.op, c.shape) for c in sent}


@pytest.mark.parametrize(("rows", "value"), [(64, 10.0029), (1024, 10.0465)])
def test_siglip_starts_at_what_its_bias_makes_of_unrelated_vectors(rows, value):
    """1/B: over B^2 pairs it would start at 0.156 and 0.0098."""
    eye = jnp.eye(rows)
    images, texts = (jnp.concatenate(x, 1) for x in ((eye, 0 * eye), (0 * eye, eye)))
    total = sum_pairs(images, texts, jnp.float32(10), jnp.float32(-10), "sigmoid", "ring", 32)
    assert float(total) / rows == pytest.approx(value, abs=1e-4)


def test_clip_starts_at_the_log_of_the_batch_where_all_vectors_are_alike():
    ones = jnp.asarray(unit(np.ones((64, 5))))
    for form in ("gather", "ring"):
        total = sum_pairs(ones, ones, jnp.float32(14.3), None, "softmax", form)
        assert float(total) / 64 == pytest.approx(math.log(64), abs=1e-5)


def test_a_held_scale_may_fall_and_not_rise():
    grad = jax.grad(lambda x, sign: sign * hold(x, 2.0))
    low, high = jnp.float32(1.5), jnp.float32(2.5)
    assert [hold(x, 2.0) for x in (low, high)] == [1.5, 2.0]
    assert [float(grad(low, sign)) for sign in (1.0, -1.0)] == [1.0, -1.0]
    # descent goes against the gradient
    assert [float(grad(high, sign)) for sign in (1.0, -1.0)] == [1.0, 0.0]


def test_bytes_are_normalised_and_floats_are_not():
    images = np.array([[[[0, 51, 255]]]], np.uint8)
    found = normalize_images(jnp.asarray(images), (0.5, 0.2, 0.0), (0.5, 0.1, 2.0))
    np.testing.assert_allclose(found, [[[[-1.0, 0.0, 0.5]]]], atol=1e-6)
    assert normalize_images(found, (9.0,) * 3, (9.0,) * 3) is found


def make_batch(rows=8):
    images = np.random.default_rng(0).integers(0, 256, (rows, 1, 9, 9, 3), dtype=np.uint8)
    return {"tokens": make_texts(rows), "images": images}


@pytest.mark.parametrize("name", cases(["clip", "siglip"], fast=["siglip"]))
def test_a_mesh_trains_towers_as_one_device_does(name):
    """Loss and all gradients; weights parted over fsdp and tensor, rows over data and fsdp."""
    loss_fn = make_loss(form="ring")

    @jax.jit
    def run(model, batch):
        return jax.value_and_grad(lambda model: loss_fn(model, batch, KEY).total)(model)

    batch = make_batch()
    alone = jax.device_get(run(make_towers(name), batch))
    with use_mesh(make_mesh(MESHES["mixed"])):
        placed = jax.tree.map(lambda x: x[0], place_batch(batch))
        shared = jax.device_get(run(make_towers(name), placed))
    np.testing.assert_allclose(shared[0], alone[0], rtol=1e-5)
    pairs = zip(jax.tree.leaves(shared[1]), jax.tree.leaves(alone[1]), strict=True)
    for found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, atol=1e-4 * max(np.abs(wanted).max(), 1e-2))


def test_a_frozen_tower_stays_as_it_is_bit_by_bit():
    model = make_towers("siglip")
    before = jax.device_get(jax.tree.leaves(model.vision))
    cfg = FitConfig(steps=2, optim=OptimConfig(lr=0.01, schedule="constant", weight_decay=0.5))
    trainer = Trainer(model, all_but("vision"), cfg, make_loss())
    assert set(trainer.split.params) == {"text", "logit_scale", "logit_bias"}
    steps = trainer.steps([make_batch()] * 2)
    losses = [float(metrics["loss"]) for metrics in steps]
    after = trainer.model(steps.state)
    chex.assert_trees_all_equal(before, jax.device_get(jax.tree.leaves(after.vision)))
    assert losses[1] < losses[0]
    assert abs(float(after.logit_bias[...]) - float(make_towers("siglip").logit_bias[...])) > 1e-3


def test_microbatches_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^accumulate=2: [^\n]*is not cut[^\n]*$"):
        Trainer(make_towers("clip"), Param, FitConfig(accumulate=2), ContrastiveLoss())


def test_sigmoids_without_a_bias_are_refused():
    batch = {"tokens": make_texts(2), "images": make_images(2)}
    with pytest.raises(ValueError, match="needs a bias"):
        make_loss(kind="sigmoid")(make_towers("clip"), batch, KEY)


def test_texts_have_one_image_each():
    batch = {"tokens": make_texts(2), "images": np.zeros((2, 2, 9, 9, 3), np.uint8)}
    with pytest.raises(ValueError, match="one image"):
        make_loss()(make_towers("clip"), batch, KEY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_batch_is_learnt_by_heart(name):
    model, batch = make_towers(name), make_batch()
    model.logit_scale[...] = jnp.float32(math.log(10))
    if name == "siglip":
        model.logit_bias[...] = jnp.float32(-10)
    loss_fn, tx = make_loss(form="ring", chunk=4), optax.adam(3e-3)

    @jax.jit
    def step(model, state):
        grads = jax.grad(lambda model: loss_fn(model, batch, KEY).total / 8)(model)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(model, updates), state

    state = tx.init(model)
    for _ in range(250):
        model, state = step(model, state)
    images = normalize_images(jnp.asarray(batch["images"][:, 0]), (0.5,) * 3, (0.5,) * 3)
    logits = np.asarray(model(batch["tokens"], images).logits_per_image)
    texts = {tuple(row) for row in batch["tokens"]}
    assert len(texts) == 8
    assert (logits.argmax(0) == np.arange(8)).all()
    assert (logits.argmax(1) == np.arange(8)).all()
