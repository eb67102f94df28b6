"""Write results/report.html from the results there are: python -m alignment_artifacts.report"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gemma_refactored.errors import exit_code


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="alignment_artifacts.report", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the commands were run (default: here)")
    parser.add_argument("--output", type=Path, help="default: results/report.html in that folder")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.folder / "results" / "report.html"

    def run() -> None:
        from . import write_report

        write_report(arguments.folder, output)
        print(f"Report: {output.resolve().as_uri()} ({output.stat().st_size / 1e6:.1f} MB)")

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
