"""Janus' own laws: codes and pictures, what is learnt of them, and what is refused."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import janus, registry
from llmprep_jax.models.janus.model import next_codes
from llmprep_jax.nn.param import Frozen, Param
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train import losses
from tests.grids import cases
from tests.models.drawing import BEGIN, CONFIG, EACH, END, IMAGE, WORDS, model
from tests.models.tiny import random_model


@functools.cache
def make_batch() -> dict[str, np.ndarray]:
    """Four rows: a picture seen and one drawn; one drawn; the same again with other pictures."""
    rng = np.random.default_rng(0)
    run = [BEGIN, *[IMAGE] * EACH, END]
    words = lambda n: rng.integers(1, WORDS, n).tolist()  # noqa: E731
    rows = [words(2) + run + words(3) + run, words(5) + run + words(EACH + 1)] * 2
    width = max(map(len, rows))
    whole = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    tokens, targets = whole[:, :-1], whole[:, 1:]
    return dict(
        tokens=tokens,
        targets=targets,
        loss_mask=((targets != IMAGE) & (targets > 0)).astype(np.float32),
        segment_ids=(tokens > 0).astype(np.int32),
        images=rng.uniform(-1, 1, (4, 2, 8, 8, 3)).astype(np.float32),
        drawn=np.array([[False, True], [True, False]] * 2),
    )


@jax.jit
def loss_and_gradients(model, batch):
    graph, params, rest = nnx.split(model, Param, ...)

    def loss(params):
        total, count, stats = losses.training_loss(nnx.merge(graph, params, rest), batch)
        return total / count, stats

    return jax.value_and_grad(loss, has_aux=True)(params)


def test_pictures_that_are_drawn_are_learnt_by_their_codes():
    batch = make_batch()
    (loss, stats), grads = loss_and_gradients(model(), batch)
    # 4 rows: words that follow words, 16 codes for each picture that is drawn
    words, codes = int(batch["loss_mask"].sum()), 4 * EACH
    means = {name: float(total / count) for name, (total, count) in stats["means"].items()}
    counts = {name: int(count) for name, (_, count) in stats["means"].items()}
    assert counts == {"text_loss": words, "code_loss": codes}
    expected = (means["text_loss"] * words + means["code_loss"] * codes) / (words + codes)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    parts = {path[0] for path, x in nnx.to_flat_state(grads) if np.abs(x[...]).max() > 1e-6}
    seen_and_said = {"language", "vision", "aligner"}
    assert parts == seen_and_said | {"drawing"}
    drawn = {path[1] for path, x in nnx.to_flat_state(grads) if path[0] == "drawing"}
    assert drawn == {"codes", "aligner", "up", "down"}
    kinds = {type(x) for _, x in nnx.to_flat_state(nnx.state(model().vq))}
    assert kinds == {Frozen}


def test_a_drawn_picture_is_read_by_codes_of_its_own_row():
    batch, ours = make_batch(), model()
    codes = np.asarray(ours.read_drawn(batch["images"], batch["drawn"])["codes"])
    np.testing.assert_array_equal(codes[0, :EACH], -np.ones(EACH))
    np.testing.assert_array_equal(codes[0, EACH:], ours.encode_codes(batch["images"][:1, 1])[0])
    np.testing.assert_array_equal(codes[1, :EACH], ours.encode_codes(batch["images"][1:2, 0])[0])
    after = np.asarray(next_codes({**batch, "codes": codes}, IMAGE))
    begins = np.flatnonzero(batch["tokens"][0] == BEGIN)
    expected = -np.ones(after.shape[1], int)
    expected[begins[1] : begins[1] + EACH] = codes[0, EACH:]
    np.testing.assert_array_equal(after[0], expected)
    # the logits of a code are those of its prompt and the codes before it, by itself
    x = ours.embed_inputs(batch["tokens"], images=batch["images"], codes=codes)
    place = begins[1] + 1
    np.testing.assert_allclose(
        x[0, place : place + EACH], ours.drawing.embed(codes[:1, EACH:])[0], atol=1e-6
    )


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "two"])
def test_the_first_code_of_a_document_follows_nothing_of_another(packed):
    tokens = np.array([[7, 8, *[IMAGE] * EACH]])
    segments = np.array([[1, 1, *[2 if packed else 1] * EACH]])
    codes = np.arange(EACH)[None]
    targets = np.roll(tokens, -1, axis=1)
    targets[:, -1] = END
    batch = dict(tokens=tokens, targets=targets, codes=codes, segment_ids=segments)
    found = np.asarray(next_codes(batch, IMAGE))[0]
    np.testing.assert_array_equal(found, [-1, -1 if packed else 0, *range(1, EACH), -1])


def test_a_picture_at_the_end_of_a_row_has_all_its_codes():
    row = np.array([[7, BEGIN, *[IMAGE] * EACH]])
    batch = dict(tokens=row[:, :-1], targets=row[:, 1:], codes=np.arange(EACH)[None])
    np.testing.assert_array_equal(next_codes(batch, IMAGE)[0], [-1, *range(EACH)])


def test_a_code_depends_on_those_before_it_alone():
    codes = jnp.zeros((1, EACH), jnp.int32)
    x_BID = model().drawing.embed(codes)

    def logit(x_BID, place):
        return jnp.sum(model().drawing.unembed(model().language.features(x_BID)[0])[0, place])

    moved = np.abs(jax.jit(jax.grad(logit))(x_BID, 5)).max(axis=(0, 2))
    np.testing.assert_array_equal(moved > 0, np.arange(EACH) < 6)


def test_every_weight_has_a_share_in_what_a_saved_model_is_compared_by():
    ours = model()
    graph, state = nnx.split(ours)
    probe = jax.jit(lambda state: nnx.merge(graph, state).probe())
    before = probe(state)
    for path, leaf in nnx.to_flat_state(state):
        changed = nnx.to_flat_state(state)
        flat = {p: x for p, x in changed}
        value = leaf[...]
        # a constant would be taken out again by norms
        moved = value + 0.3 * jnp.sin(jnp.arange(value.size, dtype=value.dtype)).reshape(
            value.shape
        )
        flat[path] = leaf.replace(moved)
        after = probe(nnx.from_flat_state(flat))
        is_bias_of_keys = path[-2:] == ("k", "b")  # a softmax sees none that all keys share
        differs = any(not np.allclose(before[name], after[name]) for name in before)
        assert differs or is_bias_of_keys, path


@pytest.mark.parametrize(
    ("call", "shape", "message"),
    [
        (
            "encode_codes",
            (1, 10, 8, 3),
            r"pictures \(1, 10, 8, 3\); this model has codes of \[B, 8",
        ),
        ("decode_codes", (1, 15), r"codes \(1, 15\); a picture has 16 of them"),
    ],
)
def test_pictures_of_other_sizes_are_refused_in_one_line(call, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(model(), call)(np.zeros(shape, np.int32 if call == "decode_codes" else np.float32))
    with pytest.raises(ValueError, match="token 40 is outside the vocabulary of 40"):
        model().image_logits(np.full((1, 3), 40))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"patch_size": 4}, "read in patches of 4 and drawn by codes of 2"),
        ("vision_config", {"image_size": 9}, "images of 9 pixels"),
        ("vision_config", {"num_image_tokens": 9}, "num_image_tokens=9; images of 8 pixels"),
        ("vision_config", {"use_qk_norm": True}, "use_qk_norm=True"),
        ("vision_config", {"projection_dim": 31}, "projection_dim=31; supported: 32"),
        ("vq_config", {"double_latent": True}, "double_latent=True"),
        ("vq_config", {"base_channels": 33}, "channels a multiple of 32"),
        ("vq_config", {"channel_multiplier": []}, "channels times ()"),
    ],
)
def test_other_grids_are_refused_in_one_line(part, changes, message):
    hf = registry.to_hf(CONFIG)
    hf = {**hf, part: {**hf[part], **changes}}
    if "image_size" in changes or "patch_size" in changes:
        del hf[part]["num_image_tokens"]
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")) as error:
        janus.from_hf(hf)
    assert "\n" not in str(error.value)


def test_a_grid_that_config_json_gives_to_the_vq_alone_is_not_read():
    hf = registry.to_hf(CONFIG)
    assert janus.from_hf({**hf, "vq_config": {**hf["vq_config"], "num_patches": 32}}) == CONFIG
    del hf["vq_config"]["num_patches"]
    assert janus.from_hf(hf) == CONFIG


@pytest.mark.parametrize("mesh", cases(["fsdp", "tensor"], slow=["tensor"]))
def test_a_mesh_gives_the_losses_and_all_gradients_of_one_device(mesh):
    batch = make_batch()
    (loss, stats), expected = loss_and_gradients(model(), batch)
    sizes = {"fsdp": 4, "tensor": 2} if mesh == "fsdp" else {"data": 2, "tensor": 4}
    with use_mesh(make_mesh(sizes)):
        ours = random_model(CONFIG)
        rows = {kind: jax.device_put(x, jax.P((*sizes,)[0])) for kind, x in batch.items()}
        (found_loss, found_stats), found = loss_and_gradients(ours, rows)
        pictures = ours.decode_codes(ours.encode_codes(rows["images"][:, 0]))
    np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
    chex.assert_trees_all_close(found_stats, stats, rtol=1e-5)
    alone = model().decode_codes(model().encode_codes(batch["images"][:, 0]))
    np.testing.assert_allclose(pictures, alone, atol=1e-4)
    most = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    pairs = zip(nnx.to_flat_state(found), nnx.to_flat_state(expected), strict=True)
    for (path, one), (_, other) in pairs:
        scale = float(jnp.abs(other[...]).max())
        is_none = path[-2:] == ("k", "b")  # a softmax sees no bias that all keys share
        assert is_none or scale > 1e-6 * most, path
        atol = 1e-4 * scale + 1e-6 * most
        np.testing.assert_allclose(one[...], other[...], atol=atol, err_msg=str(path))


@pytest.mark.grid
def test_bf16_codes_are_those_of_float32_but_for_a_few():
    compute = dataclasses.replace(CONFIG.compute, dtype="bfloat16")
    images = make_batch()["images"][:, 0]
    graph, state = nnx.split(random_model(CONFIG.with_compute(compute)).vq)
    found = nnx.merge(graph, state).encode(images)
    same = np.asarray(found) == np.asarray(model().encode_codes(images))
    assert same.mean() > 0.8
