"""Trains Janus' VQ autoencoder, which the package itself only computes with.

For a third of the steps it is a plain autoencoder, of unit vectors in place of codes. Then the
codebook begins as such vectors, each far from those before it, and the loss is VQ-VAE's (van den
Oord et al. 2017, eq. 3): the mean squared error of what comes out, gradients going straight past
the choice of codes; codes towards latents; and, a quarter as much, latents towards codes. VQGAN's
discriminator and perceptual loss are left out. The thing a reader would get wrong: with a codebook
from the start 51 of 128 rows were ever the nearest, and colours are lost.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from flax import nnx

from llmprep_jax.models.janus.vq import VQ
from llmprep_jax.types import Array

COMMIT = 0.25
KERNEL = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)


def train_vq(
    vq: VQ, images: np.ndarray, *, steps: int, rows: int, lr: float, seed: int
) -> tuple[VQ, list[float]]:
    """The autoencoder after `steps` batches of pictures [N, H, W, 3] of values from -1 to 1, and
    the mean squared error of each."""
    tx = make_optimizer(steps, lr)
    batches = _batches(images, rows, np.random.default_rng(seed))
    graph, weights = nnx.split(vq)
    state, errors = tx.init(weights), []

    @functools.partial(jax.jit, static_argnames="is_free")
    def step(weights, state, images_NHWC, is_free):
        loss = functools.partial(loss_of, graph=graph, is_free=is_free)
        (_, error), gradients = jax.value_and_grad(loss, has_aux=True)(weights, images_NHWC)
        updates, state = tx.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state, error

    for number in rich.progress.track(range(steps), "training the autoencoder", transient=True):
        if number == steps // 3:
            some = np.concatenate([next(batches) for _ in range(16)])
            weights = _begin_codebook(graph, weights, some)
        weights, state, error = step(weights, state, next(batches), number < steps // 3)
        errors.append(error)
    return nnx.merge(graph, weights), [round(float(error), 5) for error in errors]


def make_optimizer(steps: int, lr: float) -> optax.GradientTransformation:
    """Muon for kernels of convolutions, Adam for what else there is: after 120 steps the error is
    two thirds of Adam's alone."""

    def axes(weights):
        return jax.tree.map(lambda w: KERNEL if w.ndim == 4 else None, weights)

    schedule = optax.warmup_cosine_decay_schedule(0, lr, min(10, steps // 2), steps, lr / 20)
    return optax.contrib.muon(schedule, adam_b2=0.95, muon_weight_dimension_numbers=axes)


def _batches(images: np.ndarray, rows: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        yield images[rng.choice(len(images), min(rows, len(images)), replace=False)]


def loss_of(weights, images_NHWC: Array, *, graph, is_free: bool) -> tuple[Array, Array]:
    """(the loss, the mean squared error); with no codes where it `is_free`."""
    vq, stop = nnx.merge(graph, weights), jax.lax.stop_gradient
    latents_NIZ = vq.latents(images_NHWC)
    if is_free:
        error = jnp.mean(jnp.square(vq.draw(latents_NIZ) - images_NHWC))
        return error, error
    codes_NIZ = vq.look_up(vq.quantize(stop(latents_NIZ)))
    drawn_NHWC = vq.draw(latents_NIZ + stop(codes_NIZ - latents_NIZ))
    error = jnp.mean(jnp.square(drawn_NHWC - images_NHWC))
    match = jnp.mean(jnp.square(stop(latents_NIZ) - codes_NIZ))
    commit = jnp.mean(jnp.square(latents_NIZ - stop(codes_NIZ)))
    return error + match + COMMIT * commit, error


def _begin_codebook(graph, weights, images_NHWC: np.ndarray) -> nnx.State:
    """The weights with latents in place of the codebook's rows."""
    vq = nnx.merge(graph, weights)
    latents_NIZ = np.asarray(jax.jit(type(vq).latents)(vq, images_NHWC))
    rows = spread(latents_NIZ.reshape(-1, vq.cfg.code_dim), vq.cfg.num_codes)
    vq.codebook[...] = jnp.asarray(rows, vq.codebook[...].dtype)
    return nnx.split(vq)[1]


def spread(vectors: np.ndarray, count: int) -> np.ndarray:
    """So many of some unit vectors, each the farthest from those before it."""
    chosen = [0]
    nearest = vectors @ vectors[0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, vectors @ vectors[chosen[-1]])
    return vectors[chosen]
