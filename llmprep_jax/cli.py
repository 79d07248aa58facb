"""What every command does alike: help, errors in one line, exit codes, and where the outputs are.

`run(main)` is the last line of each experiments/*.py. Exit codes: 0 done, 1 a file or value that
will not do, 2 the command was called wrongly, 130 interrupted. `--help` and `--debug` (tracebacks)
are the only flags; everything else is `name=value`.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console

from llmprep_jax import interrupts, processes
from llmprep_jax.config import UsageError
from llmprep_jax.remote import is_remote

Outputs = Mapping[str, Any]


def run(
    main: Callable[[list[str]], Outputs | None], arguments: Sequence[str] | None = None
) -> None:
    """Runs a command and exits with its code.

    Args:
      main: takes the arguments, returns its outputs by name (files and folders), or None.
      arguments: of the command line; None: sys.argv.

    Raises:
      SystemExit: always.
    """
    if arguments is None:
        interrupts.watch()
        arguments = sys.argv[1:]
    if any(argument in ("--help", "-h") for argument in arguments):
        print(str(main.__globals__["__doc__"]).strip())
        raise SystemExit(0)
    arguments = list(arguments)
    debug = "--debug" in arguments
    try:
        outputs = main([argument for argument in arguments if argument != "--debug"])
        if processes.is_writer():
            show_outputs(outputs or {})
        sys.stdout.flush()
    except interrupts.Interrupted as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(interrupts.EXIT_CODE) from None
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        _drop_output()  # whoever read it, `head` say, has gone: no fault of the command
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (KeyboardInterrupt, Exception) as error:
        code, message = explain(error)
        if processes.is_first_to_fail(message or str(error)):
            if debug or message is None:
                traceback.print_exc()
            print(f"error: {message or error}", file=sys.stderr)
        processes.leave(code)
        raise SystemExit(code) from None
    raise SystemExit(0)


def _drop_output() -> None:
    """Python flushes stdout once more when it ends, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException) -> tuple[int, str | None]:
    """The exit code of an error and its message in one line; None where only a traceback helps."""
    if isinstance(error, KeyboardInterrupt):
        return interrupts.EXIT_CODE, "interrupted"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UsageError):
        return 2, f"{text} (see --help)"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return 1, f"{error.filename}: {error.strerror}; {_remedy(error)}"
    if isinstance(error, (ValueError, OSError)):
        return 1, text
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text:
        remedy = "take a smaller batch, a shorter context or remat"
        return 1, f"out of device memory: {text[:200]}; {remedy}"
    return 1, None


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space, or choose another place"
    if error.errno == errno.ENOENT:
        return "check the path"
    return "check the path and its permissions, or choose another place"


def show_outputs(outputs: Outputs) -> None:
    """Prints where the outputs are, one a line, with paths from the working folder."""
    console = rich.console.Console()
    width = max(map(len, outputs), default=0)
    for name, path in outputs.items():
        shown = path
        is_local = isinstance(path, os.PathLike) and not is_remote(path)
        if is_local and not os.path.relpath(path).startswith(".."):
            shown = os.path.relpath(path)
        console.print(f"{name:{width}}  {shown}", soft_wrap=True, markup=False, highlight=False)
