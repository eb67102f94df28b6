"""Analyse a collection: how well a direction separates artifact from natural prompts, layer by layer.

Reads what was collected last (of $MODEL_NAME, if that is set). Writes the results as JSON and figures into
results/MODEL/PAIRS/, and the main ones also beside this script; prints a table. Edit the constants; None
means: take it from the collection's manifest.
"""

import os
import shutil
import sys
import textwrap
from pathlib import Path

from alignment_artifacts import places
from alignment_artifacts.activation_set import certificate_verdict, load_activation_set
from alignment_artifacts.analysis import Run, Settings
from alignment_artifacts.pairs import load_pairs
from alignment_artifacts.separation import MIN_PAIRS
from gemma_refactored.errors import UserError, exit_code, shown
from gemma_refactored.files import write_json

RAW_ACTIVATIONS_BASE_DIR = os.environ.get("ACTIVATIONS_DIR") or None  # None: what was collected last
ORIGINAL_PAIRS_JSON_FOR_ITERATION = places.HOME / "alignment_artifact_prompt_pairs.json"
GEMMA_INPUT_SUBCATEGORY_KEY_IN_PATH = "prompt_list"
NUM_LAYERS = None
KEY_PATTERN_TEMPLATE = None  # for example "model.layers.{layer_idx}.mlp.output"
NUM_TOKEN_STEPS_TO_COLLECT = None
EXPECTED_HIDDEN_DIM = None

NUM_PERMUTATIONS = 1000
NUM_BOOTSTRAP_RESAMPLES = 1000
SEED = 0
MAX_EXCLUDED = 0.05  # stop if more than this share of the pairs cannot be used

# The last analysis; each model's own is in RESULTS_DIR.
RESULTS_JSON = places.HOME / places.ANALYSIS
PLOT_PNG = places.HOME / places.PLOT
RESULTS_DIR = places.HOME / "results"


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
        if value is None and name == "RAW_ACTIVATIONS_BASE_DIR":
            continue
        if not isinstance(value, (str, Path)) or not str(value).strip():
            raise UserError(f"{name} must be text, not {shown(value)}.")


def run() -> None:
    from tqdm import tqdm

    check_constants()
    pairs_file = places.find(ORIGINAL_PAIRS_JSON_FOR_ITERATION)
    pairs = load_pairs(pairs_file)
    folder, others = places.choose_collection(pairs, RAW_ACTIVATIONS_BASE_DIR, os.environ.get("MODEL_NAME") or None)
    data = load_activation_set(
        folder,
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
        "RAW_ACTIVATIONS_BASE_DIR": places.recorded(folder),
        "ORIGINAL_PAIRS_JSON_FOR_ITERATION": places.recorded(pairs_file),
        "NUM_LAYERS": data.num_layers,
        "NUM_TOKEN_STEPS_TO_COLLECT": data.values.shape[2] - 1,
        "EXPECTED_HIDDEN_DIM": data.values.shape[4],
    }
    print(
        f"Model: {data.manifest.get('model', 'unknown')} "
        f"({data.num_layers} layers, hidden {data.values.shape[4]}), {len(data.pairs)} pairs"
    )
    print(places.told("Collection", folder))
    if others:
        print("Also collected (ACTIVATIONS_DIR or MODEL_NAME chooses):")
        print("\n".join(f"  {other.describe()}" for other in others))
    verdict = certificate_verdict(folder, data.manifest)
    print(textwrap.fill(f"Certificate of the model's numbers: {verdict}", 78))
    analysed = Run(data, settings, config)
    origin = places.Origin.of_collection(data.manifest, folder, pairs_file, pairs)
    results = places.results_folder(RESULTS_DIR, origin)
    result = {**analysed.results, "certificate": verdict}
    write(analysed, result, origin, results)
    print_table(result)
    print("\n" + places.told("Numbers", places.HOME / RESULTS_JSON))
    print(places.told("Plot", places.HOME / PLOT_PNG))
    print(places.told("This model's own, by category, layer and step", results))
    print("All of it on one page: python -m alignment_artifacts.report")


def write(analysed: Run, result: dict, origin: places.Origin, results: Path) -> None:
    """All files of the analysis, or none: into its own folder, and the main ones as those of the last analysis."""
    from alignment_artifacts.figures import paper

    main = origin.stamp({**result, "results": places.recorded(results)})
    numbers, plot = places.HOME / RESULTS_JSON, places.HOME / PLOT_PNG
    with (
        places.written_together(numbers.parent) as last,
        places.written_together(plot.parent) as last_plot,
        places.written_together(results) as own,
    ):
        write_json(own / "data" / places.ANALYSIS, main)
        write_json(own / "data" / "alignment_artifacts_by_category.json", origin.stamp(analysed.by_category))
        write_json(own / "data" / "layer_analysis.json", origin.stamp(analysed.pattern))
        write_json(own / "data" / "projections.json", origin.stamp(analysed.projections))
        paper.plot_layer_scores(result, own / "figures" / places.PLOT)
        paper.plot_categories(analysed.by_category, own / "figures" / "alignment_artifacts_by_category.png")
        paper.plot_layer_pattern(analysed.pattern, own / "figures" / "layer_analysis.png")
        paper.plot_projections(analysed.projections, own / "figures" / "projections.png")
        write_json(last / numbers.name, main)
        for ending in (".png", ".pdf"):
            shutil.copy((own / "figures" / places.PLOT).with_suffix(ending), last_plot / f"{plot.stem}{ending}")


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


def print_table(result: dict) -> None:
    """The top layers, 80 columns wide."""
    print("\nTop layers, generated tokens (held out by pair)")
    print("layer  Cohen d    95 % interval  accuracy  AUROC      p  prompt end d")
    for layer in result["top_layers_by_cohens_d"]:
        _print_row(str(layer), result["layer_scores"][str(layer)], result["layer_scores_prompt_end"][str(layer)])
    if result["lexical_baseline"]:
        _print_row("words", result["lexical_baseline"])
    if nested := result["best_layer_nested"]:
        d, accuracy = _number(nested["cohens_d"]), nested["accuracy"]
        print(f"Best layer chosen inside the folds: d = {d}, accuracy {accuracy:.1%}.")
    print("\n" + textwrap.fill(result["summary"], 78))


def _print_row(name: str, record: dict, prompt_end: dict | None = None) -> None:
    low, high = record["cohens_d_ci"]
    interval = f"[{_number(low)}, {_number(high)}]"
    p = "-" if record["p_value"] is None else f"{record['p_value']:.3f}"
    other = _number(prompt_end["cohens_d"]) if prompt_end else ""
    print(
        f"{name:>5}  {_number(record['cohens_d']):>7}  {interval:>15}  {record['accuracy']:8.1%}  "
        f"{record['auroc']:5.2f}  {p:>6}  {other:>12}".rstrip()
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
