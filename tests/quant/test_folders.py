"""Hugging Face folders of packed weights: read as stored, dense, or packed anew; and refused."""

import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import llmprep_jax as lp
from llmprep_jax.nn.linear import Einsum
from llmprep_jax.nn.param import Compute
from llmprep_jax.pretrained import load_base
from llmprep_jax.quant import dequantize, folder, packed_layers
from llmprep_jax.sharding import make_mesh
from llmprep_jax.weights.safetensors import write_folder
from tests.grids import cases
from tests.models.tiny import forward
from tests.quant import packed_folders
from tests.quant.packed_folders import LAYERS, METHODS, SHAPES, Folder, make

KINDS = {"gptq": "int4", "gptq_v2": "int4", "awq": "int4"}
OURS = {"q_proj": "attn.q", "k_proj": "attn.k", "v_proj": "attn.v", "o_proj": "attn.o"}
OURS |= {f"{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}
FIRST = "model.layers.0.self_attn.q_proj"
STATE = f"{FIRST}.weight.quant_state.bitsandbytes__nf4"
methods = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each method's folder, as made and as written; made once."""
    made = {}

    def get(method):
        if method not in made:
            new = make(method)
            path = new.write(tmp_path_factory.mktemp("packed") / method.replace(" ", "_"))
            made[method] = new, path
        return made[method]

    return get


def stacks(made):
    """The matrices that a folder stands for, all layers of a kind together, by our paths."""
    for name in SHAPES:
        values = [made.values[f"model.layers.{l}.{name}.weight"] for l in range(LAYERS)]
        yield f"layers.{OURS[name.split('.')[1]]}", np.stack(values)


def load_changed(made, path, change=lambda tensors: None, fields=None, **kwargs):
    """Loads a folder of which tensors or fields of quantization_config are changed."""
    config = dict(made.config)
    config["quantization_config"] = {**config["quantization_config"], **(fields or {})}
    tensors = dict(made.tensors)
    change(tensors)
    return lp.load_model(Folder(config, tensors, {}).write(path / "changed"), **kwargs)


@methods
def test_a_folder_is_read_as_it_is_packed(folders, method):
    made, path = folders(method)
    layers = packed_layers(model := lp.load_model(path))
    kind = method.split()[0]
    assert {layer.packed.kind for layer in layers.values()} == {KINDS.get(kind, kind)}
    assert len(layers) == len(SHAPES)
    for ours, values in stacks(made):
        np.testing.assert_allclose(dequantize(layers[ours].packed), values, rtol=1e-6, atol=1e-7)
    assert model.cfg.compute.dtype == "float32"
    np.testing.assert_array_equal(model.embed.w[...], made.tensors["model.embed_tokens.weight"])


@methods
def test_a_float_dtype_makes_the_layers_dense(folders, method, tmp_path):
    made, path = folders(method)
    model = lp.load_model(path, dtype="float32")
    expected = lp.load_model(made.dense().write(tmp_path / "dense"), dtype="float32")
    assert not packed_layers(model)
    assert type(model.layers.attn.q) is Einsum
    found, expected = (nnx.to_pure_dict(nnx.state(m)) for m in (model, expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_model_in_act_order_computes_what_its_dense_weights_do(folders):
    path = folders("gptq desc_act")[1]
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    packed, dense = (forward(lp.load_model(path, dtype=x), tokens) for x in (None, "float32"))
    np.testing.assert_allclose(packed, dense, atol=1e-4)


def test_bytes_in_memory_are_those_of_the_file(folders):
    made, path = folders("nf4 double")
    layers = packed_layers(lp.load_model(path))
    found = sum(x.nbytes for layer in layers.values() for x in layer.packed.arrays().values())
    parts = ("proj.weight", ".absmax", ".nested_absmax")
    stored = sum(value.nbytes for name, value in made.tensors.items() if name.endswith(parts))
    assert found == stored + 4 * len(made.values)  # the offset, which the file has as text


def test_never_more_than_one_layer_is_dense_while_a_packed_folder_is_read(folders, monkeypatch):
    events, read = [], folder.PackedCheckpoint.read_packed

    def log_read(self, name):
        packed = read(self, name)
        events.append(sum(value.nbytes for value in packed.arrays().values()))
        return packed

    monkeypatch.setattr(folder.PackedCheckpoint, "read_packed", log_read)
    monkeypatch.setattr(folder, "dequantize", None)  # nothing is made dense
    made, path = folders("nf4")
    lp.load_model(path)
    assert len(events) == len(made.values)
    assert max(events) < 0.3 * 2 * max(value.size for value in made.values.values())


def test_another_kind_packs_anew_and_says_so(folders):
    path = folders("nf4")[1]
    with pytest.warns(UserWarning, match="stored as nf4 are packed again as int8.*adds up"):
        model = lp.load_model(path, dtype="int8")
    assert {layer.packed.kind for layer in packed_layers(model).values()} == {"int8"}
    assert model.embed.w.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("method", "stored", "kind"),
    [
        ("nf4", "nf4", "int8"),
        pytest.param("fp4", "fp4", "nf4", marks=pytest.mark.grid),
        pytest.param("int8", "int8", "nf4", marks=pytest.mark.grid),
        ("gptq", "int4", "nf4"),
        pytest.param("gptq desc_act", "int4", "int8", marks=pytest.mark.grid),
        ("awq", "int4", "nf4"),
        ("fp8", "fp8", "nf4"),
        ("nf4 double", None, "nf4"),
        ("int8", None, "int8"),
    ],
)
def test_a_qlora_has_the_base_that_it_asks_for_whatever_the_folder_is_packed_as(
    folders, method, stored, kind, recwarn
):
    path = folders(method)[1]
    adapter = lp.peft.QLoRA(2, 4, kind=kind)
    model = lp.peft.inject(load_base(path, adapter.base_dtype), adapter)
    assert {layer.kind for layer in packed_layers(model).values()} == {kind}
    words = [str(warning.message) for warning in recwarn.list]
    assert [f"stored as {stored} are packed again as {kind}" in line for line in words] == (
        [] if stored is None else [True]
    )
    # the layer is that of the folder, but for what packing loses
    layers = [m.layers.mlp.down for m in (lp.peft.strip(model), lp.load_model(path))]
    ours, as_stored = (np.asarray(layer.weight()) for layer in layers)
    assert np.abs(ours - as_stored).max() < 0.25 * np.abs(as_stored).max()


def test_the_stored_kind_by_name_is_as_stored(folders, recwarn):
    path = folders("nf4")[1]
    layer = lp.load_model(path, dtype="nf4").layers.attn.q
    assert layer.packed.nested_absmax is None  # as in the file, though "nf4" packs it
    assert not recwarn.list


def test_layers_that_are_left_alone_stay_dense(folders, tmp_path):
    def change(tensors):
        for name in [name for name in tensors if "down_proj" in name]:
            del tensors[name]
        tensors |= {name: x for name, x in made.values.items() if "down_proj" in name}

    made, _ = folders("fp8")
    model = load_changed(made, tmp_path, change)
    assert sorted(packed_layers(model)) == sorted(
        f"layers.{ours}" for ours in OURS.values() if ours != "mlp.down"
    )
    assert type(model.layers.mlp.down) is Einsum


def test_a_packed_head_is_made_dense(folders, tmp_path):
    made, _ = folders("int8")
    codes = np.arange(-5, 19, dtype=np.int8)[:, None].repeat(32, 1)
    scale = np.full(24, 1.27, np.float32)
    head = {"lm_head.weight": codes, "lm_head.SCB": scale}
    model = load_changed(made, tmp_path, lambda tensors: tensors.update(head))
    np.testing.assert_allclose(model.head.w[...], 0.01 * codes.T, rtol=1e-6)


def test_codes_may_be_stored_as_another_dtype(folders, tmp_path):
    made, _ = folders("nf4")

    def change(tensors):
        for name in made.values:
            tensors[name] = tensors[name].reshape(-1).view(ml_dtypes.bfloat16)[:, None]

    layers = packed_layers(load_changed(made, tmp_path, change))
    for ours, values in stacks(made):
        np.testing.assert_array_equal(dequantize(layers[ours].packed), values)


def test_a_bias_of_zeros_for_a_model_without_is_ignored_and_another_is_not(folders, tmp_path):
    made, _ = folders("gptq")
    zeros = {f"{FIRST}.bias": np.zeros(32, np.float16)}
    assert packed_layers(load_changed(made, tmp_path, lambda t: t.update(zeros)))
    (tmp_path / "again").mkdir()
    ones = {f"{FIRST}.bias": np.ones(32, np.float16)}
    with pytest.raises(ValueError, match=f"1 unexpected: {FIRST}.bias;"):
        load_changed(made, tmp_path / "again", lambda t: t.update(ones))


@pytest.mark.parametrize("method", ["awq", "nf4 double"])
def test_devices_of_a_mesh_hold_the_bytes_of_packed_weights_among_them(folders, method):
    _, path = folders(method)
    layers = packed_layers(lp.load_model(path, mesh=make_mesh({"fsdp": 8})))
    alone = packed_layers(lp.load_model(path))
    codes = layers["layers.attn.q"].packed.codes
    assert {shard.data.nbytes for shard in codes.addressable_shards} == {codes.nbytes // 8}
    found, expected = (
        jax.device_get({name: layer.packed.arrays() for name, layer in x.items()})
        for x in (layers, alone)
    )
    chex.assert_trees_all_equal(found, expected)


# of bitsandbytes' 4 bits both kinds, and both ways of writing a block's magnitude
@pytest.mark.parametrize(
    "method", cases(["nf4", "nf4 double", "fp4", "int8", "fp8"], fast=["nf4 double", "int8", "fp8"])
)
def test_saving_writes_the_bytes_that_were_loaded(folders, method, tmp_path):
    made, path = folders(method)
    saved = lp.save_model(lp.load_model(path), tmp_path / "saved")
    receipt = json.loads((saved / "llmprep_receipt.json").read_text())
    assert receipt["measured_difference"] == 0
    found = lp.weights.folder.FolderCheckpoint(saved)
    assert sorted(found.names) == sorted(made.tensors)
    for name, value in made.tensors.items():
        if "quant_state" in name:  # a JSON text, whose spaces may differ
            continue
        again = found.read(name)
        if name.endswith(".SCB"):  # its 127th is the scale, the same of two neighbours at times
            again, value = again / np.float32(127), value / np.float32(127)
        np.testing.assert_array_equal(again, value, strict=True)
    fields = found.config["quantization_config"]
    assert fields.items() >= made.config["quantization_config"].items()


def test_layers_that_stay_dense_are_named_where_transformers_looks(folders, tmp_path):
    model = lp.load_model(folders("nf4")[0].dense().write(tmp_path / "dense"))
    model = lp.quant.quantize_model(model, "int8", r"layers\.attn\..*")
    saved = lp.save_model(model, tmp_path / "saved")
    fields = json.loads((saved / "config.json").read_text())["quantization_config"]
    skipped = [f"model.layers.{l}.mlp.{x}_proj" for x in ("down", "gate", "up") for l in (0, 1)]
    assert sorted(fields["llm_int8_skip_modules"]) == sorted(["lm_head", *skipped])
    assert len(packed_layers(lp.load_model(saved))) == 4


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("int4",), "of int4 are not written; save lp.quant.dequantize_model"),
        (("nf4", "fp8"), r"packed in several ways \(fp8, nf4\).*dequantize_model"),
    ],
)
def test_what_no_folder_holds_is_refused(folders, kinds, message, tmp_path):
    model = lp.load_model(folders("nf4")[0].dense().write(tmp_path / "dense"))
    for kind, targets in zip(kinds, ("layers.attn.*", "layers.mlp.*"), strict=False):
        model = lp.quant.quantize_model(model, kind, targets)
    with pytest.raises(ValueError, match=message):
        lp.save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def state(**fields):
    whole = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [32, 32]}
    return np.frombuffer(json.dumps({**whole, **fields}).encode(), np.uint8)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("nf4", drop(f"{FIRST}.weight.absmax"), f"1 missing: {FIRST}.weight.absmax;"),
        ("nf4", drop(STATE), f"1 missing: {STATE};"),
        ("nf4", drop(f"{FIRST}.weight"), f"1 missing: {FIRST}.weight;"),
        ("nf4", put(STATE, np.zeros(3, np.uint8)), "1 that do not fit: .*is no JSON text: "),
        ("nf4", put(STATE, state(shape=[32, "x"])), "does not describe a matrix"),
        ("nf4", put(STATE, state(shape=[16, 32])), r"a matrix \[16, 32\], expected \[32, 32\]"),
        ("nf4", put(STATE, state(quant_type="nf5")), "of the unknown 4-bit kind 'nf5'"),
        ("nf4", put(STATE, state(nested_offset="x")), "has the offset 'x'; it is a number"),
        (
            "nf4",
            put(f"{FIRST}.weight.absmax", np.zeros(9, np.float32)),
            r"absmax is float32 \[9\], expected float32 16 elements;",
        ),
        (
            "nf4",
            put(f"{FIRST}.weight.nested_absmax", np.zeros(9, np.float32)),
            "1 unexpected: .*nested_absmax;",
        ),
        (
            "nf4",
            put(f"{FIRST}.weight.quant_map", np.zeros(16, np.float32)),
            r"q_proj.weight cannot be unpacked: weight.quant_map is not the code book",
        ),
        (
            "nf4",
            put(f"{FIRST}.weight", np.zeros(9, np.uint8)),
            r"weight is uint8 \[9\], expected 512 bytes;",
        ),
        ("int8", drop(f"{FIRST}.SCB"), f"1 missing: {FIRST}.SCB;"),
        ("int8", put(f"{FIRST}.weight_format", np.ones((), np.uint8)), "weight_format is 1"),
        (
            "gptq",
            put(f"{FIRST}.scales", np.zeros((3, 32), np.float16)),
            r"scales is float16 \[3, 32\], expected float16 or bfloat16 or float32 \[2, 32\];",
        ),
        ("gptq", drop(f"{FIRST}.qzeros"), f"1 missing: {FIRST}.qzeros;"),
        ("gptq desc_act", drop(f"{FIRST}.g_idx"), f"1 missing: {FIRST}.g_idx;"),
        (
            "gptq",
            put(f"{FIRST}.g_idx", np.full(32, 7, np.int32)),
            "cannot be unpacked: g_idx is .*from 7 to 7; it must name one of 2 groups",
        ),
        (
            "awq",
            put(f"{FIRST}.qweight", np.zeros((32, 4), np.float32)),
            r"qweight is float32 \[32, 4\], expected int32 or uint32 \[32, 4\];",
        ),
        ("fp8", drop(f"{FIRST}.weight_scale_inv"), f"1 missing: {FIRST}.weight_scale_inv;"),
        (
            "fp8",
            put(f"{FIRST}.weight_scale_inv", np.ones((2, 3), np.float32)),
            r"scale_inv is float32 \[2, 3\], expected .* \[2, 2\];",
        ),
        (
            "fp8",
            put("model.norm.weight_scale_inv", np.ones((1, 1), np.float32)),
            r"model.norm.weight is a packed matrix, expected \[32\];",
        ),
    ],
)
def test_damaged_layers_are_one_line(folders, method, change, message, tmp_path):
    made, _ = folders(method)
    with pytest.raises(ValueError, match=message) as caught:
        load_changed(made, tmp_path, change)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_everything_that_is_wrong_is_in_one_error(folders, tmp_path):
    made, _ = folders("gptq")

    def change(tensors):
        del tensors[f"{FIRST}.scales"], tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.up_proj.qzeros"] = np.zeros((2, 2), np.int32)
        tensors["extra.qweight"] = np.zeros((2, 2), np.int32)

    with pytest.raises(ValueError, match="2 missing: .*1 unexpected: extra.weight; 1 of another"):
        load_changed(made, tmp_path, change)


