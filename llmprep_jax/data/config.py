"""`DataConfig`: which text a run reads, and how it becomes batches."""

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any, Literal

from llmprep_jax.config import settle
from llmprep_jax.data.encoding import Overlong, text_encoders
from llmprep_jax.data.images import ImageReader
from llmprep_jax.data.records import RecordFormat
from llmprep_jax.data.sources import SourceOptions
from llmprep_jax.text.chat import SpecialTokens
from llmprep_jax.text.image_text import ImageTextProcessor
from llmprep_jax.text.processor import Processor
from llmprep_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes batches.

    Attributes:
      paths: files, folders or glob patterns.
      weights: the share of rows that each path gets, however long it is; None: the paths are one
        set of documents, of which an epoch reads each once.
      source: how to read the paths: the format of files, the column of a document.
      format: how a record (a JSON object, a row) holds a document: "text", "messages", "sharegpt",
        "alpaca" (instruction, input, output), "prompt" (and completion), "caption" (an image and
        what is said of it), "question" (an image, a question and its answer); "auto": by its
        columns.
      seq_len: T, input tokens of a row; captions have as many as their processor says.
      batch_size: B, rows of a batch over all processes.
      packing: "packed" (whole documents together), "padded" (one a row), "stream" (end to end, cut
        anywhere).
      pack_window: rows that are packed together; more leave less padding.
      max_images: M, pictures of a row: of images, or of the tiles that they are cut into. The tower
        sees so many of each row, padding too, so that one program serves all batches.
      random_crop: of pairs of images and captions, the least and the most share of a picture's area
        that is looked at, anywhere in it, as "0.5,1"; None: all of it.
      random_flip: whether every other picture of a pair is mirrored, which is wrong for captions
        that say left or right.
      drop_prompts: how often a picture that is to be drawn has no prompt, for guidance: 0.1 as
        Janus was trained; anew in every epoch, and never of held-out data.
      mask: what counts for the loss in conversations: "answers" or "all". Plain text always counts.
      special_tokens: where text that spells a special token becomes that token: "chat", in
        conversations, as in transformers, and not in plain text; "everywhere"; or "template", only
        where the chat template itself writes it: for conversations that nobody has looked through.
      date: the day (2026-11-28) or time that chat templates write, so that the same data are the
        same tokens tomorrow; None: the day on which a run begins.
      overlong: what to do with a document of more than seq_len + 1 tokens: "split", "truncate",
        "drop", "error". None: split plain text, truncate conversations, and neither in "stream",
        which cuts anyway.
      shuffle: anew in every epoch; held-out data never are.
      seed: of the shuffle.
      num_epochs: None: without end. With weights, the first source that has been read so often ends
        the data.
      holdout: share of documents kept for "heldout", by a hash of their content, and at least one;
        of texts that are too few for that, the end of one. Finding them reads all documents once at
        the start (about 5 s a GB), so large sets better have files of their own for this.
      prefetch: batches prepared ahead by a thread; 0: none.
      threads: that read and encode documents; 0: the one that prepares batches does, which is
        faster (160,000 tokens/s of chats; two reach 105,000) unless files are on a slow network.
      decoders: processes that decode images; 0: the thread that prepares batches does.
    """

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    source: SourceOptions = dataclasses.field(default_factory=SourceOptions)
    format: RecordFormat = "auto"
    seq_len: int = 1024
    batch_size: int = 8
    packing: Literal["packed", "padded", "stream"] = "packed"
    pack_window: int = 64
    max_images: int = 8
    random_crop: tuple[float, float] | None = None
    random_flip: bool = False
    drop_prompts: float = 0.0
    mask: Literal["answers", "all"] = "answers"
    special_tokens: SpecialTokens = "chat"
    date: str | None = None
    overlong: Overlong | None = None
    shuffle: bool = True
    seed: int = 0
    num_epochs: int | None = None
    holdout: float = 0.0
    prefetch: int = 2
    threads: int = 0
    decoders: int = 0

    def __post_init__(self):
        settle(self)
        if not self.paths:
            raise ValueError(f"paths must be a list of at least one path, not {self.paths!r}")
        for name in ("seq_len", "batch_size", "pack_window", "max_images", "num_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in ("prefetch", "threads", "decoders", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.random_crop is not None and not 0 < self.random_crop[0] <= self.random_crop[1] <= 1:
            raise ValueError(
                f"random_crop are two shares in (0, 1], least and most, not {self.random_crop}"
            )
        if not 0 <= self.drop_prompts <= 1:
            raise ValueError(f"drop_prompts must be in [0, 1], not {self.drop_prompts}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), not {self.holdout}")
        if self.weights is not None:
            _check_weights(self.weights, len(self.paths))
        if self.date is not None:
            _parse_date(self.date)

    def pinned(self) -> "DataConfig":
        """With today's date where none is given."""
        today = datetime.date.today().isoformat()
        return self if self.date is not None else dataclasses.replace(self, date=today)

    def encoders(self, tokenizer: Tokenizer, processor: Processor | None = None) -> dict[str, Any]:
        """What `build` and `evaluation_batches` take of a tokenizer, as keywords, and of the
        processor that it is of, where that sees."""
        now = None if self.date is None else _parse_date(self.date)
        sees = isinstance(processor, ImageTextProcessor)
        images = ImageReader(processor, self.max_images, self.decoders) if sees else None
        encoders = text_encoders(tokenizer, special_tokens=self.special_tokens, now=now)
        return {**encoders, "images": images}


def _parse_date(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"date is {text!r}; write it as 2026-11-28") from None


def _check_weights(weights: Sequence[float], num_paths: int) -> None:
    if len(weights) != num_paths:
        raise ValueError(f"there are {len(weights)} weights for {num_paths} paths; give one each")
    if min(weights) <= 0:
        raise ValueError(f"weights must be positive, not {min(weights)}; leave the path out")
