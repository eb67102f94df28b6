"""Write report.html beside the results of the latest analysis: python -m alignment_artifacts.report"""

from __future__ import annotations

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import sys
from pathlib import Path

from gemma_refactored.errors import exit_code
from gemma_refactored.settings import Parser


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

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
