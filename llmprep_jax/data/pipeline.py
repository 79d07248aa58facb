"""The pipeline that a `DataConfig` describes: split, shuffle, encode, pack, mix, batch.

Everything is a function of the config and of the place reached, so `get_state` and `set_state`
continue a stream bit for bit. Weights are shares of rows, hence of tokens, not of documents, and
`batch_size` counts the rows of all processes together. Every process reads and encodes all
documents and makes arrays of its own rows alone, so that order and place are the same however many
processes there are.
"""

import dataclasses
import functools
import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from llmprep_jax.data.config import DataConfig
from llmprep_jax.data.encoding import (
    COUNTS,
    EncodeChat,
    EncodeCompletion,
    Encoder,
    EncodeText,
    check_answers,
    refuse_marks,
)
from llmprep_jax.data.images import ImageReader
from llmprep_jax.data.packing import YIELDED, Packed, Stream, make_batch, read_seen
from llmprep_jax.data.split import CHECK_SECONDS, Documents, Split, open_documents

Batch = dict[str, np.ndarray]


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
        # places saved before a setting existed do not name it
        changed = [key for key in own if key in saved and saved[key] != own[key]]
        if changed:
            words = ", ".join(f"{key} was {saved.get(key)} and is {own[key]}" for key in changed)
            raise ValueError(
                f"the saved place is in other data ({words}); set it back, or start a new run"
            )
        self._iterator.set_state(state["position"])
        self._ended = False

    def report(self) -> dict[str, Any]:
        """What has been read so far, and what of it was given out.

        Returns:
          Counts by name: `documents` read, their `tokens` and `targets` (tokens that count for the
          loss), `rows` made; documents `split`, `truncated` (which `lost` so many targets),
          `dropped` as too long, and `empty`, without a target; `images_lost` with what was cut off
          or dropped. Reading runs ahead of the batches by
          a packing window; `yielded` are the documents, tokens and targets in the batches given out
          so far. `sources`: the same for each path of a mixture.
        """
        if self._ended:  # documents dropped after the last row are in no state that was given out
            states = [pack.iterator.get_state() for pack in self._packs]
        else:
            states = _find_packs(self._iterator.get_state())
        by_source = {
            documents.title: _counts_of(state)
            for documents, state in zip(self._documents, states, strict=True)
        }
        total = {
            key: sum(counts[key] for counts in by_source.values())
            for key in (*COUNTS, "images_lost", "rows")
        }
        parts = [counts["yielded"] for counts in by_source.values()]
        total["yielded"] = {key: sum(part[key] for part in parts) for key in YIELDED}
        return total | ({"sources": by_source} if len(by_source) > 1 else {})

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


def _counts_of(state: dict[str, Any]) -> dict[str, Any]:
    """The counts that a row iterator's state holds; those of older runs lack what was given out."""
    seen = read_seen(state["seen"])
    counts = {**dict(zip(COUNTS, seen, strict=False)), "images_lost": seen[-1]}
    yielded = dict(zip(YIELDED, state.get("yielded", (0, 0, 0)), strict=True))
    return counts | {"rows": state["rows"], "yielded": yielded}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def build(
    cfg: DataConfig,
    encode: EncodeText,
    encode_chat: EncodeChat | None = None,
    *,
    eos_id: int | None,
    pad_id: int = 0,
    encode_part: EncodeText | None = None,
    encode_completion: EncodeCompletion | None = None,
    images: ImageReader | None = None,
    template: str = "the tokenizer",
    rows: Sequence[int] | None = None,
    split: Split = "train",
) -> Batches:
    """The batches that a run trains on.

    Args:
      encode, encode_chat, eos_id, encode_part, encode_completion, images: as in `Encoder`;
        `cfg.encoders(tokenizer)` has them all, and what follows.
      pad_id: of padding; any id does, since nothing counts there.
      template: where the chat template comes from, for messages.
      rows: numbers of the rows of each batch that become arrays, on this process
        (`train.batches.own_rows`); None: all.

    Raises:
      FileNotFoundError: a path is not there.
      ValueError: no document, a broken document, or settings that do not go together.
    """
    groups = open_documents(cfg, split)
    encoder = _make_encoder(
        cfg, encode, encode_chat, eos_id, encode_part, encode_completion, images
    )
    packs = []
    for number, documents in enumerate(groups):
        order = ordered(cfg, documents, number)
        check_answers(encoder, documents, documents.title, template, CHECK_SECONDS)
        seed = seed_of(cfg.seed, number) if cfg.shuffle else None
        encoded = order.map(encoder)
        if cfg.drop_prompts:
            encoded = order.random_map(encoder, seed=seed_of(cfg.seed + 1, number))
        packs.append(_pack(cfg, encoded, documents, template, seed))
    packed = grain.IterDataset.mix(packs, cfg.weights) if cfg.weights else packs[0]
    dataset = prefetched(cfg, _batched(cfg, packed, pad_id, rows, encoder.images))
    return Batches(dataset, packs, groups, identify(cfg, groups, split, encoder.images))


