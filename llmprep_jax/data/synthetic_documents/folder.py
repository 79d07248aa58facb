"""A data set on disk: pictures, PDFs, and conversations about them.

    images/000000.png  pdf/000000.pdf ...
    documents.jsonl    a document a line: its text, words, boxes, and all its questions
    train.jsonl        a question a line as a conversation whose image part is a path from here
    heldout.jsonl      the other side
    settings.json      what it was made with, fonts included
    sheet.png          a contact sheet

The sides are files, so train with `data.holdout=0`: a hash of the conversations would part them in
another way.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import rich.console
import rich.progress

from llmprep_jax.data.synthetic_documents.fonts import families_by_language, find_families
from llmprep_jax.data.synthetic_documents.generator import Document, Question, generate
from llmprep_jax.data.synthetic_documents.pdf import to_pdf
from llmprep_jax.data.synthetic_documents.settings import Settings
from llmprep_jax.data.synthetic_documents.sheet import contact_sheet
from llmprep_jax.remote import AnyPath, as_path, write_folder

SPLITS = ("train", "heldout")
# documents of a process at least: one takes three seconds to start
MIN_SHARES = {"tiny": 1000, "plain": 100, "varied": 100}


def write(
    folder: str | os.PathLike,
    count: int,
    settings: Settings | None = None,
    *,
    pdf: bool = True,
    workers: int | None = None,
    console: rich.console.Console | None = None,
) -> AnyPath:
    """Writes documents 0 to count - 1.

    Args:
      folder: new or empty, also of a store (gs://, s3://).
      settings: None: all kinds and languages, plain.
      pdf: PDFs too.
      workers: processes; None: one a core where each has 100 documents, or 1,000 tiny ones.
      console: where progress is shown; None: nowhere.

    Returns:
      The folder.

    Raises:
      ValueError: files in the folder, a count or workers below 1, a missing font.
    """
    settings, folder = settings or Settings(), as_path(folder)
    if count < 1:
        raise ValueError(f"count={count}; give 1 or more")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}; give 1 or more")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files; give a new or an empty folder")
    for language in settings.language:  # a missing font is told of before anything is written
        find_families(language, settings.fonts)
    console = console or rich.console.Console(quiet=True)
    write_folder(folder, lambda local: _write_all(local, count, settings, pdf, workers, console))
    return folder


def _write_all(
    folder: pathlib.Path,
    count: int,
    settings: Settings,
    pdf: bool,
    workers: int | None,
    console: rich.console.Console,
) -> None:
    for name in ("images", *(["pdf"] if pdf else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    make = functools.partial(_write_one, folder, settings, pdf)
    workers = workers or _choose_workers(count, settings)
    records = rich.progress.track(
        _in_order(make, count, workers), "writing", count, console=console, transient=True
    )
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context((folder / f"{name}.jsonl").open("w", encoding="utf-8"))
            for name in ("documents", *SPLITS)
        }
        for record in records:
            _write_line(files["documents"], record)
            for conversation in _conversations(record):
                _write_line(files[record["split"]], conversation)
    contact_sheet(settings).save(folder / "sheet.png")
    made = {"count": count, "settings": dataclasses.asdict(settings), "fonts": _font_set(settings)}
    text = json.dumps(made, indent=2, ensure_ascii=False)
    (folder / "settings.json").write_text(text + "\n", encoding="utf-8")


def _in_order(make: Any, count: int, workers: int) -> Iterator[dict[str, Any]]:
    """The records in order, made in several processes where there are several workers."""
    if workers == 1:
        yield from map(make, range(count))
        return
    context = multiprocessing.get_context("spawn")  # threads of this process may hold locks
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_end_with_parent
    )
    try:
        # processes inherit the mask: Ctrl-C is this process's to answer
        unmasked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            records = pool.map(make, range(count), chunksize=8)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unmasked)
        yield from records
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Ends this process when its parent has gone, which Ctrl-C ends at once."""
    sentinel = multiprocessing.parent_process().sentinel

    def wait() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _choose_workers(count: int, settings: Settings) -> int:
    is_linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if is_linux else os.cpu_count() or 1
    return max(1, min(cores, count // MIN_SHARES[settings.level]))


def _write_one(folder: pathlib.Path, settings: Settings, pdf: bool, index: int) -> dict[str, Any]:
    """Writes the files of one document and returns its record."""
    document = generate(settings, index)
    image = pathlib.Path("images") / f"{index:06d}.png"
    # the grain of worn pages does not deflate: trying hard took four times as long
    document.image.save(folder / image, compress_level=1 if document.level == "varied" else 6)
    record = to_record(document, image.as_posix())
    if pdf:
        path = pathlib.Path("pdf") / f"{index:06d}.pdf"
        (folder / path).write_bytes(to_pdf(document))
        record["pdf"] = path.as_posix()
    return record


def to_record(document: Document, image: str) -> dict[str, Any]:
    """A document as JSON values.

    Args:
      image: the path or name that its image part holds.
    """
    width, height = document.image.size
    return {
        "id": document.index,
        "split": document.split,
        "kind": document.kind,
        "language": document.language,
        "level": document.level,
        "image": image,
        "width": width,
        "height": height,
        "ocr": document.text,
        "words": [[word.text, list(word.box)] for word in document.words],
        "questions": [_to_question(question) for question in document.questions],
        "messages": to_messages(document.questions, image),
    }


def to_messages(questions: Iterable[Question], image: str) -> list[dict[str, Any]]:
    """A conversation that begins with the picture."""
    messages: list[dict[str, Any]] = []
    for question in questions:
        content: list[dict[str, str]] = [{"type": "text", "text": question.text}]
        if not messages:
            content.insert(0, {"type": "image", "image": image})
        messages.append({"role": "user", "content": content})
        reply = [{"type": "text", "text": question.response}]
        messages.append({"role": "assistant", "content": reply})
    return messages


def _to_question(question: Question) -> dict[str, Any]:
    return {
        "question": question.text,
        "answers": list(question.answers),
        "boxes": [list(box) for box in question.boxes],
        "category": question.category,
    }


def _conversations(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A conversation a question, with the picture in each."""
    picture = record["messages"][0]["content"][0]
    turns = record["messages"]
    for i, question in enumerate(record["questions"]):
        asked = turns[2 * i]["content"][-1]
        yield {
            "messages": [{"role": "user", "content": [picture, asked]}, turns[2 * i + 1]],
            "answers": question["answers"],
            "boxes": question["boxes"],
            "category": question["category"],
            "kind": record["kind"],
            "language": record["language"],
            "id": record["id"],
        }


def _write_line(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _font_set(settings: Settings) -> dict[str, list[str]]:
    """The families by language with a hash of their files: boxes are alike where these are."""
    return {
        language: [f"{family.name} {_hash(family.regular.path)}" for family in families]
        for language, families in families_by_language(settings.fonts).items()
        if language in settings.language
    }


@functools.cache
def _hash(path: str) -> str:
    if not path:
        return "Pillow"
    return hashlib.blake2b(pathlib.Path(path).read_bytes(), digest_size=6).hexdigest()
