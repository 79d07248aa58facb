"""Adapters of layers that hold many experts: one for each expert, by every method."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import llmprep_jax as lp
from llmprep_jax.nn.language_model import Output
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import AdapterParam, Compute
from llmprep_jax.nn.stack import scan, stack, unstack
from llmprep_jax.peft import IA3, DoRA, LoHa, LoKr, LoRA
from llmprep_jax.peft.layout import axes_of, dims, shape_of
from llmprep_jax.peft.method import Method
from llmprep_jax.sharding import has_mesh, make_mesh, spec, use_mesh
from llmprep_jax.weights.rows import Table
from tests.grids import cases
from tests.peft.test_methods import QUICK, assert_near, scattered
from tests.random_modules import random_module

E, D, F, LAYERS, TOKENS = 4, 8, 16, 2, 6
COMPUTE = Compute()
METHODS = {
    "lora": LoRA(rank=2, alpha=4),
    "dora": DoRA(rank=2, alpha=4),
    "loha": LoHa(rank=2, alpha=4),
    "lokr": LoKr(rank=2, alpha=4),
    "ia3": IA3(targets="all-linear", feedforward=("down",)),
}
each_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Experts(nnx.Module):
    """Token t goes to expert t mod E, whose MLP is down(relu(gate x) * (up x)), fused as Mixtral's.

    The letter E stands first in the one weight and last in the other.
    """

    def __init__(self, *, rngs: nnx.Rngs):
        make = functools.partial(Einsum, compute=COMPUTE, rngs=rngs)
        axes = ("expert", "embed", None, "mlp")
        self.up = make("ECD,EDGF->ECGF", (E, D, 2, F), axes, ("expert", None, None, "mlp"))
        axes = ("mlp", "embed", "expert")
        self.down = make("ECF,FDE->ECD", (F, D, E), axes, ("expert", None, None))

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        chosen_ET = jnp.arange(E)[:, None] == jnp.arange(len(x_TD)) % E
        x_ECD = chosen_ET[:, :, None] * x_TD  # a slot a token; those of other experts are empty
        x_ECD = jax.reshard(x_ECD, spec("expert", None, None)) if has_mesh() else x_ECD
        h_ECGF = self.up(x_ECD)
        return x_TD + self.down(jax.nn.relu(h_ECGF[:, :, 0]) * h_ECGF[:, :, 1]).sum(0)


class Config(NamedTuple):
    vocab_size: int = 96


class Model(nnx.Module):
    """Two such layers over tokens that are angles; what comes out stands for logits."""

    weights = Table(
        {
            "layers.up.w": ("model.layers.{l}.mlp.experts.gate_up_proj", "e (g f) d -> e d g f"),
            "layers.down.w": ("model.layers.{l}.mlp.experts.down_proj", "e d f -> f d e"),
        }
    )

    def __init__(self, *, rngs: nnx.Rngs):
        self.cfg, self.layers = Config(), stack(Experts, LAYERS, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> Output:
        x_TD = jnp.sin(tokens.reshape(-1, 1) * jnp.arange(1.0, D + 1))
        step = lambda layer, x_TD: layer(x_TD)  # noqa: E731
        return Output(scan(step, self.layers, x_TD, compute=COMPUTE))

    def probe(self) -> dict[str, jax.Array]:
        return {"logits": self(jnp.arange(12)[None]).logits}


@functools.cache
def base() -> nnx.Module:
    return random_module(lambda: Model(rngs=nnx.Rngs(0)))


@functools.cache
def fresh(method: Method) -> nnx.Module:
    return lp.peft.inject(base(), method)


@functools.cache
def trained(method: Method) -> nnx.Module:
    return scattered(fresh(method))


INPUTS = np.arange(TOKENS)


@functools.partial(jax.jit, compiler_options=QUICK)
def run(model: nnx.Module) -> tuple:
    """(outputs, gradients of the adapters where token 1 alone counts, merged model)."""
    graph, adapters, frozen = nnx.split(model, AdapterParam, ...)

    def loss(adapters):
        y_TD = nnx.merge(graph, adapters, frozen)(INPUTS).logits
        return jnp.square(y_TD[1]).sum(), y_TD

    grads, y_TD = jax.grad(loss, has_aux=True)(adapters)
    return y_TD, grads, lp.peft.merge(model)


forward = jax.jit(lambda model: model(INPUTS).logits, compiler_options=QUICK)


def test_a_letter_in_all_three_is_neither_input_nor_output():
    up, down = base().layers.up, base().layers.down
    assert (dims(up), dims(down)) == (("ECD", "D", "GF", "ECGF"), ("ECF", "F", "D", "ECD"))
    assert (shape_of(up), shape_of(down)) == (((D,), (2, F)), ((F,), (D,)))
    assert (axes_of(up), axes_of(down)) == ((("embed",), (None, "mlp")), (("mlp",), ("embed",)))


@each_method
def test_each_expert_has_its_own_adapter_that_starts_as_identity(method):
    model = fresh(method)
    np.testing.assert_array_equal(forward(model), forward(base()))
    trainable, _ = lp.peft.split(model)
    assert {x.shape[:2] for x in jax.tree.leaves(trainable)} == {(LAYERS, E)}
    if isinstance(method, LoRA):
        a = np.asarray(model.layers.up.lora_a[...])
        assert a.shape == (LAYERS, E, D, 2)
        assert len(np.unique(a)) == a.size  # no two experts begin alike


@each_method
def test_a_token_moves_its_own_experts_adapter_alone_and_a_merge_says_the_same(method):
    y_TD, grads, merged = run(trained(method))
    assert np.abs(y_TD - forward(base())).max() > 0.01
    for path, grad in nnx.to_flat_state(grads):
        moved = np.any(np.asarray(grad[...]) != 0, axis=tuple(range(2, grad.ndim)))
        assert moved.tolist() == [[False, True, False, False]] * LAYERS, path
    assert jax.tree.structure(merged) == jax.tree.structure(base())
    assert_near(forward(merged), y_TD)


@each_method
def test_an_expert_computes_what_a_layer_of_its_own_would(method):
    adapted = trained(method).layers.up
    layer = jax.tree.map(lambda x: np.asarray(x)[1], adapted)
    x_ECD = np.random.default_rng(1).normal(size=(E, 3, D)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def outputs(layer: nnx.Module, x_ECD: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        make = functools.partial(Einsum, compute=COMPUTE, rngs=nnx.Rngs(0))
        alone = make("CD,DGF->CGF", (D, 2, F), (None, None, None), (None, None, None))
        expected = []
        for e in range(E):
            one = alone.with_weight(layer.base.w[...][e])
            params = {name: x[e] for name, x in layer.params().items()}
            expected.append(layer.method.forward(params, one, x_ECD[e]))
        return layer(x_ECD), expected

    found, expected = outputs(layer, x_ECD)
    np.testing.assert_allclose(found, np.stack(expected), atol=1e-5)


@pytest.mark.slow  # compiles for eight devices
@each_method
def test_layers_in_a_list_and_a_mesh_change_nothing(method):
    def make():
        return lp.peft.inject(Model(rngs=nnx.Rngs(0)), method)

    y_TD, grads, merged = run(random_module(make))
    listed = random_module(make)
    listed.layers = unstack(listed.layers)
    assert_near(forward(listed), y_TD)
    with use_mesh(make_mesh({"expert": 4, "tensor": 2})):
        found = run(random_module(make))
    assert_near(found[0], y_TD)
    assert_near(found[1], grads, 2e-5)
    assert_near(found[2], merged)


def test_a_mesh_without_an_axis_for_experts_changes_nothing():
    def make():
        return lp.peft.inject(Model(rngs=nnx.Rngs(0)), METHODS["lora"])

    expected = forward(random_module(make))
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        assert_near(forward(random_module(make)), expected)


def test_experts_adapters_are_born_on_their_experts_devices():
    expected = nnx.state(fresh(METHODS["lora"]), AdapterParam)
    with use_mesh(make_mesh({"expert": 4, "tensor": 2})):
        model = lp.peft.inject(random_module(lambda: Model(rngs=nnx.Rngs(0))), METHODS["lora"])
        found = nnx.state(model, AdapterParam)
    assert_near(found, expected, 0)
    specs = {".".join(p): jax.typeof(x[...]).sharding.spec for p, x in nnx.to_flat_state(found)}
    assert specs == {
        "layers.up.lora_a": jax.P(None, "expert", None, None),
        "layers.up.lora_b": jax.P(None, "expert", None, None, "tensor"),
        "layers.down.lora_a": jax.P(None, "expert", "tensor", None),
        "layers.down.lora_b": jax.P(None, "expert", None, None),
    }


@each_method
def test_experts_adapters_combine_merge_by_weight_and_come_out_again(method):
    model = trained(method)
    both, merged = lp.peft.combine({"a": model, "b": fresh(METHODS["lora"])}), lp.peft.merge(model)
    assert_near(lp.peft.merge(both, {"a": 1, "b": 2}), merged, 1e-6)
    with pytest.raises(ValueError, match="ECF,FDE->ECD keeps no rows of a batch; select one"):
        lp.peft.select(both, ["a", "b"])
    if not isinstance(method, DoRA):
        assert_near(lp.peft.unmerge(merged, model), base(), 1e-5)


@pytest.mark.parametrize(
    ("targets", "as_list"),
    cases(
        itertools.product(["all-linear", ("down_proj",)], [False, True]),
        fast=[("all-linear", False), (("down_proj",), True)],
    ),
)
def test_a_folder_holds_the_loras_of_experts_as_peft_does_and_opens_again(
    targets, as_list, tmp_path
):
    model = scattered(lp.peft.inject(base(), LoRA(rank=2, alpha=4, targets=targets)))
    if as_list:
        model.layers = unstack(model.layers)
    folder = lp.peft.save(model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    module = "base_model.model.model.layers.1.mlp.experts"
    shapes = {f"{module}.lora_A.weight": (E * 2, F), f"{module}.lora_B.weight": (D, 2 * E)}
    if targets == "all-linear":  # of two on one module, the first is wrapped by the second
        shapes[f"{module}.base_layer.lora_A.weight"] = (E * 2, D)
        shapes[f"{module}.base_layer.lora_B.weight"] = (2 * F, 2 * E)
    assert {name: x.shape for name, x in tensors.items() if ".1." in name} == shapes
    again = lp.peft.load(base(), folder)
    assert_near(forward(again), forward(model))
    b = tensors[f"{module}.lora_B.weight"].reshape(D, 2, E)
    a = tensors[f"{module}.lora_A.weight"].reshape(E, 2, F)
    weights = [np.asarray(x.layers.down.w)[1] for x in (lp.peft.merge(again), base())]
    delta = weights[0] - weights[1]
    np.testing.assert_allclose(delta, 2 * np.einsum("ore,eri->ioe", b, a), atol=1e-6)


class Apart(Model):
    """A model whose experts are modules of their own in transformers."""

    weights = Table(
        {
            "layers.up.w": ("model.layers.{l}.experts.{e}.up.weight", "(g f) d -> d g f"),
            "layers.down.w": ("model.layers.{l}.mlp.experts.down_proj", "e d f -> f d e"),
        }
    )


def test_experts_that_are_modules_have_an_adapter_each_in_files(tmp_path):
    apart = random_module(lambda: Apart(rngs=nnx.Rngs(0)))
    model = scattered(lp.peft.inject(apart, LoRA(rank=2, alpha=4, targets=("up",))))
    folder = lp.peft.save(model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.experts.{}.up.lora_{}.weight"
    assert tensors.keys() == {
        name.format(layer, e, x) for layer in range(LAYERS) for e in range(E) for x in "AB"
    }
    merged = np.asarray(lp.peft.merge(lp.peft.load(apart, folder)).layers.up.w[...])
    delta = (merged - np.asarray(apart.layers.up.w[...]))[1, 3].reshape(D, -1)
    a, b = (tensors[name.format(1, 3, x)] for x in "AB")
    np.testing.assert_allclose(delta.T, 2 * b @ a, atol=1e-6)


class Merged(Model):
    """A model whose experts are in one dimension with their outputs."""

    weights = Table(
        {
            "layers.up.w": ("model.layers.{l}.mlp.experts.up", "(e g f) d -> e d g f"),
            "layers.down.w": ("model.layers.{l}.mlp.experts.down_proj", "e d f -> f d e"),
        }
    )


def test_what_peft_has_no_format_for_is_refused_in_one_line(tmp_path):
    model = trained(METHODS["ia3"])
    with pytest.raises(ValueError, match="holds experts, and PEFT has a format for LoRA alone"):
        lp.peft.save(model, tmp_path / "adapter")
    merged = random_module(lambda: Merged(rngs=nnx.Rngs(0)))
    model = lp.peft.inject(merged, LoRA(rank=2, targets=(r"layers.up",)))
    with pytest.raises(
        ValueError, match="layers.up is not one fused parameter of experts, .* save"
    ):
        lp.peft.save(model, tmp_path / "adapter")
