"""The commands, one verb a file: `python -m experiments.<verb> --help`.

On Linux a command starts itself anew once, with glibc's malloc on huge pages: XLA's CPU client
takes fresh memory at every step, and the page faults of that are a fifth of a training step
(SmolLM2's LoRA step 1.49 s against 1.84). The one thing a reader would get wrong: this is decided
before anything is imported, so importing a command in Python changes nothing; there, export
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 yourself. A GLIBC_TUNABLES that is set is left alone.
"""

import os
import platform
import sys

TUNABLES = "glibc.malloc.hugetlb=1"


def start_on_huge_pages() -> None:
    """Replaces this process by the same command with malloc on huge pages, where that is new."""
    is_command = any(
        flag == "-m" and name.startswith("experiments.")
        for flag, name in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    )
    if not is_command or "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


start_on_huge_pages()
