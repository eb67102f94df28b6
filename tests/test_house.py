"""The floors of the house: data flows one way, nobody imports from above, and light imports stay light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from .conftest import ROOT

# Whoever stands higher may import what stands lower; those on one floor import nothing of each other.
SCRIPTS = {file.stem for file in ROOT.glob("*.py")}
PACKAGES = (SCRIPTS, {"toxicity_steering", "model_organism"}, {"alignment_artifacts"}, {"gemma_refactored"})
ROOMS = (
    {"report"},
    {"comparison", "suppression"},
    {"behaviour"},
    {"edits"},
    {"directions"},
    {"analysis", "collected_arrays"},
    {"baselines", "categories", "summary"},
    {"activation_set", "places", "scores"},
    {"collected_files", "blocks", "intervals"},
    {"pairs", "environment"},
    {"separation", "rates", "formatting", "stop_words", "figures", "default_model"},
)
FREE_OF_MLX = (
    "separation", "intervals", "scores", "rates", "formatting", "analysis", "comparison.transfer",
    "comparison.difference", "comparison.change_space", "figures.data", "figures.interactive", "figures.paper",
)  # fmt: skip


def modules() -> dict[str, Path]:
    """Dotted name -> file, of all packages and scripts."""
    packages = set().union(*PACKAGES) - SCRIPTS
    files = [*ROOT.glob("*.py"), *(file for package in packages for file in (ROOT / package).rglob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(text: str, package: str, names: set[str]) -> set[str]:
    """Which of `names` a module of this package imports, for more than type checkers or when run as a script."""
    found = set()
    pending = [ast.parse(text)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = f"{outer}.{node.module or ''}".strip(".")
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in names else base for alias in node.names}
    return found & names


@pytest.fixture(scope="module")
def graph():
    files = modules()
    packages = {name: name if f.name == "__init__.py" else name.rpartition(".")[0] for name, f in files.items()}
    return {name: imports(f.read_text(), packages[name], set(files)) - {name} for name, f in files.items()}


def floor_of(room: str, floors: tuple[set[str], ...]) -> int:
    return next((number for number, rooms in enumerate(floors) if room in rooms), -1)


def test_packages_import_from_below_only(graph):
    for name, imported in graph.items():
        own = name.split(".")[0]
        for other in {target.split(".")[0] for target in imported} - {own}:
            assert floor_of(other, PACKAGES) > floor_of(own, PACKAGES), f"{name} imports {imported}"


def test_rooms_import_from_below_only(graph):
    prefix = "alignment_artifacts."
    for name, imported in graph.items():
        if not name.startswith(prefix):
            continue  # the package itself is the door to all rooms
        room = name.removeprefix(prefix).split(".")[0]
        assert any(room in rooms for rooms in ROOMS), f"{name} has no floor yet"
        for target in imported:
            other = target.removeprefix(prefix).split(".")[0]
            if target.startswith(prefix) and other != room:
                assert floor_of(other, ROOMS) > floor_of(room, ROOMS), f"{name} imports {target}"


def test_no_circles(graph):
    TopologicalSorter({name: sorted(imported - {"alignment_artifacts"}) for name, imported in graph.items()}).prepare()


def test_the_ground_floor_imports_nothing_of_ours(graph):
    for name, imported in graph.items():
        room = name.removeprefix("alignment_artifacts.").split(".")[0]
        if name.startswith("alignment_artifacts.") and room in ROOMS[-1]:
            allowed = "alignment_artifacts.figures" if room == "figures" else ()
            assert all(target.startswith(allowed) for target in imported), f"{name} imports {imported}"


def test_statistics_and_figures_need_no_mlx():
    program = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"alignment_artifacts.{name}")
    heavy = {"mlx", "mlx_lm", "transformers"} & set(sys.modules)
    assert not heavy, f"{name} imports {heavy}"
"""
    run = subprocess.run([sys.executable, "-c", program, *FREE_OF_MLX], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_walls_would_be_noticed():
    """The reader of imports sees every way to write one."""
    names = {"a", "a.b", "a.b.c", "a.d", "a.e"}
    for text, expected in {
        "import a.b": {"a.b"},
        "from a import b as x, y": {"a.b", "a"},
        "from . import d": {"a.d"},
        "def f():\n    from .d import x": {"a.d"},
        "from .b.c import x": {"a.b.c"},
        "from __future__ import annotations\nif TYPE_CHECKING:\n    import a.d": set(),
        "import numpy, mlx.core": set(),
    }.items():
        assert imports(text, "a", names) == expected, text
