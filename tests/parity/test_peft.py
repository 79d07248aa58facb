"""LoRA against Hugging Face PEFT, in float32: logits, gradients, and folders both ways.

The base goes through a folder, and so does each adapter: PEFT saves and we load, or the other way.
"""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import save_file

import llmprep_jax as lp
from llmprep_jax.nn.param import AdapterParam
from llmprep_jax.nn.stack import unstack
from llmprep_jax.peft.adapter import adapters, methods
from llmprep_jax.peft.peft_format import adapter_table, trained_table
from llmprep_jax.peft.rank_budget import allocate_ranks, orthogonality
from llmprep_jax.weights.table import export
from tests.parity import torch_models
from tests.parity.peft_cases import ALL, BASES, MORE, SETTINGS, pairs

pytestmark = pytest.mark.parity
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
forward = jax.jit(lambda model, tokens: model(tokens).logits, compiler_options=QUICK)
TOKENS = torch_models.tokens()


@pytest.fixture(scope="module", params=BASES)
def base(request, pair_of):
    """transformers' model and ours with its weights."""
    return pair_of(request.param)


def in_peft(theirs, model: nnx.Module, folder, **settings) -> peft.PeftModel:
    """Their base with our adapter, by way of the folder that we save."""
    lp.peft.save(model, folder, **settings)
    return peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder).eval()


def adapt(
    model: transformers.PreTrainedModel, settings: dict, kind: type = peft.LoraConfig
) -> peft.PeftModel:
    """PEFT's model with adapters that are all random, B too; the base stays as it is."""
    config = kind(task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name or "ia3_l" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * (0.3 if "lora_" not in name else 0.1))
    return adapted


def of_file(name: str) -> str:
    """A parameter's name as PEFT's files have it."""
    name = re.sub(r"(magnitude_vector)?\.default(?(1)\.weight)", r"\1", name)
    return name.replace(".modules_to_save", "")


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def assert_same(found, expected, tolerance: float = 1e-4) -> None:
    """Equal to within a share of the largest value."""
    assert np.abs(np.asarray(found) - expected).max() <= tolerance * np.abs(expected).max()


@pairs(
    llama=("q_proj", "patterns", "patterns-by-name", "some-layers"),
    qwen2=("all-linear", "rslora"),
    qwen3=("all-linear",),
    mistral=("all-linear",),
    gemma3=("all-linear", "patterns", "regex"),
)
def test_a_folder_that_peft_saves_gives_the_same_logits(base, tmp_path, name):
    check_their_folder(*base, tmp_path, SETTINGS[name])


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica"])
def test_ways_to_begin_that_leave_the_base_alone_are_read(base, tmp_path, init):
    settings = dict(r=4, lora_alpha=8, target_modules=["v_proj"], init_lora_weights=init)
    check_their_folder(*base, tmp_path, settings)


def check_their_folder(theirs, ours, tmp_path, settings):
    adapted = adapt(theirs, settings)
    adapted.save_pretrained(tmp_path)
    expected = logits_of(adapted)
    assert np.abs(expected - logits_of(theirs)).max() > 0.02  # the adapter does something
    assert_same(forward(lp.peft.load(ours, tmp_path), TOKENS), expected)


@pairs(
    llama=("rslora",), qwen2=("all-linear",), qwen3=("all-linear",), gemma3=("patterns-by-name",)
)
def test_every_gradient_of_a_and_b_agrees(base, tmp_path, name):
    theirs, ours = base
    check_gradients(adapt(theirs, SETTINGS[name]), ours, tmp_path)


def check_gradients(adapted, ours, tmp_path, switch=lambda model: model):
    """Gives our adapted model and its logits too, which the same program computes."""
    adapted.save_pretrained(tmp_path)
    adapted(torch.tensor(TOKENS)).logits.square().mean().backward()
    expected = {
        of_file(key): parameter.grad.numpy()
        for key, parameter in adapted.named_parameters()
        if parameter.grad is not None
    }
    model = lp.peft.load(ours, tmp_path)
    if ours.head is None:  # PEFT has the tied head's gradient apart, in another layout
        for of_head, of_table in (("lora_A.weight", "B"), ("lora_B.weight", "A")):
            more = expected.pop(f"base_model.model.lm_head.{of_head}", None)
            if more is not None:
                expected[f"base_model.model.model.embed_tokens.lora_embedding_{of_table}"] += more.T
    graph, trained, frozen = nnx.split(model, AdapterParam, ...)

    def loss(trained):
        logits = switch(nnx.merge(graph, trained, frozen))(TOKENS).logits
        return jnp.square(logits).mean(), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(trained)
    found = dict(export(grads, trained_table(model)))
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        scale = max(np.abs(expected[key]).max(), 1e-5)
        assert np.abs(gradient - expected[key]).max() / scale < 1e-4, key
    return model, logits


