"""`Tokenizer`: text to ids and back.

Hugging Face folders, SentencePiece models and GGUF files all become one object of the `tokenizers`
library. Special tokens around a text (BOS) are put there by us and not by the library's
post-processor, because that one also trims spaces from the character offsets, and answers-only
masks need exact offsets.
"""

import functools
import itertools
import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmprep_jax.text import folder as hf_folder
from llmprep_jax.text import gguf
from llmprep_jax.text.chat import ChatTemplate
from llmprep_jax.text.literal import LiteralEncoder, spellings_of
from llmprep_jax.text.messages import TEXT, WITH_IMAGES
from llmprep_jax.text.stream import StreamDecoder, is_byte_piece
from llmprep_jax.text.vocab import Parts, add_special, one_line

END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eot|>",
    "<|endofturn|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


class Tokenizer:
    """A tokenizer with its special tokens, stop ids and chat template.

    `special_tokens` maps bos_token, eos_token, unk_token, pad_token and a model's own to their
    texts, where the files name them. `stop_ids` are the ids that end a reply: those of
    generation_config.json, EOS, and the end-of-turn tokens that the chat template writes.
    `chat_template` is the template's text or None. `shown` are special tokens that decoded text
    keeps. `sees` says that it is of a model that reads images, whose messages have parts for them.
    """

    shown: tuple[str, ...] = ()
    sees: bool = False

    def __init__(self, parts: Parts):
        self._core = parts.core
        self.special_tokens = dict(parts.special_tokens)
        self.chat_template = parts.chat_template
        self.source = parts.source
        self._post_processor = self._core.post_processor
        self._prefix, self._suffix = self._find_added_ids()
        self._core.post_processor = None
        self._eos_ids = parts.eos_ids
        self.stop_ids = self._find_stop_ids()

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Reads a Hugging Face folder (tokenizer.json, or tokenizer.model alone).

        Raises FileNotFoundError or ValueError, on one line, naming the file and the remedy.
        """
        return cls(hf_folder.read_folder(folder))

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Builds the tokenizer of a GGUF file. Raises ValueError when it has none we know."""
        return cls(gguf.read_tokenizer(path))

    def extended(self, special: Iterable[str], chat_template: str | None = None) -> "Tokenizer":
        """This tokenizer with further special tokens, those that it has not, in order, and with a
        chat template if it has none."""
        core, missing = self._core, [x for x in special if self._core.token_to_id(x) is None]
        if missing:
            core = type(core).from_str(core.to_str())
        core.post_processor = self._post_processor
        add_special(core, special)
        template = self.chat_template or chat_template
        parts = Parts(core, self.special_tokens, self._eos_ids, template, self.source)
        return Tokenizer(parts)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of a text.

        They start with BOS (and end with EOS) where the tokenizer adds it and `add_special`. Text
        such as "<|im_end|>" becomes the special token, as in transformers, unless `parse_special`
        is False: it is read as any other text then.
        """
        return self.encode_with_offsets(text, add_special, parse_special)[0]

    def encode_with_offsets(
        self,
        text: str,
        add_special: bool = True,
        parse_special: bool = True,
        literals: Collection[int] = (),
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, the [start, end) characters of `text` that it stands for.

        Tokens that share the bytes of one character each have that character; added BOS and EOS are
        empty. `literals` are characters at which no special token begins, whatever is spelled.
        """
        text = _checked(text)
        spelled = []
        if self.spellings and (literals or not parse_special):
            spelled = list(self.spellings.finditer(text))
        if spelled:
            specials = [m for m in spelled if parse_special and m.start() not in literals]
            ids, offsets = self._literal.encode(text, specials)
        else:
            encoding = self._core.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
        if not add_special:
            return ids, offsets
        before = [(0, 0)] * len(self._prefix)
        after = [(len(text), len(text))] * len(self._suffix)
        return [*self._prefix, *ids, *self._suffix], [*before, *offsets, *after]

    def encode_batch(self, texts: Sequence[str], add_special: bool = True) -> list[list[int]]:
        """`encode` of many texts, over the machine's cores."""
        texts = [_checked(text) for text in texts]
        encodings = self._core.encode_batch_fast(texts, add_special_tokens=False)
        if not add_special:
            return [encoding.ids for encoding in encodings]
        return [[*self._prefix, *encoding.ids, *self._suffix] for encoding in encodings]

    def decode(self, ids: Iterable, skip_special: bool = True, keep: Iterable[str] = ()) -> str:
        """The text of a row of ids (any integers), special tokens left out if `skip_special`.

        Special tokens spelled as one of `keep` are left in. Ids beyond the tokenizer's own (models
        pad their vocabulary) decode to nothing.
        """
        ids = np.asarray(list(ids) if not hasattr(ids, "shape") else ids)
        if ids.size == 0:
            return ""
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 1 << 32:
            raise ValueError(
                "decode takes one row of token ids, whole numbers of 0 or more;"
                f" got {one_line(ids.tolist(), 60)}"
            )
        skipped = self._skipped_ids(skip_special, keep)
        shown = [i for i in ids.tolist() if i not in skipped]
        return self._core.decode(shown, skip_special_tokens=False)

    def stream(self, skip_special: bool = True, keep: Iterable[str] = ()) -> StreamDecoder:
        """A new incremental decoder; see `StreamDecoder`, and `decode` for what is left out."""
        skipped = self._skipped_ids(skip_special, keep)

        def ignores(token_id: int) -> bool:
            return token_id in skipped or self.token_of(token_id) is None

        decode = functools.partial(self._core.decode, skip_special_tokens=False)
        if "ByteFallback" not in repr(self._core.decoder):
            return StreamDecoder(decode, ignores)
        return StreamDecoder(decode, ignores, lambda i: is_byte_piece(self.token_of(i)))

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the greatest id: the fewest rows a model's embedding must have."""
        return 1 + max(self._core.get_vocab(with_added_tokens=True).values(), default=-1)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` skips."""
        return frozenset(
            i for i, token in self._core.get_added_tokens_decoder().items() if token.special
        )

    @functools.cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The spellings of `special_ids`."""
        return tuple(self.token_of(i) for i in sorted(self.special_ids))

    @functools.cached_property
    def spellings(self) -> re.Pattern[str] | None:
        """A pattern of text that spells a special token; None where there is no such token."""
        return spellings_of(self.special_texts)

    @functools.cached_property
    def _literal(self) -> LiteralEncoder:
        return LiteralEncoder(self._core)

    def stop_ids_of(self, stop: Iterable[str]) -> tuple[int, ...]:
        """The ids of those strings that spell one special token, which decoded text leaves out."""
        ids = {self.token_of(i): i for i in self.special_ids}
        return tuple(ids[text] for text in dict.fromkeys(stop) if text in ids)

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """The compiled chat template. Raises ValueError when there is none or it is broken."""
        if self.chat_template is None:
            raise ValueError(
                f"{self.source}: no chat template; use plain text, or put the model's template in"
                " chat_template.jinja beside the tokenizer"
            )
        return self._compiled(self.chat_template, self.source)

    def read_chat_template(self, path: str | Path) -> None:
        """Takes the chat template in a Jinja file, for a base model's tokenizer, which has none.

        Raises OSError when it cannot be read, ValueError when it does not compile.
        """
        text = Path(path).read_text(encoding="utf-8")
        chat = self._compiled(text, str(path))
        self.chat_template, self.chat = text, chat
        self.stop_ids = self._find_stop_ids()

    def _compiled(self, template: str, source: str) -> ChatTemplate:
        kinds = WITH_IMAGES if self.sees else TEXT
        return ChatTemplate(template, self.special_tokens, source, kinds, opens_as_text=self.sees)

    @property
    def bos_id(self) -> int | None:
        """The id of the beginning-of-sequence token, or None."""
        return self._role_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The id of the end-of-sequence token, or None."""
        return self._role_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The id of the padding token, or None; it may equal `eos_id`."""
        return self._role_id("pad_token")

    def id_of(self, token: str) -> int:
        """The id of a token by its spelling in the vocabulary. Raises ValueError without one."""
        token_id = self._core.token_to_id(token)
        if token_id is None:
            raise ValueError(
                f"{self.source}: no token {token!r} in the vocabulary; check its spelling"
            )
        return token_id

    def token_of(self, token_id: int) -> str | None:
        """The vocabulary's spelling of an id, or None beyond the vocabulary."""
        return self._core.id_to_token(int(token_id)) if 0 <= token_id < 1 << 32 else None

    def check_vocab(self, model_vocab_size: int) -> None:
        """Raises ValueError when this tokenizer has ids that a model of so many rows has not."""
        if self.vocab_size > model_vocab_size:
            raise ValueError(
                f"{self.source}: the tokenizer has ids up to {self.vocab_size - 1}"
                f" ({self.token_of(self.vocab_size - 1)!r}) but the model's vocabulary ends at"
                f" {model_vocab_size - 1}; use the tokenizer that belongs to the model"
            )

    def save(self, folder: str | Path) -> None:
        """Writes the files that transformers' AutoTokenizer and `from_folder` load."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._core.post_processor = self._post_processor  # for readers other than us
        try:
            text = self._core.to_str(pretty=True)
        finally:
            self._core.post_processor = None
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", self._config())
        _write_json(folder / "special_tokens_map.json", self.special_tokens)
        template = folder / "chat_template.jinja"
        if self.chat_template is None:
            template.unlink(missing_ok=True)
        else:
            template.write_text(self.chat_template, encoding="utf-8")

    def _config(self) -> dict[str, Any]:
        # This class takes tokenizer.json as it is; LlamaTokenizer and others rebuild it their way.
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.special_tokens,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "stop_token_ids": list(self.stop_ids),
        }

    def _skipped_ids(self, skip_special: bool, keep: Iterable[str]) -> frozenset[int]:
        kept = {self._core.token_to_id(text) for text in (*keep, *self.shown)}
        return self.special_ids - kept if skip_special else frozenset()

    def _role_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self._core.token_to_id(text)

    def _find_added_ids(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        for sample in itertools.chain(("a", "1", " "), self._some_tokens()):
            bare = self._core.encode(sample, add_special_tokens=False).ids
            full = self._core.encode(sample, add_special_tokens=True).ids
            for at in range(len(full) - len(bare) + 1):
                if bare and full[at : at + len(bare)] == bare:
                    return full[:at], full[at + len(bare) :]
        return [], []

    def _some_tokens(self) -> Iterable[str]:
        yield from sorted(self._core.get_vocab(with_added_tokens=False))[:50]

    def _find_stop_ids(self) -> tuple[int, ...]:
        template = self.chat_template or ""
        turn_ends = [self._core.token_to_id(text) for text in END_OF_TURN if text in template]
        ids = [*self._eos_ids, self.eos_id, *turn_ends]
        return tuple(dict.fromkeys(i for i in ids if i is not None))


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, got {type(text).__name__}; decode bytes first")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate at character {error.start}; decode it with"
                " errors='replace'"
            ) from None
    return text


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
