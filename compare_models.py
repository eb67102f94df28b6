"""Is it alignment, or just different words? Compares a model before and after safety training.

Edit the constants. Both models (held in memory together) get the same pairs in the same chat format,
and read the same texts, so that representations are compared and not what was written. Then
directions learnt on one contrast are tried on another. Writes model_comparison.json and a figure among the results
of the second model.
"""

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from alignment_artifacts import places
from alignment_artifacts.edits.options import Site
from alignment_artifacts.formatting import interval, number, percent
from alignment_artifacts.scores import NAMES, Settings
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.files import read_json, write_json
from gemma_refactored.settings import Between, from_constants

# The embedded model before and after its change; for example google/gemma-3-1b-pt and google/gemma-3-1b-it.
MODEL_A = str(places.HOME / "model_organism/base")
MODEL_B = str(places.HOME / "model_organism/aligned")
PAIRS_JSON = places.HOME / "alignment_artifact_prompt_pairs.json"
TWINS = places.HOME / "model_organism/benign_twins.json"  # or XSTest's CSV
SITE = "mlp"  # or "residual"
NEUTRAL_TEXT = "Thank you for this question. Here is what comes to mind."
MAX_TOKENS = 20

NUM_PERMUTATIONS = 1000
NUM_BOOTSTRAP_RESAMPLES = 1000
SEED = 0

RESULTS_DIR = places.HOME / "results"


@dataclass(frozen=True)
class Constants:
    model_a: str
    """local folder, GGUF file or Hugging Face id of the model before"""
    model_b: str
    """of the model after"""
    pairs_json: Path
    """the matched prompt pairs"""
    twins: Path
    """harmless prompts that look like artifact prompts: JSON, or XSTest's CSV"""
    site: Site
    """where activations are compared"""
    neutral_text: str
    """what both models read after every prompt"""
    max_tokens: Annotated[int, Between(1, 1_000_000)]
    """tokens of each answer"""
    results_dir: Path
    """where numbers and figure go"""
    statistics: Settings = Settings()


def main(argv: Sequence[str] = ()) -> int:
    return exit_code(lambda: run(from_constants(Constants, globals(), argv, NAMES, {"PAIRS_JSON": "PAIRS"})))


def run(constants: Constants) -> None:
    from alignment_artifacts.behaviour.answers import nothing_known
    from alignment_artifacts.comparison.compare import check_comparable, compare, texts_to_read
    from alignment_artifacts.comparison.twins import load_twins
    from alignment_artifacts.directions.measurements import measure
    from alignment_artifacts.figures.paper import plot_comparison
    from alignment_artifacts.pairs import load_pairs
    from gemma_refactored.model_loading import device_description, load
    from gemma_refactored.progress import stage

    pairs_file = places.find(constants.pairs_json)
    pairs, twins = load_pairs(pairs_file), load_twins(places.find(constants.twins))
    models = [load(places.find_model(name)) for name in (constants.model_a, constants.model_b)]
    for letter, model in zip("AB", models, strict=True):
        print(f"Model {letter}: {model.name} ({model.num_layers} layers) on {device_description()}")
    check_comparable(models[0], models[1], pairs, twins)
    origin = places.Origin.of_model(models[1].facts(), pairs_file, pairs)
    results = places.results_folder(constants.results_dir, origin)  # before the work: it may be refused
    first_model(results / "data" / "model_comparison.json")
    cache = places.cache_folder()
    # The answers of a model whose chat format is the common one are measured once for everybody, and may be there.
    template = models[1].tokenizer.chat_template
    known = [
        measure(model, pairs, cache, True, [places.collection_folder(model)]).known_answer
        if model.tokenizer.chat_template == template
        else nothing_known
        for model in models
    ]
    total = texts_to_read(pairs, twins)
    with stage("reading", total, "text") as advance:
        result = compare(
            models, pairs, twins, constants.neutral_text, constants.max_tokens, constants.site, constants.statistics,
            advance, known, cache / "comparison",
        )  # fmt: skip
    keep_earlier(results, models[0].revision)
    with places.written_together(results) as folder:
        write_json(folder / "data" / "model_comparison.json", origin.stamp(result))
        plot_comparison(result, folder / "figures" / "model_comparison.png")
    print_tables(result)
    print("\n" + places.told("Numbers", results / "data" / "model_comparison.json"))
    print(places.told("Figure", results / "figures" / "model_comparison.png"))


def first_model(path: Path) -> dict | None:
    """Of the comparison that lies there; None without one.

    Raises:
        UserError: something else lies there.
    """
    if not path.exists():
        return None
    content = read_json(path, "comparison")
    try:
        model = content["models"]["a"]
        return {name: str(model[name]) for name in ("model", "model_revision")}
    except (KeyError, TypeError):
        raise UserError(f"{path} is not what compare_models.py writes; delete it.") from None


def keep_earlier(results: Path, revision: str) -> None:
    """Rename the comparison with another first model, if that is what lies there."""
    path = results / "data" / "model_comparison.json"
    earlier = first_model(path) or {"model_revision": revision}
    if earlier["model_revision"] == revision:
        return
    for file in (path, *(results / "figures").glob("model_comparison.*")):
        file.rename(
            file.with_stem(f"{file.stem}_with_{places.hashed_name(earlier['model'], earlier['model_revision'])}")
        )


def print_tables(result: dict) -> None:
    """80 columns: layers at the prompt's end, differences under every condition, transfer."""
    from alignment_artifacts.scores import is_significant

    print("\nAt the prompt's end, the same tokens in both (d held out by pair)")
    print("layer    d A    d B   B - A 95 % interval        p  cosine  A on B  B on A")
    for layer, r in enumerate(result["conditions"]["prompt_end"]["layers"]):
        print(
            f"{layer:>5}  {number(r['d_a']):>5}  {number(r['d_b']):>5}  {number(r['difference']):>6} "
            f"{interval(r['difference_ci']):<15}  {number(r['p_value'], 3):>6}  {number(r['cosine']):>6}  "
            f"{number(r['a_on_b']):>6}  {number(r['b_on_a']):>6}"
        )
    print("\nB - A on generated tokens (* p <= 0.05 over layers)")
    shown = {"neutral": "neutral text", "answers_a": "answers of A", "answers_b": "answers of B",
             "own_answers": "own answers"}  # fmt: skip
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
        shares = [f"{number(r['cohens_d'])} ({percent(r['accuracy'])})" for r in found]
        print(f"{cell:<38.38}" + "".join(f"{share:>14}" for share in shares))
    if result["planted_truth"]:
        cosines = ", ".join(f"{layer}: {number(c, 3)}" for layer, c in result["planted_truth"].items())
        print("\n" + textwrap.fill(f"Cosine of the change of direction with the planted one, by layer: {cosines}", 78))
    for name in ("summary", "transfer_summary"):
        print("\n" + textwrap.fill(result[name], 78))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
