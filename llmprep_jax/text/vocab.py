"""What each tokenizer format (tokenizer.json, tokenizer.model, GGUF) is read into before it becomes
a `Tokenizer`.

A special token must be an *added* token of the core, not only an entry of its vocabulary, else its
text is cut into pieces like any other text.
"""

import dataclasses
from collections.abc import Iterable

import tokenizers
from tokenizers import processors

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass
class Parts:
    """A tokenizers object and what the files say: token texts by role, stop ids, template."""

    core: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    source: str = "tokenizer"


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error on one line, shortened: library errors run over several."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def add_special(core: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Makes `texts` special tokens, matched whole; those not in the vocabulary get new ids."""
    known = {token.content: token for token in core.get_added_tokens_decoder().values()}
    new = [
        tokenizers.AddedToken(text, normalized=False, special=True)
        for text in dict.fromkeys(texts)
        if text and not (text in known and known[text].special)
    ]
    if new:
        core.add_special_tokens(new)


def set_template(core: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Makes the core add `bos` before and `eos` after a text (None: nothing)."""
    single = [f"{bos}:0"] * bool(bos) + ["$A:0"] + [f"{eos}:0"] * bool(eos)
    pair = single + [f"{bos}:1"] * bool(bos) + ["$B:1"] + [f"{eos}:1"] * bool(eos)
    core.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(text, core.token_to_id(text)) for text in {bos, eos} if text],
    )
