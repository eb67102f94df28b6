"""Imported first by scripts: Ctrl-C while they are still importing is answered in one line, as it is later on."""

import sys


def answer(kind, error, traceback) -> None:
    """In place of Python's own `sys.excepthook`, which tells everything else."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nInterrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = answer
