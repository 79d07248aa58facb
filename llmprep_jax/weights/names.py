"""Stored names brought to those that a model's table uses, whoever wrapped the model.

`torch.compile`, FSDP and DataParallel put names of theirs into a path, a base model's folder lacks
`model.`, and a larger model holds it under a prefix of its own; all of this is seen from where the
embedding is. Names are renamed and not searched for, so a tensor that the model has no place for is
still found out.
"""

import re
from collections.abc import Sequence

from llmprep_jax.weights.folder import Checkpoint

BUFFERS = (r"rotary_emb\.inv_freq$", r"\.position_ids$")  # in old files; computed, not loaded
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def canonical_names(
    checkpoint: Checkpoint,
    renames: Sequence[tuple[str, str]] = (),
    ignore: Sequence[str] = (),
    embed: str | None = None,
    head: str | None = None,
) -> dict[str, str]:
    """Stored names by the names that tables use.

    Args:
      renames: (regex, replacement) pairs. ignore: regexes of tensors, as stored or by their table
        names, that are none of the model's.
      embed, head: the table's names of the embedding and the output head, if it has them.

    Raises:
      ValueError: two tensors come to one name.
    """
    spelled = {stored: _spell(stored, renames) for stored in checkpoint.names}
    if embed is not None:
        spelled = _under_the_tables_prefix(spelled, embed, head)
    by_name: dict[str, str] = {}
    for stored, name in spelled.items():
        if any(re.search(pattern, x) for pattern in (*ignore, *BUFFERS) for x in (stored, name)):
            continue
        if name in by_name:
            raise ValueError(
                f"{checkpoint.path} holds {name} twice, as {by_name[name]} and as {stored};"
                " delete one or download it again"
            )
        by_name[name] = stored
    return by_name


def _spell(name: str, renames: Sequence[tuple[str, str]]) -> str:
    name = _WRAPPERS.sub("", name)
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _under_the_tables_prefix(
    spelled: dict[str, str], embed: str, head: str | None
) -> dict[str, str]:
    """The names with what stands before the embedding's replaced by what the table has there."""
    tail = ".".join(embed.split(".")[-2:])
    wanted = embed.removesuffix(tail)
    # layers of their own may hold copies of the embedding (DeepSeek's prediction modules)
    prefixes = {
        name.removesuffix(tail)
        for name in spelled.values()
        if re.fullmatch(rf"([^\d\W]\w*\.)*{re.escape(tail)}", name)
    }
    if len(prefixes) != 1 or wanted in prefixes:
        return spelled
    (prefix,) = prefixes

    def rename(name: str) -> str:
        if head is not None and name.endswith(head) and prefix.startswith(name.removesuffix(head)):
            return head
        if not name.startswith(prefix) or (not prefix and name.startswith(wanted)):
            return name
        return wanted + name.removeprefix(prefix)

    return {stored: rename(name) for stored, name in spelled.items()}
