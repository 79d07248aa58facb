"""Pairs of an image and what is said of it, for models of two towers.

A row is one pair, and a batch has no padding: a contrastive loss would take it for negatives, so
what does not fill a batch at the end of finite data is left out. In training one of an image's
captions is drawn each time it comes, and a part of the picture, where that is asked for, by the
seed and the place in the data: a run that goes on draws the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from llmprep_jax.data.config import DataConfig
from llmprep_jax.data.decoding import Decoder, Picture
from llmprep_jax.data.documents import Document
from llmprep_jax.data.encoding import COUNTS, Encoded, Piece
from llmprep_jax.data.images import Ref, Run, split_images
from llmprep_jax.data.packing import Packed, Row
from llmprep_jax.data.pipeline import Batches, identify, ordered, prefetched, reading, seed_of
from llmprep_jax.data.split import Split, open_documents
from llmprep_jax.vision.processor import ImageProcessor
from llmprep_jax.vision.views import draw_view

EncodeTexts = Callable[[Sequence[str]], Int[np.ndarray, "B T"]]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pairing:
    """What pairs need of a processor of two towers.

    Attributes:
      encode: texts to rows of one length.
      images: the image processor.
    """

    encode: EncodeTexts
    images: ImageProcessor


def pair_of(document: Document) -> tuple[Ref, tuple[str, ...]]:
    """The image of a document, and its captions.

    Raises:
      ValueError: it has none.
    """
    if not document.captions:
        raise ValueError(
            f"{document.name}: two towers are trained on images with captions; write records of"
            ' {"image": ..., "caption": ...}'
        )
    try:
        (ref,) = split_images(document.messages, document.folder)[1]
    except ValueError as error:
        raise ValueError(f"{document.name}: {error}") from None
    return ref, document.captions


def _draw(
    cfg: DataConfig, encode: EncodeTexts, numbered: tuple[int, Document], rng: np.random.Generator
) -> Encoded:
    """A pair as a piece of a row, of which one target counts."""
    doc_id, document = numbered
    ref, captions = pair_of(document)
    tokens_T = encode([captions[int(rng.integers(len(captions)))]])[0]
    view = draw_view(rng, cfg.random_crop, cfg.random_flip)
    counts_T = np.arange(len(tokens_T)) == 0
    run = Run(0, 0, 1, ref, 1, view)
    counted = dict.fromkeys(COUNTS, 0) | {"documents": 1, "tokens": len(tokens_T), "targets": 1}
    return Encoded([Piece(doc_id, tokens_T, tokens_T, counts_T, runs=(run,))], (*counted.values(),))


def build_pairs(
    cfg: DataConfig,
    pairing: Pairing,
    *,
    rows: Sequence[int] | None = None,
    split: Split = "train",
) -> Batches:
    """The batches of pairs that a run trains on: tokens [B, T], images [B, 1, H, W, 3] and doc_ids.

    Args:
      rows: as of `pipeline.build`.

    Raises:
      FileNotFoundError: a path is not there.
      ValueError: no document, a broken one, one without a caption, or fewer than a batch.
    """
    groups = open_documents(cfg, split)
    if sum(map(len, groups)) < cfg.batch_size and cfg.num_epochs is not None:
        raise ValueError(
            f"{', '.join(cfg.paths)}: there are {sum(map(len, groups))} pairs, fewer than"
            f" data.batch_size={cfg.batch_size}"
        )
    draw = functools.partial(_draw, cfg, pairing.encode)
    packs = [
        Packed(
            ordered(cfg, documents, number)
            .random_map(draw, seed=seed_of(cfg.seed, number))
            .to_iter_dataset(reading(cfg)),
            *(1, len(documents), lambda marks: None),  # of rows that are one piece each
            window=0,
        )
        for number, documents in enumerate(groups)
    ]
    mixed = grain.IterDataset.mix(packs, cfg.weights) if cfg.weights else packs[0]
    finish = functools.partial(
        make_pairs, size=cfg.batch_size, own=rows, decoder=Decoder(pairing.images, cfg.decoders)
    )
    dataset = mixed.batch(cfg.batch_size, drop_remainder=True, batch_fn=finish)
    identity = identify(cfg, groups, split) | {
        "random_crop": cfg.random_crop,
        "random_flip": cfg.random_flip,
    }
    return Batches(prefetched(cfg, dataset), packs, groups, identity)


def make_pairs(
    rows: Sequence[Row], size: int, own: Sequence[int] | None, decoder: Decoder
) -> Batch:
    """A batch of pairs, of which `own` become arrays; doc_ids are of all."""
    own = range(size) if own is None else own
    pieces = [rows[number][0] for number in own]
    pictures = [Picture(p.runs[0].ref, 1, p.runs[0].view) for p in pieces]
    pixels = [pixels.values for pixels in decoder(pictures)]
    if not pieces:  # steps are counted without
        return {"doc_ids": np.array([[row[0].doc_id] for row in rows])}
    return {
        "tokens": np.stack([piece.tokens for piece in pieces]),
        "images": np.stack(pixels),
        "image_mask": np.ones((len(pieces), 1), bool),
        "doc_ids": np.array([[row[0].doc_id] for row in rows]),
    }


class HeldOutPairs:
    """All pairs of a split in order, for evaluation.

    Iterated over it gives batches of each image with its first caption, of `size` rows; the last is
    filled up by its first pair. `further` gives the other captions.

    Attributes:
      size: rows of a batch, over all processes. num_images: how many there are.
      owners: of each caption the number of its image: first captions, then the others.
    """

    def __init__(
        self,
        cfg: DataConfig,
        pairing: Pairing,
        split: Split,
        shards: int,
        own_rows: Callable[[int], list[int]],
        most: int | None,
    ):
        """Reads the captions.

        Args:
          shards: that the rows of a batch must part into. own_rows: numbers of those of this
            process, of so many. most: batches; None: all.

        Raises:
          ValueError: fewer pairs than shards, or as of `build_pairs`.
        """
        cfg = dataclasses.replace(cfg, weights=None, shuffle=False, num_epochs=1)
        documents = [d for group in open_documents(cfg, split) for _, d in group]
        self.size = min(cfg.batch_size, len(documents) - len(documents) % shards)
        if not self.size:
            raise ValueError(
                f"{', '.join(cfg.paths)}: {len(documents)} pairs are held out, fewer than the"
                f" {shards} shards of a batch; raise data.holdout"
            )
        if most is not None:
            documents = documents[: most * self.size]
        self._pairs, self._encode = [pair_of(document) for document in documents], pairing.encode
        self._decoder, self._own = Decoder(pairing.images, cfg.decoders), own_rows(self.size)
        self.num_images = len(self._pairs)
        further = [i for i, (_, texts) in enumerate(self._pairs) for _ in texts[1:]]
        self.owners = np.array([*range(self.num_images), *further])

    def __iter__(self) -> Iterator[Batch]:
        for pairs in self._batches(self._pairs):
            pixels = self._decoder([Picture(ref, 1) for ref, _ in pairs])
            yield {
                "tokens": self._encode([texts[0] for _, texts in pairs]),
                "images": np.stack([x.values for x in pixels]),
            }

    def further(self) -> Iterator[Batch]:
        """Batches of the captions that are not the first of their image."""
        texts = [text for _, texts in self._pairs for text in texts[1:]]
        yield from ({"tokens": self._encode(some)} for some in self._batches(texts))

    def _batches(self, items: Sequence[Any]) -> Iterator[list[Any]]:
        """This process's items of each batch."""
        for start in range(0, len(items), self.size):
            some = items[start : start + self.size]
            yield [some[i] if i < len(some) else items[0] for i in self._own]
