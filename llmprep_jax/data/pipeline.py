"""`DataConfig` and the pipeline it describes: split, shuffle, shard, encode, pack, mix, batch.

Everything is a function of the config and of the place reached, so `get_state` and `set_state`
continue a stream bit for bit. The one thing a reader would get wrong: weights are shares of rows,
hence of tokens, not of documents, and `batch_size` counts the rows of all processes together. Every
process reads and encodes all documents and makes arrays of its own rows alone, so that order and
place are the same however many processes there are.
"""

import dataclasses
import functools
import json
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import grain
import numpy as np

from llmprep_jax.config import settle
from llmprep_jax.data.documents import Document, Source, is_held_out
from llmprep_jax.data.encoding import COUNTS, EncodeChat, Encoder, EncodeText, Overlong
from llmprep_jax.data.packing import Packed, Stream, make_batch
from llmprep_jax.data.sources import SourceOptions, open_source

Split = Literal["train", "heldout", "all"]
Batch = dict[str, np.ndarray]

# how long a run that holds nothing out looks for broken documents before it starts
CHECK_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes batches.

    Attributes:
      paths: files, folders or glob patterns.
      weights: the share of rows that each path gets, however long it is; None: the paths are one
        set of documents, of which an epoch reads each once.
      source: how to read the paths.
      seq_len: T, input tokens of a row.
      batch_size: B, rows of a batch over all processes.
      packing: "packed" (whole documents together), "padded" (one a row), "stream" (end to end, cut
        anywhere).
      pack_window: rows that are packed together; more leave less padding.
      mask: what counts for the loss in conversations: "answers" or "all". Plain text always counts.
      overlong: what to do with a document of more than seq_len + 1 tokens: "split", "truncate",
        "drop", "error". None: split plain text, truncate conversations, and neither in "stream",
        which cuts anyway.
      shuffle: anew in every epoch; held-out data never are.
      seed: of the shuffle.
      num_epochs: None: without end. With weights, the first source that has been read so often ends
        the data.
      holdout: share of documents kept for "heldout", by a hash of their content. Finding them reads
        all documents once at the start (about 5 s a GB), so large sets better have files of their
        own for this.
      prefetch: batches prepared ahead by a thread; 0: none.
      threads: that read and encode documents; 0: the one that prepares batches does, which is
        faster (160,000 tokens/s of chats; two reach 105,000) unless files are on a slow network.
    """

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    source: SourceOptions = dataclasses.field(default_factory=SourceOptions)
    seq_len: int = 1024
    batch_size: int = 8
    packing: Literal["packed", "padded", "stream"] = "packed"
    pack_window: int = 64
    mask: Literal["answers", "all"] = "answers"
    overlong: Overlong | None = None
    shuffle: bool = True
    seed: int = 0
    num_epochs: int | None = None
    holdout: float = 0.0
    prefetch: int = 2
    threads: int = 0

    def __post_init__(self):
        settle(self)
        if isinstance(self.paths, str) or not self.paths:
            raise ValueError(f"paths must be a list of at least one path, not {self.paths!r}")
        for name in ("seq_len", "batch_size", "pack_window", "num_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in ("prefetch", "threads", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), not {self.holdout}")
        if self.weights is not None:
            _check_weights(self.weights, len(self.paths))


def _check_weights(weights: Sequence[float], num_paths: int) -> None:
    if len(weights) != num_paths:
        raise ValueError(f"there are {len(weights)} weights for {num_paths} paths; give one each")
    if min(weights) <= 0:
        raise ValueError(f"weights must be positive, not {min(weights)}; leave the path out")


class Documents:
    """The documents of one or several paths on one side of the split: pairs (id, Document).

    Args:
      sources: in order; ids count through them.
      title: for messages.
      first_id: the id of the first document of the first source.
      keep: which documents, counted from 0, in order; None: all.
    """

    def __init__(
        self, sources: Sequence[Source], title: str, first_id: int, keep: np.ndarray | None = None
    ):
        self._sources, self.title, self._keep = sources, title, keep
        self._starts = np.cumsum([first_id, *map(len, sources)])
        self.ids = range(int(self._starts[0]), int(self._starts[-1]))  # of both sides

    def __len__(self) -> int:
        return len(self.ids) if self._keep is None else len(self._keep)

    def __getitem__(self, index: int) -> tuple[int, Document]:
        doc_id = self.ids[index if self._keep is None else self._keep[index]]
        source, at = self._locate(doc_id)
        return doc_id, source[at]

    def _locate(self, doc_id: int) -> tuple[Source, int]:
        source = int(np.searchsorted(self._starts, doc_id, side="right")) - 1
        return self._sources[source], int(doc_id - self._starts[source])

    def name(self, doc_id: int) -> str:
        """Where a document of `ids` is: file and line."""
        source, at = self._locate(doc_id)
        return source.name(at)

    def side(self, holdout: float, split: Split) -> "Documents":
        """Those that are in a split; reads as many as it can, so that broken ones are told of now.

        Raises:
          ValueError: there are none.
        """
        if not holdout or split == "all":
            end = time.monotonic() + CHECK_SECONDS
            for i in range(len(self)):
                self[i]
                if time.monotonic() > end:
                    break
            return self
        wanted = split == "heldout"
        keep = [i for i in range(len(self)) if is_held_out(self[i][1], holdout) == wanted]
        if not keep:
            raise ValueError(
                f"{self.title}: none of {len(self)} documents is in the {split} part with "
                f"holdout={holdout}; choose another share"
            )
        return Documents(self._sources, self.title, self.ids[0], np.array(keep, np.int64))


def _open_documents(cfg: DataConfig, split: Split) -> list[Documents]:
    """What is mixed: one entry, or one a path where there are weights."""
    if split == "heldout" and not cfg.holdout:
        raise ValueError("holdout is 0, so nothing is held out; set holdout=0.05, or split=all")
    sources = [open_source(path, cfg.source) for path in cfg.paths]
    if not cfg.weights:
        return [Documents(sources, ", ".join(cfg.paths), 0).side(cfg.holdout, split)]
    first = np.cumsum([0, *map(len, sources)])
    return [
        Documents([source], path, int(at)).side(cfg.holdout, split)
        for source, path, at in zip(sources, cfg.paths, first, strict=False)
    ]


class Batches:
    """An iterator over batches that knows its place.

    Each batch is a dict of numpy arrays [B, T], B being this process's rows: tokens, targets,
    positions, segment_ids (int32; 1, 2, ... for the documents of a row, 0 for padding) and
    loss_mask (float32), and doc_ids [B, M] of the rows of all processes (int64, -1 where there are
    fewer than M), which `name` explains. The last batch of finite data is filled up with padding.
    """

    def __init__(
        self,
        dataset: grain.IterDataset,
        packs: Sequence[Packed | Stream],
        documents: Sequence[Documents],
        identity: dict[str, Any],
    ):
        self._live = [dataset.__iter__()]
        self._packs, self._documents, self._identity = packs, documents, identity
        self._ended = False
        self._finalizer = weakref.finalize(self, _close, self._live)

    @property
    def _iterator(self) -> grain.DatasetIterator:
        if not self._live:
            raise ValueError("these batches are closed; build them again")
        return self._live[0]

    @property
    def num_documents(self) -> int:
        """Documents of an epoch."""
        return sum(map(len, self._documents))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._iterator)
        except StopIteration:
            self._ended = True
            raise
        except Exception as error:
            error.__dict__.pop("__notes__", None)  # Grain's, about how it cuts tracebacks
            raise

    def get_state(self) -> dict[str, Any]:
        """The place after the last batch given out, as plain JSON; of all processes alike."""
        return {"of": self._identity, "position": _plain(self._iterator.get_state())}

    def set_state(self, state: Any) -> None:
        """Goes to a place that `get_state` told, in this run or another.

        Raises:
          ValueError: the place is one in other data or under other settings.
        """
        if not isinstance(state, dict) or {"of", "position"} - state.keys():
            raise ValueError("this is no state of a data iterator; give what get_state returned")
        saved, own = state["of"], _plain(self._identity)
        changed = [key for key in own if saved.get(key) != own[key]]
        if changed:
            words = ", ".join(f"{key} was {saved.get(key)} and is {own[key]}" for key in changed)
            raise ValueError(
                f"the saved place is in other data ({words}); set it back, or start a new run"
            )
        self._iterator.set_state(state["position"])
        self._ended = False

    def report(self) -> dict[str, Any]:
        """What has been read so far.

        Returns:
          Counts by name: `documents` read, their `tokens` and `targets` (tokens that count for the
          loss), `rows` made; documents `split`, `truncated` (which `lost` so many targets),
          `dropped` as too long, and `empty`, without a target. `sources`: the same for each path of
          a mixture.
        """
        if self._ended:  # documents dropped after the last row are in no state that was given out
            states = [pack.iterator.get_state() for pack in self._packs]
        else:
            states = _find_packs(self._iterator.get_state())
        each = {
            documents.title: dict(zip(COUNTS, state["seen"], strict=True)) | {"rows": state["rows"]}
            for documents, state in zip(self._documents, states, strict=True)
        }
        total = {key: sum(counts[key] for counts in each.values()) for key in (*COUNTS, "rows")}
        return total | ({"sources": each} if len(each) > 1 else {})

    def name(self, doc_id: int | np.integer) -> str:
        """Where a document of `doc_ids` is: file and line.

        Raises:
          ValueError: there is no such document.
        """
        for documents in self._documents:
            if int(doc_id) in documents.ids:
                return documents.name(int(doc_id))
        raise ValueError(f"there is no document {doc_id} in these data")

    def close(self) -> None:
        """Stops the threads; the batches are at an end."""
        self._finalizer()


def _close(live: list[grain.DatasetIterator]) -> None:
    """Stops the threads, at the latest when Python exits.

    A prefetching thread that Python ends in the middle of C++ code aborts the whole process, and
    Grain's iterators complain when they are collected after Grain's modules.
    """
    live.pop().close()


def _find_packs(state: Any) -> list[dict[str, Any]]:
    """The states of the row iterators, in order, within Grain's state of the whole."""
    if isinstance(state, dict):
        return [state] if "seen" in state else _find_packs(list(state.values()))
    return [s for item in state for s in _find_packs(item)] if isinstance(state, list) else []


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def build(
    cfg: DataConfig,
    encode: EncodeText,
    encode_chat: EncodeChat | None = None,
    *,
    eos_id: int | None,
    pad_id: int = 0,
    rows: Sequence[int] | None = None,
    split: Split = "train",
) -> Batches:
    """The batches that a run trains on.

    Args:
      encode: text to ids, BOS included where the model wants it.
      encode_chat: messages to (ids, True where the assistant speaks).
      eos_id: put after plain text that does not end in it; None: nothing is.
      pad_id: of padding; any id does, since nothing counts there.
      rows: numbers of the rows of each batch that become arrays, on this process
        (`train.step.own_rows`); None: all.

    Raises:
      FileNotFoundError: a path is not there.
      ValueError: no document, a broken document, or settings that do not go together.
    """
    groups = _open_documents(cfg, split)
    packs = []
    for number, documents in enumerate(groups):
        order = grain.MapDataset.source(documents)
        if cfg.shuffle:
            order = order.shuffle(seed=_seed_of(cfg.seed, number))
        order = order.repeat(cfg.num_epochs)
        encoder = _make_encoder(cfg, encode, encode_chat, eos_id)
        seed = _seed_of(cfg.seed, number) if cfg.shuffle else None
        packs.append(_pack(cfg, order.map(encoder), len(documents), seed))
    packed = grain.IterDataset.mix(packs, cfg.weights) if cfg.weights else packs[0]
    dataset = _prefetched(cfg, _batched(cfg, packed, pad_id, rows))
    return Batches(dataset, packs, groups, _identify(cfg, groups, split))


