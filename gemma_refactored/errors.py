"""The one exception that is meant for the user, and how scripts report it."""

import os
import re
import sys
from collections.abc import Callable


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
    """Run a script's action and say what went wrong.

    Args:
        interrupted: the message after Ctrl-C.
        rank: of this process among several; all but the first name it in their messages.
    Returns:
        What the action returns, or 0; 2 after printing a UserError, 130 after Ctrl-C, 1 if nobody reads its output.
    """
    try:
        code = action()
        sys.stdout.flush()
    except BrokenPipeError:
        return stop_printing()
    except UserError as error:
        print(f"Error{f' in process {rank()}' if rank() else ''}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if not rank():
            print(f"\n{interrupted}", file=sys.stderr)
        return 130
    return code or 0


def stop_printing() -> int:
    """For a BrokenPipeError: the reader of the output (`head`, say) has gone; exit code 1, silently."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
    return 1
