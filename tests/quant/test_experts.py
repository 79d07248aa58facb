"""DeepSeek on packed weights, experts too: the released fp8 folders, other formats, and QLoRA."""

import dataclasses
import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.nn.moe import ExpertWeights
from llmprep_jax.nn.param import AdapterParam, Buffer, Compute
from llmprep_jax.quant import folder as packed_folder
from llmprep_jax.quant import packed_layers, quantize_model
from llmprep_jax.quant.linear import QuantExperts
from llmprep_jax.sharding import make_mesh, use_mesh
from llmprep_jax.weights import table
from llmprep_jax.weights.folder import FolderCheckpoint
from llmprep_jax.weights.safetensors import write_folder
from tests.models.tiny import CONFIGS, forward, make_tokens, random_model

BLOCK = 16  # of 24 rows of kv_a and of experts' hidden widths the second block is partial
PACKED = re.compile(r"(self_attn|mlp)\..*_proj(_with_mqa)?\.weight$")
EXPERT = "model.layers.1.mlp.experts.5.gate_proj"
KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa"
ATTENTION = ("kv_a", "kv_b", "o", "q_a", "q_b")
LAYERS = [f"{x}.attn.{y}" for x in ("dense_layers", "moe_layers", "mtp.0.block") for y in ATTENTION]
LAYERS += [f"dense_layers.mlp.{x}" for x in ("down", "gate", "up")]
LAYERS += [
    f"{x}.mlp.{y}.{z}"
    for x in ("moe_layers", "mtp.0.block")
    for y in ("experts", "shared")
    for z in ("down", "gate", "up")
]


@functools.cache
def model() -> nnx.Module:
    return random_model(CONFIGS["deepseek-v3"])


