"""Adapters to attention of GPU libraries: what they refuse, and that they pass on what is meant.

The libraries do not run here. cuDNN's call is lowered, tokamax's compiled for an H100 where both
are installed; numbers go through stand-ins that have the interface of each and know its masks.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.flash_attention import api, cudnn, reference, residuals, tokamax
from llmprep_jax.kernels.flash_attention.masks import Places, Rule
from tests.kernels.flash_attention.problems import Problem, assert_close, run

PLACES = (Places(), Places())


def head_major(*arrays):
    return [x.swapaxes(1, 2) for x in arrays]


def gradients(rule, q, k, v, lse, o, do):
    """Of head-major arrays, by a library that knows outputs and no gradient of lse."""
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    return reference.backward(q, k, v, lse, do, delta, PLACES, rule)


class Cudnn(types.ModuleType):
    """The functions of JAX's module that the adapter calls."""

    MaskType = types.SimpleNamespace(CAUSAL=True, NO_MASK=False)

    def check_cudnn_version(self):
        return 91000

    def check_is_flash_attention(self, *arguments):
        pass

    def dot_product_attention(
        self, q, k, v, *, scale, mask_type, sliding_window_length, qkv_layout, return_residual
    ):
        assert (qkv_layout, return_residual) == ("BTNH", True)
        rule = Rule(mask_type, sliding_window_length, scale)
        o, lse = reference.forward(*head_major(q, k, v), PLACES, rule)
        return o.swapaxes(1, 2), lse

    def _dot_product_attention_bwd_rule(
        self, scale, mask_type, sliding_window_length, layout, return_residual, res, grad_output
    ):
        q, k, v, *nothing, lse, o = res
        assert (len(nothing), layout, return_residual) == (7, 0, False)
        q, k, v, o, do = head_major(q, k, v, o, grad_output)
        rule = Rule(mask_type, sliding_window_length, scale)
        found = head_major(*gradients(rule, q, k, v, lse, o, do))
        return *(x.astype(q.dtype) for x in found), *[None] * 7


