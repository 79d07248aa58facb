"""Models packed while they are loaded: generated with, adapted, merged."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.generate import layout
from llmprep_jax.generate.engine import Engine
from llmprep_jax.generate.sampler import Sampling
from llmprep_jax.models import registry
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam, Compute
from llmprep_jax.quant import QuantEinsum, packed_layers, quantize_model
from llmprep_jax.quant import folder as packed_folder
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.weights import table
from llmprep_jax.weights.folder import FolderCheckpoint
from llmprep_jax.weights.safetensors import write_folder
from tests.models.tiny import CONFIGS, forward, make_tokens, random_model

FLOAT32 = Compute()
LAYERS = 2
TOKENS = make_tokens(8)  # eight rows, as a mesh parts them
NEW = 4  # tokens that are generated


@pytest.fixture(scope="module")
def model():
    cfg = dataclasses.replace(CONFIGS["qwen2-window"], num_layers=LAYERS)
    return random_model(cfg)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """As `lp.save_model` writes it, but for the comparison."""
    folder = tmp_path_factory.mktemp("hf")
    (folder / "config.json").write_text(json.dumps(registry.to_hf(model.cfg)))
    write_folder(folder, table.export(model, model.weights))
    return folder


@pytest.fixture(scope="module")
def packed(folder):
    """A model on int8, which compiles five times as fast as nf4, with activations in float32."""
    return lp.load_model(folder, dtype="int8", compute=FLOAT32)


@pytest.fixture(scope="module")
def logits(packed):
    return forward(packed, TOKENS)


@pytest.fixture(scope="module")
def generated(packed):
    """What follows the first two rows."""
    return np.asarray(lp.generate_tokens(packed, TOKENS[:2], max_new_tokens=NEW))


@pytest.mark.parametrize("kind", ["nf4", "int4"])  # of blocks, and of rows
def test_loading_packs_as_packing_what_was_loaded_does(folder, kind):
    loaded = lp.load_model(folder, dtype=kind)
    # k and v are as q, gate and down are as up
    expected = quantize_model(lp.load_model(folder), kind, r"layers\.(attn\.[qo]|mlp\.up)")
    assert len(packed_layers(loaded)) == 7
    assert len(packed_layers(expected)) == 3
    for path, layer in packed_layers(expected).items():
        found = packed_layers(loaded)[path].packed
        assert found.settings() == layer.packed.settings()
        for name, value in layer.packed.arrays().items():
            same = np.testing.assert_array_equal
            if name in ("offset", "nested_absmax"):  # of a mean, whose sums are ordered otherwise
                same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5)  # noqa: E731
            same(found.arrays()[name], value)
    assert loaded.embed.w.dtype == loaded.norm.scale.dtype == loaded.head.w.dtype == jnp.bfloat16
    assert loaded.cfg.compute.dtype == "bfloat16"


def test_one_tensor_at_a_time_is_dense_while_loading(folder, monkeypatch):
    events, read, quantize = [], FolderCheckpoint.read, packed_folder._quantize

    def log_read(self, name):
        events.append("read" if name.endswith("proj.weight") else "other")
        return read(self, name)

    def log_quantize(w, kind):
        events.append("packed")
        return quantize(w, kind)

    monkeypatch.setattr(FolderCheckpoint, "read", log_read)
    monkeypatch.setattr(packed_folder, "_quantize", log_quantize)
    lp.load_model(folder, dtype="nf4")
    assert [event for event in events if event != "other"] == ["read", "packed"] * 7 * LAYERS


def test_a_device_of_a_mesh_holds_some_rows_of_packed_weights(folder, packed, logits):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    loaded = lp.load_model(folder, "int8", mesh, compute=FLOAT32)
    codes = loaded.layers.mlp.up.codes[...]
    assert codes.sharding.spec[:2] == (None, ("fsdp", "tensor"))
    np.testing.assert_array_equal(codes, packed.layers.mlp.up.codes)
    with use_mesh(mesh):
        found = forward(loaded, jax.device_put(TOKENS, jax.P(("fsdp",))))
    np.testing.assert_allclose(found, logits, atol=2e-4)


def test_generation_is_that_of_the_dequantised_model(packed, generated):
    # greedy: each token is the likeliest after those before it
    whole = np.concatenate([TOKENS[:2], generated], axis=1)
    logits = forward(lp.quant.dequantize_model(packed), whole)
    np.testing.assert_array_equal(generated, np.argmax(logits, -1)[:, TOKENS.shape[1] - 1 : -1])


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (10**9, "a CPU is slow on packed weights: generation keeps dense copies of them"),
        (10**5, "do not fit in half of the 0.0 GB that are free"),
    ],
    ids=["room", "no room"],
)
def test_packed_layers_are_unpacked_for_a_cpu_if_memory_has_room(
    monkeypatch, packed, generated, free, said
):
    monkeypatch.setattr(layout, "free_memory", lambda: free)
    engine = Engine(packed)
    with pytest.warns(UserWarning, match=said) as warned:
        state = engine.start(TOKENS[:1], None, Sampling(), NEW, 0, 0)
    state = engine.advance(state, NEW, (), Sampling())
    assert len(warned) == 1
    np.testing.assert_array_equal(np.asarray(state.tokens_BT)[:, :NEW], generated[:1])
    stepper = engine.stepper(1)
    assert bool(layout.packed_layers(stepper)) == (stepper is packed) == (free < 10**9)


def test_lora_trains_around_a_packed_base(packed, model, logits):
    dense = lp.peft.count(model)
    model = lp.peft.inject(packed, lp.peft.LoRA(rank=4))
    graph, adapters, frozen = nnx.split(model, AdapterParam, ...)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grad(adapters):
        logits = nnx.merge(graph, adapters, frozen)(TOKENS).logits
        return jnp.square(logits).mean(), logits

    grads, found = grad(adapters)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    grads = jax.tree.leaves(grads)
    assert len(grads) == 14
    assert sum(bool(np.abs(g).max() > 0) for g in grads) == 7  # those of B; A's begin at zero
    counts = lp.peft.count(model)
    assert counts.frozen == dense.frozen
    assert counts.frozen_bytes < 4 * counts.frozen


def test_merging_makes_packed_layers_dense_and_says_so(packed):
    model = lp.peft.inject(packed, lp.peft.LoRA(rank=4))
    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    model = nnx.merge(graph, jax.tree.map(lambda x: x + 0.1, adapters), rest)
    with pytest.warns(UserWarning, match="merging makes 7 packed layers dense"):
        merged = lp.peft.merge(model)
    assert type(merged.layers.attn.q) is Einsum
    np.testing.assert_allclose(forward(merged, TOKENS), forward(model, TOKENS), atol=2e-3)


def test_adapters_of_a_dense_model_go_on_when_it_is_packed(logits, model):
    found = quantize_model(lp.peft.inject(model, lp.peft.LoRA(rank=4)), "int8")
    assert type(found.layers.attn.q.base) is QuantEinsum
    np.testing.assert_allclose(forward(found, TOKENS), logits, atol=1e-4)


def test_an_unknown_dtype_names_the_packed_ones(folder):
    with pytest.raises(ValueError, match="unknown dtype 'q4'; .*bfloat16.* nf4, fp4, int8, int4"):
        lp.load_model(folder, dtype="q4")
