"""PEFT folders written by hand: what they mean, and how a damaged or foreign one is refused."""

import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import llmprep_jax as lp
from llmprep_jax.models import registry
from llmprep_jax.models.llama.config import Config
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.nn.stack import unstack
from llmprep_jax.peft import LoRA
from tests.models.tiny import random_model
from tests.random_modules import random_module

# q is 32 -> 4 * 8
CFG = Config(
    vocab_size=96,
    dim=32,
    mlp_dim=48,
    num_layers=2,
    head_dim=8,
    max_seq_len=64,
    num_heads=4,
    num_kv_heads=2,
)
Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@functools.cache
def base() -> nnx.Module:
    return random_model(CFG)


def make_tensors(ranks: dict[int, int], width: int = 32, seed: int = 0) -> dict[str, np.ndarray]:
    """A and B of q by layer."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer, rank in ranks.items():
        tensors[Q.format(layer, "A")] = rng.normal(size=(rank, width)).astype(np.float32)
        tensors[Q.format(layer, "B")] = rng.normal(size=(width, rank)).astype(np.float32)
    return tensors


def write(folder: Path, tensors=None, **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    save_file(
        make_tensors({0: 2, 1: 2}) if tensors is None else tensors,
        folder / "adapter_model.safetensors",
    )
    return folder


def added(model: nnx.Module, layer: int) -> np.ndarray:
    """What the adapters add to q's weight, as torch keeps it: (out, in)."""
    merged = lp.peft.merge(model).layers.attn.q.w[...] - base().layers.attn.q.w[...]
    return np.asarray(merged)[layer].reshape(32, 32).T


def product(tensors: dict[str, np.ndarray], layer: int) -> np.ndarray:
    return tensors[Q.format(layer, "B")] @ tensors[Q.format(layer, "A")]


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4 / math.sqrt(2), 4 / math.sqrt(2))),
        ({"target_modules": r".*\.q_proj"}, (2.0, 2.0)),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 6}}, (2.0, 3.0)),
        ({"alpha_pattern": {r"layers\.\d.*": 1, "q_proj": 6}}, (0.5, 0.5)),
        ({"exclude_modules": ["k_proj"], "bias": "none", "lora_dropout": 0.5}, (2.0, 2.0)),
    ],
    ids=str,
)
def test_a_folder_adds_scale_times_b_a(tmp_path, config, scales):
    tensors = make_tensors({0: 2, 1: 2})
    model = lp.peft.load(base(), write(tmp_path, tensors, **config))
    for layer, scale in enumerate(scales):
        expected = scale * product(tensors, layer)
        np.testing.assert_allclose(added(model, layer), expected, atol=1e-5)


def test_layers_of_another_rank_keep_their_own_scale(tmp_path):
    tensors, pattern = make_tensors({0: 4, 1: 1}), {"layers.0.self_attn.q_proj": 4, "q_proj": 1}
    model = lp.peft.load(base(), write(tmp_path, tensors, rank_pattern=pattern))
    assert model.layers.attn.q.lora_a.shape == (2, 32, 4)
    np.testing.assert_allclose(added(model, 0), 1.0 * product(tensors, 0), atol=1e-5)
    np.testing.assert_allclose(added(model, 1), 4.0 * product(tensors, 1), atol=1e-5)


@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", "layers"]], ids=str)
@pytest.mark.parametrize("layers", [1, [1]], ids=str)
def test_layers_to_transform_leaves_the_other_layers_alone(tmp_path, layers, pattern):
    tensors = make_tensors({1: 2})
    folder = write(tmp_path, tensors, layers_to_transform=layers, layers_pattern=pattern)
    model = lp.peft.load(base(), folder)
    np.testing.assert_array_equal(added(model, 0), 0)
    assert not np.any(model.layers.attn.q.lora_a[...][0])  # so no gradient reaches either half
    np.testing.assert_allclose(added(model, 1), 2.0 * product(tensors, 1), atol=1e-5)


def test_half_precision_is_read_into_float32(tmp_path):
    tensors = {name: x.astype(np.float16) for name, x in make_tensors({0: 2, 1: 2}).items()}
    model = lp.peft.load(base(), write(tmp_path, tensors))
    assert model.layers.attn.q.lora_b.dtype == np.float32
    found = np.asarray(model.layers.attn.q.lora_a[...])[1]
    np.testing.assert_array_equal(found, tensors[Q.format(1, "A")].T.astype(np.float32))


