"""What is adapted: layers left out by name and number, single rows of the embedding, spellings."""

import contextlib
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import llmprep_jax as lp
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.nn.settle import settle
from llmprep_jax.peft import AdaLoRA, DoRA, LongLoRA, LoRA, QLoRA
from llmprep_jax.peft.adapter import adapters
from llmprep_jax.peft.counts import count_targets
from llmprep_jax.peft.tokens import TokenRows
from llmprep_jax.quant import quantize_model
from llmprep_jax.train.losses import next_token_loss
from tests.models.tiny import make_tokens
from tests.peft.test_methods import METHODS, assert_near, base, logits_of, scattered, trained

PREFIX = "base_model.model.model.layers"


@functools.cache
def attention() -> nnx.Module:
    return scattered(lp.peft.inject(base(), LoRA(4, 8, targets=("q_proj", "o_proj"))))


def taken(**settings) -> set[str]:
    whole = base()
    model = jax.eval_shape(lambda: lp.peft.inject(whole, LoRA(4, 8, **settings)))
    return {path.removeprefix("layers.") for path in adapters(model)}


def test_a_bare_name_is_the_end_of_a_name_as_in_a_list():
    assert taken(targets="q_proj") == taken(targets=("q_proj",)) == {"attn.q"}
    assert taken(targets="attn.o") == {"attn.o"}


def test_layers_are_left_out_by_name_and_where_they_are_trained_whole():
    kept = {"attn.q", "attn.o", "mlp.gate", "mlp.up", "mlp.down"}
    assert taken(exclude_modules=("k_proj", "v_proj")) == kept
    assert taken(exclude_modules=r".*\.(k|v)_proj") == kept
    assert taken(modules_to_save=("k_proj", "v_proj")) == kept


def test_layers_that_are_left_out_by_number_begin_as_zeros_and_get_no_gradient():
    model = lp.peft.inject(base(), LoRA(4, 8, targets=("q_proj",), layers_to_transform=1))
    a = np.asarray(model.layers.attn.q.lora_a)
    assert not np.any(a[0])
    assert np.any(a[1])
    graph, adapters, rest = nnx.split(model, AdapterParam, ...)

    def loss(adapters):
        return jnp.square(nnx.merge(graph, adapters, rest)(make_tokens()).logits).mean()

    moved = jax.tree.map(lambda x: x + np.float32(0.1) * (np.asarray(x) != 0), adapters)
    grads = np.asarray(jax.jit(jax.grad(loss))(moved).layers.attn.q.lora_b)
    assert not np.any(grads[0])
    assert np.any(grads[1])


def second_layer(**settings) -> nnx.Module:
    """With an adapter around q of the second of two layers."""
    method = LoRA(4, 8, targets=("q_proj",), layers_to_transform=1, **settings)
    return scattered_where_adapted(lp.peft.inject(base(), method))


def scattered_where_adapted(model: nnx.Module) -> nnx.Module:
    """As `scattered`, but for the layers whose zeros no step of training moves."""
    moved = scattered(model)
    for path, layer in adapters(moved).items():
        for name in layer.names:
            variable, before = getattr(layer, name), getattr(adapters(model)[path], name)
            rows = np.array(variable[...])
            rows[list(layer.left_out)] = np.asarray(before[...])[list(layer.left_out)]
            variable[...] = jnp.asarray(rows)
    return moved


