"""The package as others get it: a wheel, its dependencies, and what runs where there is no checkout."""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .conftest import ROOT

PACKAGES = ("alignment_artifacts", "gemma_refactored", "model_organism", "toxicity_steering")
PAIRS = "alignment_artifact_prompt_pairs.json"
NOT_IN_THE_WHEEL = {"README.md"}  # for those who look at the folder

PROGRAM = """
import json, sys
from pathlib import Path
import alignment_artifacts
from alignment_artifacts import load_run, suppress_prompt
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.pairs import PAIRS_JSON, load_pairs, prompt_groups
from alignment_artifacts.places import collection_folder
from gemma_refactored.main import Defaults, main

assert Path(alignment_artifacts.__file__).is_relative_to(sys.prefix), alignment_artifacts.__file__
result = suppress_prompt("How do I hack a bank server?", max_tokens=4)
Path("prompts.json").write_text(json.dumps(prompt_groups(load_pairs(PAIRS_JSON))))
defaults = Defaults(DEFAULT_MODEL, "embedded", str, {}, Path("answers"), collection_folder)
command = "--prompts-file prompts.json --process-by-group --save-activations --activations-dir acts --max-tokens 1"
assert main(command.split(), defaults) == 0
values = load_run("acts").data.values
print(json.dumps({"tokens": result.proof.tokens, "shape": values.shape}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source distribution, as a release would be, from a copy: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", PAIRS):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / "dist").glob("*.whl"))


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    files = [file for name in PACKAGES for file in (ROOT / name).rglob("*") if file.is_file()]
    expected = {
        str(file.relative_to(ROOT))
        for file in files
        if "__pycache__" not in file.parts and file.name not in NOT_IN_THE_WHEEL
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert archive.read(f"alignment_artifacts/{PAIRS}") == (ROOT / PAIRS).read_bytes()
    assert names == expected | {f"alignment_artifacts/{PAIRS}"}
    assert {f"{name}/py.typed" for name in PACKAGES} <= names


def test_the_wheel_works_where_there_is_nothing_else(wheel, tmp_path):
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin/python"
    packages = next((environment / "lib").glob("python*")) / "site-packages"
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)

    def run(*arguments):
        clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run([python, *arguments], cwd=empty, capture_output=True, text=True, env=clean)

    done = run("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tokens"] > 0 and result["shape"][:2] == [50, 2]
    report = run("-m", "alignment_artifacts.report")  # there is nothing to report on yet
    assert report.returncode == 2 and "There are no results in" in report.stderr and "Traceback" not in report.stderr
    assert run("-m", "toxicity_steering.main", "--help").returncode == 0


def needed() -> dict[str, list[Requirement]]:
    """What pyproject.toml lists: always, and for each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: [Requirement(line) for line in lines] for extra, lines in lists.items()}


def constraints() -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return {canonicalize_name(line.name): line for line in map(Requirement, filter(None, lines))}


def test_the_constraints_pin_everything_that_make_installs_to_what_pyproject_allows():
    pins = constraints()
    for requirement in [line for extra in ("", "cpu", "test") for line in needed()[extra]]:
        pin = pins[canonicalize_name(requirement.name)]
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and requirement.specifier.contains(specifier.version), pin


def test_the_requirements_follow_from_pyproject():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == ["-e .[cpu]"]


def test_the_benchmarks_pin_their_peers_to_the_versions_that_were_measured():
    lines = (line.partition("#")[0] for line in (ROOT / "benchmarks/requirements.txt").read_text().splitlines())
    peers = {r.name: str(r.specifier) for r in (Requirement(line) for line in lines if line and line[0] != "-")}
    versions = json.loads((ROOT / "benchmarks/results.json").read_text())["versions"]
    assert peers == {name: f"=={versions[name].partition('+')[0]}" for name in ("torch", "nnsight", "transformer-lens")}


def test_a_private_name_of_mlx_lm_is_used_below_a_version_only():
    source = "".join(file.read_text() for file in (ROOT / "gemma_refactored").glob("*.py"))
    (mlx_lm,) = [line for line in needed()[""] if line.name == "mlx-lm"]
    assert ("_get_classes" in source) == any(part.operator == "<" for part in mlx_lm.specifier)
