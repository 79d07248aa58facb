"""Tables of tensors' names: what each parameter of ours is called in a checkpoint, and laid out as.

A family states a `Table`; one that is composed of others puts theirs under prefixes and joins them:
`siglip.below("vision", "vision_tower.") | llama.below("language", "language_model.")`. Nothing here
reads a file or imports JAX.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

PLACEHOLDER = re.compile(r"\{\w+(?::([\w,]+))?\}")
Pairs = tuple[tuple[str, str], ...]


class Whole(NamedTuple):
    """A larger model that holds this one as a part.

    Attributes:
      model_type: in its config.json.
      body: what the beginning "model." of names in memory is there.
      others: names of its other parts.
    """

    model_type: str
    body: str
    others: tuple[str, ...] = ()


class Row(NamedTuple):
    """The tensor that a parameter is stored in.

    Attributes:
      name: as stored. Placeholders run over stacked layers, lists of layers and experts: `{l}` from
        0 on, `{l:3,5}` over what is listed.
      pattern: theirs -> ours as einops has it, of one tensor; of a part, that part's.
      part: (i, n), the i-th of n equal parts of the tensor's first axis; (0, 3) is q of a qkv.
      module: how the model in memory holds the parameter, where files hold another tensor (experts
        that transformers fuses); adapters go by it. Its parts are along the outputs.
    """

    name: str
    pattern: str
    part: tuple[int, int] = (0, 1)
    module: "Row | None" = None


@dataclasses.dataclass(frozen=True, eq=False)
class Table(Mapping[str, Row]):
    """Rows by the path of the parameter, without the numbers of layers in lists.

    Rows that a model has no parameter for are not used.

    Attributes:
      rows: by path; tuples are made `Row`s.
      renames: (regex, replacement) pairs that bring other spellings of whole names to the rows', in
        this order.
      ignored: regexes of tensors that may be there and are not read, since they are computed.
      copies: names under which a file holds a tensor once more, with the tensor's own name.
      modules: (beginning of stored names, of the names in memory) where these differ.
      within: the larger models whose adapters are this one's too.
      embed, head: paths of the embedding and of the output head that it may stand for; None where
        there is no row of this path.
      finds_prefix: whether stored names may lack or have a prefix, which is then seen from where
        the embedding is; for language models alone.

    Raises:
      ValueError: two rows are of one tensor, or of a tensor's parts one has no row.
    """

    rows: Mapping[str, Any]
    renames: Pairs = ()
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    modules: Pairs = ()
    within: tuple[Whole, ...] = ()
    embed: str | None = "embed.w"
    head: str | None = "head.w"
    finds_prefix: bool = False

    def __post_init__(self):
        rows = {path: Row(*row) for path, row in self.rows.items()}
        object.__setattr__(self, "rows", rows)
        for field in ("embed", "head"):
            if getattr(self, field) not in rows:
                object.__setattr__(self, field, None)
        _check_parts(rows)
        _check_parts({path: row.module for path, row in rows.items() if row.module})

    def __getitem__(self, path: str) -> Row:
        return self.rows[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def below(self, path: str, theirs: str = "", also: Mapping[str, str] | None = None) -> "Table":
        """The table of a model that holds this one at `path`.

        Spellings, ignored tensors and names in memory are left behind: the larger model states its
        own, by `dataclasses.replace`.

        Args:
          theirs: what comes before stored names.
          also: beginnings of stored names that are replaced in place of that, e.g. of a head
            that is stored beside the language model: {"model.": "model.language_model.",
            "lm_head.": "lm_head."}.
        """
        starts = sorted((also or {}).items(), key=lambda item: -len(item[0]))

        def name(stored: str) -> str:
            for start, other in starts:
                if stored.startswith(start):
                    return other + stored.removeprefix(start)
            return theirs + stored

        def row(row: Row) -> Row:
            module = row.module and row.module._replace(name=name(row.module.name))
            return row._replace(name=name(row.name), module=module)

        return Table(
            {f"{path}.{ours}": row(of_path) for ours, of_path in self.items()},
            copies={name(copy): name(original) for copy, original in self.copies.items()},
            embed=self.embed and f"{path}.{self.embed}",
            head=self.head and f"{path}.{self.head}",
        )

    def __or__(self, other: "Table") -> "Table":
        """The rows of both, with all that either says beside them.

        Raises:
          ValueError: both have rows of one path or tensor, or an embedding or head.
        """
        twice = [path for path in self if path in other]
        twice += [
            field for field in ("embed", "head") if getattr(self, field) and getattr(other, field)
        ]
        if twice:
            raise ValueError(
                f"both tables have {', '.join(twice)}; put one below a path of its own"
            )
        return Table(
            {**self.rows, **other.rows},
            self.renames + other.renames,
            self.ignored + other.ignored,
            {**self.copies, **other.copies},
            self.modules + other.modules,
            self.within + other.within,
            self.embed or other.embed,
            self.head or other.head,
            self.finds_prefix or other.finds_prefix,
        )

    def only(self, path: str) -> "Table":
        """The table of the part at `path` alone, in files of the whole, whose other tensors it
        knows and ignores.

        Raises:
          ValueError: there is nothing below the path.
        """
        start = f"{path}."
        rows = {
            ours.removeprefix(start): row for ours, row in self.items() if ours.startswith(start)
        }
        if not rows:
            parts = ", ".join(dict.fromkeys(ours.split(".")[0] for ours in self))
            raise ValueError(f"the model has no part {path!r}; it has {parts}")
        names = {row.name for row in rows.values()}
        others = [row.name for ours, row in self.items() if not ours.startswith(start)]
        others += [copy for copy, original in self.copies.items() if original not in names]
        return dataclasses.replace(
            self,
            rows=rows,
            ignored=(*self.ignored, *map(name_regex, dict.fromkeys(others))),
            copies={copy: name for copy, name in self.copies.items() if name in names},
            embed=self.embed and self.embed.removeprefix(start),
            head=self.head and self.head.removeprefix(start),
        )

    def rename(self, name: str) -> str:
        """A name in another spelling as rows have it."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def module_name(self, name: str) -> str:
        """A stored name as the model in memory has it."""
        for stored, in_memory in self.modules:
            if name.startswith(stored):
                return in_memory + name.removeprefix(stored)
        return name

    def in_memory(self) -> dict[str, Row]:
        """The rows by names in memory."""
        return {path: row._replace(name=self.module_name(row.name)) for path, row in self.items()}

    def modules_in_memory(self) -> dict[str, Row]:
        """The rows by names in memory, of the tensors that are there: an adapter's are of these."""
        return {
            path: self[path].module._replace(name=self.module_name(self[path].module.name))
            if row.module
            else row
            for path, row in self.in_memory().items()
        }


