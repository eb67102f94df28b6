"""Two processes under mlx.launch write what one process writes."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma_refactored.distributed import Team
from gemma_refactored.main import main

from .conftest import ROOT, relative_error
from .test_main import read, tree
from .tiny_checkpoints import random_gemma, write_checkpoint, write_family

PROMPTS = {f"group_{i}": {"prompt_list": ["word " * (i + 1), "Tell me about a boat."][: 1 + i % 2]} for i in range(6)}


@pytest.fixture
def workplace(tmp_path):
    write_checkpoint(tmp_path / "gemma", random_gemma())
    write_family(tmp_path / "llama", "llama")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    return tmp_path


def options(workplace: Path, run: str, *more, model="gemma", group=True) -> list[str]:
    arguments = ["--model", workplace / model, "--prompts-file", workplace / "prompts.json", "--max-tokens", "4"]
    arguments += ["--output-dir", workplace / f"{run}_out", "--activations-dir", workplace / run]
    arguments += ["--save-activations", *(["--process-by-group"] if group else []), *more]
    return [str(argument) for argument in arguments]


def launch(arguments: list[str], processes=2, timeout=120) -> subprocess.CompletedProcess:
    with socket.socket() as free:  # tests that run at the same time need ports of their own
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] % 20000 + 20000
    command = [Path(sys.executable).with_name("mlx.launch"), "-n", processes, "--backend", "ring", "-p", port]
    command += ["--", sys.executable, ROOT / "run_model.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, env=environment)


def assert_same_run(workplace: Path, a: str, b: str) -> None:
    first, second = tree(workplace / a), tree(workplace / b)
    assert first.keys() == second.keys()
    for name in first:
        if name.endswith(".npz"):
            mine, theirs = read(workplace / a / name), read(workplace / b / name)
            assert mine.keys() == theirs.keys()
            for site in mine:
                if np.abs(mine[site]).max() > 0:  # a flat batch is zero where a row has ended
                    assert relative_error(theirs[site], mine[site]) < 1e-4, (name, site)
        else:
            assert first[name] == second[name], name
    for name in ("results.json", "prompt_metadata.json", "summary.json"):
        assert (workplace / f"{a}_out" / name).read_text() == (workplace / f"{b}_out" / name).read_text()
    changing = {"created", "finished"}
    manifests = [json.loads((workplace / run / "manifest.json").read_text()) for run in (a, b)]
    assert manifests[0].keys() == manifests[1].keys()
    assert all(manifests[0][key] == manifests[1][key] for key in manifests[0].keys() - changing)


@pytest.mark.parametrize("group", [True, False], ids=["grouped", "flat"])
def test_two_processes_write_the_files_of_a_single_run(workplace, group):
    more = ["--batch-size", "4", "--temp", "1.0"]  # random numbers belong to the prompt, not to the process
    assert main(options(workplace, "single", *more, group=group)) == 0
    done = launch(options(workplace, "shared", *more, group=group))
    assert "2 processes share the prompts" in done.stdout, done.stderr
    assert done.stdout.count("Answers:") == 1
    assert_same_run(workplace, "single", "shared")


@pytest.mark.parametrize("group", [True, False], ids=["grouped", "flat"])
def test_parts_that_know_nothing_of_each_other_are_merged_by_copying(workplace, group):
    more = ["--batch-size", "2", "--temp", "1.0"]
    assert main(options(workplace, "single", *more, group=group)) == 0
    answered = 0
    for number in (1, 2, 3):
        part = options(workplace, f"part_{number}", *more, "--part", f"{number}/3", group=group)
        assert main(part) == 0
        files = {f: f.stat().st_mtime_ns for f in (workplace / f"part_{number}").rglob("*.npz")}
        assert main(part) == 0  # the same part again: nothing is left to do
        assert files == {f: f.stat().st_mtime_ns for f in files}
        answered += len(json.loads((workplace / f"part_{number}_out/results.json").read_text()))
        shutil.copytree(workplace / f"part_{number}", workplace / "merged", dirs_exist_ok=True)
    assert answered == len(json.loads((workplace / "single_out/results.json").read_text())) == 9
    before = {f: f.stat().st_mtime_ns for f in (workplace / "merged").rglob("*.npz")}
    assert main(options(workplace, "merged", *more, group=group)) == 0
    assert before == {f: f.stat().st_mtime_ns for f in (workplace / "merged").rglob("*.npz")}
    assert_same_run(workplace, "single", "merged")


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "a/b", "1/3/5", "-1/3", ""])
def test_parts_there_are_not_are_refused(workplace, capsys, part):
    assert main(options(workplace, "no", f"--part={part}")) == 2
    assert "Ith of N parts" in capsys.readouterr().err and not (workplace / "no").exists()


def test_an_unfinished_run_is_completed_by_two(workplace):
    assert main(options(workplace, "single")) == 0
    assert main(options(workplace, "shared")) == 0
    for group in ("group_0", "group_1", "group_4"):
        (workplace / "shared" / group / "prompt_list" / "batch_1" / "prompt.json").unlink()
    before = {f: f.stat().st_mtime_ns for f in (workplace / "shared" / "group_2").rglob("*.npz")}
    done = launch(options(workplace, "shared"))
    assert "6 of 9 prompts are complete already" in done.stdout, done.stderr
    assert before == {f: f.stat().st_mtime_ns for f in before}
    assert_same_run(workplace, "single", "shared")


def test_overwrite_clears_the_folder_once(workplace):
    assert main(options(workplace, "single")) == 0
    assert main(options(workplace, "shared", "--seed", "5", "--activation-filter", "self_attn.output")) == 0
    done = launch(options(workplace, "shared", "--overwrite"))
    assert done.returncode == 0, done.stderr
    assert_same_run(workplace, "single", "shared")


def test_one_model_in_two_processes(workplace):
    assert main(options(workplace, "single", model="llama")) == 0
    done = launch(options(workplace, "shared", "--shard", model="llama"))
    assert "2 processes share the model" in done.stdout, done.stderr
    assert_same_run(workplace, "single", "shared")


@pytest.mark.parametrize(
    "more, model, message",
    [
        (["--shard"], "gemma", "cannot split the architecture 'gemma3_text'"),
        (["--activation-filter", "nothing"], "gemma", "matches no site"),
    ],
)
def test_an_error_ends_every_process(workplace, more, model, message):
    done = launch(options(workplace, "shared", *more, model=model))
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (workplace / "shared").exists()


def test_a_refusal_by_the_first_process_ends_the_others(workplace):
    assert main(options(workplace, "shared")) == 0
    before = tree(workplace / "shared")
    done = launch(options(workplace, "shared", "--seed", "5"))
    assert "seed: 0 -> 5" in done.stderr and "Traceback" not in done.stderr
    assert tree(workplace / "shared") == before


def test_alone_a_model_cannot_be_split(workplace, capsys):
    assert main(options(workplace, "alone", "--shard", model="llama")) == 2
    assert "mlx.launch" in capsys.readouterr().err


def test_shares_cover_everything_once():
    items = list(range(11))
    shares = [Team(rank, 3).share(items) for rank in range(3)]
    assert sorted(sum(shares, [])) == items and max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Team().share(items) == items and Team().exchange({"a": 1}) == [{"a": 1}]
