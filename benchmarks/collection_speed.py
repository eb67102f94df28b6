"""How long the collection takes, compared with other libraries:  make bench  (about 20 minutes on two cores)

Every contender does the same job (see job.py) in a process of its own, in turn, several rounds; the table
has medians. Their saved activations must agree with ours. Writes benchmarks/results.json, results.md
and collection_speed.png.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from gemma_refactored.files import step_file, write_json
from gemma_refactored.npz_files import compressed_npz, npz
from gemma_refactored.prompt_processing import load_prompts

from .job import MAX_TOKENS, ROOT, make_job, multiply_adds, prompts_file, sites

HERE = Path(__file__).resolve().parent
RESULTS, TABLE, PLOT = HERE / "results.json", HERE / "results.md", HERE / "collection_speed.png"
PACKAGES = ("mlx", "mlx-lm", "numpy", "torch", "transformers", "nnsight", "transformer-lens")
OUR_PYTHON = ROOT / ".venv" / "bin" / "python"
PREDECESSOR = {"seconds": 358, "peak_gb": 6.5, "stored_mb": 190}  # measured once, on another machine of this kind


@dataclass(frozen=True)
class Contender:
    label: str
    name: str  # in contenders.py
    batch: int = 100
    dtype: str = "float32"
    text_only: bool = False
    rounds: int | None = None  # fewer, for those that take minutes

    @property
    def arguments(self) -> list[str]:
        text_only = ["--text-only"] if self.text_only else []
        return ["--batch", str(self.batch), "--dtype", self.dtype, *text_only]


CONTENDERS = [
    Contender("ours", "ours"),
    Contender("ours, text only", "ours", text_only=True),
    *(Contender(f"transformers + hooks, batch {b}", "transformers_hooks", b) for b in (25, 50, 100)),
    Contender("transformers + hooks, batch 1", "transformers_hooks", 1, rounds=1),
    Contender("transformers + hooks, bfloat16", "transformers_hooks", 100, "bfloat16"),
    Contender("nnsight, batch 50", "nnsight", 50),
    Contender("transformer-lens, batch 50", "transformer_lens", 50),
    Contender("mlx-lm, text only", "mlx_lm", rounds=1, text_only=True),
    Contender("mlx-lm + OpenBLAS, text only", "mlx_lm_openblas", text_only=True),
]
OURS, OURS_TEXT, PEERS = CONTENDERS[0], CONTENDERS[1], CONTENDERS[2:]
FLOOR = Contender("one multiply-add", "float32_product")


def run(contender: Contender, job: Path, out: Path) -> dict:
    """One run: its own seconds and tokens, the process's seconds and its peak memory."""
    # Each library chooses its own kernels and number of threads.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS_", "MKL_", "OMP_"))}
    # Ours too runs in the environment that its users have: without PyTorch, whose import takes transformers 2 s.
    python = OUR_PYTHON if contender.name == "ours" else sys.executable
    command = [python, "-m", "benchmarks.contenders", contender.name, job, out, *contender.arguments]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=environment, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            raise SystemExit(f"{contender.label} failed:\n{errors.read().decode()[-3000:]}")
        output.seek(0)
        result = json.loads(output.read().decode().splitlines()[-1])
    return {**result, "process_seconds": time.perf_counter() - start, "peak_gb": usage.ru_maxrss / 1e6}


def saved_steps(job: Path, out: Path) -> Iterator[tuple[int, int, dict[str, np.ndarray]]]:
    """(row, step, arrays) of every file that our run saved."""
    for row, prompt in enumerate(load_prompts(prompts_file(job))):
        for step in range(-1, MAX_TOKENS):
            name = step_file("prefill" if step < 0 else str(step))
            with np.load(out / "activations" / prompt.folder / name) as file:
                yield row, step, dict(file)


def disagreement(job: Path, ours: Path, theirs: Path) -> float:
    """Largest difference of a saved activation from ours, relative to the largest value of its file."""
    worst = 0.0
    for row, step, arrays in saved_steps(job, ours):
        with np.load(theirs / str(row) / f"{step}.npz") as file:
            difference = max(np.abs(file[site] - arrays[site]).max() for site in sites(job))
        worst = max(worst, float(difference / max(np.abs(array).max() for array in arrays.values())))
    return worst


def stored_megabytes(job: Path, out: Path) -> dict[str, float]:
    """What the job takes on disk, by number format."""
    sizes = dict.fromkeys(("float32", "float16", "float32, compressed", "float16, compressed"), 0)
    for _, _, arrays in saved_steps(job, out):
        half = {site: array.astype(np.float16) for site, array in arrays.items()}
        for name, content in (("float32", arrays), ("float16", half)):
            sizes[name] += len(npz(content))
            sizes[f"{name}, compressed"] += len(compressed_npz(content))
    return {name: size / 1e6 for name, size in sizes.items()}


