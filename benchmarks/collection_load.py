"""10,000 prompts in one collection on the embedded model: does memory stay flat?

    python -m benchmarks.collection_load

About five minutes and 2 GB of disk. Writes benchmarks/collection_load.json: prompts complete and memory, every
few seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alignment_artifacts.pairs import SIDES, load_pairs
from gemma_refactored.files import PROMPT_MARKER, write_json
from gemma_refactored.versions import library_versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "collection_load.json"
EVERY = 5  # seconds


def make_prompts(count: int) -> dict:
    """The experiment's prompts over and over, with another ending each time, 100 to a group."""
    pairs = load_pairs(ROOT / "alignment_artifact_prompt_pairs.json")
    texts = [getattr(pair, side) for pair in pairs for side in SIDES]
    numbered = [f"{texts[i % len(texts)]} This is question {i // len(texts)}." for i in range(count)]
    return {f"group_{i // 100}": {"prompt_list": numbered[i : i + 100]} for i in range(0, count, 100)}


def memory_of(process: int) -> float | None:
    """Megabytes of resident memory; None once it has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000 if "VmRSS:" in status else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    count = parser.parse_args().prompts
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "prompts.json", make_prompts(count))
        command = [
            sys.executable,
            ROOT / "run_model.py",
            "--prompts-file",
            folder / "prompts.json",
            "--save-activations",
        ]
        command += ["--process-by-group", "--activations-dir", folder / "acts", "--output-dir", folder / "out"]
        command += ["--max-tokens", "20", "--batch-size", "100"]
        start, samples = time.perf_counter(), []
        process = subprocess.Popen(list(map(str, command)))
        while process.poll() is None:
            time.sleep(EVERY)
            megabytes = memory_of(process.pid)
            if megabytes:
                complete = sum(1 for _ in (folder / "acts").glob(f"*/*/*/{PROMPT_MARKER}"))
                samples.append({"seconds": time.perf_counter() - start, "complete": complete, "megabytes": megabytes})
        if process.returncode != 0:
            raise SystemExit(f"The collection failed with exit code {process.returncode}.")
    seconds = time.perf_counter() - start
    result = {"versions": library_versions(), "prompts": count, "seconds": seconds, "samples": samples}
    write_json(RESULTS, result)
    half = [s["megabytes"] for s in samples if s["complete"] >= count / 2] or [samples[-1]["megabytes"]]
    print(json.dumps({"seconds": round(seconds), "first": samples[0], "from half on": [min(half), max(half)]}))


if __name__ == "__main__":
    main()
