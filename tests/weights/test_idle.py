"""What files hold and a model does without; layers that are one in files, trained and packed."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax import runs
from llmprep_jax.data import DataConfig
from llmprep_jax.models import registry
from llmprep_jax.nn.param import Idle, Param
from llmprep_jax.quant import export
from llmprep_jax.quant.folder import packers, unpacking
from llmprep_jax.quant.kinds import quantize
from llmprep_jax.quant.linear import adopt, packed_layers
from llmprep_jax.train.checkpoint import Checkpoints
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.run import RunConfig
from llmprep_jax.train.trainer import FitConfig, Trainer
from llmprep_jax.weights import table
from tests.models import composed
from tests.weights.samples import Memory

QKV = "vision_tower.blocks.{}.attn.qkv.weight"


@pytest.fixture(scope="module")
def model() -> nnx.Module:
    return composed.make()


@pytest.fixture(scope="module")
def tensors(model) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in table.export(model, model.weights)}


def abstract() -> nnx.Module:
    return jax.eval_shape(lambda: composed.Model(composed.Config(), rngs=nnx.Rngs(0)))


def test_idle_weights_are_loaded_and_saved(model, tensors):
    assert {
        "attn_pool.attn.qkv.bias",
        "attn_pool.attn.qkv.weight",
        "attn_pool.attn.proj.weight",
    } == {name.removeprefix("vision_tower.") for name in tensors if "attn_pool" in name}
    loaded = table.load(abstract(), Memory(tensors), model.weights)
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(m)) for m in (loaded, model)))
    assert not nnx.to_flat_state(nnx.state(loaded.vision.pool, Param))
    assert len(nnx.to_flat_state(nnx.state(loaded.vision.pool, Idle))) == 7


def test_weight_decay_leaves_idle_weights_as_they_are(model):
    copy = jax.tree.map(jnp.copy, model)
    trainer = Trainer(copy, cfg=FitConfig(steps=10, optim=OptimConfig(lr=0.1, weight_decay=0.1)))
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    batch = dict(tokens=tokens, targets=tokens + 1, loss_mask=np.ones((2, 6), np.float32))
    steps = trainer.steps(batch for _ in range(10))
    for _ in steps:
        pass
    trained = trainer.model(steps.state)
    # nothing of the tower has a gradient where there are words alone, but its weights decay
    assert not np.array_equal(trained.vision.blocks.q.w[...], model.vision.blocks.q.w[...])
    chex.assert_trees_all_equal(*(nnx.state(m.vision.pool) for m in (trained, model)))


@pytest.fixture
def family(monkeypatch):
    """The toy as a family that folders may be of."""
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, composed))


def leaves(model: nnx.Module) -> dict:
    return nnx.to_pure_dict(nnx.state(model))


def test_a_composed_model_goes_through_a_folder_whole_and_in_part(model, family, tmp_path):
    folder = lp.save_model(model, tmp_path / "model")
    chex.assert_trees_all_equal(leaves(lp.load_model(folder)), leaves(model))
    for part in ("vision", "language"):
        loaded = lp.load_model(folder, only=part)
        chex.assert_trees_all_equal(leaves(loaded), leaves(getattr(model, part)))


@pytest.mark.parametrize("began", ["loaded", "drawn"])
def test_a_run_s_model_has_the_idle_weights_that_it_began_with(model, family, tmp_path, began):
    kind = dict(out=tmp_path / "run", data=DataConfig(paths=("none",)), seed=4)
    if began == "loaded":
        cfg = RunConfig(model=str(lp.save_model(model, tmp_path / "model")), **kind)
    else:
        cfg = RunConfig(architecture=composed.Config(), tokenizer="none", **kind)
    base = runs.make_base(cfg, None, None)
    meta = runs.describe_model(cfg, base, None)
    assert meta["base"] == cfg.model
    trainer = Trainer(jax.tree.map(jnp.copy, base), cfg=cfg)
    with Checkpoints(cfg.out, cfg.checkpoint, meta) as checkpoints:
        checkpoints.save(trainer.start(), {})
    loaded = lp.load_model(cfg.out)
    chex.assert_trees_all_equal(leaves(loaded), leaves(base))
    assert np.any(loaded.vision.pool.q.w[...])


def test_idle_layers_are_not_packed_and_layers_that_are_one_are_written_dense(model, tensors):
    packed = lp.quant.quantize_model(model, "int8")
    assert "vision.blocks.q" in packed_layers(packed)
    assert not [path for path in packed_layers(packed) if "pool" in path]
    written = {name: np.array(x) for name, x in export.tensors(packed, model.weights)}
    assert written.keys() >= tensors.keys()
    assert written["vision_tower.blocks.0.attn.proj.weight"].dtype == np.int8
    dense = lp.quant.dequantize_model(packed).vision.blocks
    for layer in range(composed.DEPTH):
        rows = [np.moveaxis(getattr(dense, x).w[layer], 0, -1).reshape(8, 8) for x in "qkv"]
        np.testing.assert_array_equal(written[QKV.format(layer)], np.concatenate(rows))
    fields = export.config_fields(packed, model.weights)["quantization_config"]
    assert fields["llm_int8_skip_modules"] == [
        "lm_head",
        *(f"model.vision_tower.blocks.{layer}.attn.qkv" for layer in range(composed.DEPTH)),
        "model.vision_tower.attn_pool.attn.qkv",
        "model.vision_tower.attn_pool.attn.proj",
    ]


def test_parts_are_packed_while_they_are_read(model, tensors):
    checkpoint, shapes = Memory(tensors), abstract()
    pack = packers(shapes, checkpoint, "int8")
    loaded = adopt(table.load(shapes, checkpoint, model.weights, pack=pack.get), "float32")
    whole = lp.quant.quantize_model(model, "int8")
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(m)) for m in (loaded, whole)))


def test_a_packed_matrix_of_several_layers_is_read_dense(model, tensors):
    packed = quantize(jnp.asarray(tensors[QKV.format(0)]), "int8")
    codes = dict(tensors)
    for layer in range(composed.DEPTH):
        name = QKV.format(layer)
        codes |= export._bitsandbytes8(
            jax.tree.map(np.asarray, quantize(jnp.asarray(tensors[name]), "int8")), name, "float32"
        )
    checkpoint = Memory(codes)
    checkpoint.config = {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}
    }
    checkpoint, shapes = unpacking(checkpoint), abstract()
    loaded = table.load(
        shapes, checkpoint, model.weights, pack=packers(shapes, checkpoint, None).get
    )
    assert not packed_layers(adopt(loaded, "float32"))
    expected = np.asarray(lp.quant.packed.dequantize(packed))[8:16]
    found = np.moveaxis(loaded.vision.blocks.k.w[0], 0, -1).reshape(8, 8)
    np.testing.assert_array_equal(found, expected)