def test_a_missing_shard_is_named(folders, tmp_path):
    made, _ = folders("awq")
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    write_folder(tmp_path, made.tensors.items(), max_shard_bytes=10_000)
    assert packed_layers(lp.load_model(tmp_path))
    shard = sorted(tmp_path.glob("model-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"names the shard '{shard.name}', which is not"):
        lp.load_model(tmp_path)


def test_layers_of_a_stack_that_are_packed_differently_are_refused_unless_dense(folders, tmp_path):
    made, _ = folders("int8")

    def change(tensors):
        tensors[f"{FIRST}.weight"] = made.values[f"{FIRST}.weight"]
        del tensors[f"{FIRST}.SCB"], tensors[f"{FIRST}.weight_format"]

    with pytest.raises(ValueError, match=f'and {FIRST}.weight is not, .*dtype="bfloat16"'):
        load_changed(made, tmp_path, change)
    assert not packed_layers(lp.load_model(tmp_path / "changed", dtype="bfloat16"))


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("awq", {"quant_method": "aqlm"}, "packed by 'aqlm'; bitsandbytes, gptq, awq, fp8 are"),
        ("gptq", {"bits": 3}, "of gptq: bits is 3; 4 is read; load the original"),
        ("gptq", {"checkpoint_format": "marlin"}, "is 'marlin'; gptq or gptq_v2 is read"),
        ("gptq", {"group_size": 0}, "group_size is 0; it must be -1 or a positive number"),
        ("awq", {"version": "gemv"}, "version is 'gemv'; gemm is read"),
        ("fp8", {"weight_block_size": [1, 128]}, r"is \[1, 128\]; square blocks are read"),
        ("fp8", {"weight_block_size": None}, "weight_block_size is None; square blocks"),
    ],
)
def test_packings_that_are_not_read_are_one_line(folders, method, fields, message, tmp_path):
    made, _ = folders(method)
    with pytest.raises(ValueError, match=message):
        load_changed(made, tmp_path, fields=fields)


def test_groups_of_all_inputs_are_read(folders, tmp_path):
    made, _ = folders("awq")

    def change(tensors):
        for name in [name for name in tensors if name.endswith((".qzeros", ".scales"))]:
            tensors[name] = tensors[name][:1]

    model = load_changed(made, tmp_path, change, fields={"group_size": -1})
    assert model.layers.mlp.down.packed.group == packed_folders.MLP
    assert model.layers.mlp.down.packed.scale.shape == (LAYERS, 32, 1)


def test_activations_may_be_in_another_dtype_than_the_folders(folders):
    compute = Compute(dtype="bfloat16", param_dtype="bfloat16")
    model = lp.load_model(folders("nf4")[1], compute=compute)
    assert packed_layers(model)
    assert model.embed.w.dtype == jnp.bfloat16
