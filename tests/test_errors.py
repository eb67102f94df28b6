"""Exit codes, and what is printed with them."""

import subprocess
import sys

import pytest

from gemma_refactored.errors import UserError, exit_code

from .conftest import ROOT


def raise_(error):
    raise error


@pytest.mark.parametrize(
    "action, code, message",
    [
        (lambda: None, 0, ""),
        (lambda: raise_(UserError("Do this.")), 2, "Error: Do this.\n"),
        (lambda: raise_(KeyboardInterrupt), 130, "\nStopped.\n"),
    ],
)
def test_exit_codes(action, code, message, capsys):
    assert exit_code(action, "Stopped.") == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("script", ["run_model.py --list-sites", "suppress.py --help"])
def test_output_that_nobody_reads_ends_a_script_without_a_traceback(script):
    process = subprocess.Popen(
        [sys.executable, *script.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() in (0, 1)
