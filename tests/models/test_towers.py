"""CLIP and SigLIP: golden numbers of transformers, and laws that any tower keeps."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import clip, registry, siglip
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.nn.stack import unstack
from llmprep_jax.peft import LoRA
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.train.contrastive import sum_pairs
from llmprep_jax.weights import table
from tests.grids import cases
from tests.models.test_golden import load
from tests.models.towers import CONFIGS, END, make_images, make_texts, make_towers

NAMES = ["clip", "siglip"]


@functools.cache
def model_of(name):
    return make_towers(name)


@jax.jit
def loss_and_grads(model, tokens, images, mask):
    """The loss without a mask and its gradients, all that a call gives, and logits with a mask."""

    def loss(model):
        out = model(tokens, images)
        kind = "softmax" if model.logit_bias is None else "sigmoid"
        total = sum_pairs(out.image_embeds, out.text_embeds, *model.similarity(), kind)
        return total / len(tokens), out

    masked = model(tokens, images, mask).logits_per_image
    return jax.value_and_grad(loss, has_aux=True)(model), masked


@pytest.mark.parametrize("name", NAMES)
def test_vectors_logits_loss_and_gradients_are_those_of_transformers(name):
    model, golden = load(name)
    (((loss, out), grads), masked) = loss_and_grads(
        model, golden["tokens"], golden["images"], golden["mask"]
    )
    for field, values in out._asdict().items():
        np.testing.assert_allclose(values, golden[field], atol=1e-5, err_msg=field)
    np.testing.assert_allclose(masked, golden["masked"], atol=1e-5)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    found = dict(table.export(grads, model.weights))
    wanted = {key[len("grad/") :]: grad for key, grad in golden.items() if key.startswith("grad/")}
    assert len(wanted) >= 10
    for key, grad in wanted.items():
        np.testing.assert_allclose(found[key], grad, atol=1e-4 * np.abs(grad).max(), err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_is_what_it_is_in_a_batch(name):
    model, tokens, images = model_of(name), make_texts(), make_images()
    texts, pictures = model.encode_text(tokens), model.encode_image(images)
    assert texts.dtype == pictures.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-6)
    for row in (0, 3):
        one = slice(row, row + 1)
        np.testing.assert_allclose(model.encode_text(tokens[one]), texts[one], atol=1e-6)
        np.testing.assert_allclose(model.encode_image(images[one]), pictures[one], atol=1e-6)


def test_clip_reads_a_text_up_to_its_first_end_whatever_follows():
    tokens = np.array([[5, 6, END, END, END, END], [5, 6, END, 7, END, 8]], np.int32)
    first, second = model_of("clip").encode_text(tokens)
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert np.abs(first - model_of("clip").encode_text(tokens[:, :2])[0]).max() > 0.01


def test_clip_reads_the_end_of_newer_files_by_its_id():
    """An end that is not the greatest id, and a text without one, which its first token is for."""
    config = CONFIGS["clip"]
    text = clip.TextConfig(**{**vars(config.text), "eos_id": 7})
    model = model_of("clip")
    graph, state = nnx.split(model)
    newer = nnx.merge(graph, state)
    newer.text.cfg = text
    tokens = np.array([[5, 6, 7, END, 7], [5, 6, END, 3, 3]], np.int32)
    states = newer.text.norm(newer.text.features(tokens))
    np.testing.assert_allclose(
        newer.text(tokens), np.stack([states[0, 2], states[1, 0]]), atol=1e-6
    )


def test_siglip_reads_a_text_at_its_last_place_and_sees_padding_unless_masked():
    model, tokens = model_of("siglip"), np.array([[5, 6, 7, 1, 1, 1]], np.int32)
    other = np.array([[5, 6, 7, 1, 2, 1]], np.int32)
    mask = np.array([[True] * 4 + [False] * 2])
    plain = model.encode_text(tokens)
    assert np.abs(plain - model.encode_text(other)).max() > 1e-3
    assert np.abs(plain - model.encode_text(tokens, mask)).max() > 1e-3
    # what is hidden is not seen, also by the last place, which is hidden itself
    hidden = model.encode_text(tokens, mask)
    np.testing.assert_allclose(hidden, model.encode_text(other, mask), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_model_encodes_as_it_did_when_it_was_made(name):
    model, images = model_of(name), make_images(2)
    tokens, mask = np.array([[5, 6, END, 3]], np.int32), np.array([[True, True, True, False]])
    frozen = model.frozen()
    expected = [
        model.encode_image(images),
        model.encode_text(tokens),
        model.encode_text(tokens, mask),
    ]
    found = [frozen.encode_image(images), frozen.encode_text(tokens)]
    found.append(frozen.encode_text(tokens, mask))
    for one, same in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, same, atol=1e-6)
    with pytest.raises(ValueError, match="outside the vocabulary of 40"):
        frozen.encode_text(np.array([[5, 40]], np.int32))


@pytest.mark.parametrize(
    ("dtype", "axes"), [("bfloat16", None), ("float32", {"fsdp": 4, "tensor": 2})], ids=str
)
def test_a_frozen_model_encodes_alike_in_bf16_and_on_a_mesh(dtype, axes):
    with contextlib.nullcontext() if axes is None else use_mesh(make_mesh(axes)):
        model = make_towers("clip", dtype=dtype)
    tokens, images = make_texts(8), make_images(8)
    found, atol = model.frozen(), 1e-6 if dtype == "float32" else 0.02
    np.testing.assert_allclose(found.encode_text(tokens), model.encode_text(tokens), atol=atol)
    np.testing.assert_allclose(found.encode_image(images), model.encode_image(images), atol=atol)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_model_keeps_its_adapters(name):
    model, tokens, images = model_of(name), make_texts(2), make_images(2)
    adapted = lp.peft.inject(model, LoRA(rank=2, targets=("q_proj", "fc1")))
    graph, trained, rest = nnx.split(adapted, AdapterParam, ...)
    moved = jax.tree.map(lambda x: x + 0.3, trained)
    adapted = nnx.merge(graph, moved, rest)
    found = adapted.frozen()
    for kind, inputs in (("text", tokens), ("image", images)):
        encode = f"encode_{kind}"
        expected = getattr(adapted, encode)(inputs)
        assert np.abs(expected - getattr(model, encode)(inputs)).max() > 1e-3
        np.testing.assert_allclose(getattr(found, encode)(inputs), expected, atol=1e-6)


def test_stacks_and_lists_of_layers_stop_at_the_same():
    model, images = model_of("siglip"), make_images(2)
    graph, state = nnx.split(model)
    listed = nnx.merge(graph, state)
    listed.vision.layers = unstack(model.vision.layers)
    some = model.vision.features(images, -1)
    np.testing.assert_allclose(listed.vision.features(images, -1), some, atol=1e-6)


@pytest.mark.parametrize("name", cases(NAMES, fast=["clip"]))
def test_features_stop_where_they_are_told(name):
    tower, images = model_of(name).vision, make_images(2)
    all_but_one = tower.features(images, -1)
    np.testing.assert_allclose(all_but_one, tower.features(images, 1), atol=1e-6)
    none = tower.features(images, 0)
    np.testing.assert_array_equal(none, tower.features(images, -2))
    assert np.abs(all_but_one - none).max() > 0.01
    assert tower.features(images).shape == (2, tower.cfg.num_tokens, 16)


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    images = make_images(1)
    model, seen, unseen = model_of("siglip"), images.copy(), images.copy()
    unseen[:, 8], unseen[:, :, 8], seen[:, 7, 7] = 100.0, 100.0, 100.0
    vector = model.encode_image(images)
    np.testing.assert_array_equal(model.encode_image(unseen), vector)
    assert np.abs(model.encode_image(seen) - vector).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_refused_in_one_line(name):
    model = model_of(name)
    with pytest.raises(ValueError, match=r"takes \[B, 9, 9, 3\]"):
        model.encode_image(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="positions for 10"):
        model.encode_text(np.ones((1, 11), np.int32))
    with pytest.raises(ValueError, match="outside the vocabulary of 40"):
        model.encode_text(np.full((1, 3), 40, np.int32))


@pytest.mark.parametrize(
    ("family", "part", "field", "value"),
    [
        (clip, "text_config", "hidden_act", "swish"),
        (clip, "vision_config", "num_channels", 1),
        (clip, "vision_config", "hidden_size", 31),
        (clip, "vision_config", "image_size", [224, 112]),
        (siglip, "text_config", "projection_size", 20),
        (siglip, "vision_config", "vision_use_head", False),
        (siglip, "vision_config", "patch_size", 0),
        (siglip, "text_config", "num_hidden_layers", "two"),
    ],
)
def test_what_is_not_computed_is_refused(family, part, field, value):
    config = registry.to_hf(CONFIGS[family.MODEL_TYPES[0]])
    config[part] = {**config[part], field: value}
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        family.from_hf(config)


@pytest.mark.slow  # initialisers compile for seconds
def test_random_weights_are_those_of_the_papers():
    """Standard deviations of widths 128 and 192, and the scalars."""
    sizes = dict(num_layers=2, num_heads=4)
    text = dict(vocab_size=500, dim=128, mlp_dim=512, **sizes)
    vision = dict(dim=192, mlp_dim=768, **sizes)
    states = {}
    for name, family in (("clip", clip), ("siglip", siglip)):
        more = {} if name == "clip" else {"projection_dim": 192}
        cfg = family.Config(family.TextConfig(**text, **more), family.VisionConfig(**vision))
        model = jax.jit(lambda cfg=cfg: registry.build(cfg, rngs=nnx.Rngs(0)))()
        flat = nnx.to_flat_state(nnx.state(model))
        states[name] = {".".join(map(str, path)): np.asarray(x[...]) for path, x in flat}
    expected = {
        ("clip", "text.embed.w"): 0.02,
        ("clip", "text.positions.table"): 0.01,
        ("clip", "text.layers.attn.q.w"): 128**-0.5,
        ("clip", "text.layers.attn.o.w"): 128**-0.5 / 2,
        ("clip", "text.layers.mlp.up.w"): 256**-0.5,
        ("clip", "text.layers.mlp.down.w"): 128**-0.5 / 2,
        ("clip", "text_projection.w"): 128**-0.5,
        ("clip", "vision.positions.table"): 192**-0.5,
        ("siglip", "text.embed.w"): 128**-0.5,
        ("siglip", "vision.layers.attn.k.w"): 192**-0.5,
        ("siglip", "vision.layers.mlp.up.w"): (2 / (192 + 768)) ** 0.5,
        ("siglip", "vision.pool.probe"): (2 / 193) ** 0.5,
        ("siglip", "vision.patches.w"): 768**-0.5,
    }
    for (name, path), std in expected.items():
        assert states[name][path].std() == pytest.approx(std, rel=0.1), path
    assert states["clip"]["logit_scale"] == pytest.approx(np.log(1 / 0.07), abs=1e-4)
    assert states["siglip"]["logit_scale"] == pytest.approx(np.log(10))
    assert states["siglip"]["logit_bias"] == -10
