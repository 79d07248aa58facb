"""Laws of the families that read images, on tiny random models: rows of a batch are as each alone,
and a mesh computes what one device does, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmprep_jax.models import deepseek_vl, gemma3, gemma3_text, llama, llava, sam, siglip
from llmprep_jax.models.clip import VisionConfig as ClipConfig
from llmprep_jax.nn.param import Param
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.losses import sum_losses
from tests.grids import cases
from tests.models.tiny import random_model

WORDS, IMAGE = 90, 95
_SIZES = dict(vocab_size=96, dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8)
_LLAMA = llama.Config(**_SIZES, num_layers=2, max_seq_len=128)
_TOWER = dict(dim=16, mlp_dim=24, num_layers=2, num_heads=2, image_size=28)
_SIGLIP = siglip.VisionConfig(**_TOWER, patch_size=7, has_pool=False)
_SAM = sam.Config(
    dim=16,
    mlp_dim=24,
    num_layers=3,
    num_heads=2,
    image_size=40,
    patch_size=4,
    out_dim=8,
    window=4,
    global_layers=(1,),
)
CONFIGS = {
    "gemma3": gemma3.Config(
        gemma3_text.Config(**_SIZES, num_layers=3, global_every=2, window=3),
        _SIGLIP,
        tokens_per_image=4,
        image_id=IMAGE,
    ),
    "llava": llava.Config(_LLAMA, ClipConfig(**_TOWER, patch_size=14), image_id=IMAGE),
    "deepseek-vl": deepseek_vl.Config(_LLAMA, _SIGLIP, image_id=IMAGE),
    "deepseek-vl-hybrid": deepseek_vl.Config(
        _LLAMA, _SIGLIP, _SAM, image_id=IMAGE, model_type="deepseek_vl_hybrid"
    ),
}
families = pytest.mark.parametrize("name", cases(CONFIGS, slow=["deepseek-vl"]))


@functools.cache
def make_batch(name: str) -> dict[str, np.ndarray]:
    """Four rows with one image or two, as training has them."""
    cfg, rng = CONFIGS[name], np.random.default_rng(0)
    run = [IMAGE] * cfg.tokens_per_image
    words = lambda n: rng.integers(1, WORDS, n).tolist()  # noqa: E731
    rows = [words(2) + run + words(3) + run + words(2), words(3) + run + words(6)] * 2
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    mask = tokens > 0
    sizes = {"images": cfg.vision.image_size}
    if name == "deepseek-vl-hybrid":
        sizes["images_high"] = cfg.high.image_size
    media = {
        kind: rng.normal(size=(4, 2, size, size, 3)).astype(np.float32)
        for kind, size in sizes.items()
    }
    return dict(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_mask=((tokens != IMAGE) & mask).astype(np.float32),
        segment_ids=mask.astype(np.int32),
        **media,
    )


@functools.partial(jax.jit, static_argnames="media")
def loss_and_gradients(model, batch, media):
    """(logits, gradients) of the mean loss."""
    graph, params, rest = nnx.split(model, Param, ...)

    def mean_loss(params):
        model = nnx.merge(graph, params, rest)
        x_BTD = model.embed_inputs(batch["tokens"], **{kind: batch[kind] for kind in media})
        spans_BT = model.spans(batch["tokens"])
        more = batch if spans_BT is None else {**batch, "spans": spans_BT}
        summed = functools.partial(sum_losses, model.decoder, 0.0)
        total, count, _ = model.next_token_terms(x_BTD, more, summed)
        return total / count

    return jax.value_and_grad(mean_loss)(params)


def media_of(name: str) -> tuple[str, ...]:
    return tuple(kind for kind in make_batch(name) if kind.startswith("images"))


@families
def test_rows_with_unlike_images_are_as_each_alone(name):
    model, batch = random_model(CONFIGS[name]), make_batch(name)
    call = jax.jit(lambda model, tokens, mask, media: model(tokens, mask=mask, **media).logits)
    media = {kind: batch[kind] for kind in media_of(name)}
    mask = batch["segment_ids"] > 0
    whole = call(model, batch["tokens"], mask, media)
    for row in range(2):
        one = lambda x: x[row : row + 1]  # noqa: B023, E731
        found = call(model, one(batch["tokens"]), one(mask), jax.tree.map(one, media))
        np.testing.assert_allclose(whole[row][mask[row]], found[0][mask[row]], atol=2e-5)
    assert np.abs(np.asarray(whole[0] - whole[2])).max() > 1e-3  # other pictures, other logits


@families
def test_a_mesh_gives_the_loss_and_all_gradients_of_one_device(name):
    batch, media = make_batch(name), media_of(name)
    loss, expected = loss_and_gradients(random_model(CONFIGS[name]), batch, media)
    with use_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        model = random_model(CONFIGS[name])
        rows = {kind: jax.device_put(x, jax.P(("fsdp",))) for kind, x in batch.items()}
        found_loss, found = loss_and_gradients(model, rows, media)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
    most = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    pairs = zip(nnx.to_flat_state(found), nnx.to_flat_state(expected), strict=True)
    for (path, ours), (_, theirs) in pairs:
        scale = float(jnp.abs(theirs[...]).max())
        is_none = path[-2:] == ("k", "b")  # a softmax sees no bias that all keys share
        assert is_none or scale > 1e-6 * most, path
        atol = 1e-4 * scale + 1e-6 * most
        np.testing.assert_allclose(ours[...], theirs[...], atol=atol, err_msg=str(path))
