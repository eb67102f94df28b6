"""Analyse a collection: how well a direction separates artifact from natural prompts, layer by layer.

Reads the latest collection (of $MODEL_NAME, $ADAPTER and $SYSTEM_PROMPT, if these are set). Writes the results as JSON
and figures into results/MODEL/PAIRS/, and the main ones also beside this script; prints a table. Edit the constants;
None means: take it from the collection's manifest.
"""

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from alignment_artifacts import places
from alignment_artifacts.activation_set import (
    ActivationSet,
    certificate_verdict,
    load_activation_set,
    names_a_layer,
    refuse_excluded,
)
from alignment_artifacts.analysis import Run
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.environment import Named
from alignment_artifacts.figures.data import POSITION_NAMES
from alignment_artifacts.formatting import interval, number, percent
from alignment_artifacts.pairs import load_pairs
from alignment_artifacts.scores import NAMES, Settings, layers_by_d
from alignment_artifacts.separation import MIN_PAIRS
from alignment_artifacts.summary import records_of
from gemma_refactored import site_names
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.files import write_json
from gemma_refactored.settings import Between, Must, from_constants, from_environment

RAW_ACTIVATIONS_BASE_DIR = None  # None: the latest collection
ORIGINAL_PAIRS_JSON_FOR_ITERATION = places.HOME / "alignment_artifact_prompt_pairs.json"
GEMMA_INPUT_SUBCATEGORY_KEY_IN_PATH = "prompt_list"
NUM_LAYERS = None
SITE = None  # "mlp", "attention" or "residual"; None: the one that was collected
KEY_PATTERN_TEMPLATE = None  # any other site, for example "model.layers.{layer_idx}.mlp.down_proj.output"
NUM_TOKEN_STEPS_TO_COLLECT = None
EXPECTED_HIDDEN_DIM = None

NUM_PERMUTATIONS = 1000
NUM_BOOTSTRAP_RESAMPLES = 1000
SEED = 0
MAX_EXCLUDED = 0.05  # stop if more than this share of the pairs cannot be used

# Of the latest analysis; the results of each model are in RESULTS_DIR.
RESULTS_JSON = places.HOME / places.ANALYSIS
PLOT_PNG = places.HOME / places.PLOT
RESULTS_DIR = places.HOME / "results"


@dataclass(frozen=True)
class Constants:
    raw_activations_base_dir: Path | None
    """folder of the collection (also ACTIVATIONS_DIR in the environment); None: the latest collection"""
    original_pairs_json_for_iteration: Path
    """the matched prompt pairs that were collected"""
    gemma_input_subcategory_key_in_path: str
    """folder between a group and its batch"""
    num_layers: Annotated[int, Between(1)] | None
    """number of layers to read; None: all"""
    site: Literal["mlp", "attention", "residual"] | None
    """kind of site, where several were collected; None: the one that was"""
    key_pattern_template: Annotated[str, Must(names_a_layer, "have {layer_idx} or {layer} in it once")] | None
    """name of the arrays, with {layer_idx} or {layer} for the layer; None: by site"""
    num_token_steps_to_collect: Annotated[int, Between(0)] | None
    """number of generated tokens to read; None: all"""
    expected_hidden_dim: Annotated[int, Between(1)] | None
    """width of an activation, to check the files with; None: whatever it is"""
    max_excluded: Annotated[float, Between(0, 1)]
    """stop if more than this share of the pairs cannot be used"""
    results_json: Path
    """file for the numbers"""
    plot_png: Path
    """file for the plot, with a .pdf beside it"""
    results_dir: Path
    """folder for further numbers and figures"""
    statistics: Settings = Settings()


def main(argv: Sequence[str] = ()) -> int:
    return exit_code(lambda: run(read_constants(argv)))


def read_constants(argv: Sequence[str]) -> Constants:
    also = {"RAW_ACTIVATIONS_BASE_DIR": "ACTIVATIONS_DIR", "ORIGINAL_PAIRS_JSON_FOR_ITERATION": "PAIRS"}
    return from_constants(Constants, globals(), argv, NAMES, also)