@pairs(
    llama=("dora-rslora", "whole", "tables", "loha", "lokr-both", "vera", "oft"),
    qwen2=(
        *("dora", "biases", "dora-biases", "loha-patterns", "lokr"),
        *("adalora", "oft-coft", "hra-gs", "ia3"),
    ),
    qwen3=("whole",),
    gemma3=("dora", "whole", "tables", "vera-drawn", "oft-exact", "hra"),
)
def test_other_methods_agree_in_logits_gradients_and_folders_both_ways(base, tmp_path, name):
    theirs, ours = base
    kind, settings = MORE[name]
    adapted = adapt(theirs, settings, kind)
    model, logits = check_gradients(adapted, ours, tmp_path / "theirs")
    expected = logits_of(adapted)
    assert np.abs(expected - logits_of(theirs)).max() > 0.02  # the adapter does something
    assert_same(logits, expected)
    assert_same(forward(lp.peft.merge(model), TOKENS), expected)
    again = in_peft(theirs, model, tmp_path / "ours")
    assert_same(logits_of(again), expected)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5])
def test_vera_draws_its_projections_as_peft_does_bit_for_bit(base, seed):
    theirs, ours = base
    settings = dict(r=24, target_modules=ALL, projection_prng_key=seed)
    expected = adapt(theirs, settings, peft.VeraConfig).base_model
    q = lp.peft.inject(ours, lp.peft.VeRA(rank=24, seed=seed)).layers.attn.q
    np.testing.assert_array_equal(q.vera_a[...], expected.vera_A["default"].numpy())
    np.testing.assert_array_equal(q.vera_b[...], expected.vera_B["default"].numpy())


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("every", [1, 2])
def test_adalora_prunes_what_peft_prunes(base, tmp_path, every):
    theirs, ours = base
    schedule = dict(target_r=2, tinit=1, tfinal=2, deltaT=every, total_step=8)
    settings = dict(init_r=4, lora_alpha=6, target_modules=ALL, **schedule)
    adapted = adapt(theirs, settings, peft.AdaLoraConfig)
    adapted.save_pretrained(tmp_path / "start")
    model = lp.peft.load(ours, tmp_path / "start")
    graph, state, frozen = nnx.split(model, AdapterParam, ...)
    method = next(iter(methods(model).values()))
    tx = allocate_ranks(optax.sgd(0.1), method, nnx.to_pure_dict(state), 8)
    params = nnx.to_pure_dict(state)
    opt_state, update = tx.init(params), jax.jit(tx.update)
    weights = {
        of_file(key): parameter
        for key, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    rng = np.random.default_rng(0)
    for step in range(1, 9):
        drawn = {key: rng.normal(0, 0.1, x.shape).astype(np.float32) for key, x in weights.items()}
        grads = nnx.to_pure_dict(nnx.state(read_tensors(ours, tmp_path, drawn), AdapterParam))
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        with torch.no_grad():
            for key, parameter in weights.items():
                parameter.grad = torch.tensor(drawn[key])
                parameter -= 0.1 * parameter.grad
        adapted.base_model.update_and_allocate(step)
        state = nnx.state(nnx.merge(graph, params, frozen), AdapterParam)
        found = dict(export(state, adapter_table(model, methods(model))))
        for key, array in found.items():
            np.testing.assert_allclose(array, weights[key].detach(), atol=1e-6)
            if key.endswith("lora_E"):
                np.testing.assert_array_equal(array == 0, weights[key].detach() == 0)
        pruned = step >= 2 and (step % every == 0 or step > 6)
        assert any(np.any(array == 0) for array in found.values()) == pruned
    left = adapted.peft_config["default"].rank_pattern
    assert sum(map(sum, left.values())) == 2 * len(left)
    check_pruned_folder(theirs, ours, adapted, tmp_path)


def read_tensors(ours: nnx.Module, folder, tensors: dict[str, np.ndarray]) -> nnx.Module:
    """The model with these in the place of the adapters in `folder / "start"`."""
    (folder / "drawn").mkdir(exist_ok=True)
    config = (folder / "start" / "adapter_config.json").read_text()
    (folder / "drawn" / "adapter_config.json").write_text(config)
    save_file(tensors, folder / "drawn" / "adapter_model.safetensors")
    return lp.peft.load(ours, folder / "drawn")


def check_pruned_folder(theirs, ours, adapted, tmp_path):
    """What is left after pruning, of one layer nothing, goes to us and back."""
    pattern, name = adapted.peft_config["default"].rank_pattern, "layers.0.self_attn.q_proj.lora_E"
    key = next(key for key in pattern if name in key)
    pattern[key] = [False] * 4
    with torch.no_grad():
        adapted.get_parameter(f"base_model.model.{key}").zero_()
    expected = logits_of(adapted)
    adapted.save_pretrained(tmp_path / "pruned")
    model = lp.peft.load(ours, tmp_path / "pruned")
    assert_same(forward(model, TOKENS), expected)
    assert_same(forward(lp.peft.merge(model), TOKENS), expected)
    again = in_peft(theirs, model, tmp_path / "again")
    assert_same(logits_of(again), expected)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_the_orthogonality_of_adalora_is_what_peft_adds_to_the_loss(base, tmp_path):
    theirs, ours = base
    settings = dict(init_r=4, target_modules=ALL, total_step=10, orth_reg_weight=0.25)
    adapted = adapt(theirs, settings, peft.AdaLoraConfig)
    adapted.save_pretrained(tmp_path)
    losses = []
    for weight in (0.25, 0.0):
        adapted.peft_config["default"].orth_reg_weight = weight
        with torch.no_grad():
            losses.append(
                adapted(torch.tensor(TOKENS), labels=torch.tensor(TOKENS).long()).loss.item()
            )
    found = 0.25 * orthogonality([*adapters(lp.peft.load(ours, tmp_path)).values()])
    np.testing.assert_allclose(found, losses[0] - losses[1], rtol=1e-5)


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_parts_of_the_weight_are_those_of_peft_and_load_there_on_the_base(base, tmp_path, init):
    theirs, ours = base
    settings = dict(r=4, lora_alpha=2, target_modules=["q_proj", "down_proj"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings, init_lora_weights=init)
    adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
    method = lp.peft.LoRA(4, 2, targets=("q_proj", "down_proj"), init_weights=init)
    model = lp.peft.inject(ours, method)
    down = model.layers.mlp.down
    for layer, block in enumerate(adapted.base_model.model.model.layers):
        product = down.lora_a[...][layer] @ down.lora_b[...][layer]
        expected = block.mlp.down_proj.get_delta_weight("default").detach().numpy().T
        np.testing.assert_allclose(0.5 * product, expected, atol=1e-5)
    graph, trained, rest = nnx.split(model, AdapterParam, ...)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype("float32"), trained)
    model = nnx.merge(graph, moved, rest)
    found = forward(model, TOKENS)
    assert np.abs(found - logits_of(theirs)).max() > 0.02
    again = in_peft(theirs, model, tmp_path / "ours")
    assert_same(logits_of(again), found)


class Drop(torch.nn.Module):
    """Drops the same inputs whatever the key is."""

    def forward(self, x):
        return x * torch.tensor(kept(tuple(x.shape[1:])))


def kept(shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(len(TOKENS))
    return (rng.random((shape[0], int(np.prod(shape[1:])))) > 0.4).astype(np.float32) / 0.6


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_what_is_dropped_changes_logits_and_gradients_as_in_peft(
    base, tmp_path, monkeypatch, use_dora
):
    theirs, ours = base
    adapted = adapt(theirs, dict(r=4, target_modules=ALL, use_dora=use_dora, lora_dropout=0.4))
    for module in adapted.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Drop()
    monkeypatch.setattr(
        lp.peft.adapter, "drop", lambda x, rate, key: x * kept(x.shape[1:]).reshape(x.shape[1:])
    )
    adapted.train()
    expected = logits_of(adapted)
    key = jax.random.key(0)
    model, logits = check_gradients(
        adapted, ours, tmp_path, switch=lambda m: lp.peft.train_mode(m, key)
    )
    assert_same(logits, expected)
    assert np.abs(expected - forward(model, TOKENS)).max() > 0.02


@pairs(
    llama=("all-linear",),
    qwen2=("rslora",),
    qwen3=("all-linear",),
    mistral=("rslora",),
    gemma3=("patterns",),
)
def test_a_folder_that_we_save_gives_the_same_logits_in_peft(base, tmp_path, name):
    theirs, ours = base
    adapt(theirs, SETTINGS[name]).save_pretrained(tmp_path / "theirs")
    model = lp.peft.load(ours, tmp_path / "theirs")
    again = in_peft(theirs, model, tmp_path / "ours", base_model="org/base")
    assert_same(forward(model, TOKENS), logits_of(again))
    config = again.peft_config["default"]
    assert config.use_rslora == SETTINGS[name].get("use_rslora", False)
    assert config.base_model_name_or_path == "org/base"


@pytest.mark.parametrize(
    "base", ["llama", pytest.param("qwen2", marks=pytest.mark.grid), "gemma3"], indirect=True
)
def test_adapters_on_some_layers_of_a_list_load_in_peft(base, tmp_path):
    theirs, ours = base
    graph, state = nnx.split(ours)
    listed = nnx.merge(graph, state)
    listed.layers = unstack(ours.layers)
    rank_pattern = {"layers.2.self_attn.o_proj": 3}
    method = lp.peft.LoRA(4, 8, targets=r".*layers\.[02]\..*\.o_proj", rank_pattern=rank_pattern)
    model = lp.peft.inject(listed, method)
    graph, adapters, rest = nnx.split(model, AdapterParam, ...)
    model = nnx.merge(graph, jax.tree.map(lambda x: x + 0.1, adapters), rest)  # B is zero else
    again = in_peft(theirs, model, tmp_path / "ours")
    assert_same(forward(model, TOKENS), logits_of(again))
    ranks = {key: x.shape[0] for key, x in again.named_parameters() if "lora_A" in key}
    assert sorted(ranks.values()) == [3, 4]


@pytest.mark.parametrize("base", ["gemma3"], indirect=True)
@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("whole", ["lm_head"]),
        ("ia3", ["embed_tokens"]),
        ("lora", ["lm_head", "embed_tokens"]),
        *[
            pytest.param(*row, marks=pytest.mark.grid)
            for row in (
                *[("whole", ["embed_tokens"]), ("whole", ["lm_head", "embed_tokens"])],
                *[("ia3", ["lm_head"]), ("ia3", ["lm_head", "embed_tokens"])],
                *[("lora", ["embed_tokens"]), ("lora", ["lm_head"])],
            )
        ],
    ],
)
def test_tables_that_peft_unties_load_onto_an_untied_model(base, tmp_path, kind, modules):
    theirs, ours = base
    settings = dict(target_modules=["k_proj"], modules_to_save=modules)
    settings |= {"ia3": dict(feedforward_modules=[])}.get(kind, {})
    settings = dict(target_modules=["k_proj", *modules]) if kind == "lora" else settings
    adapted = adapt(theirs, settings, peft.IA3Config if kind == "ia3" else peft.LoraConfig)
    adapted.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"load it onto lp.peft.untie\(model\)"):
        lp.peft.load(ours, tmp_path / "theirs")
    model = lp.peft.load(lp.peft.untie(ours), tmp_path / "theirs")
    assert_same(forward(model, TOKENS), logits_of(adapted))
    again = in_peft(theirs, model, tmp_path / "ours")
    assert_same(logits_of(again), logits_of(adapted))