def pack(shape, rng):
    """Random codes with scales, and what they stand for, by the released README's formula."""
    codes = rng.normal(0, 100, shape).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5e-3, 2e-3, [-(-size // BLOCK) for size in shape]).astype(np.float32)
    whole = scale.repeat(BLOCK, 0).repeat(BLOCK, 1)[: shape[0], : shape[1]]
    return codes, scale, codes.astype(np.float32) * whole


@functools.cache
def released() -> tuple[dict, dict, dict]:
    """(config, tensors, values of those that are packed), as DeepSeek-V3 is released."""
    rng, tensors, values = np.random.default_rng(0), {}, {}
    for name, array in table.export(model(), model().weights):
        if not PACKED.search(name):
            tensors[name] = np.array(array)
            continue
        tensors[name], tensors[f"{name}_scale_inv"], values[name] = pack(array.shape, rng)
    for name in ("embed_tokens", "shared_head.head"):  # copies of the main model's
        tensors[f"model.layers.3.{name}.weight"] = tensors["lm_head.weight"]
    config = registry.to_hf(model().cfg)
    config["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return config, tensors, values


def write(path, config=None, change=lambda tensors: None, **fields):
    """The released folder with other fields of config.json or tensors."""
    whole, tensors, _ = released()
    tensors = dict(tensors)
    change(tensors)
    (path / "config.json").write_text(json.dumps({**(config or whole), **fields}))
    write_folder(path, tensors.items(), max_shard_bytes=100_000)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def loaded(folder):
    return lp.load_model(folder)


def stacked(pattern, layers=(1, 2), experts=range(8)):
    _, _, values = released()
    return np.stack([[values[pattern.format(l=l, e=e)] for e in experts] for l in layers])


def test_a_released_folder_is_held_as_it_is_packed(loaded):
    layers = packed_layers(loaded)
    assert sorted(layers) == sorted(LAYERS)  # and not eh_proj, routers, tables
    assert {layer.packed.kind for layer in layers.values()} == {"fp8"}
    kv_a = layers["dense_layers.attn.kv_a"].weight()
    np.testing.assert_allclose(kv_a[0].T, released()[2][f"{KV_A}.weight"], rtol=1e-6)
    for name, axes in (("gate", (0, 1, 3, 2)), ("down", (0, 1, 3, 2))):
        experts = layers[f"moe_layers.mlp.experts.{name}"]
        assert isinstance(experts, QuantExperts)
        expected = stacked("model.layers.{l}.mlp.experts.{e}." + f"{name}_proj.weight")
        assert experts.shape == tuple(expected.shape[i] for i in axes)
        np.testing.assert_allclose(experts.weight(), expected.transpose(axes), rtol=1e-6)
    assert loaded.moe_layers.mlp.router.bias.dtype == jnp.float32


def test_a_float_dtype_makes_all_dense_and_saving_writes_what_was_read(folder, loaded, tmp_path):
    dense = lp.load_model(folder, dtype="float32")
    assert not packed_layers(dense)
    assert type(dense.moe_layers.mlp.experts.up) is ExpertWeights
    expected = stacked("model.layers.{l}.mlp.experts.{e}.up_proj.weight").swapaxes(2, 3)
    np.testing.assert_allclose(dense.moe_layers.mlp.experts.up.w[...], expected, rtol=1e-6)
    found = FolderCheckpoint(lp.save_model(loaded, tmp_path / "saved"))
    config, tensors, _ = released()
    fields = found.config["quantization_config"]
    assert fields.pop("modules_to_not_convert") == ["lm_head", "model.layers.3.eh_proj"]
    assert fields == config["quantization_config"]
    assert set(found.names) == set(tensors)
    copies = {
        "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.3.shared_head.head.weight": "lm_head.weight",
    }
    for name in found.names:
        expected = tensors[copies.get(name, name)]
        np.testing.assert_array_equal(found.read(name), expected, strict=True)


def test_a_routers_bias_is_float32_whatever_the_dtype_of_the_rest(folder):
    router = lp.load_model(folder, dtype="bfloat16").moe_layers.mlp.router
    assert (router.w.dtype, router.bias.dtype) == (jnp.bfloat16, jnp.float32)


MESH = {"expert": 4, "fsdp": 2}


@pytest.mark.parametrize("kind", ["float32", None, "int8"], ids=["dense", "fp8", "int8"])
def test_a_device_reads_no_experts_but_its_own(folder, kind, monkeypatch):
    read, reads, module = FolderCheckpoint.read, [], table
    monkeypatch.setattr(
        FolderCheckpoint, "read", lambda self, name: reads.append(name) or read(self, name)
    )
    parts = []  # the experts of which tensors are read for one device's part of a parameter

    def experts_of(names):
        found = re.findall(r"layers\.[12]\.mlp\.experts\.(\d)\.up_proj", " ".join(names))
        return tuple(sorted(set(map(int, found))))

    def log(of):
        def logged(*args):
            reads.clear()
            result = of(*args)
            parts.append(experts_of(reads))
            return result

        return logged

    if kind == "float32":
        monkeypatch.setattr(module, "_assemble", log(table._assemble))
    else:
        monkeypatch.setattr(packed_folder, "_joined", log(packed_folder._joined))
    loaded = lp.load_model(folder, kind, make_mesh(MESH), compute=Compute())
    up = loaded.moe_layers.mlp.experts.up
    array = up.w[...] if kind == "float32" else up.codes[...]
    assert array.sharding.spec[:2] == (None, "expert")
    assert {part for part in parts if part} == {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert {shard.data.shape[1] for shard in array.addressable_shards} == {2}


@pytest.mark.slow  # compiles for eight devices
def test_packed_experts_over_devices_change_nothing(folder, loaded):
    expected, mesh = forward(loaded, make_tokens(8)), make_mesh(MESH)
    loaded = lp.load_model(folder, mesh=mesh)
    with use_mesh(mesh):
        found = forward(loaded, jax.device_put(make_tokens(8), jax.P(("fsdp", "expert"))))
        again = quantize_model(lp.quant.dequantize_model(loaded), "fp8", r"moe.*experts.*")
        assert jax.typeof(again.moe_layers.mlp.experts.up.codes[...]).sharding.spec[1] == "expert"
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.14), ("int8", 8.17), ("int4", 4.2)])
def test_experts_are_packed_one_by_one(kind, bits):
    cfg = dataclasses.replace(CONFIGS["deepseek-v3"], dim=256, expert_dim=128, num_mtp=0)
    make = lambda: registry.build(cfg, rngs=nnx.Rngs(0))  # noqa: E731
    packed = jax.eval_shape(lambda: quantize_model(make(), kind, r".*\.experts\..*"))
    layers = packed_layers(packed)
    assert sorted(layers) == [f"moe_layers.mlp.experts.{x}" for x in ("down", "gate", "up")]
    assert {layer.codes.shape[:2] for layer in layers.values()} == {(2, 8)}
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(packed, Buffer)))
    assert 8 * size / (2 * 8 * 3 * 256 * 128) == pytest.approx(bits, rel=0.02)


def test_nf4_takes_v2_lite_from_31_4_to_8_7_gb():
    compute = Compute(dtype="bfloat16", param_dtype="bfloat16")
    cfg = dataclasses.replace(registry.preset("deepseek-v2-lite"), compute=compute)
    build = lambda: registry.build(cfg, rngs=nnx.Rngs(0))  # noqa: E731
    sizes = [
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(jax.eval_shape(make))))
        for make in (build, lambda: quantize_model(build(), "nf4"))
    ]
    assert [round(size / 1e9, 1) for size in sizes] == [31.4, 8.7]


def test_packing_a_dense_folder_packs_what_packing_the_model_does(tmp_path):
    config = registry.to_hf(model().cfg)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_folder(tmp_path, table.export(model(), model().weights))
    whole = jax.eval_shape(lambda model: quantize_model(model, "int8"), model())
    loaded, some = lp.load_model(tmp_path, "int8"), r"moe_layers.*experts\.down|mtp.*experts\.gate"
    assert sorted(packed_layers(loaded)) == sorted(packed_layers(whole)) == sorted(LAYERS)
    layers = packed_layers(quantize_model(model(), "int8", some))
    assert sorted(layers) == ["moe_layers.mlp.experts.down", "mtp.0.block.mlp.experts.gate"]
    for name, layer in layers.items():
        found = packed_layers(loaded)[name].packed.arrays()
        chex.assert_trees_all_equal(found, layer.packed.arrays())


