"""How the analysis grows with the number of prompts:  python -m benchmarks.analysis_scaling

Simulated collections of a Gemma 3 1B's shape (26 layers, hidden 1,152, 20 steps) with a known d; every statistic
with 1,000 sign flips and resamples. Each size runs in a process of its own, which may not allocate more
than 2 GB. The largest takes 25 GB of disk, and as much again for temporary files. Writes
benchmarks/analysis_scaling.json and .png.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from alignment_artifacts.pairs import SIDES, SUBCATEGORY, Pair
from gemma_refactored.versions import library_versions

HERE = Path(__file__).resolve().parent
RESULTS, PLOT = HERE / "analysis_scaling.json", HERE / "analysis_scaling.png"
PROMPTS = (100, 300, 1000, 3000, 10_000)
STEPS, LAYERS, HIDDEN = 20, 26, 1152
LIMIT = 2_000_000_000  # bytes
CATEGORIES = 5


def pairs_of(prompts: int) -> list[Pair]:
    return [Pair(f"p_{i}", f"category_{i % CATEGORIES}", f"natural {i}", f"artifact {i}") for i in range(prompts // 2)]


def simulate(folder: Path, prompts: int) -> None:
    """A collection whose d grows from 0 at the first layer to 2 at the last."""
    from gemma_refactored.files import MANIFEST, PROMPT_EMBEDDING, PROMPT_MARKER, step_file, write_json
    from gemma_refactored.npz_files import NpzWriter

    rng = np.random.default_rng(0)
    names = [f"model.layers.{layer}.mlp.output" for layer in range(LAYERS)]
    d = np.linspace(0, 2, LAYERS)
    write_json(folder / MANIFEST, {"model": "simulated", "max_tokens": STEPS, "sites": names})
    steps = [step_file("prefill"), *(step_file(str(step)) for step in range(STEPS))]
    with NpzWriter() as writer:
        for pair in pairs_of(prompts):
            for side in range(2):
                place = folder / pair.group(SIDES[side]) / SUBCATEGORY / "batch_1"
                prompt = rng.standard_normal((LAYERS, 1, HIDDEN), np.float32)
                values = prompt + 0.5 * rng.standard_normal((LAYERS, STEPS + 1, HIDDEN), np.float32)
                values[:, :, 0] += side * d[:, None]
                arrays = {name: values[layer][:, None, :] for layer, name in enumerate(names)}
                writer.put(arrays, {place / step: slice(i, i + 1) for i, step in enumerate(steps)})
                embedding = rng.standard_normal((1, 1, HIDDEN), np.float32)
                writer.put({"prompt_embedding": embedding}, {place / PROMPT_EMBEDDING: slice(None)})
                marker = {"token_ids": [0] * STEPS}
                writer.run_after(lambda path=place / PROMPT_MARKER, marker=marker: write_json(path, marker))


def analyse_within_limit(folder: Path, prompts: int) -> dict:
    """Seconds for reading and for the statistics, and the peak memory (without file pages)."""
    from alignment_artifacts.activation_set import load_activation_set
    from alignment_artifacts.analysis import Run
    from alignment_artifacts.scores import Settings

    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    data = load_activation_set(folder, pairs_of(prompts))
    read = time.perf_counter()
    run = Run(data, Settings(permutations=1000, resamples=1000))
    result, *_ = run.results, run.by_category, run.pattern, run.projections
    end = time.perf_counter()
    stop.set()
    thread.join()
    d = [result["layer_scores"][str(layer)]["cohens_d"] for layer in (0, LAYERS - 1)]
    return {
        "prompts": prompts,
        "read_seconds": read - start,
        "statistics_seconds": end - read,
        "peak_bytes": peak[0],
        "cohens_d_first_and_last_layer": d,
    }


def plot(results: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    prompts = np.array([r["prompts"] for r in results])
    seconds = np.array([r["read_seconds"] + r["statistics_seconds"] for r in results])
    memory = np.array([r["peak_bytes"] for r in results]) / 1e9
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    left.loglog(prompts, seconds, "o-", color="#0072B2", label="measured")
    left.loglog(prompts, seconds[0] * prompts / prompts[0], ":", color="black", label="in proportion")
    left.set(xlabel="prompts", ylabel="seconds, reading included", title="Time")
    left.legend(frameon=False)
    right.semilogx(prompts, memory, "o-", color="#0072B2")
    right.axhline(LIMIT / 1e9, linestyle=":", color="black")
    right.text(prompts[0], LIMIT / 1e9, "limit", va="bottom")
    right.set(xlabel="prompts", ylabel="peak memory, GB", title="Memory", ylim=(0, 2.3))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PLOT, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, nargs="+", default=PROMPTS)
    parser.add_argument("--analyse", type=Path, help="(internal) analyse this folder in this process")
    arguments = parser.parse_args()
    if arguments.analyse:
        print(json.dumps(analyse_within_limit(arguments.analyse, arguments.prompts[0])))
        return
    results = []
    for prompts in arguments.prompts:
        folder = Path(tempfile.mkdtemp())
        try:
            simulate(folder, prompts)
            command = [sys.executable, "-m", "benchmarks.analysis_scaling", "--analyse", folder, "--prompts", prompts]
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=HERE.parent)
            if done.returncode != 0:
                raise SystemExit(done.stderr)
            results.append({**json.loads(done.stdout), "versions": library_versions()})
        finally:
            shutil.rmtree(folder)
        print(json.dumps(results[-1]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    plot(results)


if __name__ == "__main__":
    main()
