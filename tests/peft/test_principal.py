"""PiSSA and OLoRA train a part of the weight itself and keep the rest: laws, and their folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft import DoRA, LoRA
from llmprep_jax.sharding import make_mesh, use_mesh
from tests.peft.test_methods import (
    assert_near,
    base,
    fresh,
    logits_of,
    run,
    small,
    trained,
)
from tests.random_modules import random_module

SETTINGS = dict(rank=4, alpha=2, targets=("q_proj", "down_proj"))
METHODS = {
    "pissa": LoRA(**SETTINGS, init_weights="pissa"),
    "olora": LoRA(**SETTINGS, init_weights="olora", rslora=True),
    "dora": DoRA(**SETTINGS, init_weights="pissa"),
}
each_method = pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=pytest.mark.slow if name == "dora" else ())
        for name, method in METHODS.items()
    ],
)


def delta(q, a: str, b: str) -> np.ndarray:
    """s B A of each layer of q, as torch has it: [L, outputs, inputs]."""
    product = jnp.einsum("ldr,lrnh->lnhd", getattr(q, a)[...], getattr(q, b)[...])
    return q.method.scale * np.asarray(product).reshape(2, 32, 32)


def weights() -> np.ndarray:
    return np.asarray(base().layers.attn.q.w[...]).reshape(2, 32, 32).swapaxes(1, 2)


def test_pissa_takes_the_largest_singular_values():
    u, s, v = np.linalg.svd(weights())
    expected = (u[:, :, :4] * s[:, None, :4]) @ v[:, :4]
    q = fresh(METHODS["pissa"]).layers.attn.q
    np.testing.assert_allclose(delta(q, "lora_a", "lora_b"), expected, atol=1e-5)
    lengths = [np.linalg.norm(x, axis=axis) for x, axis in ((q.lora_a[...][0], 0),)]
    np.testing.assert_allclose(lengths[0] ** 2, s[0, :4] / 0.5, rtol=1e-4)  # shared with B evenly


def test_olora_takes_the_first_columns_of_a_qr_factorisation():
    expected = []
    for matrix in weights():
        q, r = np.linalg.qr(matrix)
        expected.append(q[:, :4] @ r[:4])
    q = fresh(METHODS["olora"]).layers.attn.q
    found = delta(q, "lora_a", "lora_b") / q.method.scale
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gaussian_draws_a_with_a_spread_of_one_over_the_rank_and_leaves_b_at_zero():
    q = fresh(LoRA(rank=8, targets=("q_proj",), init_weights="gaussian")).layers.attn.q
    assert np.asarray(q.lora_a[...]).std() == pytest.approx(1 / 8, rel=0.1)
    assert not np.any(q.lora_b[...])


@each_method
def test_it_starts_as_identity_to_rounding_on_a_base_that_is_shared(method):
    model = fresh(method)
    assert_near(logits_of(model), logits_of(base()))
    q = model.layers.attn.q
    assert q.base.w[...] is base().layers.attn.q.w[...]
    places = [x[...].unsafe_buffer_pointer() for x in (q.lora_a, q.lora_a0, q.lora_b, q.lora_b0)]
    assert len(set(places)) == 4  # a step may take what it trains over


@each_method
def test_a_step_moves_what_is_trained_alone_and_a_merge_says_the_same(method):
    model = trained(method)
    _, grads, merged = run(model)
    logits = logits_of(model)
    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, AdapterParam))}
    assert names - {"magnitude"} == {"lora_a", "lora_b"}
    assert all(np.any(np.asarray(grad) != 0) for grad in jax.tree.leaves(grads))
    assert np.abs(logits - logits_of(base())).max() > 0.1
    assert_near(logits_of(merged), logits)
    assert_near(lp.peft.strip(model), base(), 0.0)


@each_method
def test_its_folder_is_a_lora_of_twice_the_rank_on_the_base_as_it_was(method, tmp_path):
    model = trained(method)
    folder = lp.peft.save(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    found = lp.peft.load(base(), folder)
    assert found.layers.attn.q.method.scale == pytest.approx(method.scale)
    assert_near(logits_of(found), logits_of(model))


@pytest.mark.slow  # compiles for eight devices
def test_a_mesh_takes_the_same_part_out():
    expected = delta(fresh(METHODS["pissa"]).layers.attn.q, "lora_a0", "lora_b0")
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        model = lp.peft.inject(random_module(small), METHODS["pissa"])
        q = jax.tree.map(lambda x: jax.device_put(jax.device_get(x)), model.layers.attn.q)
        logits = np.asarray(logits_of(model))
    np.testing.assert_allclose(delta(q, "lora_a0", "lora_b0"), expected, atol=1e-5)
    assert_near(logits, logits_of(base()))


def test_what_is_dropped_is_not_the_part_that_was_taken_out():
    model = fresh(LoRA(**SETTINGS, init_weights="pissa", dropout=0.5))
    graph, trained, rest = nnx.split(model, AdapterParam, ...)
    model = nnx.merge(graph, jax.tree.map(jnp.zeros_like, trained), rest)
    key = jax.random.key(0)  # nothing that is dropped is left, so the key changes nothing
    assert_near(logits_of(lp.peft.train_mode(model, key)), logits_of(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(init_weights="svd"), "init_weights is 'svd'; it must be one of default, gaussian"),
        (dict(init_weights="pissa", alpha=-1), "pissa takes roots of its scale, but alpha is -1"),
        (
            dict(init_weights="pissa", targets=("embed",)),
            "embed: an embedding begins as default, not pissa",
        ),
        (dict(init_weights="pissa", rank=17), "rank 17 and its frozen half exceed .* 32 x 32 of"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_beginnings_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        lp.peft.inject(base(), LoRA(**{"rank": 4, "targets": ("q_proj",), **settings}))
    assert "\n" not in str(caught.value)
