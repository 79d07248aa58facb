"""Decoding pictures in processes of their own, in order.

Pillow holds Python's lock while it decodes, so threads would wait for each other. A process takes
some seconds to start and gives back bytes, the same that this one would make.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llmprep_jax.data.refs import Ref
from llmprep_jax.vision.open import open_rgb
from llmprep_jax.vision.processor import ImageProcessor, Pixels
from llmprep_jax.vision.views import View

_own: list[ImageProcessor] = []  # of a worker


class Picture(NamedTuple):
    """An image, of how many images in its conversation it is one, and the part of it that is looked
    at; None: all."""

    ref: Ref
    num_images: int
    view: View | None = None


class Decoder:
    """What the image processor makes of images, one after another.

    Args:
      workers: processes, started when they are first needed; 0: this one.
    """

    def __init__(self, images: ImageProcessor, workers: int):
        self._images, self._workers = images, workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __call__(self, pictures: Iterable[Picture]) -> Iterator[Pixels]:
        """In order. Raises FileNotFoundError or ValueError, on one line, naming the image."""
        if not self._workers:
            yield from (_decode(self._images, picture) for picture in pictures)
            return
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._workers,
                multiprocessing.get_context("spawn"),  # threads of this process may hold locks
                _start,
                (self._images,),
            )
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        # processes inherit the mask: Ctrl-C is this process's to answer
        unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            results = self._pool.map(_decode_here, pictures)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
        yield from results


def _start(images: ImageProcessor) -> None:
    _own.append(images)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _decode_here(picture: Picture) -> Pixels:
    return _decode(_own[0], picture)


def _decode(images: ImageProcessor, picture: Picture) -> Pixels:
    ref, content = picture.ref, picture.ref.content()
    if picture.view is not None:
        whole = open_rgb(content, name=ref.title, max_pixels=images.max_pixels)
        content = picture.view.of(whole)
    return images(content, [ref.title], num_images=picture.num_images)
