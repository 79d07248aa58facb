"""The first lines of a command: help, malloc on huge pages, the compile cache, Ctrl-C.

They come before the imports, so only Python's own library is used here. On Linux a command replaces
itself once by the same command with glibc's malloc on huge pages, where freed memory stays with the
process: XLA's CPU client takes gigabytes at every step and gives them back, and the faults of fresh
pages are a fifth of a training step on huge pages too (SmolLM2's LoRA step: 4.6 CPU-seconds against
3.6). Whoever calls a command's `main` from Python exports GLIBC_TUNABLES as `TUNABLES` to have the
same; one that is set is left alone.
"""

import os
import pathlib
import platform
import signal
import sys

KEPT_BYTES = 4 * 2**30  # of memory that is free, and taken from it: all but very large arrays
TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in dict(
        hugetlb=1, mmap_threshold=KEPT_BYTES, trim_threshold=KEPT_BYTES, arena_max=1
    ).items()
)
CACHE_SWITCH = "LLMPREP_COMPILE_CACHE"  # a folder in place of the usual one, or off
CACHE_BYTES = 4 * 2**30
CACHE_WORDS = (
    "Compiled programs are kept in {folder}, at most 4 GiB, the oldest going first;\n"
    f"{CACHE_SWITCH}=off turns that off, {CACHE_SWITCH}=FOLDER moves it."
)


def start(usage: str | None, settings: str | None = None, *, compile_cache: bool = True) -> None:
    """Prints the help and ends, where it is asked for; else makes this process ready.

    Args:
      usage: the command's docstring.
      settings: "module:Class" of its settings, None where it has none.
      compile_cache: whether compiled programs are kept; benchmarks time compiling.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        show_help(str(usage).strip(), settings, compile_cache)
        raise SystemExit(0)
    start_on_huge_pages()
    # until `cli.run` takes over: an exception in the midst of an import may be swallowed
    signal.signal(signal.SIGINT, _end)
    if compile_cache:
        use_compile_cache()


def _end(number: int, frame: object) -> None:
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def show_help(usage: str, settings: str | None, compile_cache: bool) -> None:
    from experiments.command.reference import describe

    parts = [usage, *([] if settings is None else ["Settings:\n\n" + describe(settings)])]
    folder = _cache_folder() if compile_cache else None
    parts += [] if folder is None else [CACHE_WORDS.format(folder=folder)]
    try:
        print("\n\n".join(parts), flush=True)
    except BrokenPipeError:  # of `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def start_on_huge_pages() -> None:
    """Replaces this process by the same command with malloc on huge pages, where that is new."""
    if "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def use_compile_cache() -> None:
    """Tells JAX where to keep compiled programs, unless the environment says so already."""
    folder = _cache_folder()
    if folder is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    is_new = not folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # a home that cannot be written: the command runs, and compiles each time
    if is_new:
        print(CACHE_WORDS.format(folder=folder), file=sys.stderr)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHE_BYTES))


def _cache_folder() -> pathlib.Path | None:
    switch = os.environ.get(CACHE_SWITCH, "")
    if switch.lower() in ("off", "0", "false", "no"):
        return None
    if switch:
        return pathlib.Path(switch).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "llmprep_jax" / "compiled"
