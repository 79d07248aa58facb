"""Stored names brought to those that a model's table uses, whoever wrapped the model.

`torch.compile`, FSDP and DataParallel put names of theirs into a path, a base model's folder lacks
`model.`, and a larger model holds it under a prefix of its own; all of this is seen from where the
embedding is. Names are renamed and not searched for, so a tensor that the model has no place for is
still found out.
"""

import re

from llmprep_jax.weights.folder import Checkpoint
from llmprep_jax.weights.rows import Table

BUFFERS = (r"rotary_emb\.inv_freq$", r"\.position_ids$")  # in old files; computed, not loaded
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def canonical_names(checkpoint: Checkpoint, table: Table) -> dict[str, str]:
    """Stored names by the names that a table uses, without what it ignores by either.

    Raises:
      ValueError: two tensors come to one name.
    """
    spelled = {name: table.rename(_WRAPPERS.sub("", name)) for name in checkpoint.names}
    if table.finds_prefix and table.embed:
        head = table.head and table[table.head].name
        spelled = _under_the_tables_prefix(spelled, table[table.embed].name, head)
    ignored = (*table.ignored, *BUFFERS)
    by_name: dict[str, str] = {}
    for stored, name in spelled.items():
        if any(re.search(pattern, x) for pattern in ignored for x in (stored, name)):
            continue
        if name in by_name:
            raise ValueError(
                f"{checkpoint.path} holds {name} twice, as {by_name[name]} and as {stored};"
                " delete one or download it again"
            )
        by_name[name] = stored
    return by_name


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
