"""GPU kernels against the reference, interpreted; and compiled for an H100, which takes no H100."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmprep_jax.kernels.flash_attention import attention, pallas_gpu
from llmprep_jax.kernels.flash_attention.gpu_blocks import (
    Sizes,
    blocks_seen,
    cut_width,
    seen_by_column,
)
from llmprep_jax.kernels.flash_attention.masks import Places, Rule
from tests.grids import cases
from tests.kernels.flash_attention.problems import Problem, alibi, assert_close, run

ROWS = [
    # blocks seen whole and in part, in order of columns, with lengths that divide no block
    Problem(T=150, N=2, K=1, H=20, U=16, window=40, B=1),
    # everything at once that is said by values; two key heads, two tiles
    Problem(T=70, S=90, values="psi", window=30, soft_cap=2.0, bias="function", K=2, H=24),
    # few queries: heads of a group as rows, keys split over programs and ending within a block
    Problem(T=2, S=300, N=8, H=24, values="p", bias="function"),
    Problem(),
    Problem(T=130, H=24),
    Problem(window=9),
    Problem(T=70, causal=False, window=9),
    Problem(T=20, S=50, causal=False, soft_cap=2.0),
    Problem(T=50, S=20, causal=False),
    Problem(T=50, S=20, window=4),
    Problem(values="psi"),
    Problem(values="r", K=1),
    Problem(values="r", window=9, causal=False, K=4),
    Problem(values="e", sinks=True),
    Problem(values="i", T=150, H=8),
    Problem(bias="function", K=4, soft_cap=3.0),
    Problem(bias="factors", causal=False),
    Problem(T=1, S=100, N=8, K=1, H=20, U=16, values="ps"),
    Problem(T=3, S=600, B=1, K=1, values="r", causal=False, window=100),
    Problem(T=1, S=33, values="p"),
    *[
        Problem(T=100, B=1, N=2, K=1, H=H, U=U, values=values, window=50)
        for (H, U), values in itertools.product(
            [(64, 64), (80, 80), (128, 128), (256, 256), (192, 128), (576, 512)], ["", "s"]
        )
    ],
    Problem(T=200, H=24, U=16, window=50, values="s", dtype="bfloat16"),
    Problem(T=150, N=8, H=80, soft_cap=5.0, dtype="bfloat16"),
    Problem(T=100, H=64, values="psi", dtype="float16"),
]


@pytest.mark.parametrize("problem", cases(ROWS, fast=ROWS[:3]), ids=str)
def test_equals_the_reference(problem):
    tolerance = 1e-5 if problem.dtype == "float32" else 2e-2
    assert_close(run(problem, "pallas_gpu"), run(problem, "reference"), tolerance)


@pytest.mark.parametrize(
    ("width", "parts"),
    [
        (8, ((0, 16),)),
        (64, ((0, 64),)),
        (72, ((0, 64), (64, 16))),
        (80, ((0, 64), (64, 16))),
        (112, ((0, 128),)),
        (192, ((0, 128), (128, 64))),
        (576, ((0, 512), (512, 64))),
    ],
)
def test_widths_are_cut_into_powers_of_two(width, parts):
    assert cut_width(width) == parts


def seen_one_by_one(start, size, block, length, back, ahead):
    """`seen_by_column` by looking at each pair."""
    rows = np.arange(start, start + size)[:, None]
    columns = np.arange(-(-length // block) * block)[None]
    seen = np.broadcast_to(columns < length, (size, columns.size))
    seen = seen & (True if back is None else rows - columns <= back)
    seen = seen & (True if ahead is None else columns - rows <= ahead)
    return seen.reshape(size, -1, block)


@pytest.mark.parametrize("window", [None, 1, 5, 12, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_by_column_are_those_with_a_visible_pair(causal, window):
    back = None if window is None else window - 1
    ahead = 0 if causal else back
    for (size, block), length, swap in itertools.product([(8, 4), (4, 8)], (30, 32), (0, 1)):
        reach = (ahead, back) if swap else (back, ahead)
        for start in range(0, 32, size):
            ends = [int(x) for x in seen_by_column(start, size, block, length, *reach)]
            seen = seen_one_by_one(start, size, block, length, *reach)
            some, whole = [np.flatnonzero(x) for x in (seen.any((0, 2)), seen.all((0, 2)))]
            wanted = [some[0], some[-1] + 1] if len(some) else [ends[0]] * 2
            assert [ends[0], ends[3]] == wanted, (start, size, block, length)
            assert list(range(ends[1], ends[2])) == list(whole), (start, size, block, length)


def test_blocks_of_other_documents_are_left_out():
    segments = jnp.asarray([[1] * 8 + [2] * 16 + [0] * 8, [1] * 32])
    places = (Places(segments=segments),) * 2
    sizes = Sizes(q=8, k=4, warps=1, stages=1)
    low, high = blocks_seen(places, Rule(), (32, 32), sizes)
    np.testing.assert_array_equal(low, [[0, 2, 2, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(high, [[2, 4, 6, 0], [2, 4, 6, 8]])
    low, high = blocks_seen(places, Rule(), (32, 32), sizes, by_key=True)
    np.testing.assert_array_equal(low[0], [0, 0, 1, 1, 2, 2, 0, 0])
    np.testing.assert_array_equal(high[0], [1, 1, 3, 3, 3, 3, 0, 0])


@pytest.mark.parametrize(
    ("H", "U", "dtype", "backward", "reason"),
    [
        (576, 512, "float32", True, None),
        (512, 512, "bfloat16", True, None),
        (1024, 1024, "bfloat16", False, "widths 1024 and 1024 in bfloat16 take 327680 bytes"),
        (1024, 1024, "float32", True, "of shared memory in dq; there are 232448"),
        (64, 64, "int8", False, "it takes float32, bfloat16, float16, not int8"),
    ],
)
def test_what_a_card_cannot_hold_is_refused(H, U, dtype, backward, reason):
    arrays = [jnp.zeros((1, 2, 128, width), dtype) for width in (H, H, U)]
    found = pallas_gpu.refusal(*arrays, Rule(), backward)
    assert found is None if reason is None else reason in found


def compiled(card, H, U, *, T=1024, S=None, values="", backward, dtype="bfloat16", **rule):
    """A program of 8 query heads on 2 key heads; float32 ones may keep sums in memory.

    Args:
      values: which are given, by their second letter: "o", "e" and "p".
    """
    S = S or T
    names = [name for name in ("positions", "segments", "spans") if name[1] in values]

    def output(q, k, v, *sides):
        options = {}
        for name, side in zip(names, sides, strict=True):
            options |= {f"q_{name}": side[:, S - T :], f"k_{name}": side}
        return attention(q, k, v, impl="pallas_gpu", **options, **rule)

    def total(*arrays):
        return jnp.sum(output(*arrays).astype(jnp.float32))

    with jax.set_mesh(card):
        place = jax.NamedSharding(card, jax.P())
        sizes = [(1, T, 8, H), (1, S, 2, H), (1, S, 2, U)]
        arrays = [jax.ShapeDtypeStruct(size, dtype, sharding=place) for size in sizes]
        arrays += [jax.ShapeDtypeStruct((1, S), "int32", sharding=place)] * len(names)
        function = jax.grad(total, (0, 1, 2)) if backward else output
        options = {"xla_gpu_fail_ptx_compilation_on_register_spilling": dtype == "bfloat16"}
        return jax.jit(function).lower(*arrays).compile(compiler_options=options)


def assert_kernels_alone(card, H, U, *, T, backward, dtype="bfloat16", **options):
    """One kernel, or three; nothing beside them but o, dk, dv and rows of float32."""
    program = compiled(card, H, U, T=T, backward=backward, dtype=dtype, **options)
    assert program.as_text().count("gpu.triton") == (3 if backward else 1)
    row, itemsize = 8 * 4, 4 if dtype == "float32" else 2
    a_token = 2 * row + itemsize * (8 * U + 2 * (H + U)) if backward else row
    assert program.memory_analysis().temp_size_in_bytes < 1.1 * T * a_token


WIDTHS = [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (576, 512)]


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("H", "U"), WIDTHS, ids=str)
def test_kernels_compile_for_an_h100_without_spilling(card, H, U, backward):
    for values in ("", "oep"):
        assert_kernels_alone(card, H, U, values=values, backward=backward, T=1000)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_kernels_of_float32_compile_too(card, backward):
    assert_kernels_alone(card, 128, 128, backward=backward, dtype="float32", T=1000)


def test_kernels_count_in_32_bits_whatever_others_do():
    problem = Problem(T=40, values="ps", window=30, bias="function", K=1, H=8, B=1)
    wanted = run(problem, "reference")
    with jax.enable_x64(True):
        found = run(problem, "pallas_gpu")
    assert_close(found, wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_kernels_compile_where_others_count_in_64_bits(card, backward):
    with jax.enable_x64(True):
        compiled(card, 64, 64, values="oep", backward=backward)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_kernels_compile_with_caps_windows_and_biases(card, backward):
    options = dict(T=1024, window=512, soft_cap=50.0, backward=backward)
    assert_kernels_alone(card, 256, 256, **options)
    assert_kernels_alone(card, 128, 128, values="oep", bias=alibi, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("H", "U"), [(64, 64), (128, 128), (576, 512)], ids=str)
def test_decode_compiles_and_splits_long_rows(card, H, U):
    program = compiled(card, H, U, T=1, S=32768, values="oe", backward=False)
    # the parts' outputs beside each other, in float32
    assert program.memory_analysis().temp_size_in_bytes > 32 * 8 * U * 4


@pytest.mark.slow
@pytest.mark.parametrize("values", ["", "oe"], ids=["columns", "values"])
def test_memory_is_linear_in_length_and_nothing_is_transposed(card, values):
    sizes = []
    for T in (4096, 8192):
        program = compiled(card, 128, 128, T=T, values=values, backward=True)
        sizes.append(program.memory_analysis().temp_size_in_bytes)
        # o, dk and dv in float32, and rows: no array of T x T, no second q
        assert sizes[-1] < T * (8 * 128 * 2 * 2.1 + 2 * 128 * 2 * 4)
        assert not re.findall(r" = bf16\S+ (?:copy|transpose)\(", program.as_text())
    assert sizes[1] < 2.05 * sizes[0]
