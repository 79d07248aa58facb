"""Weights by table: Hugging Face tensors into a module's parameters, and back.

A table maps each of our parameter paths to (Hugging Face name, einops pattern theirs -> ours); `{l}` and
further placeholders run over the parameter's leading, stacked dimensions. Sizes come from the abstract
parameter, and swapping the pattern's sides exports. The one thing a reader would get wrong: the loader
reports everything that does not fit in one error, before it reads a single tensor.
"""

import concurrent.futures
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmprep_jax.weights.checkpoint import Checkpoint

Table = Mapping[str, tuple[str, str]]
BUFFERS = (r"rotary_emb\.inv_freq$", r"\.position_ids$")  # in old files; computed, not loaded
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_SHOWN = 12  # lines of each kind in an error


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and the tensors that make it up.

    Attributes:
      path: ours, e.g. "layers.attn.q.w". shape: ours, stacked dimensions first.
      name: theirs, with placeholders. pattern: theirs -> ours, of one tensor.
    """

    path: str
    shape: tuple[int, ...]
    name: str
    pattern: str

    @property
    def stacked(self) -> tuple[int, ...]:
        """Sizes of the leading dimensions that the placeholders run over."""
        return self.shape[: len(_PLACEHOLDER.findall(self.name))]

    def names(self) -> dict[tuple[int, ...], str]:
        """Hugging Face names by place in the stacked dimensions."""
        keys = _PLACEHOLDER.findall(self.name)
        places = itertools.product(*map(range, self.stacked))
        return {place: self.name.format(**dict(zip(keys, place, strict=True))) for place in places}

    def sizes(self) -> dict[str, int]:
        """The pattern's letters, from our shape."""
        letters = self.pattern.split("->")[1].split()
        return dict(zip(letters, self.shape[len(self.stacked) :], strict=True))

    def their_shape(self) -> tuple[int, ...]:
        """The shape that each tensor must have."""
        sizes, shape = self.sizes(), []
        for group in re.findall(r"\([^)]*\)|\S+", self.pattern.split("->")[0]):
            letters = group.strip("()").split()
            shape.append(int(np.prod([sizes[letter] for letter in letters])))
        return tuple(shape)

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        return einops.rearrange(tensor, self.pattern, **self.sizes())

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        theirs, ours = self.pattern.split("->")
        return einops.rearrange(array, f"{ours.strip()} -> {theirs.strip()}", **self.sizes())


def entries(module: nnx.Module, table: Table, kind: type = nnx.Variable) -> dict[str, Entry]:
    """The table's rows for a module's variables of `kind`, by path.

    Raises:
      ValueError: the module has a variable that the table does not name.
    """
    flat = nnx.to_flat_state(nnx.state(module, kind))
    shapes = {".".join(map(str, path)): variable.shape for path, variable in flat}
    unnamed = sorted(set(shapes) - set(table))
    if unnamed:
        raise ValueError(f"the weight table names no tensor for {', '.join(unnamed)}")
    return {path: Entry(path, tuple(shape), *table[path]) for path, shape in shapes.items()}


def load(
    abstract: nnx.Module,
    checkpoint: Checkpoint,
    table: Table,
    *,
    dtype: str | None = None,
    renames: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
    progress: Callable[[str], None] | None = None,
) -> nnx.Module:
    """Fills an abstract module from a checkpoint.

    Each parameter is read tensor by tensor into the dtype and sharding of its place; under a mesh a process
    reads only what its devices hold.

    Args:
      abstract: from `jax.eval_shape` of the model's constructor, under the mesh if there is one.
      dtype: of all parameters; None: each as stored.
      renames: (regex, replacement) pairs that bring the checkpoint's names to the table's.
      ignore: regexes of tensors (as stored) that are none of this model's.
      progress: called with each parameter's path before it is read.

    Raises:
      ValueError: tensors are missing, unexpected or misshapen; all are listed.
    """
    rows = entries(abstract, table)
    found = _canonical_names(checkpoint, renames, ignore)
    _check(rows, table, found, checkpoint)
    graph, state = nnx.split(abstract)
    flat = []
    for path, variable in nnx.to_flat_state(state):
        row = rows[".".join(map(str, path))]
        if progress is not None:
            progress(row.path)
        names = {place: found[name] for place, name in row.names().items()}
        value = _read(row, names, checkpoint, dtype, variable.get_value().sharding)
        flat.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _canonical_names(
    checkpoint: Checkpoint, renames: Sequence[tuple[str, str]], ignore: Sequence[str]
) -> dict[str, str]:
    """Stored names by the names that tables use."""
    found = {}
    for stored in checkpoint.names:
        if any(re.search(pattern, stored) for pattern in (*ignore, *BUFFERS)):
            continue
        name = stored
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        found[name] = stored
    return found


