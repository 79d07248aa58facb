"""Multi-token prediction modules against transformers, by files in the released layout.

transformers neither writes the modules nor keeps them with its model: `MtpModel` holds them, and
this writes them where DeepSeek-V3's files have them, behind the last layer.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_layers import MtpModel

import llmprep_jax as lp
from llmprep_jax.nn.attention import Tokens
from llmprep_jax.weights.folder import FolderCheckpoint
from llmprep_jax.weights.safetensors import write_folder
from tests.parity import torch_models

pytestmark = pytest.mark.parity
NUM_LAYERS = 3
CONFIGS = ["deepseek-v3", "deepseek-v3-one-group"]


def make(name: str, num_mtp: int):
    """transformers' model and its modules, with random weights."""
    theirs = torch_models.make(name)
    theirs.config.num_nextn_predict_layers = num_mtp
    modules = MtpModel(theirs, num_mtp).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (*modules.layers.parameters(), *modules.layers.buffers()):
            tensor.copy_(torch.randn_like(tensor) * 0.15 + (tensor.ndim == 1))
    return theirs, modules


def released_names(modules: MtpModel, theirs) -> dict[str, np.ndarray]:
    """The modules' tensors as files have them, with the two copies."""
    found = {}
    for m, layer in enumerate(modules.layers):
        prefix = f"model.layers.{NUM_LAYERS + m}."
        for name, tensor in layer.state_dict().items():
            name = name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
            before, _, part = name.rpartition(".")
            if part not in ("gate_up_proj", "down_proj"):
                found[prefix + name] = tensor.numpy()
                continue
            names = ["gate_proj", "up_proj"] if part == "gate_up_proj" else ["down_proj"]
            for e, expert in enumerate(tensor.numpy()):
                for each, half in zip(names, np.split(expert, len(names)), strict=True):
                    found[f"{prefix}{before}.{e}.{each}.weight"] = half
        found[prefix + "embed_tokens.weight"] = theirs.model.embed_tokens.weight.detach().numpy()
        found[prefix + "shared_head.head.weight"] = theirs.lm_head.weight.detach().numpy()
    return found


def write(theirs, modules: MtpModel | None, folder):
    """A folder in the released layout."""
    torch_models.save(theirs, folder)
    if modules is not None:
        checkpoint = FolderCheckpoint(folder)
        tensors = {name: np.array(checkpoint.read(name)) for name in checkpoint.names}
        write_folder(folder, [*tensors.items(), *released_names(modules, theirs).items()])
    return folder


@pytest.fixture(
    scope="module",
    params=[(name, num) for name in CONFIGS for num in (1, 2)],
    ids=lambda param: "-".join(map(str, param)),
)
def trio(request, tmp_path_factory):
    """transformers' model and modules, and our model of both."""
    theirs, modules = make(*request.param)
    return theirs, modules, lp.load_model(write(theirs, modules, tmp_path_factory.mktemp("hf")))


@torch.no_grad()
def their_logits(theirs, modules: MtpModel, tokens: np.ndarray) -> list[np.ndarray]:
    """Of every module, which reads the text from its second token on, third token on, ..."""
    tokens, found = torch.tensor(tokens).long(), []
    hidden = theirs.model(tokens[:, : -len(modules.layers)]).last_hidden_state
    positions = torch.arange(hidden.shape[1])[None] + 1
    for m in range(len(modules.layers)):
        following = tokens[:, m + 1 :][:, : hidden.shape[1]]
        hidden = modules.forward_layer(m, hidden, positions, None, input_ids=following)
        found.append(theirs.lm_head(hidden).numpy())
    return found


@jax.jit
def our_logits(model, tokens):
    hidden, found = model.features(model.embed_inputs(tokens[:, : -len(model.mtp)]))[0], []
    place = Tokens(jnp.broadcast_to(jnp.arange(hidden.shape[1]), hidden.shape[:2]))
    for m, module in enumerate(model.mtp):
        following = model.embed(tokens[:, m + 1 :][:, : hidden.shape[1]])
        hidden, _, _ = module(hidden, following, place, model.rope(place))
        found.append(model.unembed(hidden))
    return found


def test_logits_of_every_module_agree(trio):
    theirs, modules, ours = trio
    tokens = torch_models.tokens()
    expected, found = their_logits(theirs, modules, tokens), our_logits(ours, tokens)
    assert len(found) == len(expected) == len(modules.layers)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 1
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_folder_that_we_save_loads_with_its_modules_here_and_in_transformers(
    trio, tmp_path, monkeypatch
):
    theirs, modules, ours = trio
    # theirs looks for layer 61, whatever the number of layers
    behind = [r"model\.layers\.[34].*"]
    monkeypatch.setattr(type(theirs), "_keys_to_ignore_on_load_unexpected", behind)
    folder, tokens = lp.save_model(ours, tmp_path / "ours"), torch_models.tokens()
    released = released_names(modules, theirs)
    checkpoint = FolderCheckpoint(folder)
    names = [name for name in checkpoint.names if re.match(behind[0], name)]
    assert sorted(names) == sorted(name for name in released if released[name].size)
    for name in names:
        np.testing.assert_array_equal(checkpoint.read(name), released[name])
    for x in zip(our_logits(lp.load_model(folder), tokens), our_logits(ours, tokens), strict=True):
        np.testing.assert_array_equal(*x)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    loaded = MtpModel.from_pretrained(again.eval()).eval()
    expected = their_logits(theirs, modules, tokens)
    for one, other in zip(their_logits(again, loaded, tokens), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_folder_without_modules_is_a_model_without_them_whatever_its_config_says(tmp_path):
    theirs, _ = make("deepseek-v3", 1)
    folder = write(theirs, None, tmp_path)
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    ours = lp.load_model(folder)
    assert (ours.cfg.num_mtp, len(ours.mtp)) == (0, 0)


@pytest.mark.parametrize(("said", "held"), [(2, 1), (1, 2)])
def test_fewer_modules_than_the_config_says_are_one_error_and_more_are_left(tmp_path, said, held):
    theirs, modules = make("deepseek-v3", held)
    theirs.config.num_nextn_predict_layers = said
    folder = write(theirs, modules, tmp_path)
    if said < held:
        assert len(lp.load_model(folder).mtp) == said
        return
    with pytest.raises(ValueError, match=r"missing: model\.layers\.4\.") as caught:
        lp.load_model(folder)
    assert "\n" not in str(caught.value)
    assert "unexpected" not in str(caught.value)


@pytest.mark.parametrize("num_mtp", [1, 2])
def test_greedy_drafting_leaves_transformers_text_as_it_is(tmp_path, num_mtp):
    theirs, modules = make("deepseek-v3", num_mtp)
    ours, tokens = lp.load_model(write(theirs, modules, tmp_path)), torch_models.tokens(3, 12)
    settings = dict(max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        expected = theirs.generate(torch.tensor(tokens).long(), **settings)[:, 12:].numpy()
    found = lp.generate_tokens(ours, tokens, max_new_tokens=32, draft="mtp")
    np.testing.assert_array_equal(found, expected)
