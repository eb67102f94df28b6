"""Analyse a collection: how well a direction separates artifact from natural prompts, layer by layer.

Writes the results as JSON and figures, and prints a table. Edit the constants; None means:
take it from the collection's manifest.
"""

import os
import sys
import textwrap
from pathlib import Path

from alignment_artifacts.activation_set import certificate_verdict, load_activation_set
from alignment_artifacts.analysis import Run, Settings
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.figures.data import POSITION_NAMES
from alignment_artifacts.pairs import load_pairs
from alignment_artifacts.scores import layers_by_d
from alignment_artifacts.separation import MIN_PAIRS
from alignment_artifacts.summary import records_of
from gemma_refactored.errors import UserError, exit_code, shown
from gemma_refactored.files import write_json

RAW_ACTIVATIONS_BASE_DIR = os.environ.get("ACTIVATIONS_DIR", "collected_activations_output")
ORIGINAL_PAIRS_JSON_FOR_ITERATION = "alignment_artifact_prompt_pairs.json"
GEMMA_INPUT_SUBCATEGORY_KEY_IN_PATH = "prompt_list"
NUM_LAYERS = None
KEY_PATTERN_TEMPLATE = None  # for example "model.layers.{layer_idx}.mlp.output"
NUM_TOKEN_STEPS_TO_COLLECT = None
EXPECTED_HIDDEN_DIM = None

NUM_PERMUTATIONS = 1000
NUM_BOOTSTRAP_RESAMPLES = 1000
SEED = 0
MAX_EXCLUDED = 0.05  # stop if more than this share of the pairs cannot be used

RESULTS_JSON = Path("alignment_artifact_analysis_results.json")
PLOT_PNG = Path("alignment_artifact_analysis_plot.png")
RESULTS_DIR = Path("results")


def main() -> int:
    return exit_code(run)


def check_constants() -> None:
    """Raise UserError for a constant that cannot be used, by its name."""
    counts = {"NUM_PERMUTATIONS": 1, "NUM_BOOTSTRAP_RESAMPLES": 1, "SEED": 0}
    optional = {"NUM_LAYERS": 1, "NUM_TOKEN_STEPS_TO_COLLECT": 0, "EXPECTED_HIDDEN_DIM": 1}
    for name, least in {**counts, **optional}.items():
        value = globals()[name]
        if value is None and name in optional:
            continue
        if type(value) is not int or value < least:
            none = " or None" if name in optional else ""
            raise UserError(f"{name} must be a whole number of at least {least}{none}, not {shown(value)}.")
    if type(MAX_EXCLUDED) not in (int, float) or not 0 <= MAX_EXCLUDED <= 1:
        raise UserError(f"MAX_EXCLUDED must be a share between 0 and 1, not {shown(MAX_EXCLUDED)}.")
    pattern = KEY_PATTERN_TEMPLATE
    if pattern is not None and not (isinstance(pattern, str) and pattern.count("{layer_idx}") == 1):
        raise UserError(f"KEY_PATTERN_TEMPLATE must have {{layer_idx}} in it, once, or be None; not {shown(pattern)}.")
    for name in (
        "RAW_ACTIVATIONS_BASE_DIR",
        "ORIGINAL_PAIRS_JSON_FOR_ITERATION",
        "GEMMA_INPUT_SUBCATEGORY_KEY_IN_PATH",
    ):
        value = globals()[name]
        if not isinstance(value, (str, Path)) or not str(value).strip():
            raise UserError(f"{name} must be text, not {shown(value)}.")


