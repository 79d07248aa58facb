"""Places where the code is broken on purpose, each with the tests that must see it.

    make mutations                     # all of them, about half an hour on two cores
    python -m tests.mutations 3 17     # some

Each break is made in a copy of the working tree, its tests are run there until one fails, and a
break that all of them pass is named at the end (exit code 1). `tests/test_mutations.py` holds that
every break still has its place in the code.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("llmprep_jax", "experiments", "configs", "tests", "docs", "pyproject.toml", "README.md")


class Mutation(NamedTuple):
    """Code of a file of the package, what takes its place, and the tests (pytest's arguments)."""

    file: str
    code: str
    broken: str
    tests: str


MUTATIONS = [
    Mutation(
        "nn/rope.py", "head_dim / (head_dim - 2)", "head_dim / (head_dim - 1)", "nn/test_rope.py"
    ),
    Mutation(
        "nn/rope.py",
        "math.floor(low), math.ceil(high)",
        "math.floor(low), math.floor(high)",
        "nn/test_rope.py",
    ),
    Mutation(
        "nn/rope.py",
        "a, b = x_BTNH[..., 0::2]",
        "b, a = x_BTNH[..., 0::2]",
        "nn/test_rope.py models/test_golden.py",
    ),
    Mutation(
        "nn/norm.py", "x32 * (1.0 + self.scale", "x32 * (0.99 + self.scale", "nn/test_norm.py"
    ),
    Mutation("nn/mlp.py", "approximate=False", "approximate=True", "nn"),
    Mutation(
        "nn/balance.py", " / jnp.sum(scores_BTE, axis=-1, keepdims=True)", "", "nn/test_balance.py"
    ),
    Mutation("nn/balance.py", "(G / num_active_groups)", "(G / num_groups)", "nn/test_balance.py"),
    Mutation(
        "nn/moe.py",
        "best = 1 if routing.score",
        "best = 2 if routing.score",
        "nn/test_moe.py models/test_golden.py",
    ),
    Mutation(
        "nn/moe.py",
        "weights_BTA * routing.scale",
        "weights_BTA",
        "nn/test_moe.py models/test_golden.py",
    ),
    Mutation(
        "nn/mla.py",
        "_temperature(rope_scaling) ** 2",
        "_temperature(rope_scaling)",
        "nn/test_mla.py models/test_golden.py",
    ),
    Mutation(
        "nn/mla.py",
        "absorbed + T * S * (2 * C + R) < naive",
        "absorbed + T * S * (2 * C + R) > naive",
        "nn/test_mla.py",
    ),
    Mutation(
        "kernels/flash_attention/masks.py",
        "(k.segments > 0)",
        "(k.segments >= 0)",
        "kernels/flash_attention/test_masks.py models/test_laws.py",
    ),
    Mutation(
        "kernels/flash_attention/masks.py",
        "seen &= k.positions - q.positions < rule.window",
        "seen &= k.positions - q.positions <= rule.window",
        "kernels/flash_attention/test_masks.py",
    ),
    Mutation(
        "kernels/flash_attention/masks.py",
        "(q.spans == k.spans) & (k.spans > 0)",
        "(q.spans == k.spans)",
        "kernels/flash_attention/test_masks.py",
    ),
    Mutation(
        "kernels/flash_attention/gpu_blocks.py",
        "jnp.exp(lse_PBNT - top_BNT)",
        "1.0",
        "kernels/flash_attention/test_pallas_gpu.py",
    ),
    Mutation(
        "kernels/flash_attention/api.py",
        "sums_BTN - dlse_BTN",
        "sums_BTN",
        "kernels/flash_attention/test_attention.py",
    ),
    Mutation(
        "kernels/flash_attention/chunked.py",
        "jnp.max(s_BKGTS, axis=-1, keepdims=True)",
        "jnp.max(s_BKGTS, axis=-1, keepdims=True) * 0",
        "kernels/flash_attention/test_attention.py",
    ),
    Mutation(
        "nn/stack.py", "compute.unroll or depth(layers)", "compute.unroll or 1", "nn/test_stack.py"
    ),
    Mutation(
        "nn/routes.py",
        "weights_R[:, None].astype(dz_RD.dtype) * dz_RD",
        "dz_RD",
        "nn/test_dispatch.py nn/test_moe.py",
    ),
    Mutation(
        "kernels/grouped_matmul/blocks.py", "[:, None] < left", "[:, None] <= left", "kernels"
    ),
    Mutation("kernels/grouped_matmul/pallas_tpu.py", "(row < end)", "(row <= end)", "kernels"),
    Mutation("kernels/grouped_matmul/pallas_gpu.py", "[:, None] & is_new", "[:, None]", "kernels"),
    Mutation(
        "kernels/grouped_matmul/blocks.py",
        'jnp.arange(len(x_MD)), side="right"',
        'jnp.arange(len(x_MD)), side="left"',
        "kernels",
    ),
    Mutation(
        "generate/sampler.py",
        "tail_BV <= 1 - top_p",
        "tail_BV <= 1.02 - top_p",
        "generate/test_sampler.py",
    ),
    Mutation(
        "generate/sampler.py",
        "logits_BV < _kth_largest",
        "logits_BV <= _kth_largest",
        "generate/test_sampler.py",
    ),
    Mutation(
        "generate/sampler.py",
        "logits_BV * penalty)",
        "logits_BV / penalty)",
        "generate/test_sampler.py",
    ),
    Mutation(
        "train/losses.py", "z_loss * jnp.square(lse_BT)", "z_loss * lse_BT", "train/test_losses.py"
    ),
    Mutation(
        "train/losses.py",
        "jnp.where(weights_BT != 0, losses_BT, 0.0)",
        "losses_BT",
        "train/test_losses.py",
    ),
    Mutation(
        "train/optim.py",
        "jnp.cos(jnp.pi * progress)",
        "jnp.cos(3.0 * progress)",
        "train/test_optim.py",
    ),
    Mutation(
        "train/optim.py",
        "fall = min(fall, round(cfg.decay_fraction * num_steps))",
        "fall = min(fall, round(cfg.decay_fraction * num_steps) + 1)",
        "train/test_optim.py",
    ),
    Mutation(
        "train/adam8bit.py",
        "c1, c2 = 1 - b1**count, 1 - b2**count",
        "c1, c2 = 1 - b2**count, 1 - b2**count",
        "train/test_adam8bit.py",
    ),
    Mutation(
        "data/packing.py",
        "bisect.bisect_left(spaces, (size, -1))",
        "bisect.bisect_left(spaces, (size + 1, -1))",
        "data",
    ),
    Mutation("data/packing.py", "np.arange(len(piece)), m + 1", "np.arange(len(piece)), m", "data"),
    Mutation(
        "quant/nf4.py",
        'jnp.asarray(middle), x, side="left"',
        'jnp.asarray(middle), x, side="right"',
        "quant/test_nf4.py",
    ),
    Mutation(
        "quant/nf4.py",
        "[(start + jnp.arange(count)) // NESTED_BLOCK]",
        "[jnp.arange(count) // NESTED_BLOCK]",
        "quant/test_nf4.py quant/test_linear.py",
    ),
    Mutation(
        "quant/int8.py",
        "jnp.round(w / scale[:, None])",
        "jnp.trunc(w / scale[:, None])",
        "quant/test_integers.py",
    ),
    Mutation(
        "quant/int4.py",
        "jnp.round(-low / exact), 0, 15",
        "jnp.round(-low / exact), 0, 14",
        "quant/test_integers.py",
    ),
    Mutation(
        "peft/lokr.py",
        'jnp.einsum("ac,bd->cdab", w1, w2)',
        'jnp.einsum("ac,bd->dcab", w1, w2)',
        "peft/test_methods.py -k lokr",
    ),
    Mutation("peft/vera.py", "b * d * params", "b * params", "peft/test_methods.py -k vera"),
    Mutation(
        "peft/ia3.py",
        "return bias if self.feedforward",
        "return bias if not self.feedforward",
        "peft",
    ),
    Mutation(
        "weights/table.py",
        "(slice(start, start + step),)",
        "(slice(start, start + step - 1),)",
        "weights/test_table.py",
    ),
    Mutation(
        "weights/table.py",
        "jnp.promote_types, stored",
        "lambda a, b: a, stored",
        "weights/test_table.py",
    ),
    Mutation(
        "weights/safetensors.py",
        "if stop > size",
        "if stop > size + 8",
        "weights/test_safetensors.py weights/test_safetensors_fuzz.py",
    ),
    Mutation(
        "text/stream.py",
        "for size in range(1, len(mark))",
        "for size in range(1, len(mark) - 1)",
        "text generate/test_text.py",
    ),
    Mutation("text/stream.py", "piece.endswith(_REPLACEMENT)", 'piece.endswith("!")', "text"),
    Mutation(
        "sharding.py",
        "taken and shape is not None and shape[dim]",
        "False and shape[dim]",
        "sharding nn/test_linear.py",
    ),
]


def apply(mutation: Mutation, root: pathlib.Path) -> None:
    """Breaks the code under `root`.

    Raises:
      ValueError: the code to break is not there, or stands there twice.
    """
    path = root / "llmprep_jax" / mutation.file
    text = path.read_text()
    if text.count(mutation.code) != 1:
        raise ValueError(
            f"{path}: {mutation.code!r} stands there {text.count(mutation.code)} times"
        )
    path.write_text(text.replace(mutation.code, mutation.broken))


def is_seen(mutation: Mutation) -> bool:
    """Whether one of the mutation's tests fails with the code broken."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, pathlib.Path(folder, name))
        apply(mutation, pathlib.Path(folder))
        tests = [
            x if x.startswith("-") or not (ROOT / "tests" / x).exists() else f"tests/{x}"
            for x in mutation.tests.split()
        ]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-m",
            "not slow and not grid",
            *tests,
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"pytest ended with {done.returncode} for {mutation}: {done.stdout[-500:]}"
        )
    return done.returncode == 1


def main(numbers: list[str]) -> int:
    chosen = [int(number) for number in numbers] or range(len(MUTATIONS))
    missed = []
    for number in chosen:
        start, mutation = time.monotonic(), MUTATIONS[number]
        seen = is_seen(mutation)
        missed += [] if seen else [number]
        word, seconds = "seen" if seen else "MISSED", time.monotonic() - start
        line = f"{number:2} {word:6} {seconds:4.0f} s  {mutation.file}: {mutation.broken}"
        print(line, flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} breaks seen")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
