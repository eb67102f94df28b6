"""The one exception that is meant for the person at the keyboard, and what scripts make of it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: one clear sentence that says what is wrong and what to do next.

    Command lines print it without a traceback and exit with code 2.
    """


def exit_code(action: Callable[[], object], interrupted: str = "Interrupted.") -> int:
    """Run a script's action: 0, or 2 after printing a UserError, or 130 after Ctrl-C."""
    try:
        action()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    return 0
