"""The lower rungs of the ladder: every module of every layer on the inputs transformers gave it.

When logits differ, the lowest rung that fails here says where: each failure is a list of modules.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llmprep_jax.nn.attention import Tokens
from llmprep_jax.nn.rope import rope_angles, rope_frequencies
from llmprep_jax.weights.table import entries
from tests.parity import torch_models

pytestmark = pytest.mark.parity
TOLERANCE = 1e-5  # of the largest value of a module's output


class Trace:
    """What went into and came out of every module of transformers' model, in the order of calls."""

    def __init__(self, model, tokens):
        self.calls = {}
        hooks = [
            module.register_forward_hook(self._note(name), with_kwargs=True)
            for name, module in model.named_modules()
        ]
        with torch.no_grad():
            model(torch.tensor(tokens))
        for hook in hooks:
            hook.remove()

    def _note(self, name):
        def note(module, args, kwargs, output):
            given = (*args, *kwargs.values())
            self.calls.setdefault(name, []).append((given, output))

        return note

    def of(self, name):
        """Input and output of a module that was called once."""
        (((x, *_), output),) = self.calls[name]
        output = output[0] if isinstance(output, tuple) else output
        return x.numpy(), output.numpy()


@pytest.fixture(scope="module", params=torch_models.CASES)
def case(request, pair_of):
    theirs, ours = pair_of(request.param)
    return Trace(theirs, torch_models.tokens()), ours


def layer_of(model, number):
    """A layer by its number in the checkpoint, whatever stack it is in."""
    if model.stacks == ("layers",):
        return at(model.layers, number)
    kinds = model.cfg.is_moe
    stack = model.moe_layers if kinds[number] else model.dense_layers
    return at(stack, kinds[:number].count(kinds[number]))


def at(stack, place):
    return jax.tree.map(lambda x: x[place], stack)


def modules(model, suffix):
    """(our module, transformers' name) for each row of the weights table whose path ends so.

    Without routed experts and their routers, which transformers runs in one module each.
    """
    for path, row in entries(model, model.weights).items():
        stack, *steps, _ = path.split(".")
        if not path.endswith(suffix) or path in ("embed.w", "head.w"):
            continue
        if "experts" in steps or "router" in steps:
            continue
        for place, name in row.names().items():
            module = getattr(model, stack)
            module = at(module, place[0]) if place else module
            for step in steps:
                module = getattr(module, step)
            yield module, name.removesuffix(".weight")


def differ(found, expected):
    scale = np.abs(expected).max()
    return np.abs(np.asarray(found) - expected).max() > TOLERANCE * scale


def test_norms_agree(case):
    trace, ours = case
    failures, checked = [], list(modules(ours, ".scale"))
    for module, name in checked:
        x, expected = trace.of(name)
        if differ(module(x), expected):
            failures.append(name)
    assert not failures
    assert len(checked) >= 2 * ours.cfg.num_layers + 1


def test_projections_agree(case):
    trace, ours = case
    failures, checked = [], list(modules(ours, ".w"))
    for module, name in checked:
        x, expected = trace.of(name)
        x_dims, w_dims = module.eqn.split("->")[0].split(",")
        shared = [size for dim, size in zip(w_dims, module.w.shape, strict=True) if dim in x_dims]
        found = module(jnp.asarray(x).reshape(len(x), -1, *shared))
        if differ(found.reshape(expected.shape), expected):
            failures.append(name)
    assert not failures
    assert len(checked) == num_projections(ours.cfg)


def num_projections(cfg):
    if not hasattr(cfg, "kv_rank"):
        return 7 * cfg.num_layers
    mlps = cfg.num_layers if cfg.num_shared else cfg.is_moe.count(False)
    return (4 if cfg.q_rank is None else 5) * cfg.num_layers + 3 * mlps


def ropes_of(cfg):
    """(base, scaling) by the kind of layer, None where there is one kind."""
    if hasattr(cfg, "rope_local_base"):
        local, full = (cfg.rope_local_base, None), (cfg.rope_base, cfg.rope_scaling)
        return {"sliding_attention": local, "full_attention": full}
    return {None: (cfg.rope_base, cfg.rope_scaling)}


def test_rotations_agree(case):
    trace, ours = case
    positions, ropes = jnp.arange(24)[None], ropes_of(ours.cfg)
    kinds = set()
    width = getattr(ours.cfg, "rope_dim", None) or ours.cfg.head_dim
    for (_, _, *kind), output in trace.calls["model.rotary_emb"]:
        kind = kind[0] if kind else None
        kinds.add(kind)
        if isinstance(output, torch.Tensor):  # V2: complex numbers, one for each pair
            output = [part.repeat(1, 1, 2) for part in (output.real, output.imag)]
        found = rope_angles(positions, *rope_frequencies(width, *ropes[kind]))
        for ours_BTR, theirs_BTH in zip(found, output, strict=True):
            expected = np.split(theirs_BTH.numpy()[:1], 2, axis=-1)
            np.testing.assert_allclose(ours_BTR, expected[0], atol=2e-6)
            np.testing.assert_array_equal(*expected)
    assert kinds


def places(tokens):
    return Tokens(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))


def layer_call(model, number, tokens):
    """What a layer, and its attention, is called with beside its input."""
    cfg, where = model.cfg, places(tokens)
    if hasattr(cfg, "local_layers"):
        is_local = cfg.local_layers()[number]
        return where, model._rope(where, is_local), cfg.window if is_local else None
    if hasattr(cfg, "kv_rank"):
        return where, model.rope(where)
    rope = rope_angles(
        where.positions_BT, *rope_frequencies(cfg.head_dim, cfg.rope_base, cfg.rope_scaling)
    )
    return where, rope, cfg.windows()[number]


@pytest.mark.parametrize("part", ["attention", "mlp", "block"])
def test_layers_agree(case, part):
    trace, ours = case
    failures = []
    for number in range(ours.cfg.num_layers):
        layer, name = layer_of(ours, number), f"model.layers.{number}"
        call = layer_call(ours, number, torch_models.tokens())
        if part == "attention":
            name += ".self_attn"
            found = layer.attn(trace.of(name)[0], *call)[0]
        elif part == "mlp":
            name += ".mlp"
            found = layer.mlp(jnp.asarray(trace.of(name)[0]))
            found = found[0] if isinstance(found, tuple) else found  # and the load of experts
        else:
            found = layer(trace.of(name)[0], *call)[0]
        if differ(found, trace.of(name)[1]):
            failures.append(name)
    assert not failures