def test_a_folder_loads_onto_layers_in_a_list(tmp_path):
    graph, state = nnx.split(base())
    listed = nnx.merge(graph, state)
    listed.layers = unstack(base().layers)
    stacked = lp.peft.load(base(), write(tmp_path)).layers.attn.q
    found = lp.peft.load(listed, tmp_path)
    for layer in (0, 1):
        q = found.layers[layer].attn.q
        np.testing.assert_array_equal(q.lora_a[...], stacked.lora_a[...][layer])
        np.testing.assert_array_equal(q.lora_b[...], stacked.lora_b[...][layer])


def make_adapted(method: LoRA) -> nnx.Module:
    return random_module(lambda: lp.peft.inject(registry.build(CFG, rngs=nnx.Rngs(0)), method))


def test_saved_adapters_come_back_bit_for_bit(tmp_path):
    method = LoRA(rank=2, alpha=3.5, targets=("q_proj", "o_proj", "up_proj"), rslora=True)
    model = make_adapted(method)
    folder = lp.peft.save(model, tmp_path / "adapter", base_model="org/base")
    found = lp.peft.load(lp.peft.strip(model), folder)
    leaves = [jax.tree.leaves(nnx.state(each, AdapterParam)) for each in (found, model)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found.layers.mlp.up.method == model.layers.mlp.up.method
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == ["o_proj", "q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 3.5, True)
    assert config["base_model_name_or_path"] == "org/base"
    shapes = {name: x.shape for name, x in load_file(folder / "adapter_model.safetensors").items()}
    assert len(shapes) == 12
    assert shapes[Q.format(1, "A")] == (2, 32)
    assert shapes["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] == (48, 2)


def test_ranks_and_scales_that_differ_are_written_as_patterns(tmp_path):
    patterns = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"q_proj": 1.5}}
    method = LoRA(rank=4, alpha=8, targets=("q_proj", "k_proj", "o_proj"), **patterns)
    model = make_adapted(method)
    folder = lp.peft.save(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {name: config[name] for name in patterns} == patterns
    found = lp.peft.load(lp.peft.strip(model), folder)
    assert found.layers.attn.o.method == model.layers.attn.o.method
    assert found.layers.attn.q.method.scale == 1.5 / 4


def drop(name: str):
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(**config):
    return lambda folder: write(folder, **config)


def hold(*ranks: int, **more):
    """Tensors of other ranks by layer, or width."""
    return lambda folder: write(folder, make_tensors(dict(enumerate(ranks)), **more))


def change(name: str, value: np.ndarray | None):
    """Puts one tensor in place of another, or takes it out."""

    def run(folder):
        tensors = make_tensors({0: 2, 1: 2}) | {name: value}
        write(folder, {key: x for key, x in tensors.items() if x is not None})

    return run


def pickle_alone(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


JSON, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REFUSED = {
    "no config": (drop(JSON), "holds no adapter_config.json; give the folder of a PEFT adapter"),
    "half a config": (cut(JSON, 20), "adapter_config.json is no JSON .*; download it again"),
    "a list": (lambda f: (f / JSON).write_text("[]"), "holds a list, no JSON object"),
    "no weights": (drop(WEIGHTS), "holds no adapter_model.safetensors; save the adapter again"),
    "half a header": (cut(WEIGHTS, 40), "states a header of .* bytes, but the file has 40"),
    "half the data": (cut(WEIGHTS, 700), "safetensors .*download or export the file again"),
    "empty": (cut(WEIGHTS, 0), "has 0 bytes, too few for a header"),
    "a pickle": (pickle_alone, "pickled adapter_model.bin, which can run code .* save it again"),
    "two ranks": (
        change(Q.format(1, "A"), np.zeros((3, 32), np.float32)),
        r"1 of two ranks: .*layers.1.*lora_A.weight is \[3, 32\] and .*lora_B.weight is \[32, 2\]",
    ),
    "half a pair": (change(Q.format(0, "B"), None), "1 missing: .*layers.0.*q_proj.lora_B.weight"),
    "another rank": (
        hold(2, 3),
        r"2 of another shape: .*A.weight is \[3, 32\], expected \[2,",
    ),
    "another width": (
        hold(2, 2, width=40),
        r"4 of another shape: .*is \[2, 40\], expected \[2,",
    ),
    "fewer layers": (hold(2), "2 missing: .*layers.1.*lora_A.weight, .*layers.1.*lora_B"),
    "more layers": (hold(2, 2, 2), "2 unexpected: .*layers.2.*lora_A.weight, .*layers.2.*lora_B"),
    "no tensors": (hold(), "4 missing"),
    "many": (hold(*[2] * 9), r"14 unexpected: .* and 6 more; load it on the base that"),
    "integers": (
        change(Q.format(0, "A"), np.zeros((2, 32), np.int32)),
        "1 not of a float dtype: .*layers.0.*lora_A",
    ),
    "another family": (put(target_modules=["c_attn"]), "4 unexpected: "),
    "not targeted": (put(target_modules=["v_proj"]), "4 missing: .*; 4 unexpected: "),
    "left out": (put(exclude_modules=["q_proj"]), "4 unexpected: "),
    "no head": (put(modules_to_save=["lm_head"]), "1 missing: base_model.model.lm_head.weight"),
    "saved numbers": (put(modules_to_save=[1]), "modules_to_save is .*; it must hold names"),
    "one layer whole": (
        put(modules_to_save=["layers.0.input_layernorm"]),
        r"takes some layers of the stack layers.attn_norm and leaves others; unstack",
    ),
    "another method": (
        put(peft_type="BOFT"),
        "is of peft_type .*BOFT.*; supported: ADALORA, HRA, IA3, LOHA, LOKR, LORA, OFT, VERA",
    ),
    "no rank": (lambda f: (f / JSON).write_text('{"peft_type": "LORA"}'), "has no 'r'; save"),
    "rank in words": (put(r="eight"), "r is 'eight'; it must be a whole number"),
    "rank 0": (put(r=0), "r is 0; it must be a whole number of at least 1"),
    "another bias": (put(bias="some"), "bias is 'some'; it must be one of none, lora_only, all"),
    "no scale": (put(lora_alpha=None), "lora_alpha is None; it must be a finite number"),
    "rslora in words": (put(use_rslora="yes"), "use_rslora is .*yes.*; it must be true or false"),
    "a bad regex": (put(target_modules="(q_proj"), r"target_modules .*'\(q_proj' is no regex: "),
    "a bad excluded": (put(exclude_modules="(q"), r"exclude_modules '\(q' is no regex: "),
    "a bad rank key": (put(rank_pattern={"(q": 2}), r"rank_pattern key '\(q' is no regex: "),
    "a bad alpha key": (put(alpha_pattern={"[q": 2}), r"alpha_pattern key '\[q' is no regex: "),
    "a bad rank": (put(rank_pattern={"q_proj": 1.5}), "rank_pattern of 'q_proj' is 1.5; "),
    "a rank list": (put(rank_pattern=["q_proj"]), "rank_pattern is .*; it must be an object"),
    "target numbers": (put(target_modules=[1, 2]), "target_modules is .*; it must hold names"),
    "layers in words": (put(layers_to_transform=["a"]), "layers_to_transform is .*numbers"),
    "a bad container": (
        put(layers_to_transform=[0, 1], layers_pattern="(l"),
        r"layers_pattern '\(l' is no regex",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_will_not_do_is_refused_in_one_line(tmp_path, damage, message):
    folder = write(tmp_path / "adapter")
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        lp.peft.load(base(), folder)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "adapter") in str(caught.value)


SET = {
    "use_qalora": True,
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
    "fan_in_fan_out": True,
    "lora_bias": True,
    "layer_replication": [[0, 1], [0, 1]],
    "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "velora_config": {"rank": 1},
    "monteclora_config": {"num_samples": 4},
    "megatron_config": {"a": 1},
    "init_lora_weights": "loftq",
    "use_something_of_peft_0_99": True,
}


@pytest.mark.parametrize(("field", "value"), SET.items(), ids=SET)
def test_a_field_that_changes_the_result_is_refused_by_name(tmp_path, field, value):
    folder = write(tmp_path, **{field: value})
    with pytest.raises(
        ValueError, match=f"sets {field}=.*, which is not supported; merge"
    ) as caught:
        lp.peft.load(base(), folder)
    assert "\n" not in str(caught.value)


def test_parameters_of_experts_that_the_model_has_not_are_refused(tmp_path):
    folder = write(tmp_path, target_parameters=["experts.gate_up_proj"])
    with pytest.raises(ValueError, match="no experts of target_parameters experts.gate_up_proj"):
        lp.peft.load(base(), folder)


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(tmp_path, init):
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'"):
        lp.peft.load(base(), write(tmp_path, init_lora_weights=init))


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_starts_of_a_and_b_alone_are_taken(tmp_path, init):
    folder = write(tmp_path, init_lora_weights=init, modules_to_save=None, use_dora=False)
    assert lp.peft.is_adapted(lp.peft.load(base(), folder))


def test_a_folder_is_loaded_once_and_a_plain_model_is_not_saved_as_an_adapter(tmp_path):
    model = lp.peft.load(base(), write(tmp_path / "adapter"))
    with pytest.raises(ValueError, match="has adapters already"):
        lp.peft.load(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has no adapters"):
        lp.peft.save(base(), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
