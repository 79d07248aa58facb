"""Models whose output head is their embedding, and what adapters make of the two.

What adapts or trains the table of such a model does so for both its uses, which is PEFT's
ensure_weight_tying: its files then hold the head's tensors too, made of the embedding's. Without
that setting PEFT changes one use alone (the lookup, where the embedding is named), which here takes
an `untie`d model.
"""

import functools
from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx

from llmprep_jax.nn.linear import Head
from llmprep_jax.peft.targets import Targets, embedding, is_name, part, table_of
from llmprep_jax.sharding import has_mesh, on_own_mesh, spec
from llmprep_jax.weights.gather import to_host
from llmprep_jax.weights.safetensors import SafetensorsFile

_ADAPTED = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}


def is_tied(model: nnx.Module) -> bool:
    """Whether a model's output head is its embedding."""
    table = table_of(model)
    return bool(table.embed and table.head) and part(model, _head(model)) is None


def _head(model: nnx.Module) -> str:
    """The path of the head."""
    return model.weights.head.removesuffix(".w")


def _name(model: nnx.Module, path: str) -> str:
    """PEFT's name of a table's module."""
    return model.weights.in_memory()[f"{path}.w"].name.removesuffix(".weight")


@on_own_mesh
def untie(model: nnx.Module) -> nnx.Module:
    """The same model with an output head of its own, a copy of its embedding.

    PEFT's adapters of a tied model's embedding or head alone load onto it.
    """
    if not is_tied(model):
        return model
    embed = part(model, embedding(model))
    table, compute = embed.w[...], embed.compute
    make = functools.partial(Head, *table.shape[::-1], compute=compute)
    graph, state = nnx.split(jax.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    w = table.T
    w = jax.reshard(w, spec("embed", "vocab", shape=w.shape)) if has_mesh() else w
    state["w"] = state["w"].replace(w)
    changed = nnx.merge(*nnx.split(model))
    changed.cfg = model.cfg.with_decoder(tie_embeddings=False)
    changed.decoder.cfg = changed.cfg.decoder
    changed.decoder.head = nnx.data(nnx.merge(graph, state))
    return changed


def refuse_head(model: nnx.Module, names: Targets) -> None:
    """Refuses names of what is to be adapted or trained that have the head of a tied model.

    Raises:
      ValueError: they do.
    """
    names = (names,) if is_name(names) else names
    if not is_tied(model) or isinstance(names, str):
        return
    own = _head(model)
    head = {own, own.rsplit(".", 1)[-1], _name(model, own)}.intersection(names)
    if head:
        raise ValueError(
            f"the model's head is its embedding, so {head.pop()!r} cannot be trained apart; name"
            " the embedding, which trains both, or lp.peft.untie(model) first"
        )


def _pairs(model: nnx.Module, prefix: str) -> dict[str, str]:
    """Names of the head's tensors in PEFT's files, and of the embedding's that they are made of."""
    if not (model.weights.embed and model.weights.head):
        return {}
    paths = embedding(model), _head(model)
    table, head = (f"{prefix}{_name(model, path)}.weight" for path in paths)
    ends = {
        head.removesuffix("weight") + of_head: table.removesuffix("weight") + of_table
        for of_head, of_table in _ADAPTED.items()
    }
    return {head: table, **ends}


def head_tensors(
    model: nnx.Module, tensors: Iterable[tuple[str, np.ndarray]], prefix: str
) -> Iterable[tuple[str, np.ndarray]]:
    """A file's tensors, and after them those of a head that goes with its embedding."""
    theirs = {of_table: of_head for of_head, of_table in _pairs(model, prefix).items()}
    heads = []
    for name, array in tensors:
        yield name, array
        if is_tied(model) and name in theirs:
            heads.append((theirs[name], array if name.endswith("weight") else array.T))
    yield from heads


def shapes(model: nnx.Module, file: SafetensorsFile, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of what the file has of a tied head, and of tables that PEFT saves as they were."""
    names = [*_base_tables(model, file, prefix), *_saved_tables(model, file, prefix)]
    by_name = {name: tuple(part(model, model.weights.embed).shape) for name in names}
    if is_tied(model):
        for head, table in _pairs(model, prefix).items():
            if head in file:  # alone, it is refused by `check`
                shape = tuple(file.shape(table if table in file else head))
                turned = table in file and not table.endswith("weight")
                by_name[head] = shape[::-1] if turned else shape
    return by_name


def _base_tables(model: nnx.Module, file: SafetensorsFile, prefix: str) -> list[str]:
    whole = list(_pairs(model, prefix).items())[:1]
    names = [f"{name.removesuffix('weight')}base_layer.weight" for pair in whole for name in pair]
    return [name for name in names if name in file]


def _saved_tables(model: nnx.Module, file: SafetensorsFile, prefix: str) -> list[str]:
    """Tables that a file holds whole."""
    pairs = list(_pairs(model, prefix).items())[:1]
    return [name for pair in pairs for name in pair if name in file]


def changed_tables(model: nnx.Module, file: SafetensorsFile, prefix: str) -> set[str]:
    """Modules of tables that a file holds whole and that are not the base's.

    Raises:
      ValueError: a table is of another size.
    """
    changed = set()
    for name in _saved_tables(model, file, prefix):
        ours, theirs = _table(model, name, prefix), file.read(name)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{file.path}: {name} has {len(theirs)} rows, and the base's table {len(ours)}; the"
                " vocabulary was resized before training, so resize and save the base alike first"
            )
        if not _equal(ours, theirs):
            changed.add(name.removeprefix(prefix).removesuffix(".weight"))
    return changed


def _table(model: nnx.Module, name: str, prefix: str) -> np.ndarray:
    """The base's table of this name, vocabulary first."""
    is_head = name.startswith(f"{prefix}{_name(model, _head(model))}.")
    if is_tied(model) or not is_head:
        return to_host(part(model, model.weights.embed)[...])
    return to_host(part(model, model.weights.head)[...]).T


def _equal(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two tables are the same but for the dtype that one is kept in."""
    return not np.any(ours != theirs.astype(ours.dtype)) or not np.any(
        ours.astype(theirs.dtype) != theirs
    )


def check(model: nnx.Module, file: SafetensorsFile, prefix: str) -> None:
    """Refuses what changes a tied table in one of its uses alone, and another base's table.

    Raises:
      ValueError: it does.
    """
    for name in _base_tables(model, file, prefix):
        ours, theirs = _table(model, name, prefix), file.read(name)
        if ours.shape != theirs.shape or not _equal(ours, theirs):
            raise ValueError(
                f"{file.path}: {name} is not the base's; merge the adapter into its own base with"
                " peft (merge_and_unload) and load that model"
            )
    if not is_tied(model):
        return
    for head, table in _pairs(model, prefix).items():
        if head not in file and table not in file:
            continue
        if head in file and table in file:
            of_table = file.read(table)
            of_table = of_table if table.endswith("weight") else of_table.T
            if np.array_equal(file.read(head), of_table):
                continue
        raise ValueError(
            f"{file.path} trains the embedding or the head of a model whose head is its embedding,"
            " one apart from the other; load it onto lp.peft.untie(model)"
        )
