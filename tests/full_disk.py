"""A disk that is full as far as one process can tell, with no mount: files that may not grow."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def disk_for_files_of(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond so many bytes: writes give OSError (EFBIG).

    Python ignores SIGXFSZ from its start, so the writer gets the error and not the signal.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
