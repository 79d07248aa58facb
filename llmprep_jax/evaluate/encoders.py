"""Models of two towers on pictures: zero-shot classification and retrieval, with each case's score.

Letters: I pictures, C texts, D width.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.console

from llmprep_jax.data.refs import Ref
from llmprep_jax.evaluate.answers import batches, shown
from llmprep_jax.evaluate.page import Example
from llmprep_jax.evaluate.pictures import Picture
from llmprep_jax.evaluate.retrieval import chance, ranks, recall
from llmprep_jax.evaluate.tasks import Report, report_of
from llmprep_jax.evaluate.zero_shot import TEMPLATES, class_vectors
from llmprep_jax.types import Float

_ROWS = 256  # pictures that are compared with all texts at once


class Outcome(NamedTuple):
    """What a measurement found.

    Attributes:
      numbers: by name, in [0, 1] but for counts, as they are written to a file.
      report: a score a case, and by split. examples: the cases, in the same order.
    """

    numbers: dict[str, Any]
    report: Report
    examples: list[Example]


class Embedder:
    """Pictures and texts to vectors, a batch at a time.

    Args:
      model: of two towers, or what it is `frozen`. processor: its own.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int = 32,
        console: rich.console.Console | None = None,
    ):
        self._model, self._processor = model, processor
        self._batch_size, self._console = batch_size, console

    def images(self, refs: Sequence[Ref]) -> Float[np.ndarray, "I D"]:
        """Unit vectors of pictures."""
        return self._run(self._encode_images, refs, "looking")

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "C D"]:
        """Unit vectors of texts."""
        return self._run(self._encode_texts, texts, "reading")

    def _run(
        self, encode: Callable[[list[Any]], Any], items: Sequence[Any], word: str
    ) -> np.ndarray:
        rows = shown(batches(items, self._batch_size), len(items), word, self._console)
        return np.concatenate([np.asarray(encode(batch)) for batch in rows])[: len(items)]

    def _encode_images(self, refs: list[Ref]) -> Any:
        pictures = [ref.content() for ref in refs]
        return self._model.encode_image(self._processor(images=pictures)["images"])

    def _encode_texts(self, texts: list[str]) -> Any:
        return self._model.encode_text(self._processor(texts)["tokens"])


def classify(
    embedder: Embedder, pictures: Sequence[Picture], templates: Sequence[str] = TEMPLATES
) -> Outcome:
    """The class of each picture by the nearest of the classes' vectors; classes are those there.

    Raises:
      ValueError: one class alone, or what `class_vectors` refuses.
    """
    names = sorted({picture.texts[0] for picture in pictures})
    if len(names) < 2:
        raise ValueError(f"the pictures are all of the class {names[0]!r}; give two or more")
    right_I = np.array([names.index(picture.texts[0]) for picture in pictures])
    classes_CD = class_vectors(embedder.texts, names, templates)
    images_ID = embedder.images([picture.image for picture in pictures]).astype(np.float64)
    above_I, tied_I = ranks(images_ID, classes_CD, right_I)
    top = {k: chance(above_I, tied_I, np.ones_like(tied_I), k) for k in (1, 5) if k < len(names)}
    numbers = {f"top_{k}": float(scores.mean()) for k, scores in top.items()}
    numbers |= {"chance": 1 / len(names), "classes": len(names)}
    examples = [
        Example(
            question=f"Which of {len(names)} classes?",
            answers=picture.texts,
            prediction=names[nearest],
            score=float(score),
            images=(picture.image,),
            category=picture.texts[0],
            name=picture.name,
        )
        for picture, nearest, score in zip(
            pictures, _nearest(images_ID, classes_CD), top[1], strict=True
        )
    ]
    return Outcome(numbers, report_of(top[1].tolist(), [p.texts for p in pictures]), examples)


def retrieve(embedder: Embedder, pictures: Sequence[Picture]) -> Outcome:
    """Recall both ways; a case is a picture, and its score 1 / the rank of its best caption."""
    captions = [text for picture in pictures for text in picture.texts]
    owner_C = np.repeat(np.arange(len(pictures)), [len(picture.texts) for picture in pictures])
    images_ID = embedder.images([picture.image for picture in pictures])
    texts_CD = embedder.texts(captions)
    found = recall(images_ID, texts_CD, owner_C)
    ways = {"image_to_text": found.image_to_text, "text_to_image": found.text_to_image}
    numbers = {f"{way}_r{k}": value for way, by_k in ways.items() for k, value in by_k.items()}
    numbers |= {"images": len(pictures), "captions": len(captions)}
    images_ID, texts_CD = images_ID.astype(np.float64), texts_CD.astype(np.float64)
    own_C = np.einsum("CD,CD->C", images_ID[owner_C], texts_CD)
    order_C = np.lexsort((-own_C, owner_C))  # of each picture its nearest caption first
    best_I = order_C[np.searchsorted(owner_C, np.arange(len(pictures)))]
    above_I, tied_I = ranks(images_ID, texts_CD, best_I)
    scores = (1 / (above_I + (tied_I + 1) / 2)).tolist()  # equal ones share their mean rank
    nearest_I = _nearest(images_ID, texts_CD)
    examples = [
        Example(
            question="Which caption?",
            answers=picture.texts,
            prediction=captions[nearest],
            score=score,
            images=(picture.image,),
            name=picture.name,
        )
        for picture, nearest, score in zip(pictures, nearest_I, scores, strict=True)
    ]
    return Outcome(numbers, report_of(scores), examples)


def _nearest(images_ID: np.ndarray, texts_CD: np.ndarray) -> list[int]:
    """The text that each picture is nearest to."""
    blocks = [images_ID[i : i + _ROWS] for i in range(0, len(images_ID), _ROWS)]
    return np.concatenate([np.argmax(block @ texts_CD.T, axis=1) for block in blocks]).tolist()