def fill(name: str, place: tuple[int, ...]) -> str:
    """A name with the numbers of a place, or what is listed for them, in its placeholders."""
    numbers = iter(place)

    def value(match: re.Match) -> str:
        number = next(numbers)
        return str(number) if match[1] is None else match[1].split(",")[number]

    return PLACEHOLDER.sub(value, name)


def name_regex(name: str) -> str:
    """A regex of all names that a row's name stands for."""
    regex, end = "", 0
    for match in PLACEHOLDER.finditer(name):
        listed = r"\d+" if match[1] is None else f"(?:{match[1].replace(',', '|')})"
        regex += re.escape(name[end : match.start()]) + listed
        end = match.end()
    return f"^{regex}{re.escape(name[end:])}$"


def _check_parts(rows: Mapping[str, Row]) -> None:
    """Refuses two rows of one tensor's part, and a tensor of which a part has no row."""
    by_name: dict[str, dict[tuple[int, int], str]] = {}
    for path, row in rows.items():
        of_name = by_name.setdefault(row.name, {})
        if row.part in of_name:
            raise ValueError(f"{of_name[row.part]} and {path} are both {row.name} in the table")
        of_name[row.part] = path
    for name, parts in by_name.items():
        count = next(iter(parts))[1]
        if sorted(parts) != [(i, count) for i in range(count)]:
            named = ", ".join(f"{i} of {n} ({path})" for (i, n), path in sorted(parts.items()))
            raise ValueError(f"the table has not each part of {name} once, but {named}")
