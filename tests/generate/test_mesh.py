"""Generation on meshes says what it says on one device, without the caller entering the mesh."""

import functools
import itertools

import jax
import numpy as np
import pytest

import llmprep_jax as lp
from llmprep_jax.sharding import has_mesh, make_mesh, use_mesh
from tests.generate.drafting import drafting_model
from tests.grids import cases
from tests.models.tiny import make_model, make_tokens

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 2},
    "expert": {"expert": 4},
    "fsdp-tensor": {"fsdp": 4, "tensor": 2},
    "expert-tensor": {"expert": 4, "tensor": 2},
}
# each compiles for seconds: every mesh, and every family on two
PAIRS = cases(
    itertools.product(("llama-tied-9-3-heads", "qwen2-window", "gemma3", "deepseek-v3"), MESHES),
    fast=[
        ("qwen2-window", "tensor"),
    ],
    slow=[
        ("llama-tied-9-3-heads", "data"),
        ("gemma3", "fsdp-tensor"),
        ("deepseek-v3", "expert-tensor"),
        ("llama-tied-9-3-heads", "expert-tensor"),
        ("qwen2-window", "fsdp"),
    ],
)
# eight rows, two of which are padded
TOKENS, MASK = make_tokens(8, 11), np.arange(11) >= np.array([[0, 3, 0, 0, 6, 0, 0, 0]]).T
SAMPLED = dict(temperature=1.0, top_k=20, top_p=0.9, repetition_penalty=1.2)


def on(axes, make):
    """What `make` makes, laid over a mesh; no mesh is in force afterwards."""
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    with use_mesh(make_mesh(axes, devices)):
        return make()


@functools.cache
def said(name, **settings):
    """What one device says."""
    return np.asarray(lp.generate_tokens(make_model(name), TOKENS, MASK, **settings))


@pytest.mark.parametrize(("name", "axes"), PAIRS)
def test_a_model_on_a_mesh_says_what_it_says_on_one_device(name, axes):
    model = on(MESHES[axes], lambda: make_model(name))
    assert not has_mesh()
    found = lp.generate_tokens(model, TOKENS, MASK, max_new_tokens=6)
    np.testing.assert_array_equal(found, said(name, max_new_tokens=6))
    with use_mesh(model.embed.w[...].sharding.mesh):  # nor does it matter
        again = lp.generate_tokens(model, TOKENS, MASK, max_new_tokens=6)
    np.testing.assert_array_equal(again, found)


# twenty seconds each; drafts below draw from deepseek-v3 on a mesh
@pytest.mark.parametrize(
    "name", cases(["llama-tied-9-3-heads", "gemma3", "deepseek-v3"], slow=["llama-tied-9-3-heads"])
)
def test_draws_samples_streams_and_chats_on_a_mesh_are_those_of_one_device(name):
    model = on(MESHES["fsdp-tensor"], lambda: make_model(name))
    settings = dict(max_new_tokens=6, **SAMPLED)
    pieces = list(lp.stream_tokens(model, TOKENS, MASK, chunk=4, **settings))
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), said(name, **settings))
    samples = lp.generate_tokens(model, TOKENS[:3], num_samples=8, **settings)
    expected = lp.generate_tokens(make_model(name), TOKENS[:3], num_samples=8, **settings)
    np.testing.assert_array_equal(samples, expected)
    cache, text = lp.PromptCache(), TOKENS[:1]
    for _ in range(2):
        found = lp.generate_tokens(model, text, max_new_tokens=6, prompt_cache=cache)
        expected = lp.generate_tokens(make_model(name), text, max_new_tokens=6)
        np.testing.assert_array_equal(found, expected)
        text = np.concatenate([text, found, TOKENS[1:2, :3]], axis=1)


# half a minute each; what holds for drawn tokens holds for the likeliest
@pytest.mark.parametrize(
    ("settings", "axes"),
    cases(
        itertools.product(({}, SAMPLED), ("fsdp-tensor", "expert-tensor")),
        slow=[(SAMPLED, "expert-tensor")],
    ),
    ids=["greedy-fsdp", "greedy-expert", "sampled-fsdp", "sampled-expert"],
)
def test_drafts_on_a_mesh_are_accepted_as_on_one_device(axes, settings):
    settings = dict(max_new_tokens=12, draft="mtp", **settings)
    accounts = []
    found, expected = [
        lp.generate_tokens(model, TOKENS, MASK, report=accounts.append, **settings)
        for model in (on(MESHES[axes], lambda: drafting_model(2)), drafting_model(2))
    ]
    np.testing.assert_array_equal(found, expected)
    assert str(accounts[0]) == str(accounts[1])
    assert accounts[0].accepted.any()
