"""Write report.html beside the results of the latest analysis: python -m alignment_artifacts.report"""

from __future__ import annotations

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import sys
from pathlib import Path

from gemma_refactored.errors import exit_code
from gemma_refactored.files import read_json
from gemma_refactored.settings import Parser, from_environment


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="alignment_artifacts.report", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--folder", type=Path, help="results/MODEL/PAIRS (default: those of the latest analysis)")
    parser.add_argument("--output", type=Path, help="default: report.html in that folder")

    def run() -> None:
        arguments = parser.parse_args(argv)
        from alignment_artifacts import places

        from . import write_report

        folder = places.folder_to_report(arguments.folder or places.HOME)
        output = arguments.output or folder / places.REPORT
        write_report(folder, output)
        print(f"Report: {output.resolve().as_uri()} ({output.stat().st_size / 1e6:.1f} MB)")
        if arguments.folder is None and is_about_something_else(folder):
            print("It is about the latest analysis, not about what the environment names; --folder chooses.")

    return exit_code(run)


def is_about_something_else(folder: Path) -> bool:
    """Than the model, pairs or site in the environment, where these are set and there is an analysis."""
    from alignment_artifacts import places
    from alignment_artifacts.environment import Named
    from alignment_artifacts.pairs import load_pairs, pairs_hash

    path, named = folder / "data" / places.ANALYSIS, from_environment(Named())
    if not path.exists():
        return False
    analysis = read_json(path, "results file")
    origin = analysis["origin"]
    return (
        not places.wanted(named.model_name, named.adapter, named.chat)(analysis["collection"])
        or (named.pairs is not None and pairs_hash(load_pairs(places.find(named.pairs))) != origin["pairs_hash"])
        or (named.site is not None and named.site != origin.get("site"))
    )


if __name__ == "__main__":
    sys.exit(main())
