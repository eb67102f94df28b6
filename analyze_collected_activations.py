"""Analyse a collection: how well a direction separates artifact from natural prompts, layer by layer.

Writes the results as JSON and figures, and prints a table. Edit the constants; None means:
take it from the collection's manifest.
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from alignment_artifacts.activation_set import certificate_verdict, load_activation_set
from alignment_artifacts.analysis import NAMES, Run, Settings
from alignment_artifacts.formatting import interval, number, percent
from alignment_artifacts.pairs import load_pairs
from alignment_artifacts.separation import MIN_PAIRS
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.files import write_json
from gemma_refactored.settings import Between, Must, from_constants

RAW_ACTIVATIONS_BASE_DIR = "collected_activations_output"
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


@dataclass(frozen=True)
class Constants:
    raw_activations_base_dir: Path
    """folder of the collection (also ACTIVATIONS_DIR in the environment)"""
    original_pairs_json_for_iteration: Path
    """the matched prompt pairs that were collected"""
    gemma_input_subcategory_key_in_path: str
    """folder between a group and its batch"""
    num_layers: Annotated[int, Between(1)] | None
    """layers that are read; None: all"""
    key_pattern_template: (
        Annotated[str, Must(lambda text: text.count("{layer_idx}") == 1, "have {layer_idx} in it once")] | None
    )
    """name of the arrays, with {layer_idx} for the layer; None: from the manifest"""
    num_token_steps_to_collect: Annotated[int, Between(0)] | None
    """generated tokens that are read; None: all"""
    expected_hidden_dim: Annotated[int, Between(1)] | None
    """width of an activation, to check the files with; None: whatever it is"""
    max_excluded: Annotated[float, Between(0, 1)]
    """stop if more than this share of the pairs cannot be used"""
    results_json: Path
    """where the numbers go"""
    plot_png: Path
    """where the plot goes; a .pdf beside it"""
    results_dir: Path
    """where further numbers and figures go"""
    statistics: Settings = Settings()


def main(argv: Sequence[str] = ()) -> int:
    return exit_code(lambda: run(read_constants(argv)))


def read_constants(argv: Sequence[str]) -> Constants:
    return from_constants(
        Constants, globals(), argv, NAMES, environment={"RAW_ACTIVATIONS_BASE_DIR": "ACTIVATIONS_DIR"}
    )


def run(constants: Constants) -> None:
    from tqdm import tqdm

    folder, results_dir = constants.raw_activations_base_dir, constants.results_dir
    pairs = load_pairs(constants.original_pairs_json_for_iteration)
    data = load_activation_set(
        folder,
        pairs,
        constants.gemma_input_subcategory_key_in_path,
        constants.key_pattern_template,
        constants.num_layers,
        constants.num_token_steps_to_collect,
        constants.expected_hidden_dim,
        progress=lambda items: tqdm(items, desc="reading", unit="pair", leave=False, disable=not sys.stderr.isatty()),
    )
    report_excluded(data, len(pairs), constants.max_excluded)
    config = {
        "RAW_ACTIVATIONS_BASE_DIR": str(folder),
        "ORIGINAL_PAIRS_JSON_FOR_ITERATION": str(constants.original_pairs_json_for_iteration),
        "NUM_LAYERS": data.num_layers,
        "NUM_TOKEN_STEPS_TO_COLLECT": data.values.shape[2] - 1,
        "EXPECTED_HIDDEN_DIM": data.values.shape[4],
    }
    print(
        f"Model: {data.manifest.get('model', 'unknown')} "
        f"({data.num_layers} layers, hidden {data.values.shape[4]}), {len(data.pairs)} pairs"
    )
    verdict = certificate_verdict(folder, data.manifest)
    print(textwrap.fill(f"Certificate of the model's numbers: {verdict}", 78))
    analysed = Run(data, constants.statistics, config)
    result = {**analysed.results, "certificate": verdict}
    write_json(constants.results_json, result)
    write_json(results_dir / "data" / "alignment_artifacts_by_category.json", analysed.by_category)
    write_json(results_dir / "data" / "layer_analysis.json", analysed.pattern)
    write_json(results_dir / "data" / "projections.json", analysed.projections)

    from alignment_artifacts.figures import paper

    paper.plot_layer_scores(result, constants.plot_png)
    paper.plot_categories(analysed.by_category, results_dir / "figures" / "alignment_artifacts_by_category.png")
    paper.plot_layer_pattern(analysed.pattern, results_dir / "figures" / "layer_analysis.png")
    paper.plot_projections(analysed.projections, results_dir / "figures" / "projections.png")
    print_table(result)
    print(
        f"\nNumbers: {constants.results_json}\nPlot:    {constants.plot_png}\n"
        f"By category, layer and step: {results_dir}/"
    )
    print("All of it on one page: python -m alignment_artifacts.report")


def report_excluded(data, total: int, max_excluded: float) -> None:
    """Say what could not be used; stop if it is too much, or too little is left."""
    for item in data.excluded:
        print(f"Excluded {item['category']} {item['pair']}: {item['reason']}", file=sys.stderr)
    if len(data.excluded) > max_excluded * total:
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
        d, accuracy = number(nested["cohens_d"]), percent(nested["accuracy"], 1)
        print(f"Best layer chosen inside the folds: d = {d}, accuracy {accuracy}.")
    print("\n" + textwrap.fill(result["summary"], 78))


def _print_row(name: str, record: dict, prompt_end: dict | None = None) -> None:
    other = number(prompt_end["cohens_d"]) if prompt_end else ""
    print(
        f"{name:>5}  {number(record['cohens_d']):>7}  {interval(record['cohens_d_ci']):>15}  "
        f"{percent(record['accuracy'], 1):>8}  {number(record['auroc']):>5}  {number(record['p_value'], 3):>6}  "
        f"{other:>12}".rstrip()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
