"""`Processor`: texts or conversations to the arrays that `model(**inputs)` takes, and ids back to
text.

Rows are padded on the left, unless `padding_side` is "right", so that the last column is the last
real token of every row and generation goes on from there; `mask` is True on real tokens, and the
model must see it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Int

from llmprep_jax.text.chat import ChatTemplate, SpecialTokens
from llmprep_jax.text.messages import Conversation
from llmprep_jax.text.tokenizer import Tokenizer

Inputs = dict[str, Int[np.ndarray, "B T"] | Bool[np.ndarray, "B T"]]


class Processor:
    """A tokenizer, its chat template, and how to pad ("left" or "right")."""

    def __init__(self, tokenizer: Tokenizer, padding_side: str = "left"):
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; give 'left' or 'right'")
        self.tokenizer = tokenizer
        self.padding_side = padding_side

    @classmethod
    def from_path(cls, path: str | Path, padding_side: str = "left") -> "Processor":
        """Reads a Hugging Face folder, a .gguf file, or a folder of ours that holds `tokenizer/`.

        Raises FileNotFoundError or ValueError, on one line, naming the file and the remedy.
        """
        path = Path(path)
        if path.is_file():
            return cls(Tokenizer.from_gguf(path), padding_side)
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path}: no such file or folder; give a model folder or .gguf file"
            )
        if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return cls(Tokenizer.from_folder(path), padding_side)
        if (path / "tokenizer").is_dir():
            return cls(Tokenizer.from_folder(path / "tokenizer"), padding_side)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return cls(Tokenizer.from_gguf(ggufs[0]), padding_side)
        return cls(Tokenizer.from_folder(path), padding_side)

    def __call__(
        self,
        messages_or_texts: str | Sequence[str] | Conversation,
        images: Any = None,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        special_tokens: SpecialTokens = "everywhere",
        **variables: Any,
    ) -> Inputs:
        """`tokens` [B, T] int32 and `mask` [B, T] bool (True = real token) of a batch.

        Takes a text, a list of texts, a conversation (a list of messages) or a list of
        conversations. Texts get BOS as the tokenizer has it; conversations go through the chat
        template, which writes its own.

        Args:
          add_generation_prompt: end a conversation with the header of the answer; None: unless its
            last message is the assistant's.
          continue_final_message: leave a conversation open whose last message is the assistant's,
            so that the model goes on with it; others end with the header.
          special_tokens: where text that spells a special token becomes it: "everywhere", "chat"
            (not in texts), or "template" (only where the chat template itself writes it: for what
            users of a service send).
          variables: for the chat template (tools, documents, enable_thinking, ...).

        Raises:
          ValueError: on one line: images (this processor is for text), an empty batch or text,
            malformed messages, a variable that the template does not read.
        """
        if special_tokens not in get_args(SpecialTokens):
            known = ", ".join(get_args(SpecialTokens))
            raise ValueError(f"special_tokens is {special_tokens!r}; give one of {known}")
        items = _listed(messages_or_texts)
        is_one = items is not messages_or_texts
        items, pictures = self._take_images(items, images, is_one, special_tokens)
        seen = self._look_at(pictures, len(items))
        if isinstance(items[0], str):
            if variables:
                raise ValueError(
                    f"{min(variables)} is for a chat template, and texts go through none; leave it"
                    " out, or give messages"
                )
            if special_tokens == "everywhere":
                texts = [self._write_places(*pair)[0] for pair in zip(items, seen, strict=True)]
                rows = self.tokenizer.encode_batch(texts)
            else:
                rows = [self.tokenizer.encode(text, parse_special=False) for text in items]
        else:
            kind = (add_generation_prompt, continue_final_message, special_tokens, variables)
            rows = [self._encode(*pair, *kind) for pair in zip(items, seen, strict=True)]
        for i, row in enumerate(rows):
            if not row:
                raise ValueError(f"text {i} has no tokens; a model needs at least one")
        rows, media = self._place_images(rows, seen)
        return {**self._pad(rows), **media}

    def decode(
        self,
        ids: Iterable,
        skip_special: bool = True,
    ) -> str | list[str]:
        """The text of one row of ids, or a list of texts for several; lists or arrays."""
        rows = np.asarray(ids) if hasattr(ids, "shape") else list(ids)
        if len(rows) and np.ndim(rows[0]):
            return [self.tokenizer.decode(row, skip_special) for row in rows]
        return self.tokenizer.decode(rows, skip_special)

    @property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises ValueError when the tokenizer has none."""
        return self.tokenizer.chat

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files, as `Tokenizer.save`."""
        self.tokenizer.save(folder)

    def _take_images(
        self, items: Sequence, images: Any, is_one: bool, special_tokens: SpecialTokens
    ) -> tuple[Sequence, list[list[Any]]]:
        """(the texts or conversations as templates take them, the images of each)."""
        if images is not None:
            raise ValueError("this model reads text only; call the processor without images")
        return items, []

    def _look_at(self, images: list[list[Any]], count: int) -> list[Any]:
        """What the image processor makes of each prompt's images; None where it has none."""
        return [None] * count

    def _write_places(
        self, text: str, seen: Any, literals: Sequence[int] = ()
    ) -> tuple[str, list[int]]:
        """A text with what is written around images, and where spelled tokens are none."""
        return text, list(literals)

    def _place_images(
        self, rows: list[list[int]], seen: list[Any]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """(ids with the tokens that images are, what the model is given beside them)."""
        return rows, {}

    def _encode(
        self,
        messages: Conversation,
        seen: Any,
        add_generation_prompt: bool | None,
        continue_final_message: bool,
        special_tokens: SpecialTokens,
        variables: Mapping[str, Any],
    ) -> list[int]:
        """The ids of one conversation."""
        last = messages[-1] if isinstance(messages, Sequence) and len(messages) else None
        is_answered = isinstance(last, Mapping) and last.get("role") == "assistant"
        prompt = not is_answered if add_generation_prompt is None else add_generation_prompt
        goes_on = continue_final_message and is_answered
        text = self.chat.apply(messages, prompt, goes_on, **variables)
        literals = []
        if special_tokens == "template" and self.tokenizer.spellings is not None:
            literals = self.chat.find_literals(messages, self.tokenizer.spellings, **variables)
        text, literals = self._write_places(text, seen, literals)
        adds = self.chat.adds_special(text)
        return self.tokenizer.encode_with_offsets(text, adds, literals=literals)[0]

    def _pad(self, rows: list[list[int]]) -> Inputs:
        width = max(map(len, rows))
        pad = next((i for i in (self.tokenizer.pad_id, self.tokenizer.eos_id) if i is not None), 0)
        tokens_BT = np.full((len(rows), width), pad, np.int32)
        mask_BT = np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            at = slice(width - len(row), None) if self.padding_side == "left" else slice(len(row))
            tokens_BT[i, at] = row
            mask_BT[i, at] = True
        return {"tokens": tokens_BT, "mask": mask_BT}


def _listed(batch: str | Sequence[str] | Conversation) -> Sequence:
    """The texts or the conversations of a batch. Raises ValueError on anything else."""
    items = [batch] if isinstance(batch, str) else batch
    if isinstance(items, Mapping | bytes) or not isinstance(items, Sequence) or not items:
        raise ValueError(
            "give a text, a list of texts, a conversation or a list of conversations;"
            f" got {'nothing in it' if items == [] else type(items).__name__}"
        )
    are_texts = [isinstance(item, str) for item in items]
    if any(are_texts) and not all(are_texts):
        raise ValueError("the batch mixes texts and messages; give one kind in a call")
    return [items] if isinstance(items[0], Mapping) else items
