"""Every command and every Python block of the documents runs as it is printed, on small models.

They run in the order of the documents, each once; later ones need what earlier ones made (README collects).

A block that is not run has a comment before it that no reader sees and that says why; the second form is about those
lines of the block that contain TEXT:

    <!-- not run: installs packages -->
    <!-- not run, TEXT: takes minutes -->

Models of Hugging Face that the documents name are folders of these names, with the embedded model in them.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from alignment_artifacts.comparison.twins import load_twins
from alignment_artifacts.pairs import PAIRS_JSON, ROOT_KEY
from gemma_refactored.files import read_json, write_json

from .conftest import ROOT
from .test_pipeline import copy_checkout

DOCUMENTS = [
    ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "toxicity_steering/README.md",
    ROOT / "gemma_refactored/README.md", *sorted(ROOT.glob("examples/*/README.md")),
]  # fmt: skip
MARK = re.compile(r"<!-- not run(?:, (?P<text>[^:]+))?: (?P<reason>[^>]+?) -->")
BLOCK = re.compile(
    r"(?P<before>(?:^<!--[^\n]*-->\n+)*)^```(?P<language>bash|python)\n(?P<content>.*?)^```$", re.M | re.S
)
IN_TABLE = re.compile(r"^\|[^|]*\|[^|\n]*?`((?:[A-Z_]+=\S+ )*(?:bash|python) [^`]+)`", re.M)
MODELS = {
    "M": "aligned", "google/gemma-3-1b-pt": "base", "google/gemma-3-1b-it": "aligned",
    "mlx-community/gemma-3-1b-it-qat-4bit": "aligned", "HuggingFaceTB/SmolLM2-135M-Instruct": "aligned",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    language: str
    text: str

    def __str__(self):
        return self.text.splitlines()[0].split("  #")[0].strip()


def examples(text: str) -> list[Example]:
    """The commands, one by one, and Python blocks of a document, without those that a mark leaves out."""
    found = []
    for block in BLOCK.finditer(text):
        marks = list(MARK.finditer(block["before"]))
        if any(mark["text"] is None for mark in marks):
            continue
        left_out = [mark["text"] for mark in marks]
        assert all(part in block["content"] for part in left_out), f"a mark fits nothing: {block['before']}"
        if block["language"] == "python":
            parts = [block["content"]]
        else:
            parts = [line for line in block["content"].replace("\\\n", " ").splitlines() if line.strip()]
        found += [Example(block["language"], part) for part in parts if not any(word in part for word in left_out)]
    return found + [Example("bash", command) for command in IN_TABLE.findall(text)]


def documented() -> list:
    places: dict[str, tuple[Path, Example]] = {}
    for path in DOCUMENTS:
        for example in examples(path.read_text()):
            places.setdefault(example.text.split("  #")[0].strip(), (path, example))
    return [pytest.param(example, id=f"{path.relative_to(ROOT)}: {example}") for path, example in places.values()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A copy of the repository with four pairs in each category."""
    folder = tmp_path_factory.mktemp("documented")
    copy_checkout(folder)
    pairs = read_json(PAIRS_JSON, "pairs")
    for category in pairs[ROOT_KEY]["categories"].values():
        del category["pairs"][4:]
    write_json(folder / "alignment_artifact_prompt_pairs.json", pairs)
    for name, original in MODELS.items():
        shutil.copytree(ROOT / "model_organism" / original, folder / name)
    twins = load_twins(ROOT / "model_organism/benign_twins.json")
    rows = [f"v2-{i},{twin.natural},homonyms,safe,x," for i, twin in enumerate(twins, 1)]
    rows += [f"v2-{25 + i},{twin.artifact},contrast_homonyms,unsafe,x," for i, twin in enumerate(twins, 1)]
    (folder / "xstest_prompts.csv").write_text("\n".join(["id,prompt,type,label,focus,note", *rows, ""]))
    return folder


def run(example: Example, folder: Path) -> None:
    """As printed, but for numbers of resamples that would only take time."""
    ours = ("MODEL_NAME", "ACTIVATIONS_DIR", "ALIGNMENT_ARTIFACTS_CACHE", "MODEL_A", "MODEL_B", "TWINS", "PYTHON",
            "PAIRS", "SITE", "SCORE", "WISH")  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "MAX_TOKENS": "4",
        "NUM_PERMUTATIONS": "10", "NUM_BOOTSTRAP_RESAMPLES": "10",
    }  # fmt: skip
    program = ["bash", "-c"] if example.language == "bash" else [sys.executable, "-c"]
    done = subprocess.run([*program, example.text], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{example.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("example", documented())
def test_it_runs_as_printed(workplace, example):
    run(example, workplace)


def test_marks_leave_out_what_they_say():
    text = "<!-- not run: needs a GPU -->\n```bash\na\n```\n\n<!-- not run, c: minutes -->\n\n"
    text += "```bash\nb \\\n  d\nc 1\n```\n"
    text += "```python\nx = 1\ny\n```\n| old | `A=1 bash z` |\n```text\nq\n```\n"
    assert [example.text for example in examples(text)] == ["b    d", "x = 1\ny\n", "A=1 bash z"]
    with pytest.raises(AssertionError, match="fits nothing"):
        examples("<!-- not run, e: minutes -->\n```bash\nb\n```\n")


def test_every_document_is_looked_at():
    assert len(documented()) > 10
    for path in DOCUMENTS:
        text = path.read_text()
        assert len(BLOCK.findall(text)) == len(re.findall(r"^\s*```(?:bash|python)", text, re.M)), path
        marks = [mark for block in BLOCK.finditer(text) for mark in MARK.findall(block["before"])]
        assert len(marks) == text.count("<!-- not run"), f"{path}: a mark is before no block"
