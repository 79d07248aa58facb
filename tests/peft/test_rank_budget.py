"""AdaLoRA's budget: the cubic schedule, which triplets go, and a run that ends at the target."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam, Compute, Param
from llmprep_jax.nn.stack import scan, stack
from llmprep_jax.peft import AdaLoRA
from llmprep_jax.peft.adapter import adapters
from llmprep_jax.peft.rank_budget import allocate_ranks, num_pruned, orthogonality, triplets
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.checkpoint import CheckpointConfig
from llmprep_jax.train.loop import fit
from llmprep_jax.train.optim import OptimConfig
from llmprep_jax.train.trainer import FitConfig, Trainer
from tests.train.toy import DIM, Rows, Toy

# 3 layers of two matrices with 4 triplets each: 24 triplets, of which 12 stay
METHOD = AdaLoRA(rank=4, target_rank=2, total_steps=8, warmup_steps=1, final_steps=2)


def make_tree(seed: int, *, listed: bool = False) -> dict:
    """Parameters or gradients of 3 stacked layers, or the same in a list."""
    rng = np.random.default_rng(seed)
    shapes = {"lora_a": (3, 8, 2, 4), "lora_b": (3, 4, 6), "lora_e": (3, 4)}
    tree = {
        name: {key: rng.normal(0, 1, shape).astype(np.float32) for key, shape in shapes.items()}
        for name in ("q", "k")
    }
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(3)] if listed else tree


def run(place=lambda tree: tree, method: AdaLoRA = METHOD, *, listed: bool = False) -> list[dict]:
    """Parameters after each of 9 steps."""
    params = place(make_tree(0, listed=listed))
    tx = allocate_ranks(optax.sgd(0.01), method, params, 9)
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for step in range(1, 10):
        updates, state = update(place(make_tree(step, listed=listed)), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def numbers(params) -> np.ndarray:
    """All of E, in the order of stacks."""
    each = [layer["lora_e"] for layer in triplets(params).values()]
    return np.stack([np.asarray(e) for e in each])


def test_the_budget_falls_by_the_cube_of_what_is_left_of_the_schedule():
    # 24 - int(12 * (1 - (step - 1) / 5)^3 + 12): 12 * .512 = 6.1, 12 * .216 = 2.6, .77, .096
    assert num_pruned(METHOD, triplets(make_tree(0))).tolist() == [-1, -1, 6, 10, 12, 12, 12]
    found = [int(np.sum(numbers(params) == 0)) for params in run()]
    assert found == [0, 6, 10, 12, 12, 12, 12, 12, 12]


def test_the_last_pruning_is_final_and_the_others_are_not():
    found = [numbers(params) == 0 for params in run()]
    assert np.any(found[1] & ~found[4])  # pruned at step 2, back at step 5
    for later in found[6:]:
        np.testing.assert_array_equal(later, found[5])
    every = [numbers(p) == 0 for p in run(method=AdaLoRA(4, target_rank=2, total_steps=6, every=4))]
    assert [int(np.sum(each)) for each in every] == [0, 0, 0, 12, 0, 12, 12, 12, 12]


def test_only_e_is_pruned_and_all_else_is_the_optimizers():
    plain, found = make_tree(0), run()[-1]
    for step in range(1, 10):
        plain = jax.tree.map(lambda x, g: x - np.float32(0.01) * g, plain, make_tree(step))
    for name in ("lora_a", "lora_b"):
        np.testing.assert_allclose(found["q"][name], plain["q"][name], atol=1e-6)
    kept = np.asarray(found["q"]["lora_e"]) != 0
    assert 0 < kept.sum() < 12


def test_layers_in_a_list_compete_as_those_of_a_stack_do():
    listed, stacked = numbers(run(listed=True)[-1]), numbers(run()[-1])
    expected = stacked.transpose(1, 0, 2).reshape(6, 4)  # from [matrix, layer, r]
    np.testing.assert_allclose(listed, expected, atol=1e-6)
    assert np.sum(listed == 0) == 12


def test_a_mesh_prunes_the_same():
    specs = {"lora_a": ("fsdp", "tensor"), "lora_b": (None, "tensor"), "lora_e": ()}
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):

        def place(tree):
            return {
                layer: {k: jax.device_put(x, jax.P(None, *specs[k])) for k, x in leaves.items()}
                for layer, leaves in tree.items()
            }

        found = numbers(run(place)[-1])
    np.testing.assert_array_equal(found == 0, numbers(run()[-1]) == 0)
    np.testing.assert_allclose(found, numbers(run()[-1]), atol=1e-6)


def linear(*, rngs: nnx.Rngs) -> Einsum:
    axes = ("embed", "mlp"), ("batch", "seq", "mlp")
    return Einsum("BTD,DF->BTF", (DIM, DIM), *axes, compute=Compute(), rngs=rngs)


class Deep(Toy):
    """The toy model with 3 linear layers."""

    def __init__(self, *, rngs: nnx.Rngs):
        super().__init__(rngs=rngs)
        self.layers = stack(linear, 3, rngs=rngs)

    def features(self, x_BTD, **places):
        x, _ = super().features(x_BTD, **places)
        return scan(
            lambda layer, x: x + jnp.tanh(layer(x)), self.layers, x, compute=Compute()
        ), None


def orthogonality_of(model: nnx.Module) -> float:
    return float(orthogonality([*adapters(model).values()]))


@functools.cache
def adapted() -> nnx.Module:
    method = AdaLoRA(4, target_rank=2, total_steps=8, final_steps=2, orthogonality=0.25)
    return lp.peft.inject(jax.jit(lambda: Deep(rngs=nnx.Rngs(0)))(), method)


@pytest.mark.slow  # a whole run
def test_a_run_ends_with_the_target_rank_and_more_orthogonal_factors(tmp_path):
    cfg = FitConfig(
        steps=8,
        optim=OptimConfig(lr=0.02, weight_decay=0.0),
        checkpoint=CheckpointConfig(every=None),
    )
    model = jax.tree.map(jnp.copy, adapted())
    before = orthogonality_of(model)
    assert before == pytest.approx(2.0, abs=0.02)  # all but zero: the norm of I, sqrt(4)
    result = fit(Trainer(model, AdapterParam, cfg), Rows(), out=tmp_path)
    trained = result.model
    # the loss is that of the next token, as evaluations give it; the regulariser is beside it
    added = result.metrics["objective"] - result.metrics["loss"]
    assert added > 0.25 * orthogonality_of(trained) / 2
    assert int(np.sum(np.asarray(trained.layers.lora_e[...]) != 0)) == 6
    assert orthogonality_of(trained) < 0.9 * before
    trainer = Trainer(jax.tree.map(jnp.copy, adapted()), AdapterParam, cfg)
    again = fit(trainer, Rows(), out=tmp_path).model
    np.testing.assert_array_equal(again.layers.lora_e[...], trained.layers.lora_e[...])
    x_BTD = trained.embed_inputs(np.ones((1, 4), np.int32))
    found = lp.peft.merge(trained).features(x_BTD)[0]
    np.testing.assert_allclose(trained.features(x_BTD)[0], found, atol=1e-5)


def test_the_budget_is_laid_over_the_run_where_its_steps_are_not_given():
    given, open_ended = METHOD, AdaLoRA(rank=4, target_rank=2, warmup_steps=1, final_steps=2)
    assert open_ended.of_run(8) == given
    assert given.of_run(100) == given
    params, grads = make_tree(0), make_tree(1)
    found = []
    for method in (given, open_ended):
        tx = allocate_ranks(optax.sgd(0.01), method, params, 8)
        state = tx.init(params)
        for _ in range(3):
            _, state = jax.jit(tx.update)(grads, state, params)
        found.append(jax.tree.leaves(state.kept))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("trainable", "steps", "message"),
    [
        (Param, 8, "AdaLoRA adapters, but nothing trained is a lora_e"),
        (
            AdapterParam,
            5,
            r"until step 6 \(total_steps - final_steps\), but .* at step 5; set total",
        ),
    ],
    ids=["base", "short"],
)
def test_settings_that_do_not_fit_the_run_are_refused(trainable, steps, message):
    with pytest.raises(ValueError, match=message):
        Trainer(adapted(), trainable, FitConfig(steps=steps))