def _check(
    rows: Mapping[str, Entry], table: Table, found: Mapping[str, str], checkpoint: Checkpoint
) -> None:
    wanted = {name: row for row in rows.values() for name in row.names().values()}
    missing = sorted(set(wanted) - set(found))
    # an untied table's head beside a tied model: the caller has seen that it repeats the embedding
    spare = {name for path, (name, _) in table.items() if path == "head.w" and path not in rows}
    unexpected = sorted(set(found) - set(wanted) - spare)
    misshapen = [
        f"{name} is {checkpoint.shape(found[name])}, expected {row.their_shape()}"
        for name, row in wanted.items()
        if name in found and tuple(checkpoint.shape(found[name])) != row.their_shape()
    ]
    problems = [
        f"{len(lines)} {kind}: {_shown(lines)}"
        for kind, lines in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if lines
    ]
    if problems:
        raise ValueError(
            f"{checkpoint.path}: config.json and the weights do not fit together: "
            + "; ".join(problems)
        )


def _shown(lines: Sequence[str]) -> str:
    rest = len(lines) - _SHOWN
    return ", ".join(lines[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _read(
    row: Entry,
    names: Mapping[tuple[int, ...], str],
    checkpoint: Checkpoint,
    dtype: str | None,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    dtype = jnp.dtype(dtype) if dtype else checkpoint.dtype(next(iter(names.values())))
    depth = len(row.stacked)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        """Our array's part `index`, reading only the tensors in it."""
        steps = [range(*span.indices(size)) for span, size in zip(index, row.shape, strict=False)]
        places = list(itertools.product(*steps[:depth]))
        shape = tuple(len(step) for step in steps)
        out = np.empty((len(places), *shape[depth:]), dtype)

        def fill(i: int) -> None:
            tensor = row.to_ours(checkpoint.read(names[places[i]]))
            np.copyto(out[i], tensor[index[depth:]], casting="unsafe")

        # the copies transpose, which is slow and releases the interpreter: two at a time
        with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(fill, range(len(places))))
        return out.reshape(shape)

    if sharding is None or len(sharding.device_set) == 1:
        return jnp.asarray(part((slice(None),) * len(row.shape)))
    return jax.make_array_from_callback(row.shape, sharding, part)


def head_is_separate(
    checkpoint: Checkpoint,
    embed_name: str,
    head_name: str,
    renames: Sequence[tuple[str, str]] = (),
) -> bool:
    """True when the file holds an output head that is not the embedding; it wins over "tied"."""
    found = _canonical_names(checkpoint, renames, ())
    if head_name not in found or embed_name not in found:
        return False
    head, embed = checkpoint.read(found[head_name]), checkpoint.read(found[embed_name])
    return head.shape != embed.shape or not np.array_equal(head, embed)


def export(
    module: nnx.Module, table: Table, *, dtype: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, array) of every tensor, one parameter in host memory at a time."""
    rows = entries(module, table)
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        row = rows[".".join(map(str, path))]
        stacked = np.asarray(jax.device_get(variable[...]))
        for place, name in row.names().items():
            array = row.to_theirs(stacked[place])
            yield name, np.ascontiguousarray(array if dtype is None else array.astype(dtype))