@pytest.mark.parametrize("bias", ["none", "all"])
def test_layers_that_are_left_out_by_number_are_in_no_file_and_come_back_left_out(tmp_path, bias):
    model = second_layer(bias=bias)
    folder = lp.peft.save(model, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    q = f"{PREFIX}.1.self_attn.q_proj"
    assert {name for name in tensors if "bias" not in name} == {
        f"{q}.lora_A.weight",
        f"{q}.lora_B.weight",
    }
    biases = {name for name in tensors if name.endswith("q_proj.bias") or "base_layer" in name}
    names = {f"{PREFIX}.0.self_attn.q_proj.bias", f"{q}.base_layer.bias"}  # as PEFT names them
    assert biases == (names if bias == "all" else set())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    loaded = lp.peft.load(base(), folder)
    assert_near(loaded, model, 1e-7)
    again = load_file(lp.peft.save(loaded, tmp_path / "b") / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()


def test_adapters_keep_what_is_left_out_through_all_that_is_made_of_them(tmp_path):
    method = LoRA(4, 8, targets=("q_proj",), layers_to_transform=1, init_weights="pissa")
    models = {
        "one": second_layer(),
        "part": scattered_where_adapted(lp.peft.inject(base(), method)),
    }
    several = lp.peft.combine(models)
    made = {
        "chosen": lp.peft.select(several, "one"),
        "blended": lp.peft.blend(several, {"one": 0.5, "part": 0.5}),
        "settled": settle(models["one"]),
        "begun in the weight": models["part"],
    }
    for name, model in made.items():
        folder = lp.peft.save(model, tmp_path / name)
        names = load_file(folder / "adapter_model.safetensors").keys()
        assert not [x for x in names if ".layers.0." in x], name


def test_what_is_left_out_is_in_memory_and_is_counted_as_no_parameter():
    found = lp.peft.count(second_layer())
    assert (found.trainable, found.idle) == (4 * (32 + 32), 4 * (32 + 32))
    assert found.trainable_bytes == 4 * (found.trainable + found.idle)
    whole = lp.peft.count(base())
    assert found.frozen == whole.frozen
    (row,) = count_targets(second_layer()).values()
    assert row.trainable == found.trainable


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(exclude_modules=("x_proj",)), "module to exclude 'x_proj' matches no linear layer"),
        (dict(targets=("q_proj",), exclude_modules=("q_proj",)), "of the targets none is left"),
        (dict(layers_pattern="layers"), "layers_pattern is for layers_to_transform; give"),
        (dict(targets=r".*q_proj", layers_to_transform=1), "put the numbers into '.*q_proj'"),
        (dict(layers_to_transform=[-1]), r"layers_to_transform is \(-1,\); it must hold"),
        (dict(layers_to_transform=7), "of the targets none is left"),
        (
            dict(targets="q_proj", trainable_token_indices=(96,)),
            "holds 96; give each token once, from 0 to 95",
        ),
        (dict(targets="q_proj", trainable_token_indices=(1, 1)), "holds 1; give each token once"),
        (
            dict(
                targets="q_proj",
                modules_to_save=("embed_tokens",),
                trainable_token_indices=(1,),
            ),
            "the embedding is a target or trained whole",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_selections_that_take_nothing_are_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        lp.peft.inject(base(), LoRA(4, 8, **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (DoRA(4, layers_to_transform=1), "layers.attn.k and leaves others, which DoRA cannot"),
        (AdaLoRA(4, layers_to_transform=1), "layers.attn.k and leaves others, which AdaLoRA"),
        (
            LoRA(4, layers_to_transform=1, bias="lora_only"),
            'leaves layers of the stack layers.attn.k, whose biases bias="lora_only" would train',
        ),
    ],
    ids=["zeros change it", "a budget for all", "biases"],
)
def test_what_cannot_leave_layers_out_of_a_stack_takes_it_whole(method, message):
    with pytest.raises(ValueError, match=message) as caught:
        lp.peft.inject(base(), method)
    assert "unstack(model.layers) first" in str(caught.value)


def test_rows_of_the_embedding_are_trained_alone_and_merge_into_it(tmp_path):
    ids = (5, 17, 90)
    fresh = lp.peft.inject(base(), LoRA(4, targets="q_proj", trainable_token_indices=ids))
    assert isinstance(fresh.embed, TokenRows)
    assert_near(logits_of(fresh), logits_of(base()), 1e-6)
    model = scattered(fresh)
    merged = lp.peft.merge(model)
    assert_near(logits_of(merged), logits_of(model))
    changed = np.any(np.asarray(merged.embed.w) != np.asarray(base().embed.w), axis=1)
    assert np.flatnonzero(changed).tolist() == list(ids)
    assert lp.peft.strip(model).embed.w[...] is base().embed.w[...]
    folder = lp.peft.save(model, tmp_path / "rows")
    assert_near(lp.peft.load(base(), folder), model, 1e-7)


EMBED = "base_model.model.model.embed_tokens.weight"


def renamed(old: str, new: str):
    """Tensors of which the names have one thing in another's place."""
    return lambda tensors: {name.replace(old, new): x for name, x in tensors.items()}


FILES = {
    "with the adapter's name": renamed(".weight", ".default.weight"),
    "of a compiled model": renamed(".model.model", ".model._orig_mod.model"),
    "with the base's embedding": lambda t: t | {EMBED: np.asarray(base().embed.w[...])},
}


def changed_folder(tmp_path, change, **config):
    folder = lp.peft.save(attention(), tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    file = tmp_path / "b" / "adapter_model.safetensors"
    save_file(change(load_file(folder / file.name)), file)
    path = tmp_path / "b" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return tmp_path / "b"


@pytest.mark.parametrize("change", FILES.values(), ids=FILES)
def test_files_of_other_spellings_say_the_same(tmp_path, change):
    assert_near(lp.peft.load(base(), changed_folder(tmp_path, change)), attention(), 1e-7)


def test_an_embedding_that_came_with_an_adapter_is_taken_unless_it_was_resized(tmp_path):
    table = 1.1 * np.asarray(base().embed.w[...])
    model = lp.peft.load(base(), changed_folder(tmp_path / "x", lambda t: t | {EMBED: table}))
    np.testing.assert_allclose(model.embed.w[...], table, rtol=1e-6)
    folder = changed_folder(tmp_path / "y", lambda t: t | {EMBED: table[:90]})
    with pytest.raises(ValueError, match=r"has 90 rows, and the base's table 96; the vocabulary"):
        lp.peft.load(base(), folder)


def test_a_rank_above_a_layers_smaller_side_is_read(tmp_path):
    def wide(tensors):
        rng = np.random.default_rng(0)
        shape = lambda name, x: (40, x.shape[1]) if "lora_A" in name else (x.shape[0], 40)  # noqa: E731
        return {
            name: rng.normal(0, 0.1, shape(name, x)).astype(np.float32)
            for name, x in tensors.items()
        }

    model = lp.peft.load(base(), changed_folder(tmp_path, wide, r=40))
    assert model.layers.attn.q.lora_a.shape == (2, 32, 40)


def test_a_base_that_is_named_and_lacks_the_layers_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "qwen2"}')
    tensors = {"transformer.h.0.attn.weight": np.zeros((2, 2), np.float32)}
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no module for model.layers.0.* peft would leave it"):
        lp.peft.save(attention(), tmp_path / "a", base_model=str(tmp_path / "other"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2"])
def test_beginnings_in_the_weight_are_refused_around_packed_layers(init):
    method = QLoRA(4, 8, targets=("q_proj",), init_weights=init)
    with pytest.raises(ValueError, match="a packed layer would keep a rest") as caught:
        lp.peft.inject(base(), method)
    assert "\n" not in str(caught.value)


def test_power_iterations_find_the_largest_singular_values():
    products = []
    for init in ("pissa", "pissa_niter_8"):
        model = lp.peft.inject(base(), LoRA(4, 2, targets=("down_proj",), init_weights=init))
        down = model.layers.mlp.down
        products.append(np.einsum("lfr,lrd->lfd", down.lora_a[...], down.lora_b[...]))
    assert_near(products[1], products[0], 1e-2)


def test_layers_are_named_while_their_weights_are_looked_at():
    seen = []
    method = LoRA(4, 2, targets=("q_proj",), init_weights="pissa")
    lp.peft.inject(base(), method, progress=seen.append)
    assert seen == ["layers.attn.q 1/2", "layers.attn.q 2/2"]


@pytest.mark.parametrize(
    ("dtype", "is_packed"), [("bfloat16", False), ("bfloat16", True)], ids=["dense", "packed"]
)
def test_dora_starts_as_the_identity_in_every_dtype(dtype, is_packed):
    packed = r"layers\.(attn\.q|mlp\.down)"
    plain = quantize_model(base(), "nf4", packed) if is_packed else base()
    model = lp.peft.inject(plain, DoRA(4, 8, targets=("q_proj", "down_proj"), dtype=dtype))
    assert model.layers.attn.q.lora_a.dtype == dtype
    np.testing.assert_array_equal(logits_of(model), logits_of(plain))


def test_a_settled_model_says_the_same():
    model = trained(METHODS["dora-rslora"])
    assert "ratio" in settle(model).layers.attn.q.names
    assert_near(logits_of(settle(model)), logits_of(model), 1e-6)


def test_rows_of_several_adapters_are_trained_by_the_shipped_loss_with_their_own_dropout():
    law = scattered(lp.peft.inject(base(), LoRA(4, 8, targets=("q_proj",), dropout=0.5)))
    verse = scattered(lp.peft.inject(base(), LoRA(2, 8, targets=("q_proj",)), seed=1))
    rows = lp.peft.select(lp.peft.combine({"law": law, "verse": verse}), ["law", "verse"])
    tokens = make_tokens(2)
    batch = {"tokens": tokens, "targets": tokens, "loss_mask": np.ones(tokens.shape, np.float32)}
    graph, trained, rest = nnx.split(rows, AdapterParam, ...)

    @jax.jit
    def grads_of(key, weights):
        def loss(trained):
            model = lp.peft.train_mode(nnx.merge(graph, trained, rest), key)
            return next_token_loss(model, batch | {"loss_mask": weights}).total

        return jax.grad(loss)(trained)

    def of(grads, name):
        return np.asarray(grads.layers.attn.q.parts[name].lora_b[...])

    keys, ones = jax.random.split(jax.random.key(0)), batch["loss_mask"]
    first, second = (grads_of(key, ones) for key in keys)
    assert np.any(of(first, "law") != of(second, "law"))
    np.testing.assert_array_equal(of(first, "verse"), of(second, "verse"))
    alone = grads_of(keys[0], ones * np.array([[0], [1]], np.float32))
    assert not np.any(of(alone, "law"))
    np.testing.assert_allclose(of(alone, "verse"), of(first, "verse"), atol=1e-6)


def test_a_blend_takes_long_loras():
    long = LongLoRA(2, 4, targets=("attn.q",), modules_to_save=())
    models = {"a": scattered(lp.peft.inject(base(), long)), "b": attention()}
    with contextlib.suppress(Warning):
        both = lp.peft.combine(models)
    weights = {"a": 0.5, "b": 0.5}
    assert_near(logits_of(lp.peft.blend(both, weights)), logits_of(lp.peft.merge(both, weights)))
