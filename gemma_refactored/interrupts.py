"""Imported before all else: Ctrl-C while our programs are still importing is answered in one line, as it is later."""

import os
import sys
import traceback

INTERRUPTED = 130  # the exit code of a program that Ctrl-C has ended, for shells
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_others = sys.excepthook


def answer(kind, error, trace) -> None:
    """In place of `sys.excepthook`, which answers everything else, and in programs that only import this package."""
    if not (issubclass(kind, KeyboardInterrupt) and _is_ours(trace)):
        return _others(kind, error, trace)
    print("\nInterrupted.", file=sys.stderr)
    raise SystemExit(INTERRUPTED)


def _is_ours(trace) -> bool:
    """Did it begin in a file of this repository? (Python's own, which start a module, have no path.)"""
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
    first = next((file for file in files if not file.startswith("<")), "")
    return os.path.abspath(first).startswith(_ROOT + os.sep)


sys.excepthook = answer