def run() -> None:
    from tqdm import tqdm

    check_constants()
    pairs = load_pairs(ORIGINAL_PAIRS_JSON_FOR_ITERATION)
    data = load_activation_set(
        RAW_ACTIVATIONS_BASE_DIR,
        pairs,
        GEMMA_INPUT_SUBCATEGORY_KEY_IN_PATH,
        KEY_PATTERN_TEMPLATE,
        NUM_LAYERS,
        NUM_TOKEN_STEPS_TO_COLLECT,
        EXPECTED_HIDDEN_DIM,
        progress=lambda items: tqdm(items, desc="reading", unit="pair", leave=False, disable=not sys.stderr.isatty()),
    )
    report_excluded(data, len(pairs))
    settings = Settings(NUM_PERMUTATIONS, NUM_BOOTSTRAP_RESAMPLES, SEED)
    config = {
        "RAW_ACTIVATIONS_BASE_DIR": RAW_ACTIVATIONS_BASE_DIR,
        "ORIGINAL_PAIRS_JSON_FOR_ITERATION": ORIGINAL_PAIRS_JSON_FOR_ITERATION,
        "NUM_LAYERS": data.num_layers,
        "NUM_TOKEN_STEPS_TO_COLLECT": data.values.shape[2] - 1,
        "EXPECTED_HIDDEN_DIM": data.values.shape[4],
    }
    print(
        f"Model: {data.manifest.get('model', 'unknown')} "
        f"({data.num_layers} layers, hidden {data.values.shape[4]}), {len(data.pairs)} pairs"
    )
    verdict = certificate_verdict(RAW_ACTIVATIONS_BASE_DIR, data.manifest)
    print(textwrap.fill(f"Certificate of the model's numbers: {verdict}", 78))
    analysed = Run(data, settings, config)
    result = {**analysed.results, "certificate": verdict}
    write_json(RESULTS_JSON, result)
    write_json(RESULTS_DIR / "data" / "alignment_artifacts_by_category.json", analysed.by_category)
    write_json(RESULTS_DIR / "data" / "layer_analysis.json", analysed.pattern)
    write_json(RESULTS_DIR / "data" / "projections.json", analysed.projections)

    from alignment_artifacts.figures import paper

    paper.plot_layer_scores(result, PLOT_PNG)
    paper.plot_categories(analysed.by_category, RESULTS_DIR / "figures" / "alignment_artifacts_by_category.png")
    paper.plot_layer_pattern(analysed.pattern, RESULTS_DIR / "figures" / "layer_analysis.png")
    paper.plot_projections(analysed.projections, RESULTS_DIR / "figures" / "projections.png")
    print_table(result)
    print(f"\nNumbers: {RESULTS_JSON}\nPlot:    {PLOT_PNG}\nBy category, layer and step: {RESULTS_DIR}/")
    print("All of it on one page: python -m alignment_artifacts.report")


def report_excluded(data, total: int) -> None:
    """Say what could not be used; stop if it is too much, or too little is left."""
    for item in data.excluded:
        print(f"Excluded {item['category']} {item['pair']}: {item['reason']}", file=sys.stderr)
    if len(data.excluded) > MAX_EXCLUDED * total:
        raise UserError(
            f"{len(data.excluded)} of {total} pairs cannot be used. Run `bash collect_activations.sh` again to "
            "complete them, or raise MAX_EXCLUDED to go on without."
        )
    if len(data.pairs) < MIN_PAIRS:
        raise UserError(f"Held-out statistics need at least {MIN_PAIRS} pairs; there are {len(data.pairs)}.")
    groups = int(independent_groups(data.pairs).max()) + 1
    if groups < MIN_PAIRS:
        raise UserError(
            f"The {len(data.pairs)} pairs share prompts or a declared group and make {groups} independent group"
            f"{'s' if groups > 1 else ''}; held-out statistics need at least {MIN_PAIRS}."
        )


def print_table(result: dict) -> None:
    """The headline and the top layers at both kinds of positions, 80 columns wide; prompt end first."""
    for positions in result["controls"]:
        scores, nested = records_of(result, positions)
        print(f"\n{POSITION_NAMES[positions].capitalize()} (held out by pair)")
        print("layer     Cohen d    95 % interval  accuracy  pairs  AUROC      p")
        if nested:
            _print_row("nested", {**nested, "p_value": None})
        for layer in layers_by_d(list(scores.values()))[: result["config"]["top_layers"]]:
            _print_row(str(layer), scores[str(layer)])
        _print_row("LDA", {**result["controls"][positions]["lda"], "p_value": None})
    print("\nWithout any model")
    for kind, record in result["word_baselines"].items():
        _print_row(kind.replace("mean difference", "words"), record)
    if result["length_baseline"]:
        _print_row("length", result["length_baseline"])
    print("nested: layer chosen inside the folds; pairs: artifact above its own partner")
    independence, found = result["independence"], result["power"]
    text = f"{independence['num_pairs']} pairs, {independence['num_groups']} independent groups; "
    text += f"the smallest p they allow is {independence['p_floor']:.2g}."
    if found["smallest_d"] is not None:
        needs = ", ".join(f"d = {d}: {n}" for d, n in found["groups_needed"].items())
        text += f" With 80 % power they find a d of {found['smallest_d']:.2f}; groups needed for {needs}."
    print(textwrap.fill(text, 78))
    print("\n" + textwrap.fill(result["summary"], 78))


def _print_row(name: str, record: dict) -> None:
    low, high = record["cohens_d_ci"]
    interval = f"[{_number(low)}, {_number(high)}]"
    p = "-" if record["p_value"] is None else f"{record['p_value']:.3f}"
    print(
        f"{name:>8}  {_number(record['cohens_d']):>7}  {interval:>15}  {record['accuracy']:8.1%}  "
        f"{record['pair_accuracy']:5.0%}  {record['auroc']:5.2f}  {p:>6}"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
