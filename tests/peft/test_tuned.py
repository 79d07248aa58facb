"""Modules trained whole beside adapters: which they are, tied tables, PEFT's folders of them."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import llmprep_jax as lp
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.peft import IA3, LoRA
from llmprep_jax.peft.tuned import tuned
from llmprep_jax.train.flops import count_flops
from llmprep_jax.train.state import split_model
from tests.models.tiny import forward, make_model, make_tokens
from tests.models.towers import make_towers

TIED, UNTIED = "llama-tied-9-3-heads", "qwen2-window"
HEAD = "base_model.model.lm_head.weight"


def inject(name: str, method=None, **settings) -> nnx.Module:
    """The named model with its adapters, and what is trained whole, off their beginnings."""
    method = method or LoRA(rank=2, targets=("q_proj",), **settings)
    model = lp.peft.inject(make_model(name), method)
    graph, trained, rest = nnx.split(model, AdapterParam, ...)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(x.dtype), trained)
    return nnx.merge(graph, moved, rest)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("norm",), {"norm"}),
        (("embed_tokens", "input_layernorm"), {"embed", "layers.attn_norm"}),
        (r".*(embed|norm).*", {"embed", "norm", "layers.attn_norm", "layers.mlp_norm"}),
    ],
    ids=["ours", "theirs", "regex"],
)
def test_modules_go_by_our_names_by_hugging_faces_and_by_regex(names, expected):
    model = jax.eval_shape(lambda: inject(UNTIED, modules_to_save=names))
    assert tuned(model).keys() == expected


def test_the_copy_is_its_own_and_in_the_adapters_dtype():
    base = make_model(TIED, param_dtype="bfloat16")
    model = lp.peft.inject(
        base, LoRA(rank=2, targets=("q_proj",), modules_to_save=["norm", "embed"])
    )
    assert model.norm.base.scale[...] is base.norm.scale[...]
    for module, name in ((model.norm, "scale"), (model.embed, "w")):
        copy, kept = getattr(module.trained, name), getattr(module.base, name)
        assert copy.dtype == np.float32
        assert copy[...].unsafe_buffer_pointer() != kept[...].unsafe_buffer_pointer()
    np.testing.assert_array_equal(forward(model, make_tokens()), forward(base, make_tokens()))
    assert lp.peft.merge(model).embed.w.dtype == base.embed.w.dtype


def test_a_trained_embedding_is_the_head_of_a_tied_model_and_its_file_says_so(tmp_path):
    model = inject(TIED, modules_to_save=("embed_tokens",))
    folder = lp.peft.save(model, tmp_path / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert json.loads((folder / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    np.testing.assert_array_equal(tensors[HEAD], model.embed.trained.w[...])
    merged = lp.peft.merge(model)
    np.testing.assert_array_equal(merged.embed.w[...], model.embed.trained.w[...])
    method = IA3(targets=("k_proj",), feedforward=(), modules_to_save=("embed_tokens",))
    folder = lp.peft.save(inject(TIED, method), tmp_path / "ia3")  # whose config has no such field
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("change", ["without a head", "with another head", "the head alone"])
def test_a_table_trained_apart_from_its_head_loads_onto_an_untied_model(tmp_path, change):
    model = inject(TIED, modules_to_save=("embed_tokens",))
    folder = lp.peft.save(model, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    names = {"without a head": ["embed_tokens"], "the head alone": ["lm_head"]}
    config["modules_to_save"] = names.get(change, ["embed_tokens", "lm_head"])
    if change == "without a head":
        del tensors[HEAD]
    elif change == "the head alone":
        del tensors["base_model.model.model.embed_tokens.weight"]
    else:
        tensors[HEAD] = 2 * tensors[HEAD]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    base, tokens = lp.peft.strip(model), make_tokens()
    with pytest.raises(ValueError, match=r"apart from the other; load it onto lp.peft.untie"):
        lp.peft.load(base, folder)
    untied = lp.peft.untie(base)
    np.testing.assert_allclose(forward(untied, tokens), forward(base, tokens), atol=1e-5)
    found = lp.peft.load(untied, folder)
    embed, head = lp.peft.merge(found).embed.w[...], lp.peft.merge(found).head.w[...].T
    kept, changed = base.embed.w[...], model.embed.trained.w[...]
    np.testing.assert_array_equal(embed, kept if change == "the head alone" else changed)
    expected = {"without a head": kept, "with another head": 2 * changed}
    np.testing.assert_array_equal(head, expected.get(change, changed))


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        (TIED, ("nrm",), "module to save 'nrm' matches no module with weights; near names: norm"),
        (TIED, ("q",), "of the targets none is left by exclude_modules, modules_to_save"),
        (TIED, ("lm_head",), "head is its embedding, so 'lm_head' cannot .*; name the embedding"),
        (TIED, r".*layers\.1\.input.*", "take some layers of the stack layers.attn_norm and leave"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_trained_whole_is_refused_in_one_line(name, names, message):
    with pytest.raises(ValueError, match=message) as caught:
        inject(name, modules_to_save=names)
    assert "\n" not in str(caught.value)


def test_packed_layers_are_not_trained_whole():
    model = lp.quant.quantize_model(make_model(UNTIED), "int8", "layers.attn.*")
    method = LoRA(rank=2, targets=("up_proj",), modules_to_save=("v_proj",))
    with pytest.raises(ValueError, match=r"layers.attn.v is packed.*; target it instead"):
        lp.peft.inject(model, method)


def test_a_table_of_positions_is_not_trained_whole_and_the_reason_is_said():
    method = LoRA(rank=2, targets=("q_proj",), modules_to_save=("position_embedding",))
    with pytest.raises(ValueError, match=r"text.positions is a table of positions.* freeze= on"):
        lp.peft.inject(make_towers("clip"), method)


def test_what_the_copy_replaces_costs_no_flops():
    parts = split_model(inject(UNTIED, modules_to_save=("lm_head",)), AdapterParam)
    cfg = make_model(UNTIED).cfg
    found = count_flops(cfg, parts.params, parts.frozen, 16)
    base = nnx.to_pure_dict(nnx.state(make_model(UNTIED)))
    assert found.frozen == count_flops(cfg, base, {}, 16).trained - 96 * 48