@pytest.mark.parametrize("base", ["gemma3"], indirect=True)
def test_a_tied_table_trained_beside_ia3_loads_in_peft(base, tmp_path):
    theirs, ours = base
    method = lp.peft.IA3(targets=("k_proj",), feedforward=(), modules_to_save=("embed_tokens",))
    graph, trained, rest = nnx.split(lp.peft.inject(ours, method), AdapterParam, ...)
    model = nnx.merge(graph, jax.tree.map(lambda x: 1.1 * x, trained), rest)
    again = in_peft(theirs, model, tmp_path / "ours")
    assert_same(logits_of(again), forward(model, TOKENS))


@pytest.mark.parametrize(
    "base",
    [pytest.param("llama", marks=pytest.mark.grid), "qwen2", "qwen3", "gemma3"],
    indirect=True,
)
def test_a_merged_folder_gives_the_same_logits_in_transformers(base, tmp_path):
    theirs, ours = base
    adapted = adapt(theirs, SETTINGS["all-linear"])
    adapted.save_pretrained(tmp_path / "adapter")
    model = lp.peft.merge(lp.peft.load(ours, tmp_path / "adapter"))
    lp.save_model(model, tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager"
    ).eval()
    assert_same(logits_of(again), logits_of(adapted))


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_weighted_merge_is_pefts_weighted_adapter(base, tmp_path):
    theirs, ours = base
    weights = {"law": 0.7, "verse": 0.3}
    settings = {
        "law": dict(r=4, lora_alpha=8, target_modules=ALL),
        "verse": dict(r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "down_proj"]),
    }
    for name, each in settings.items():
        adapt(theirs, each).save_pretrained(tmp_path / name)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "law", "law")
    adapted.load_adapter(tmp_path / "verse", "verse")
    adapted.add_weighted_adapter(list(weights), list(weights.values()), "both", "cat")
    adapted.set_adapter("both")
    expected = logits_of(adapted.eval())
    both = lp.peft.combine({name: tmp_path / name for name in settings}, ours)
    assert_same(forward(lp.peft.merge(both, weights), TOKENS), expected)
    again = in_peft(theirs, lp.peft.blend(both, weights), tmp_path / "ours")
    assert_same(logits_of(again), expected)
    # "linear" mixes A with the other's B unless there is one adapter, where all three agree
    adapted.add_weighted_adapter(["law"], [0.7], "one", "linear")
    adapted.set_adapter("one")
    one = lp.peft.merge(both, {"law": 0.7})
    assert_same(forward(one, TOKENS), logits_of(adapted))