def _batched(
    cfg: DataConfig,
    packed: grain.IterDataset,
    pad_id: int,
    rows: Sequence[int] | None,
    images: ImageReader | None,
) -> grain.IterDataset:
    """Batches of packed rows, of which `rows` become arrays."""
    size = cfg.batch_size
    finish = functools.partial(
        make_batch, num_rows=size, seq_len=cfg.seq_len, pad_id=pad_id, own=rows, images=images
    )
    return packed.batch(size, batch_fn=finish)


def ordered(cfg: DataConfig, documents: Documents, number: int) -> grain.MapDataset:
    """The documents of a path, the `number`-th, as often as they are read."""
    order = grain.MapDataset.source(documents)
    if cfg.shuffle:
        order = order.shuffle(seed=seed_of(cfg.seed, number))
    return order.repeat(cfg.num_epochs)


def seed_of(seed: int, number: int) -> int:
    """32 bits that are no neighbours for neighbouring seeds: Grain adds the epoch to them."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _make_encoder(
    cfg: DataConfig,
    encode: EncodeText,
    encode_chat: EncodeChat | None,
    eos_id: int | None,
    encode_part: EncodeText | None,
    encode_completion: EncodeCompletion | None,
    images: ImageReader | None,
) -> Encoder:
    anywhere = cfg.packing == "stream" and cfg.overlong in (None, "split")
    return Encoder(
        encode,
        encode_chat,
        eos_id,
        seq_len=None if anywhere else cfg.seq_len,
        overlong=cfg.overlong,
        answers_only=cfg.mask == "answers",
        encode_part=encode_part,
        encode_completion=encode_completion,
        images=None if cfg.packing == "stream" else images,
        drop_prompts=cfg.drop_prompts,
    )


def _pack(
    cfg: DataConfig,
    encoded: grain.MapDataset,
    source: Documents,
    template: str,
    seed: int | None,
) -> Packed | Stream:
    documents = encoded.to_iter_dataset(reading(cfg))
    check = functools.partial(refuse_marks, source.title, template)
    of_rows = documents, cfg.seq_len, len(source), check
    if cfg.packing == "stream":
        return Stream(*of_rows)
    window = cfg.pack_window if cfg.packing == "packed" else 0
    return Packed(*of_rows, window=window, seed=seed, max_images=cfg.max_images)


def reading(cfg: DataConfig) -> grain.ReadOptions:
    """How documents are read; Grain's default is 500 ahead, by 16 threads."""
    return grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=16 * cfg.threads)


def prefetched(cfg: DataConfig, dataset: grain.IterDataset) -> grain.IterDataset:
    """The batches, prepared ahead."""
    if not cfg.prefetch:
        return dataset
    return grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=cfg.prefetch)


def identify(
    cfg: DataConfig, groups: Sequence[Documents], split: Split, images: ImageReader | None = None
) -> dict[str, Any]:
    """What a place in the data depends on; not the paths: folders move, typos are corrected."""
    keys = ("weights", "seq_len", "batch_size", "packing", "pack_window", "mask", "overlong")
    keys = (*keys, "shuffle", "seed", "holdout", "special_tokens", "date", "format")
    keys = keys if images is None else (*keys, "max_images")
    keys = (*keys, "drop_prompts") if cfg.drop_prompts else keys
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
    encode_part: EncodeText | None = None,
    encode_completion: EncodeCompletion | None = None,
    images: ImageReader | None = None,
    template: str = "the tokenizer",
    rows: Sequence[int] | None = None,
    split: Split = "heldout",
) -> EvaluationBatches:
    """All documents of a split once, in order, without weights.

    Args and errors are those of `build`.
    """
    cfg = dataclasses.replace(cfg, weights=None, shuffle=False, num_epochs=1)
    groups = open_documents(cfg, split)
    encoder = _make_encoder(
        cfg, encode, encode_chat, eos_id, encode_part, encode_completion, images
    )
    for documents in groups:
        check_answers(encoder, documents, documents.title, template, CHECK_SECONDS)
    identity = identify(cfg, groups, split, encoder.images)

    def make() -> Batches:
        (documents,) = groups
        encoded = grain.MapDataset.source(documents).map(encoder)
        pack = _pack(cfg, encoded, documents, template, None)
        dataset = prefetched(cfg, _batched(cfg, pack, pad_id, rows, encoder.images))
        return Batches(dataset, [pack], groups, identity)

    return EvaluationBatches(make)
