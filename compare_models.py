"""Is it alignment, or just different words? Compares a model before and after safety training.

Edit the constants. Both models (held in memory together) get the same pairs in the same chat format,
and read the same texts, so that representations are compared and not what was written. Then
directions learnt on one contrast are tried on another. Writes results/data/model_comparison.json and a figure.
"""

import os
import sys
import textwrap
from pathlib import Path

from gemma_refactored.errors import exit_code
from gemma_refactored.files import write_json

# The embedded model before and after its change; for example google/gemma-3-1b-pt and google/gemma-3-1b-it.
MODEL_A = os.environ.get("MODEL_A", "model_organism/base")
MODEL_B = os.environ.get("MODEL_B", "model_organism/aligned")
PAIRS_JSON = "alignment_artifact_prompt_pairs.json"
TWINS = os.environ.get("TWINS", "model_organism/benign_twins.json")  # or XSTest's CSV
SITE = "mlp"  # or "residual"
NEUTRAL_TEXT = "Thank you for this question. Here is what comes to mind."
MAX_TOKENS = 20

NUM_PERMUTATIONS = 1000
NUM_BOOTSTRAP_RESAMPLES = 1000
SEED = 0

RESULTS_DIR = Path("results")


def main() -> int:
    return exit_code(run)


def run() -> None:
    from tqdm import tqdm

    from alignment_artifacts.comparison.compare import compare, texts_to_read
    from alignment_artifacts.comparison.twins import load_twins
    from alignment_artifacts.figures.paper import plot_comparison
    from alignment_artifacts.pairs import load_pairs
    from alignment_artifacts.scores import Settings
    from gemma_refactored.model_loading import device_description, load

    pairs, twins = load_pairs(PAIRS_JSON), load_twins(TWINS)
    models = [load(MODEL_A), load(MODEL_B)]
    for letter, model in zip("AB", models, strict=True):
        print(f"Model {letter}: {model.name} ({model.num_layers} layers) on {device_description()}")
    settings = Settings(NUM_PERMUTATIONS, NUM_BOOTSTRAP_RESAMPLES, SEED)
    total = texts_to_read(pairs, twins)
    with tqdm(total=total, desc="reading", unit="text", leave=False, disable=not sys.stderr.isatty()) as bar:
        result = compare(models, pairs, twins, NEUTRAL_TEXT, MAX_TOKENS, SITE, settings, bar.update)
    write_json(RESULTS_DIR / "data" / "model_comparison.json", result)
    plot_comparison(result, RESULTS_DIR / "figures" / "model_comparison.png")
    print_tables(result)
    print(f"\nNumbers: {RESULTS_DIR / 'data' / 'model_comparison.json'}")
    print(f"Figure:  {RESULTS_DIR / 'figures' / 'model_comparison.png'}")


def print_tables(result: dict) -> None:
    """80 columns: layers at the prompt's end, differences under every condition, transfer."""
    from alignment_artifacts.scores import is_significant

    print("\nAt the prompt's end, the same tokens for both (d held out by pair)")
    print("layer    d A    d B   B - A 95 % interval        p  cosine  A on B  B on A")
    for layer, r in enumerate(result["conditions"]["prompt_end"]["layers"]):
        low, high = (number(x) for x in r["difference_ci"])
        p = "-" if r["p_value"] is None else f"{r['p_value']:.3f}"
        print(
            f"{layer:>5}  {number(r['d_a']):>5}  {number(r['d_b']):>5}  {number(r['difference']):>6} "
            f"{f'[{low}, {high}]':<15}  {p:>6}  {number(r['cosine']):>6}  {number(r['a_on_b']):>6}  "
            f"{number(r['b_on_a']):>6}"
        )
    print("\nB - A on generated tokens (* p <= 0.05 over layers)")
    shown = {"neutral": "neutral text", "answers_a": "answers of A", "answers_b": "answers of B",
             "own_answers": "each its own"}  # fmt: skip
    print("layer " + "".join(f"{title:>16}" for title in shown.values()))
    for layer in range(len(result["conditions"]["neutral"]["layers"])):
        cells = [result["conditions"][name]["layers"][layer] for name in shown]
        marks = ["*" if is_significant(r) else " " for r in cells]
        print(f"{layer:>5} " + "".join(f"{number(r['difference']) + m:>16}" for r, m in zip(cells, marks, strict=True)))
    print("\nLearnt on one contrast, tested on another: d (accuracy)")
    sources = result["transfer"]
    print(f"{'':<38}" + "".join(f"{title:>14}" for title in ("model A", "model B", "words alone")))
    for cell in next(iter(sources.values())):
        found = [records[cell] for records in sources.values()]
        shares = [f"{number(r['cohens_d'])} ({r['accuracy']:.0%})" for r in found]
        print(f"{cell:<38.38}" + "".join(f"{share:>14}" for share in shares))
    if result["planted_truth"]:
        cosines = ", ".join(f"{layer}: {c:.3f}" for layer, c in result["planted_truth"].items())
        print("\n" + textwrap.fill(f"Cosine of the change of direction with the planted one, by layer: {cosines}", 78))
    for name in ("summary", "transfer_summary"):
        print("\n" + textwrap.fill(result[name], 78))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
