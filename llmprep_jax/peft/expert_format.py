"""How PEFT keeps LoRAs of experts (`target_parameters`): one pair of matrices for all of them.

A fused parameter (E, out, in) has A as (E r, in) and B as (out, r E), with E and r in these two
orders. The keys are under the module that holds the parameter, not under the parameter's name: of
two adapted parameters of one module, PEFT wraps the first in the second, and the first one's keys
are under `base_layer`. The one thing a reader would get wrong: the first is the one that the module
holds first, whatever target_parameters says, so a weight table must keep their order.
"""

import re
from collections.abc import Iterable, Sequence

from flax import nnx

from llmprep_jax.nn.linear import Einsum
from llmprep_jax.peft.experts import are_apart, experts, letters
from llmprep_jax.peft.layout import Layout, dims
from llmprep_jax.peft.method import Method
from llmprep_jax.peft.targets import bases, plain, rows


def expert_layers(model: nnx.Module, paths: Iterable[str]) -> list[str]:
    """Those of the paths whose layers hold experts as one, in the order of the weight table."""
    of_model, table = bases(model), rows(model)
    order = list(table)

    def is_one(path: str) -> bool:
        base = of_model[path]
        return bool(experts(base)) and not are_apart(base, table[f"{plain(path)}.w"].pattern)

    return sorted(filter(is_one, paths), key=lambda path: order.index(f"{plain(path)}.w"))


def expert_module(name: str, adapted: Sequence[str]) -> str:
    """What the keys of a parameter's adapter start with; `adapted` are all such names."""
    module = name.rpartition(".")[0]
    siblings = [x for x in dict.fromkeys(adapted) if x.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(siblings) - 1 - siblings.index(name))


def expert_tensors(method: Method, path: str, base: Einsum, pattern: str) -> dict:
    """As `Method.tensors`, of a layer of many experts whose weight has this pattern.

    Raises:
      ValueError: PEFT has no format for the method there, or for a parameter of this layout.
    """
    if not method.adds_product:
        raise ValueError(
            f"{path} holds experts, and PEFT has a format for LoRA alone there, none for"
            f" {type(method).__name__}; save the merged model (lp.peft.merge)"
        )
    layout, numbers = _layout(path, base, pattern)
    return {
        "lora_a": (
            "lora_A.weight",
            f"({numbers} r) {layout.their_ins} -> {numbers} {layout.ins} r",
        ),
        "lora_b": (
            "lora_B.weight",
            f"{layout.their_outs} (r {numbers}) -> {numbers} r {layout.outs}",
        ),
    }


def tensors_of(
    method: Method, path: str, base: Einsum, pattern: str, mark: str
) -> dict[str, tuple[str, str]]:
    """As `Method.tensors`, of an ordinary layer or one of many experts whose weight has a pattern.

    Args:
      mark: what names end in, of layers that are one in transformers; else "".

    Raises:
      ValueError: PEFT has no format for the method there.
    """
    if experts(base) and not are_apart(base, pattern):
        tensors = expert_tensors(method, path, base, pattern)
    elif mark and not method.adds_product:
        raise ValueError(
            f"{path} is a part of one layer in transformers, where only a LoRA can be taken apart"
            f" and put together, no {type(method).__name__}; save the merged model (lp.peft.merge)"
        )
    else:
        tensors = method.tensors(Layout.of_layer(base, pattern))
    return {name: (f"{suffix}{mark}", order) for name, (suffix, order) in tensors.items()}


def _layout(path: str, base: Einsum, pattern: str) -> tuple[Layout, str]:
    """(inputs and outputs, the experts' letter) of a pattern of three groups."""
    theirs, ours = pattern.split("->")
    names = dict(zip(ours.split(), letters(base)[1], strict=False))
    _, ins, outs, _ = dims(base)
    sides = {"experts": experts(base), "ins": ins, "outs": outs}
    groups = {}
    for group in re.findall(r"\([^)]*\)|\S+", theirs):
        for side, dims_of_side in sides.items():
            if {names[name] for name in group.strip("()").split()} == set(dims_of_side):
                groups[side] = group
    if groups.keys() != sides.keys() or "(" in groups["experts"]:
        raise ValueError(
            f"{path} is not one fused parameter of experts, outputs and inputs in the weight table"
            f" ({pattern}), and PEFT has a format for no other; save the merged model"
        )
    ordered = [" ".join(n for n, dim in names.items() if dim in side) for side in (ins, outs)]
    return Layout(groups["ins"], groups["outs"], *ordered), groups["experts"]
