"""How long the collection takes on architectures of mlx-lm, beside transformers with hooks: part of `make bench`.

The same job as in collection_speed.py on SmolLM2 and on random models of other layouts, whole processes in turn. Writes
benchmarks/architectures.json and architectures.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np

from gemma_refactored.files import write_json

from .collection_speed import HERE, Contender, disagreement, machine, run
from .job import MODELS, make_job

RESULTS, TABLE = HERE / "architectures.json", HERE / "architectures.md"
OURS = Contender("ours", "ours")
PEERS = [Contender(f"transformers + hooks, batch {b}", "transformers_hooks", b) for b in (25, 50, 100)]
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers")


def measure(shape: dict, rounds: int, work: Path) -> dict:
    """Seconds of whole processes by contender (medians), and how closely the others agree with ours."""
    job = work / "job"
    make_job(job, shape)
    seconds: dict[str, list[float]] = {}
    agreement = {}
    for number in range(rounds):
        for contender in (OURS, *PEERS):
            is_first, out = number == 0, work / ("ours" if contender is OURS else "out")
            shutil.rmtree(out, ignore_errors=True)
            result = run(contender, job, out)
            seconds.setdefault(contender.label, []).append(result["process_seconds"])
            if is_first and contender is OURS:
                tokens = result["tokens"]
            elif is_first:
                same = float(np.mean([a == b for a, b in zip(tokens, result["tokens"], strict=True)]))
                difference = disagreement(job, work / "ours", out) if same == 1 else None
                agreement[contender.label] = {"same_answers": same, "largest_difference": difference}
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    return {"seconds": medians, "runs": seconds, "agreement": agreement}


def share_of_best(result: dict) -> float:
    """Our seconds over those of transformers at its best batch size."""
    seconds = result["seconds"]
    return seconds[OURS.label] / min(seconds[peer.label] for peer in PEERS)


def write_table(results: dict) -> None:
    labels = [OURS.label, *(peer.label for peer in PEERS)]
    rows = []
    for name, result in results["models"].items():
        cells = " | ".join(f"{result['seconds'][label]:.1f}" for label in labels)
        differences = [entry["largest_difference"] for entry in result["agreement"].values()]
        same = min(entry["same_answers"] for entry in result["agreement"].values())
        worst = max((d for d in differences if d is not None), default=None)
        told = f"{same:.0%}" + (f", {worst:.0e}" if worst is not None else "")
        rows.append(f"| {name} | {cells} | {share_of_best(result):.2f} x | {told} |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    heads = " | ".join(labels)
    TABLE.write_text(f"""\
# Collection on architectures of mlx-lm

Made by `make bench`; do not edit. 100 chat prompts x 20 greedy tokens, every layer's MLP output of every step saved,
float32. SmolLM2 is the published model, the others are random. {results["machine"]}.
Seconds of whole processes, from the start of Python to its end, each in the environment that its installation makes
(ours has no PyTorch). Medians, rounds taken in turn: {results["rounds"]}. Last columns: what ours takes of the best of
transformers, how many answers agree, and the largest difference of a saved activation relative to the largest value of
its file.

| model | {heads} | ours takes | same answers, difference |
| --- | {"---: | " * (len(labels) + 1)}--- |
{chr(10).join(rows)}

{versions}.
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    models = {}
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory() as work:
            models[name] = measure(shape, arguments.rounds, Path(work))
        print(f"{name}: {share_of_best(models[name]):.2f} of transformers + hooks", flush=True)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    write_json(RESULTS, {"machine": machine(), "versions": versions, "rounds": arguments.rounds, "models": models})
    write_table(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