def measure(rounds: int, job: Path, work: Path) -> dict:
    """Everything in the table."""
    make_job(job)
    runs: dict[str, list[dict]] = {}
    speeds, agreement, stored = [], {}, {}
    ours_out = work / "first_ours"
    for number in range(rounds):
        speeds.append(run(FLOOR, job, work / "none")["seconds"])
        for contender in CONTENDERS:
            if number >= (contender.rounds or rounds):
                continue
            first_ours = contender is OURS and number == 0
            out = ours_out if first_ours else work / "out"
            result = run(contender, job, out)
            print(f"{number + 1}/{rounds} {contender.label}: {result['seconds']:.2f} s", flush=True)
            tokens = result.pop("tokens")
            runs.setdefault(contender.label, []).append(result)
            if first_ours:
                our_tokens, stored = tokens, stored_megabytes(job, out)
            elif number == 0 and tokens:
                same = float(np.mean([ours == theirs for ours, theirs in zip(our_tokens, tokens, strict=True)]))
                difference = disagreement(job, ours_out, out) if contender in PEERS and same == 1 else None
                agreement[contender.label] = {"same_answers": same, "largest_difference": difference}
            if out != ours_out:
                shutil.rmtree(out, ignore_errors=True)
    medians = {
        label: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for label, results in runs.items()
    }
    return {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "rounds": rounds,
        "multiply_adds": multiply_adds(job),
        "multiply_adds_per_second": 1 / statistics.median(speeds),
        "medians": medians,
        "runs": runs,
        "agreement": agreement,
        "stored_megabytes": stored,
        "predecessor": PREDECESSOR,
    }


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {platform.system()}"


def headline(results: dict) -> dict[str, float]:
    """The ratios that matter."""
    seconds = {label: entry["seconds"] for label, entry in results["medians"].items()}
    best_peer = min(seconds[c.label] for c in PEERS if c.name == "transformers_hooks" and c.dtype == "float32")
    floor = results["multiply_adds"] / results["multiply_adds_per_second"]
    return {
        "times as long as the best float32 transformers + hooks": seconds[OURS.label] / best_peer,
        "times as long as the floor (its multiply-adds, at OpenBLAS's speed)": seconds[OURS.label] / floor,
        "times as long as generating text only": seconds[OURS.label] / seconds[OURS_TEXT.label],
    }


def write_table(results: dict) -> None:
    """benchmarks/results.md."""
    old, speed = results["predecessor"], results["multiply_adds_per_second"]
    floor = results["multiply_adds"] / speed
    ours = results["medians"][OURS.label]["seconds"]
    rows = [(label, entry["seconds"], f"{entry['peak_gb']:.1f} GB") for label, entry in results["medians"].items()]
    rows.append(("the predecessor (another machine of this kind)", old["seconds"], f"{old['peak_gb']} GB"))
    rows.append((f"floor: {results['multiply_adds'] / 1e9:.0f} G multiply-adds at {speed / 1e9:.0f} G/s", floor, ""))
    table = [
        f"| {label} | {seconds:.1f} | {ours / seconds:.2f} x | {peak} |"
        for label, seconds, peak in sorted(rows, key=lambda row: row[1])
    ]
    agreement = [
        f"| {label} | {entry['same_answers']:.0%} | "
        + (f"{entry['largest_difference']:.1e} |" if entry["largest_difference"] is not None else "|")
        for label, entry in results["agreement"].items()
    ]
    sizes = ", ".join(f"{name} {size:.0f} MB" for name, size in results["stored_megabytes"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    ratios = ", ".join(f"{value:.2f} {what}" for what, value in headline(results).items())
    TABLE.write_text(f"""\
# Collection, compared with other libraries

Made by `make bench`; do not edit. 100 chat prompts x 20 greedy tokens, every layer's MLP output of every step saved
as .npz per prompt and step, on a random Gemma 3 of the 270m shape (121 M parameters, vocabulary 32,768).
{results["machine"]}; float32 unless stated otherwise. Seconds from the loaded model to the last saved file, peak
memory of the process including the weights (0.48 GB); medians of {results["rounds"]} rounds, taken
in turn (one round for the slow ones).

| library | seconds | ours takes | peak memory |
| --- | ---: | ---: | ---: |
{chr(10).join(table)}

Ours takes {ratios}. The predecessor took {old["seconds"] / ours:.0f} times as long as ours.

![the same as a plot](collection_speed.png)

How closely the answers and saved activations of the others agree with ours (largest difference of an activation,
relative to the largest value of its file):

| library | same answers | largest difference |
| --- | ---: | ---: |
{chr(10).join(agreement)}

On disk: {sizes}; the predecessor wrote {old["stored_mb"]} MB.

{versions}.
""")


def plot(results: dict) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = sorted(results["medians"].items(), key=lambda item: -item[1]["seconds"])
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    colours = ["#0072B2" if label.startswith("ours") else "#999999" for label, _ in entries]
    bars = axes.barh([label for label, _ in entries], [entry["seconds"] for _, entry in entries], color=colours)
    axes.bar_label(bars, fmt="%.1f s", padding=3, fontsize=9)
    floor = results["multiply_adds"] / results["multiply_adds_per_second"]
    axes.axvline(floor, color="black", linewidth=1, linestyle=":")
    axes.text(floor, 1, "floor", fontsize=9, ha="center", va="bottom", transform=axes.get_xaxis_transform())
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
    axes.minorticks_off()
    axes.set_xlim(1, max(entry["seconds"] for _, entry in entries) * 2)
    axes.set_xlabel("seconds for 100 prompts x 20 tokens, activations saved (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--redraw", action="store_true", help="table and plot from the last results.json")
    arguments = parser.parse_args()
    if not arguments.redraw:
        with tempfile.TemporaryDirectory() as work:
            write_json(RESULTS, measure(arguments.rounds, Path(work) / "job", Path(work)))
    results = json.loads(RESULTS.read_text())
    write_table(results)
    plot(results)
    print(f"Ours takes {', '.join(f'{value:.2f} {what}' for what, value in headline(results).items())}.")


if __name__ == "__main__":
    main()