def run(constants: Constants) -> None:
    from tqdm import tqdm

    pairs_file = places.find(constants.original_pairs_json_for_iteration)
    pairs = load_pairs(pairs_file)
    typed, named = constants.raw_activations_base_dir, from_environment(Named())
    folder, others = places.choose_collection(pairs, typed, named.model_name, constants.site, named.adapter, named.chat)
    data = load_activation_set(
        folder,
        pairs,
        constants.gemma_input_subcategory_key_in_path,
        constants.key_pattern_template,
        constants.num_layers,
        constants.num_token_steps_to_collect,
        constants.expected_hidden_dim,
        progress=lambda items: tqdm(items, desc="reading", unit="folder", leave=False, disable=not sys.stderr.isatty()),
        site=constants.site,
    )
    report_excluded(data, constants.max_excluded)
    config = {
        "RAW_ACTIVATIONS_BASE_DIR": places.recorded(folder),
        "ORIGINAL_PAIRS_JSON_FOR_ITERATION": places.recorded(pairs_file),
        "KEY_PATTERN_TEMPLATE": data.site,
        "NUM_LAYERS": data.num_layers,
        "NUM_TOKEN_STEPS_TO_COLLECT": data.values.shape[2] - 1,
        "EXPECTED_HIDDEN_DIM": data.values.shape[4],
    }
    print(f"Model: {data.model} ({data.num_layers} layers, hidden {data.values.shape[4]}), {len(data.pairs)} pairs")
    print(textwrap.fill(f"Site: {site_names.described(data.site)}", 78, break_long_words=False))
    print(places.told("Collection", folder))
    if typed and not places.wanted(named.model_name, named.adapter, named.chat)(data.manifest):
        print("MODEL_NAME and the chat format in the environment are not this collection's;")
        print("it is analysed because it was named.")
    if others:
        print("Also collected (ACTIVATIONS_DIR, or MODEL_NAME and ADAPTER, choose):")
        print("\n".join(f"  {other.describe()}" for other in others))
    verdict = certificate_verdict(folder, data.manifest)
    print(textwrap.fill(f"Certificate of the model's numbers: {verdict}", 78))
    analysed = Run(data, constants.statistics, config)
    kind = site_names.kind_of(data.site) or data.site
    origin = places.Origin.of_collection(data.manifest, data.model, folder, pairs_file, pairs, kind)
    results = places.results_folder(constants.results_dir, origin, kind)
    result = {**analysed.results, "certificate": verdict}
    write(constants, analysed, result, origin, results)
    print_table(result)
    print("\n" + places.told("Numbers", places.HOME / constants.results_json))
    print(places.told("Plot", places.HOME / constants.plot_png))
    print(places.told("This model's results, by category, layer and step", results))
    print("Everything on one page: python -m alignment_artifacts.report")


def write(constants: Constants, analysed: Run, result: dict, origin: places.Origin, results: Path) -> None:
    """All files of the analysis, or none: into its own folder, and the main ones as those of the last analysis."""
    from alignment_artifacts.figures import paper

    main_result = origin.stamp({**result, "results": places.recorded(results)})
    numbers, plot = places.HOME / constants.results_json, places.HOME / constants.plot_png
    with (
        places.written_together(numbers.parent) as last,
        places.written_together(plot.parent) as last_plot,
        places.written_together(results) as of_model,
    ):
        data, figures = of_model / "data", of_model / "figures"
        write_json(data / places.ANALYSIS, main_result)
        write_json(data / "alignment_artifacts_by_category.json", origin.stamp(analysed.by_category))
        write_json(data / "layer_analysis.json", origin.stamp(analysed.pattern))
        write_json(data / "projections.json", origin.stamp(analysed.projections))
        paper.plot_layer_scores(result, figures / places.PLOT)
        paper.plot_categories(analysed.by_category, figures / "alignment_artifacts_by_category.png")
        paper.plot_layer_pattern(analysed.pattern, figures / "layer_analysis.png")
        paper.plot_projections(analysed.projections, figures / "projections.png")
        write_json(last / numbers.name, main_result)
        for ending in (".png", ".pdf"):
            shutil.copy((figures / places.PLOT).with_suffix(ending), last_plot / f"{plot.stem}{ending}")


def report_excluded(data: ActivationSet, max_excluded: float) -> None:
    """Print what could not be used; stop if that is too much, or too little remains."""
    for item in data.excluded:
        print(f"Excluded {item['category']} {item['pair']}: {item['reason']}", file=sys.stderr)
    refuse_excluded(data, max_excluded)
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
    for positions in [*result["controls"], *(["answer"] if "layer_scores_answer" in result else [])]:
        scores, nested = records_of(result, positions)
        print(f"\n{POSITION_NAMES[positions].capitalize()} (held out by pair)")
        print("layer     Cohen d     95% interval  accuracy  pairs  AUROC      p")
        if nested:
            _print_row("nested", {**nested, "p_value": None})
        for layer in layers_by_d(list(scores.values()))[: result["config"]["top_layers"]]:
            _print_row(str(layer), scores[str(layer)])
        if lda := result["controls"].get(positions, {}).get("lda"):
            _print_row("LDA", {**lda, "p_value": None})
    print("\nFrom the prompts' words and lengths alone")
    for kind, record in result["word_baselines"].items():
        _print_row(kind.replace("mean difference", "embed"), record)
    if result["length_baseline"]:
        _print_row("length", result["length_baseline"])
    text = f"nested, LDA: layer chosen inside the folds; pairs: {result['sides'][1]} above its own partner"
    print(textwrap.fill(text, 80))
    print("rows of single layers: intervals are pointwise, the highest of many is too high")
    independence, found = result["independence"], result["power"]
    text = f"{independence['num_pairs']} pairs, {independence['num_groups']} independent groups; "
    text += f"the smallest p they allow is {independence['p_floor']:.2g}."
    if found["smallest_d"] is not None:
        needs = ", ".join(f"d = {d}: {n}" for d, n in found["groups_needed"].items())
        text += f" With 80% power they find a d of {found['smallest_d']:.2f}; groups needed for {needs}."
    print(textwrap.fill(text, 78))
    for paragraph in result["summary"].split("\n\n"):
        print("\n" + textwrap.fill(paragraph, 78))


def _print_row(name: str, record: dict) -> None:
    between = "-" if record["cohens_d_ci"][0] is None else interval(record["cohens_d_ci"])
    print(
        f"{name:>8}  {number(record['cohens_d']):>7}  {between:>15}  "
        f"{percent(record['accuracy'], 1):>8}  {percent(record['pair_accuracy']):>5}  {number(record['auroc']):>5}  "
        f"{number(record['p_value'], 3):>6}".rstrip()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
