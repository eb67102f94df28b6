"""The documents: numbers come from the result files, links lead somewhere, the front page stays short."""

import importlib.util
import re
import subprocess
import sys

import pytest

from .conftest import ROOT

SCRIPT = ROOT / "docs" / "update_numbers.py"
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")


@pytest.fixture(scope="module")
def update():
    spec = importlib.util.spec_from_file_location("update_numbers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split()]


def anchors(text: str) -> set[str]:
    """Of all headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_numbers_are_those_of_the_result_files():
    run = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}{run.stderr}\nRun: python docs/update_numbers.py"


def test_another_result_changes_the_text_and_nothing_else(update):
    numbers = update.load()
    text = (ROOT / "docs" / "controls.md").read_text()
    numbers["comparison"]["peak"]["d_b"] = 123.44
    changed = update.refreshed(text, numbers)
    assert "d_b .1f-->123.4<!--=-->" in changed
    assert update.refreshed(changed, update.load()) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a <!--=comparison.peek.d_b .1f-->1<!--=-->", "no number comparison.peek.d_b"),
        ("a <!--=comparison.peak.d_b .1f-->1", "not closed"),
        ("<!--=comparison.peak.d_b .1f-->1<!--=--> a", "begin"),
        ("- a\n  <!--=comparison.peak.d_b .1f-->1<!--=--> b", "begin"),
    ],
)
def test_a_wrong_marker_is_refused(update, text, problem):
    with pytest.raises(ValueError, match=problem):
        update.refreshed(text, update.load())


@pytest.mark.parametrize(
    ("value", "spec", "words"),
    [
        (0.126, "%", "13%"), (-0.84, "+%", "-84%"), (0.11, "+%", "+11%"), (5e-6, ".0e", "5e-6"),
        (4.567, ".1f", "4.6"), ([0.8, 1.0], "[%]", "[80-100]"), ([2.47, 4.81], "[.1f]", "[2.5, 4.8]"),
        ([2, 3, 4], "", "2, 3 and 4"), ([7], "", "7"),
    ],
)  # fmt: skip
def test_printed(update, value, spec, words):
    assert update.printed(value, spec) == words


def test_links_lead_somewhere():
    texts = {path: path.read_text() for path in documents()}
    links = [(path, link) for path, text in texts.items() for link in LINK.findall(text)]
    assert len(links) > 20
    for path, link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.relative_to(ROOT)} links to {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{path.relative_to(ROOT)} links to {link}"


def test_the_front_page_is_short_and_says_what_the_default_model_is():
    text = (ROOT / "README.md").read_text()
    assert len(re.sub("<!--.*?-->", "", text).encode()) <= 9000  # what a reader sees
    first_screen = "\n".join(text.splitlines()[:40])
    assert "toy requests only" in first_screen and "MODEL_NAME=" in first_screen


def test_code_that_the_documents_name_exists():
    for path in documents():
        for name in re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|sh))`", path.read_text()):
            if path.name != "earlier-scripts.md":
                assert any((base / name).exists() for base in (ROOT, path.parent, *ROOT.glob("*/"))), f"{path}: {name}"
