"""The TPU kernels as compiled for chips that are not there: that they fit, and what they hold."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from llmprep_jax.kernels.flash_attention import attention, pallas_tpu
from llmprep_jax.kernels.flash_attention.masks import Places, Rule
from tests.grids import cases
from tests.kernels.ahead import TPUS, temporaries, tpu_devices
from tests.kernels.flash_attention.problems import Problem, alibi

SHAPES = {
    "Llama-3.2-1B": Problem(B=1, T=4096, N=32, K=8, H=64, values="ps"),
    "SigLIP-SO400M": Problem(B=1, T=729, N=16, K=16, H=72, causal=False),
    "SAM ViT-H": Problem(B=1, T=4096, N=16, K=16, H=80, causal=False, bias="factors"),
    "Llama-3-8B": Problem(B=1, T=4096, N=32, K=8, H=128),
    "Gemma-3-4B, local": Problem(B=1, T=4096, N=8, K=4, H=256, window=1024, values="psi"),
    "Gemma-2-9B, capped": Problem(B=1, T=4096, N=16, K=8, H=256, soft_cap=50.0, values="ps"),
    "DeepSeek-V3": Problem(B=1, T=4096, N=16, K=16, H=192, U=128, values="ps"),
    "DeepSeek-V3, latents": Problem(B=1, T=1024, S=4096, N=16, K=1, H=576, U=512, values="ps"),
    "ALiBi": Problem(B=1, T=2048, N=8, K=2, H=128, bias="function"),
    "float32": Problem(B=1, T=2048, N=8, K=2, H=128, values="ps", dtype="float32"),
}
NARROW, WIDE = "Llama-3-8B", "DeepSeek-V3, latents"


def mesh_of(chip: str) -> jax.sharding.Mesh:
    """One of it."""
    types = (jax.sharding.AxisType.Explicit,)
    return jax.make_mesh((1,), ("data",), types, devices=tpu_devices(chip)[:1])


def compiled(problem: Problem, chip: str, gradients: bool = True, head_major: bool = False):
    """The program of one chip, in bfloat16 unless the problem says otherwise."""
    mesh = mesh_of(chip)

    def array(*shape, dtype=None):
        dtype = dtype or (problem.dtype if chip_dtype is None else chip_dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

    B, T, N, K, H = problem.B, problem.T, problem.N, problem.K, problem.H
    S, U = problem.S or T, problem.U or H
    chip_dtype = None if problem is SHAPES["float32"] else jnp.bfloat16
    order = (lambda x: (x[0], x[2], x[1], x[3])) if head_major else (lambda x: x)
    arrays = dict(q=array(B, T, N, H), k=array(*order((B, S, K, H))), v=array(*order((B, S, K, U))))
    if problem.bias == "factors":
        arrays["bias"] = (array(B, T, N, 128), array(1, S, 1, 128))
    names = {"p": "positions", "s": "segments", "i": "spans"}
    values = {
        f"{side}_{names[x]}": array(B, n, dtype=jnp.int32)
        for x in problem.values
        for side, n in (("q", T), ("k", S))
    }
    statics = dict(causal=problem.causal, window=problem.window, soft_cap=problem.soft_cap)
    if problem.bias == "function":
        statics["bias"] = alibi

    def forward(arrays, values):
        arrays = {
            name: x.swapaxes(1, 2) if head_major and name in "kv" else x
            for name, x in arrays.items()
        }
        return attention(**arrays, **values, **statics, impl="pallas_tpu")

    def loss(arrays, values):
        return jnp.sum(forward(arrays, values).astype(jnp.float32))

    with jax.set_mesh(mesh):
        function = jax.grad(loss) if gradients else forward
        return jax.jit(function).lower(arrays, values).compile()


ROWS = list(itertools.product(SHAPES, TPUS))
TELLING = ("Llama-3.2-1B", "Gemma-3-4B, local", WIDE, "ALiBi")
SLOW = [row for row in ROWS if row[0] == NARROW or (row[0] in TELLING and row[1] == "v5e")]


@pytest.mark.parametrize(("shape", "chip"), cases(ROWS, slow=SLOW))  # 5 to 10 s each
def test_forward_and_backward_compile(shape, chip):
    program = compiled(SHAPES[shape], chip)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.slow  # 5 s
def test_kernels_compile_where_others_count_in_64_bits():
    with jax.enable_x64(True):
        program = compiled(dataclasses.replace(SHAPES["Llama-3.2-1B"], T=1024), "v5p")
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.slow  # two programs each: 15 s
@pytest.mark.parametrize("shape", [NARROW, "DeepSeek-V3"])
def test_temporaries_are_linear_in_length(shape):
    problem = dataclasses.replace(SHAPES[shape], N=8, K=8)
    short, long = [
        temporaries(compiled(dataclasses.replace(problem, T=length), "v5p"))
        for length in (8192, 16384)
    ]
    assert long < 2.1 * short
    assert long < 8 * 16384**2 / 2**20 / 4  # less than two bits a score


CACHES = {
    "Llama-3-8B": Problem(B=8, T=1, S=8192, N=32, K=8, H=128, values="ps"),
    # 576 wide XLA lays it out with slots innermost, and the kernel gets a copy
    "DeepSeek-V3, latents": Problem(B=8, T=1, S=8192, N=128, K=1, H=640, U=512, values="ps"),
}


@pytest.mark.slow  # 3 s each
@pytest.mark.parametrize("shape", CACHES)
@pytest.mark.parametrize("chip", TPUS)
def test_a_step_of_decoding_copies_no_cache(shape, chip):
    problem = CACHES[shape]
    program = compiled(problem, chip, gradients=False, head_major=True)
    width = problem.H + (problem.U or problem.H)
    cache = 2 * problem.B * problem.S * problem.K * width / 2**20  # MiB
    assert temporaries(program) < cache / 50


@pytest.mark.slow  # 3 s
def test_a_step_from_latents_copies_none():
    B, S, mesh = 8, 8192, mesh_of("v5p")
    place = jax.NamedSharding(mesh, jax.P())

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def step(q, z, places):
        return pallas_tpu.latent_forward(q, z, 512, places, Rule(scale=0.1))

    places = tuple(Places(*[array(B, n, dtype=jnp.int32)] * 2) for n in (1, S))
    with jax.set_mesh(mesh):
        call = jax.shard_map(step, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        program = jax.jit(call).lower(array(B, 128, 1, 640), array(B, 1, S, 640), places).compile()
    assert temporaries(program) < 2  # MiB; the cache takes 80