class Tokamax:
    """The operation of tokamax that the adapter calls; rules are its options."""

    def __call__(self, q, k, v, *, rule, return_residuals):
        o, lse = reference.forward(*head_major(q, k, v), PLACES, rule)
        # the greatest score and the sum, of which lse is made
        return o.swapaxes(1, 2), (lse - 1.5, jnp.full_like(lse, np.exp(1.5)))

    def bind(self, q, k, v, *, rule):
        return types.SimpleNamespace(args=(q, k, v), kwargs=dict(rule=rule))

    def vjp(self, sums, o, do, q, k, v, *, rule):
        top, total = sums
        q, k, v, o, do = head_major(q, k, v, o, do)
        found = gradients(rule, q, k, v, top + jnp.log(total), o, do)
        return dict(zip("qkv", head_major(*found), strict=True))


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins, on what says that it is a GPU."""
    for module in (cudnn, tokamax):
        monkeypatch.setattr(module, "platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "_library", lambda: Cudnn("cudnn"))
    monkeypatch.setattr(tokamax, "_operation", Tokamax)
    monkeypatch.setattr(tokamax, "_options", lambda rule, num_keys: dict(rule=rule))


PROBLEMS = {
    "cudnn": Problem(window=9, dtype="bfloat16", H=24, U=16, sinks=True),
    "tokamax": Problem(T=20, soft_cap=3.0, dtype="bfloat16"),
}


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("impl", ["cudnn", "tokamax"])
def test_outputs_and_gradients_are_the_references(impl, recwarn):
    problem = PROBLEMS[impl]
    assert_close(run(problem, impl), run(problem, "reference"), 2e-2)
    assert not [x for x in recwarn if "another takes its place" in str(x.message)]


def test_stand_in_outputs_make_the_sum_that_is_asked_for():
    draw = np.random.default_rng(0).standard_normal
    do, delta = jnp.asarray(draw((1, 2, 5, 64)), "float32"), jnp.asarray(draw((1, 2, 5)), "float32")
    do = do.at[0, 0, 0].multiply(1e-30).at[0, 1, 1].set(0.0)
    found = jnp.sum(do * residuals.outputs_like(do, delta), axis=-1)
    np.testing.assert_allclose(found, delta.at[0, 1, 1].set(0.0), rtol=1e-5)


LIMITS = [
    ("cudnn", {}, None),
    ("cudnn", dict(window=4), None),
    ("cudnn", dict(causal=False, S=9), None),
    ("cudnn", dict(window=4, causal=False), "it knows no window ahead"),
    ("cudnn", dict(given=("positions", "segments")), "not by positions and segments"),
    ("cudnn", dict(bias=lambda h, i, j: h * i * j), "a bias would be a T x S array"),
    ("cudnn", dict(soft_cap=5.0), "it caps no scores"),
    ("cudnn", dict(S=9), "8 queries and 9 keys"),
    ("cudnn", dict(dtype="float32"), "not float32"),
    ("cudnn", dict(H=60), "multiples of 8"),
    ("cudnn", dict(T=0, S=0), "an array is empty"),
    ("tokamax", {}, None),
    ("tokamax", dict(soft_cap=5.0, window=4), None),
    ("tokamax", dict(given=("segments",)), "not by segments"),
    ("tokamax", dict(window=4, causal=False), "it knows no window ahead"),
    ("tokamax", dict(dtype="float32"), "not float32"),
    ("tokamax", dict(H=576), "pass shared memory"),
]


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(("impl", "options", "reason"), LIMITS)
@pytest.mark.parametrize("backward", [False, True])
def test_what_a_library_would_compute_wrongly_is_refused(impl, options, reason, backward):
    options = dict(options)
    T, H = options.pop("T", 8), options.pop("H", 64)
    S, dtype = options.pop("S", T), options.pop("dtype", "bfloat16")
    q, k = jnp.zeros((1, 2, T, H), dtype), jnp.zeros((1, 2, S, H), dtype)
    module = {"cudnn": cudnn, "tokamax": tokamax}[impl]
    found = module.refusal(q, k, k, Rule(**options), backward)
    assert found is None if reason is None else reason in found


def test_on_a_cpu_both_say_that_they_do_not_run_there():
    q = jnp.zeros((1, 2, 8, 64), "bfloat16")
    for module in (cudnn, tokamax):
        assert "not on cpu" in module.refusal(q, q, q, Rule(), False)


def test_a_library_that_is_absent_is_refused_and_not_missed(monkeypatch):
    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
    monkeypatch.setattr(tokamax, "platform", lambda: "gpu")

    def absent():
        raise ImportError("No module named tokamax")

    monkeypatch.setattr(tokamax, "_operation", absent)
    q = jnp.zeros((1, 2, 8, 64), "bfloat16")
    assert "this cuDNN or JAX cannot" in cudnn.refusal(q, q, q, Rule(), False)
    assert "tokamax is not installed" in tokamax.refusal(q, q, q, Rule(), False)
    monkeypatch.setitem(api.BACKENDS, "cpu", ("cudnn", "tokamax", "chunked"))
    assert api.backend(None, q, q, q, Rule()).__name__.endswith("chunked")


@pytest.mark.parametrize("window", [None, 16])
def test_cudnn_is_called_with_a_causal_mask_and_its_window(window, monkeypatch):
    library = cudnn._library()
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "check_compute_capability", lambda version: True)
    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
    q = jax.ShapeDtypeStruct((1, 4, 64, 128), "bfloat16")
    k = jax.ShapeDtypeStruct((1, 2, 64, 128), "bfloat16")
    row, rule = jax.ShapeDtypeStruct((1, 4, 64), "float32"), Rule(window=window, scale=0.1)

    def both(q, k, lse, delta):
        assert cudnn.refusal(q, k, k, rule, True) is None
        o, _ = cudnn.forward(q, k, k, PLACES, rule)
        return o, cudnn.backward(q, k, k, lse, o, delta, PLACES, rule)

    text = jax.jit(both).trace(q, k, row, row).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmax" in line]
    assert len(calls) == 2
    assert "Backward" in calls[1]
    for line in calls:
        assert "CAUSAL" in line
        assert f"sliding_window_length\\22: {window or 0}" in line


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("H", "U", "options"),
    [
        (128, 128, {}),
        (128, 128, dict(window=512, soft_cap=30.0)),
        (192, 128, {}),
        (256, 256, dict(causal=False)),
    ],
)
def test_tokamax_compiles_for_an_h100(card, H, U, options, backward):
    pytest.importorskip("tokamax", reason="tokamax is not installed")
    rule = Rule(scale=H**-0.5, **options)

    def call(q, k, v, do, lse, delta):
        assert tokamax.refusal(q, k, v, rule, backward) is None
        if backward:
            return tokamax.backward(q, k, v, lse, do, delta, PLACES, rule)
        return tokamax.forward(q, k, v, PLACES, rule)

    with jax.set_mesh(card), jax.default_device(card.devices.flat[0]):
        place = jax.NamedSharding(card, jax.P())
        shapes = [(1, 8, 1024, H), (1, 2, 1024, H), (1, 2, 1024, U), (1, 8, 1024, U)]
        arrays = [jax.ShapeDtypeStruct(x, "bfloat16", sharding=place) for x in shapes]
        arrays += [jax.ShapeDtypeStruct((1, 8, 1024), "float32", sharding=place)] * 2
        call = jax.shard_map(call, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        program = jax.jit(call).lower(*arrays).compile()
    assert program.as_text().count('custom_call_target="mosaic_gpu') == 1 + backward
    # copies by heads, 4 to 15 MiB; scores would be 32 more
    outputs = program.memory_analysis().output_size_in_bytes
    arguments = program.memory_analysis().argument_size_in_bytes
    assert program.memory_analysis().temp_size_in_bytes < arguments + outputs
