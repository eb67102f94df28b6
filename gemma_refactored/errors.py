"""The one exception that is meant for the user, and how scripts report it."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable
from typing import TextIO

from .interrupts import INTERRUPTED

# Of writing, to whatever file; the last is `tempfile`'s where no folder of temporary files can be written to.
NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.ENOENT)


class UserError(Exception):
    """Bad input: one clear sentence that says what is wrong and what to do next.

    Command lines print it without a traceback and exit with code 2. Long hashes are cut to 12 digits, but not those
    that are part of a path.
    """

    def __init__(self, message: str = ""):
        super().__init__(re.sub(r"(?<![\w/.-])(sha256:)?([0-9a-f]{12})[0-9a-f]{28,}\b", r"\1\2", message))


def shown(value) -> str:
    """A value in an error message, cut to a length one can read."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]} .. ({len(text)} characters)"


def exit_code(
    action: Callable[[], int | None], interrupted: str = "Interrupted.", rank: Callable[[], int] = lambda: 0
) -> int:
    """Run a script's action, reading its options included, and say what went wrong.

    Args:
        interrupted: the message after Ctrl-C.
        rank: of this process among several; all but the first name it in their messages.
    Returns:
        What the action returns, or 0; 2 after printing a UserError or when a file cannot be used or the output not be
        printed, 130 after Ctrl-C, 1 if nobody reads the output.
    """
    if sys.stderr is None:  # closed (`2>&-`); whoever prints an error may rely on it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    if sys.stdout is None:
        print("Error: standard output is closed; send it to a file, or to /dev/null.", file=sys.stderr)
        return 2
    print_every_character()
    output, sys.stdout = sys.stdout, _Output(sys.stdout)
    try:
        code = _outcome(action, interrupted, rank)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return stop_printing()
    except CannotPrint as error:
        print(f"Error: {error}", file=sys.stderr)
        stop_printing()
        return 2
    finally:
        sys.stdout = output


def print_every_character() -> None:
    """From now on a terminal in Latin-1 gets \\u2192 for an arrow, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):  # of LC_ALL=C
            stream.reconfigure(errors="backslashreplace")


class CannotPrint(Exception):
    """Standard output takes no more: its disk is full, for example. (An OSError would do, if argparse let it pass.)"""


class _Output:
    """Standard output that tells its own errors from those of other files."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable, *arguments):
        try:
            return action(*arguments)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CannotPrint(f"the output cannot be printed: {error.strerror}. Send it elsewhere.") from error


def _outcome(action: Callable[[], int | None], interrupted: str, rank: Callable[[], int]) -> int:
    try:
        return action() or 0
    except UserError as error:
        print(f"Error{f' in process {rank()}' if rank() else ''}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is not None:
            problem = f"{shown(str(error.filename))} cannot be used: {error.strerror}. Name another."
        elif error.errno in NO_ROOM:
            problem = (
                f"A file could not be written: {error.strerror}. Free some space, also for temporary files (in the "
                "folder that TMPDIR names), then run the same command again."
            )
        else:  # not of a file: of a pipe, for example
            raise
        print(f"Error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if not rank():
            print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as end:  # argparse's, after --help or for an option there is not
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def stop_printing() -> int:
    """For a BrokenPipeError: the reader of the output (`head`, say) has gone; exit code 1, silently."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
    return 1
