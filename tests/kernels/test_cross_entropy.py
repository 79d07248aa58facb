"""The loss of a linear head: every form against the reference, and what it holds in memory."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.cross_entropy import linear_cross_entropy

N, D, V = 24, 16, 200


def make_inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(N, D)), rng.normal(size=(D, V))
    targets = rng.integers(0, V, N)
    targets[[3, 7]] = -1
    return x.astype(dtype), w.astype(dtype), targets, rng.normal(size=N).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("impl", "chunk", "is_table", "terms"))
def run(x, w, targets, weights, impl=None, chunk=None, is_table=False, terms=()):
    """Losses, and the gradients of their weighted sum."""

    def total(x, w):
        losses = linear_cross_entropy(
            x, w, targets, impl=impl, chunk=chunk, is_table=is_table, **dict(terms)
        )
        if not jax.sharding.get_abstract_mesh().empty:
            losses = jax.reshard(losses, jax.typeof(weights).sharding.spec)
        return jnp.sum(losses * weights), losses

    (_, losses), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, w)
    return losses, *gradients


TERMS = {
    "plain": (),
    "soft cap": (("soft_cap", 3.0),),
    "z loss": (("z_loss", 1e-2),),
    "smoothed": (("label_smoothing", 0.1),),
    "all": (("label_smoothing", 0.1), ("soft_cap", 3.0), ("z_loss", 1e-2)),
}
# 64 does not divide 200 words: the last chunk begins over words of the one before
FORMS = {"whole": ("whole", None), "chunks": ("chunked", 50), "uneven chunks": ("chunked", 64)}
TELLING = {
    ("plain", "uneven chunks", True),
    ("all", "uneven chunks", False),
    ("all", "whole", True),
}
CASES = [
    pytest.param(
        terms, form, is_table, marks=() if (terms, form, is_table) in TELLING else pytest.mark.grid
    )
    for terms, form, is_table in itertools.product(TERMS, FORMS, (False, True))
]


@pytest.mark.parametrize(("terms", "form", "is_table"), CASES)
def test_losses_and_gradients_are_those_of_the_reference(terms, form, is_table):
    x, w, targets, weights = make_inputs()
    expected = run(x, w, targets, weights, impl="reference", terms=TERMS[terms])
    impl, chunk = FORMS[form]
    w = w.T if is_table else w
    losses, dx, dw = run(x, w, targets, weights, impl, chunk, is_table, TERMS[terms])
    dw = dw.T if is_table else dw
    chex.assert_trees_all_close((losses, dx, dw), expected, rtol=1e-5, atol=1e-5)


def test_losses_are_the_formula_by_hand():
    # logits 1, 2, 3: log(e + e^2 + e^3) = 3.4076060, mean 2
    x, w = jnp.ones((2, 1)), jnp.array([[1.0, 2.0, 3.0]])
    losses = functools.partial(linear_cross_entropy, x, w, jnp.array([0, -1]))
    for impl in ("reference", "whole", "chunked"):
        np.testing.assert_allclose(losses(impl=impl), [2.4076060, 0.0], rtol=1e-6)
        np.testing.assert_allclose(
            losses(impl=impl, z_loss=0.1, label_smoothing=0.3)[0],
            3.4076060 - 0.7 * 1.0 - 0.3 * 2.0 + 0.1 * 3.4076060**2,
            rtol=1e-6,
        )


@pytest.mark.parametrize("chunk", [None, 64])
def test_bf16_gradients_are_summed_in_float32(chunk):
    x, w, targets, weights = make_inputs(jnp.bfloat16)
    expected = run(*(a.astype(np.float32) for a in (x, w)), targets, weights, impl="reference")
    many = [np.concatenate([a] * 512) for a in (x, targets, weights)]  # 12,288 tokens
    losses, dx, dw = run(many[0], w, *many[1:], chunk=chunk)
    assert (losses.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    for ours, theirs in zip((losses[:N], dx[:N], dw / 512), expected, strict=True):
        error = np.linalg.norm(ours.astype(np.float32) - theirs) / np.linalg.norm(theirs)
        assert error < 6e-3  # one rounding to bf16 is 2e-3


def test_an_ignored_token_gives_nothing_even_with_infinite_logits():
    x, w, targets, weights = make_inputs()
    w[:, 5] = np.abs(w[:, 5])
    x[3] = 1e38  # its target is -1
    for chunk in (None, 64):
        losses, dx, dw = run(x, w, targets, weights, chunk=chunk)
        assert losses[3] == 0
        chex.assert_tree_all_finite((losses, dx, dw))
        assert not dx[3].any()


LAYOUTS = {  # of x, and of a head [D, V]
    "vocabulary over 8 devices": ((8,), (None, None), (None, "a")),
    "tokens and vocabulary": ((4, 2), ("a", None), ("a", "b")),
    "tokens over the vocabulary's devices": ((4, 2), (("a", "b"), None), (None, "b")),
    "model dimension over two axes": ((2, 4), ("a", None), (("a", "b"), None)),
    "whole weights": ((8,), ("a", None), (None, None)),
    "whole tokens": ((4, 2), (None, None), ("a", "b")),
}
FAST = ("vocabulary over 8 devices", "tokens and vocabulary", "model dimension over two axes")


@pytest.mark.parametrize(
    ("layout", "chunk", "is_table"),
    [
        pytest.param(
            layout,
            chunk,
            is_table,
            marks=() if layout in FAST and (chunk is None) == is_table else pytest.mark.grid,
        )
        for layout, chunk, is_table in itertools.product(LAYOUTS, (None, 20), (False, True))
    ],
)
def test_a_mesh_computes_what_one_device_does(layout, chunk, is_table):
    x, w, targets, weights = make_inputs()
    expected = run(x, w, targets, weights, impl="reference", terms=TERMS["all"])
    sizes, x_axes, w_axes = LAYOUTS[layout]
    w, w_axes = (w.T, w_axes[::-1]) if is_table else (w, w_axes)
    mesh = jax.make_mesh(
        sizes, ("a", "b")[: len(sizes)], (jax.sharding.AxisType.Explicit,) * len(sizes)
    )
    with jax.set_mesh(mesh):
        x, w = jax.device_put(x, jax.P(*x_axes)), jax.device_put(w, jax.P(*w_axes))
        rest = [jax.device_put(a, jax.P(x_axes[0])) for a in (targets, weights)]
        losses, dx, dw = run(x, w, *rest, chunk=chunk, is_table=is_table, terms=TERMS["all"])
    assert jax.typeof(dx).sharding.spec == jax.P(*x_axes)
    assert jax.typeof(dw).sharding.spec == jax.P(*w_axes)
    found = jax.device_get((losses, dx, dw.T if is_table else dw))
    chex.assert_trees_all_close(found, jax.device_get(expected), rtol=1e-5, atol=2e-5)


def test_no_array_of_all_tokens_and_words_is_formed():
    x, w = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 64), (64, 32768))]
    targets = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def temporaries(impl):
        total = lambda x, w, t: jnp.sum(linear_cross_entropy(x, w, t, impl=impl))  # noqa: E731
        lowered = jax.jit(jax.value_and_grad(total, (0, 1))).lower(x, w, targets)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    logits = 4096 * 32768 * 4
    assert temporaries(None) < logits / 2  # a chunk's and their gradient, an eighth each
    assert temporaries("whole") > logits


def test_logits_that_are_kept_are_not_written_again_to_find_the_targets():
    def total(x, w, targets):
        return jnp.sum(linear_cross_entropy(x, w, targets, impl="whole"))

    shapes = ((64, 8), jnp.float32), ((8, 8192), jnp.float32), ((64,), jnp.int32)
    program = jax.jit(total).lower(*[jax.ShapeDtypeStruct(*x) for x in shapes]).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.5 * 64 * 8192 * 4


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (2, 5), (4,)), r"x \(4, 3\), w \(2, 5\), targets \(4,\); they must be \[N, D\]"),
        (((4, 3), (3, 5), (5,)), r"targets \(5,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
    x, w, targets = map(jnp.zeros, shapes)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(x, w, targets.astype(jnp.int32))


def test_an_unknown_form_is_named():
    x, w, targets, _ = make_inputs()
    with pytest.raises(ValueError, match="unknown impl 'fast'; there are chunked, whole, ref"):
        linear_cross_entropy(x, w, targets, impl="fast")
