"""FLOPs of training: hand counts, and those of XLA's own analysis at sizes where sums weigh little.

Programs are lowered and not compiled, so that widths may be such that norms and softmaxes, which
XLA counts too, are a few hundredths.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import janus, llama, registry, siglip
from llmprep_jax.nn.param import Param
from llmprep_jax.nn.work import Work
from llmprep_jax.train.flops import Flops, count_flops, peak_flops
from llmprep_jax.train.losses import training_loss
from llmprep_jax.train.state import Split, split_model
from tests.grids import cases
from tests.models import test_deepseek_vl2, test_seeing
from tests.programs import flops_of_products


class Config:
    """Of a model that is its own decoder."""

    num_layers, num_heads, head_dim = 2, 3, 4

    def __init__(self, tie_embeddings):
        self.tie_embeddings, self.decoder = tie_embeddings, self


TREE = {"embed": {"w": np.ones((100, 8))}, "layers": {"w": np.ones((2, 8, 8))}}
ADAPTER = {"lora_a": np.ones((8, 2))}


def test_full_training_costs_six_a_weight_and_causal_attention_once():
    # 6 * (800 + 128) + 12 * 2 * 3 * 4 * 5
    assert count_flops(Config(True), TREE, {}, seq_len=10).per_token == 5568 + 1440
    # rows of a table that is only looked up take no product
    assert count_flops(Config(False), TREE, {}, seq_len=10).per_token == 6 * 128 + 1440


def test_adapters_cost_four_a_frozen_weight():
    assert count_flops(Config(True), ADAPTER, TREE, seq_len=0).per_token == 4 * 928 + 6 * 16


def test_a_stated_peak_counts_all_devices():
    assert peak_flops(1e12) == 8e12
    assert peak_flops() is None  # nobody states a CPU's


def test_towers_of_composed_models_are_in_no_token():
    class Composed:
        decoder = Config(True)

    tree = {"language": TREE, "vision": {"w": np.ones((50, 50))}}
    assert count_flops(Composed(), tree, {}, seq_len=10).per_token == 5568 + 1440
    assert count_flops(Composed(), {}, tree, seq_len=10).per_token == 4 * 928 + 1440


def test_an_image_costs_what_its_places_meet_and_a_frozen_tower_a_third():
    class Composed:
        decoder = Config(True)

    tower, aligner = {"w": np.ones((5, 4)), "pool": np.ones(7)}, np.ones((4, 3))
    work = {"vision": Work(9, 100), "vision.pool": Work(0), "aligner": Work(2, 0, ("vision",))}
    work["code"] = Work(3, behind=("",), is_drawn=True)
    rest = {"language": TREE, "code": np.ones(11)}

    def count(params, frozen):
        found = count_flops(Composed(), {**params, **rest}, frozen, 10, work)
        return found.seen, found.drawn

    both = {"vision": tower, "aligner": aligner}
    code = 6 * 11 * 3
    assert count(both, {}) == (6 * 20 * 9 + 3 * 4 * 100 + 6 * 12 * 2, code)
    assert count({}, both) == (2 * 20 * 9 + 4 * 100 + 2 * 12 * 2, code)
    # what is frozen behind what is trained is gone back through, and not before it
    frozen_aligner = 6 * 20 * 9 + 3 * 4 * 100 + 4 * 12 * 2
    assert count({"vision": tower}, {"aligner": aligner}) == (frozen_aligner, code)
    frozen_tower = 2 * 20 * 9 + 4 * 100 + 6 * 12 * 2
    assert count({"aligner": aligner}, {"vision": tower}) == (frozen_tower, code)


def test_a_batch_costs_its_tokens_and_its_images_by_what_they_are():
    flops = Flops(1, 0, seen=100, drawn=1000)
    assert flops.of(5) == 20
    assert flops.of(5, images=3, drawn=1) == 20 + 200 + 1000


_TEXT = llama.Config(
    vocab_size=2048,
    dim=512,
    mlp_dim=1536,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    num_layers=2,
    max_seq_len=1024,
)
JANUS = janus.Config(
    _TEXT,
    siglip.VisionConfig(256, 1024, 2, 4, image_size=64, patch_size=4, act="gelu", has_pool=False),
    janus.VQConfig(4096, 8, 256, 64, (1, 2, 4), 2),
    image_id=2047,
)


def xla_flops(split: Split, batch: dict) -> float:
    """Of a loss's gradients, as XLA's analysis has it."""

    def loss(params, frozen, batch):
        total, *_ = training_loss(nnx.merge(split.graphdef, params, frozen), batch)
        return total

    lowered = jax.jit(jax.grad(loss)).lower(split.params, split.frozen, batch)
    return lowered.cost_analysis()["flops"]


def janus_batch(drawn: bool) -> dict:
    """One row, all of which is one picture and a word."""
    length = JANUS.tokens_per_image + 1
    of = lambda dtype: jax.ShapeDtypeStruct((1, length), dtype)  # noqa: E731
    ids, weights = of(jnp.int32), of(jnp.float32)
    batch = dict(tokens=ids, targets=ids, segment_ids=ids, loss_mask=weights)
    batch["images"] = jax.ShapeDtypeStruct((1, 1, 64, 64, 3), jnp.float32)
    return batch | ({"drawn": jax.ShapeDtypeStruct((1, 1), bool)} if drawn else {})


@pytest.mark.parametrize("what", cases(["seen", "drawn", "frozen tower"], fast=["seen", "drawn"]))
def test_steps_of_janus_cost_what_xla_counts_to_a_twelfth(what):
    model = registry.abstract(JANUS.with_compute(dataclasses.replace(JANUS.compute, unroll=0)))
    trainable = {"frozen tower": nnx.All(Param, lambda path, _: path[0] != "vision")}
    trainable = trainable.get(what, Param)
    batch = janus_batch(what == "drawn")
    split = split_model(model, trainable)
    flops = count_flops(model.cfg, split.params, split.frozen, 1 + 256, model.image_work)
    found = xla_flops(split, batch)
    expected = flops.of(257, images=1, drawn=int(what == "drawn"))
    if what == "drawn":  # the tower looks at it too, which is of no use
        expected += flops.seen
        assert flops.drawn > 0.3 * expected
    assert abs(found / expected - 1) < 1 / 12


SEEING = {"gemma3": 1.06, "llava": 1.21, "deepseek-vl": 1.06, "deepseek-vl2": 1.03}


@pytest.mark.parametrize("name", SEEING)
def test_an_image_that_is_seen_costs_the_products_of_towers_and_projectors(name):
    """Forwards; norms and biases, which count as weights do, are hundredths of these widths, more
    of LLaVA's five tokens, of which one is no patch."""
    cfg = test_seeing.CONFIGS.get(name) or test_deepseek_vl2.load().cfg
    model = registry.abstract(cfg)
    media = {
        kind: jax.ShapeDtypeStruct((1, 1, size, size, 3), np.float32)
        for kind, size in model.image_sizes.items()
    }
    if name == "deepseek-vl2":
        media["grids"] = jax.ShapeDtypeStruct((1, 1, 2), np.int32)
    split = split_model(model, lambda path, _: path[0] == "language")
    flops = count_flops(cfg, split.params, split.frozen, 1, model.image_work)
    jaxpr = jax.make_jaxpr(lambda model, media: model.image_features(**media))(model, media).jaxpr
    assert 1 <= flops.seen / flops_of_products(jaxpr) < SEEING[name]