@pytest.mark.slow  # compiles for twenty seconds
def test_a_packed_model_generates_and_decodes_with_an_absorbed_packed_matrix(loaded):
    tokens = make_tokens()
    found = lp.generate_tokens(loaded, tokens, max_new_tokens=3)
    whole = np.concatenate([tokens, found], axis=1)
    logits = forward(lp.quant.dequantize_model(loaded), whole)
    np.testing.assert_array_equal(found, np.argmax(logits, -1)[:, tokens.shape[1] - 1 : -1])


@pytest.mark.parametrize(
    ("kind", "packed", "stacks"),
    [
        ("int8", r"moe_layers\..*(kv_b|experts\..*)", "moe_layers"),
        pytest.param("nf4", r".*_layers\..*", ".*_layers", marks=pytest.mark.grid),
    ],
    ids=["some", "all"],  # all layers compile for half a minute
)
def test_qlora_trains_adapters_alone_those_of_experts_too(kind, packed, stacks):
    num_dense = 0 if stacks == "moe_layers" else 1
    cfg = dataclasses.replace(CONFIGS["deepseek-v3"], num_dense=num_dense, num_mtp=0)
    base = quantize_model(random_model(cfg), kind, packed)
    targets = rf"{stacks}\..*(kv_b|experts\..*)"
    adapted = lp.peft.inject(base, lp.peft.LoRA(2, 4, targets=targets))
    graph, trained, frozen = nnx.split(adapted, AdapterParam, ...)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(trained):
        logits = nnx.merge(graph, trained, frozen)(make_tokens()).logits
        return jnp.square(logits).mean(), logits

    (_, logits), grads = run(trained)
    np.testing.assert_allclose(logits, forward(base, make_tokens()), atol=1e-5)
    for path, grad in nnx.to_flat_state(grads):
        assert bool(np.any(grad[...])) == (path[-1] == "lora_b"), path  # B is zero, so A's is


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put(f"{EXPERT}.weight_scale_inv", np.ones((3, 2), np.float32)),
            rf"1 of another shape: {EXPERT}.weight_scale_inv is float32 \[3, 2\], expected .*"
            r" \[2, 3\];",
        ),
        (
            put(f"{KV_A}.weight_scale_inv", np.ones((1, 3), np.float32)),
            rf"1 of another shape: {KV_A}.weight_scale_inv is float32 \[1, 3\], .* \[2, 3\];",
        ),
        (drop(f"{EXPERT}.weight_scale_inv"), f"1 missing: {EXPERT}.weight_scale_inv;"),
        (
            drop(f"{EXPERT}.weight", f"{EXPERT}.weight_scale_inv"),
            f"1 missing: {EXPERT}.weight;",
        ),
        (
            put(f"{EXPERT}.weight", np.zeros((24, 40), ml_dtypes.float8_e4m3fn)),
            rf"{EXPERT}.weight is float8_e4m3fn \[24, 40\], expected float8_e4m3fn \[24, 48\]",
        ),
        (
            lambda tensors: (
                drop(f"{EXPERT}.weight_scale_inv")(tensors),
                put(f"{EXPERT}.weight", np.zeros((24, 48), np.float32))(tensors),
            ),
            f'is packed and {EXPERT}.weight is not, .* load it with dtype="bfloat16"',
        ),
    ],
    ids=["scales", "scales of kv_a", "no scales", "no expert", "expert", "dense expert"],
)
def test_damaged_experts_are_one_line(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        lp.load_model(write(tmp_path, change=change))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_group": 3}, "num_experts=8 do not part into num_groups=3"),
        ({"topk_group": 5}, "num_active_groups=5 of num_groups=4"),
        ({"num_experts_per_tok": 5}, "num_active=5 experts of 4 that may be chosen"),
        ({"topk_method": "best"}, "config.json has topk_method='best'; supported: 'noaux_tc'"),
        ({"scoring_func": "tanh"}, "config.json has scoring_func='tanh'; supported: 'sigmoid'"),
        ({"n_routed_experts": "8"}, "n_routed_experts='8'; these must be positive whole numbers"),
        (
            {"n_routed_experts": 12},
            r"36 missing: model.layers.1.mlp.experts.10.down_proj.weight, .* of another shape:"
            r" .*mlp.gate.weight is \[8, 48\], expected \[12, 48\]",
        ),
        (
            {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
            "36 unexpected: model.layers.1.mlp.experts.4.down_proj",
        ),
    ],
    ids=str,
)
def test_configs_that_do_not_fit_are_one_line_with_the_folder(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        lp.load_model(write(tmp_path, **fields))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_shard_of_experts_is_named(tmp_path):
    shard = sorted(write(tmp_path).glob("model-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names the shard '{shard.name}', which is not"):
        lp.load_model(tmp_path)
