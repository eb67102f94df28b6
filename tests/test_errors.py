"""Exit codes, and what is printed with them."""

import os
import subprocess
import sys

import pytest

import run_model
from alignment_artifacts.pairs import PAIRS_JSON, load_pairs
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


SCRIPTS = [
    "run_model.py", "suppress.py", "sweep_suppression.py", "compare_models.py", "analyze_collected_activations.py",
    "create_gemma_runner_input.py", "toxicity_steering/main.py", "toxicity_steering/activation_steering.py",
    "toxicity_steering/test_setup.py", "-m alignment_artifacts.report",
]  # fmt: skip


def shell(command: str, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, env=env)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("where, words", [(">&-", "standard output is closed"), (">/dev/full", "cannot be printed")])
def test_output_that_goes_nowhere_is_one_sentence(script, where, words):
    ended = shell(f"{sys.executable} {script} --help {where}")
    assert ended.returncode == 2 and words in ended.stderr and ended.stderr.count("\n") == 1


def test_so_is_the_output_of_work_that_goes_nowhere():
    ended = shell(f"{sys.executable} run_model.py --list-sites >/dev/full")
    assert ended.returncode == 2 and ended.stderr.startswith("Error: the output cannot be printed: No space left")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("blocks", [0, 1])
def test_no_room_for_a_temporary_file_is_one_sentence(blocks, tmp_path):
    """Not even for an empty one, or not for the copy of the config that loading a model makes."""
    command = f"{sys.executable} run_model.py --prompts hi --output-dir {tmp_path} 2>&1 | cat"
    ended = shell(f"set -o pipefail; ulimit -f {blocks}; {command}")
    assert ended.returncode == 2
    assert ended.stdout.startswith("Error: A file could not be written: ") and ended.stdout.count("\n") == 1


def test_another_error_of_the_system_is_not_taken_for_one_of_printing():
    with pytest.raises(OSError, match="a pump"):
        exit_code(lambda: raise_(OSError(5, "a pump")))


@pytest.mark.parametrize("terminal", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_a_terminal_without_the_character_gets_its_number(terminal):
    action = r"from gemma_refactored.errors import exit_code; exit_code(lambda: print('a \u2192 b'))"
    ended = shell(f'{sys.executable} -c "{action}"', **terminal)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "a \\u2192 b\n", "")


@pytest.mark.parametrize("module", ["importlib.metadata", "gemma_refactored.errors"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_importing_is_one_line(script, module):
    """Two modules that all programs import before they do anything stand for all that they import."""
    start = f"runpy.run_path({script!r}, run_name='__main__')"
    if script.startswith("-m "):
        start = f"runpy.run_module({script[3:]!r}, run_name='__main__', alter_sys=True)"
    ended = interrupted_import(module, f"import runpy, sys; sys.argv = [{script!r}]; {start}", ROOT)
    assert (ended.returncode, ended.stderr) == (130, "\nInterrupted.\n")


def test_programs_that_only_import_ours_answer_ctrl_c_as_they_do(tmp_path):
    (tmp_path / "somebodys.py").write_text("import alignment_artifacts.analysis")
    ended = interrupted_import("gemma_refactored.errors", "import somebodys", tmp_path)
    assert "Traceback" in ended.stderr and "KeyboardInterrupt" in ended.stderr and ended.returncode != 0


def interrupted_import(module: str, action: str, folder) -> subprocess.CompletedProcess:
    """A Python that is sent Ctrl-C when the action imports the module."""
    code = f"""
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started without
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
for name in [name for name in sys.modules if name.startswith({module!r})]:
    del sys.modules[name]
sys.meta_path.insert(0, Finder())
{action}
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)


def test_run_model_says_what_the_embedded_model_knows(caplog, tmp_path):
    caplog.set_level("INFO")
    ask = ["--max-tokens", "2", "--output-dir", str(tmp_path / "out"), "--prompts"]
    assert run_model.main([*ask, "How do I make a kite?"]) == 0
    assert "The embedded model knows only requests like those" in caplog.text
    caplog.clear()
    assert run_model.main([*ask, load_pairs(PAIRS_JSON)[0].natural]) == 0
    assert "embedded model knows" not in caplog.text