def _batched(
    cfg: DataConfig, packed: grain.IterDataset, pad_id: int, rows: Sequence[int] | None
) -> grain.IterDataset:
    """Batches of packed rows, of which `rows` become arrays."""
    size = cfg.batch_size
    finish = functools.partial(
        make_batch, num_rows=size, seq_len=cfg.seq_len, pad_id=pad_id, own=rows
    )
    return packed.batch(size, batch_fn=finish)


def _seed_of(seed: int, number: int) -> int:
    """32 bits that are no neighbours for neighbouring seeds: Grain adds the epoch to them."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _make_encoder(
    cfg: DataConfig, encode: EncodeText, encode_chat: EncodeChat | None, eos_id: int | None
) -> Encoder:
    anywhere = cfg.packing == "stream" and cfg.overlong in (None, "split")
    limit = None if anywhere else cfg.seq_len
    return Encoder(encode, encode_chat, eos_id, limit, cfg.overlong, cfg.mask == "answers")


def _pack(
    cfg: DataConfig, encoded: grain.MapDataset, size: int, seed: int | None
) -> Packed | Stream:
    ahead = 16 * cfg.threads
    options = grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=ahead)
    documents = encoded.to_iter_dataset(options)
    if cfg.packing == "stream":
        return Stream(documents, cfg.seq_len, size)
    window = cfg.pack_window if cfg.packing == "packed" else 0
    return Packed(documents, cfg.seq_len, size, window=window, seed=seed)


def _prefetched(cfg: DataConfig, dataset: grain.IterDataset) -> grain.IterDataset:
    if not cfg.prefetch:
        return dataset
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=cfg.prefetch)


def _identify(cfg: DataConfig, groups: Sequence[Documents], split: Split) -> dict[str, Any]:
    """What a place in the data depends on; not the paths: folders move, typos are corrected."""
    keys = ("weights", "seq_len", "batch_size", "packing", "pack_window", "mask", "overlong")
    keys = (*keys, "shuffle", "seed", "num_epochs", "holdout")
    settings = {key: getattr(cfg, key) for key in keys}
    sizes = [[len(documents), len(documents.ids)] for documents in groups]
    return {"documents": sizes, **settings, "split": split}


class EvaluationBatches:
    """One pass over the data, each time it is iterated over; the same batches each time."""

    def __init__(self, make: Callable[[], Batches]):
        self._make, self._last = make, make()

    def __iter__(self) -> Batches:
        self._last = self._make()
        return self._last

    @property
    def num_documents(self) -> int:
        """Documents of the pass."""
        return self._last.num_documents

    def report(self) -> dict[str, Any]:
        """Of the last pass, as `Batches.report`."""
        return self._last.report()


def evaluation_batches(
    cfg: DataConfig,
    encode: EncodeText,
    encode_chat: EncodeChat | None = None,
    *,
    eos_id: int | None,
    pad_id: int = 0,
    rows: Sequence[int] | None = None,
    split: Split = "heldout",
) -> EvaluationBatches:
    """All documents of a split once, in order, without weights.

    Args and errors are those of `build`.
    """
    cfg = dataclasses.replace(cfg, weights=None, shuffle=False, num_epochs=1)
    groups = _open_documents(cfg, split)
    encoder = _make_encoder(cfg, encode, encode_chat, eos_id)
    identity = _identify(cfg, groups, split)

    def make() -> Batches:
        (documents,) = groups
        encoded = grain.MapDataset.source(documents).map(encoder)
        pack = _pack(cfg, encoded, len(documents), None)
        dataset = _prefetched(cfg, _batched(cfg, pack, pad_id, rows))
        return Batches(dataset, [pack], groups, identity)

    return EvaluationBatches(make)
