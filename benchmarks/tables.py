"""Tables of the simulations: printed while they grow, then kept as JSON and Markdown beside the script."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent


def parse(parser: argparse.ArgumentParser, runs: int = 2000) -> argparse.Namespace:
    """The options that every simulation has."""
    parser.add_argument("--runs", type=int, default=runs, help="simulated collections a cell")
    parser.add_argument("--no-files", action="store_true", help="print the table only")
    return parser.parse_args()


def write_table(name: str, description: str, rows: Iterable[dict], arguments: argparse.Namespace) -> None:
    """Print the rows as they come; keep them as NAME.json and NAME.md with the number of runs."""
    kept, lines = [], []
    for row in rows:
        if not kept:
            lines += [f"| {' | '.join(row)} |", "|" + " --- |" * len(row)]
            print(*lines, sep="\n", flush=True)
        kept.append(row)
        lines.append(f"| {' | '.join(str(value) for value in row.values())} |")
        print(lines[-1], flush=True)
    if arguments.no_files:
        return
    content = {"runs": arguments.runs, "rows": kept}
    (HERE / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    text = f"{description.strip()}\n\n{arguments.runs} runs a cell.\n\n" + "\n".join(lines) + "\n"
    (HERE / f"{name}.md").write_text(text)
