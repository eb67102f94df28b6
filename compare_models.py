"""What did training change? Compares a model before and after it, by its activations and its weights.

Edit the constants. Both models (held in memory together) get the same pairs in the same chat format,
and read the same texts, so that representations are compared and not what was written. The weights are compared
tensor by tensor. With twins, directions learnt on one contrast are tried on another. Writes model_comparison.json and
figures among the results of the second model.
"""

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from alignment_artifacts import places
from alignment_artifacts.edits.options import Site
from alignment_artifacts.environment import unused
from alignment_artifacts.formatting import interval, number, percent
from alignment_artifacts.scores import NAMES, Settings
from gemma_refactored.configuration import Chat
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.files import read_json, write_json
from gemma_refactored.settings import Between, from_constants

# The embedded model before and after its change; for example google/gemma-3-1b-pt and google/gemma-3-1b-it.
MODEL_A = str(places.HOME / "model_organism/base")
MODEL_B = str(places.HOME / "model_organism/aligned")
ADAPTER_A = None  # LoRA adapters to add to them, of mlx-lm or PEFT: to see what one changed, set MODEL_B = MODEL_A
ADAPTER_B = None
PAIRS_JSON = places.HOME / "alignment_artifact_prompt_pairs.json"
TWINS = None  # harmless prompts that look like artifact prompts: JSON, or XSTest's CSV; None: the built-in pairs' own
SITE = "mlp"  # or "residual"
NEUTRAL_TEXT = "Thank you for this question. Here is what comes to mind."
MAX_TOKENS = 20
SYSTEM_PROMPT = None  # the system message before each prompt
CHAT_TEMPLATE = None  # the name of one of several, or a file
CHAT_TEMPLATE_ARGS = None  # variables of the template as JSON: '{"enable_thinking": false}'

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
    adapter_a: str | None
    """LoRA adapter of mlx-lm or PEFT to add to the model before: folder or Hugging Face id"""
    adapter_b: str | None
    """to add to the model after; with it, that may be the same as the one before"""
    pairs_json: Path
    """the matched prompt pairs"""
    twins: Path | None
    """prompts that look like artifact prompts but are not: JSON, or XSTest's CSV (default: of the built-in pairs)"""
    site: Site
    """where activations are compared"""
    neutral_text: str
    """what both models read after every prompt"""
    max_tokens: Annotated[int, Between(1, 1_000_000)]
    """tokens of each answer"""
    results_dir: Path
    """where numbers and figure go"""
    statistics: Settings = Settings()
    chat: Chat = Chat()


def main(argv: Sequence[str] = ()) -> int:
    return exit_code(lambda: run(from_constants(Constants, globals(), argv, NAMES, {"PAIRS_JSON": "PAIRS"})))


def run(constants: Constants) -> None:
    from alignment_artifacts.behaviour.answers import nothing_known
    from alignment_artifacts.comparison.compare import check_comparable, compare, texts_to_read
    from alignment_artifacts.comparison.twins import twins_for
    from alignment_artifacts.comparison.weights import changes_or_reason, num_tensors
    from alignment_artifacts.directions.measurements import measure
    from alignment_artifacts.figures.paper import plot_comparison, plot_weights
    from alignment_artifacts.pairs import load_pairs
    from gemma_refactored.model_loading import device_description, load
    from gemma_refactored.progress import stage

    pairs_file = places.find(constants.pairs_json)
    pairs = load_pairs(pairs_file)
    twins = twins_for(pairs, constants.twins and places.find(constants.twins))
    models = [
        load(places.find_model(name), chat=constants.chat, adapter=adapter and places.find_model(adapter))
        for name, adapter in (
            (constants.model_a, constants.adapter_a),
            (constants.model_b, constants.adapter_b),
        )
    ]
    for sentence in not_compared(constants):
        print(textwrap.fill(sentence, 80))
    for letter, model in zip("AB", models, strict=True):
        print(f"Model {letter}: {model.name} ({model.num_layers} layers) on {device_description()}")
    check_comparable(models[0], models[1], pairs, twins)
    origin = places.Origin.of_model(models[1].facts(), pairs_file, pairs, constants.site)
    results = places.results_folder(constants.results_dir, origin, constants.site)  # before the work: it may be refused
    first_model(results / "data" / "model_comparison.json")
    cache = places.cache_folder()
    # The answers of a model whose chat format is the common one are measured once for everybody, and may be there.
    template = models[1].tokenizer.chat_template
    known = [
        measure(model, pairs, cache, True, places.collection_folders(model, pairs)).known_answer
        if model.tokenizer.chat_template == template
        else nothing_known
        for model in models
    ]
    total = texts_to_read(pairs, twins)
    with stage("comparing weights", num_tensors(models[1]), "tensor") as advance:
        changes = changes_or_reason(models, advance)
    with stage("reading", total, "text") as advance:
        result = compare(
            models, pairs, twins, constants.neutral_text, constants.max_tokens, constants.site, constants.statistics,
            advance, known, cache / "comparison", changes,
        )  # fmt: skip
    keep_earlier(results, models[0].revision)
    with places.written_together(results) as folder:
        write_json(folder / "data" / "model_comparison.json", origin.stamp({**result, "typed": typed(constants)}))
        for plot, stem in zip((plot_comparison, plot_weights), places.COMPARISON_FIGURES, strict=True):
            plot(result, folder / "figures" / f"{stem}.png")
    print_tables(result)
    print("\n" + places.told("Numbers", results / "data" / "model_comparison.json"))
    for stem in places.COMPARISON_FIGURES:
        print(places.told("Figure", results / "figures" / f"{stem}.png"))


def typed(constants: Constants) -> dict:
    """Option -> what names models, prompts and chat format; what else repeats a comparison is in its "config"."""

    def recorded(name: str | Path | None) -> str | None:
        if name is None:
            return None
        path = places.find_model(name)
        return places.recorded(path) if os.path.exists(path) else path

    names = ("model_a", "adapter_a", "model_b", "adapter_b", "pairs_json", "twins")
    return {**{name: recorded(getattr(constants, name)) for name in names}, **asdict(constants.chat)}


def not_compared(constants: Constants) -> list[str]:
    """What to say about MODEL_NAME and ADAPTER, which name one model to every other script."""
    reasons = {}
    for variable, names, use in (
        ("MODEL_NAME", (constants.model_a, constants.model_b), "MODEL_A and MODEL_B name the models"),
        ("ADAPTER", (constants.adapter_a, constants.adapter_b), "ADAPTER_A and ADAPTER_B name adapters"),
    ):
        typed = os.environ.get(variable)
        if typed and places.resolved_model(typed) not in [places.resolved_model(name) for name in names if name]:
            reasons[variable] = use
    return unused(reasons)


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
    figures = [file for stem in places.COMPARISON_FIGURES for file in (results / "figures").glob(f"{stem}.*")]
    for file in (path, *figures):
        file.rename(
            file.with_stem(f"{file.stem}_with_{places.hashed_name(earlier['model'], earlier['model_revision'])}")
        )


def print_tables(result: dict) -> None:
    """80 columns: layers at the prompt's end, differences under every condition, transfer."""
    from alignment_artifacts.scores import is_significant

    natural, artifact = result["sides"]
    title = f"{result['behaviour'].capitalize()}: {artifact} and {natural} prompts, {result['site']}"
    print("\n" + textwrap.fill(title, 80))
    print("At the prompt's end, the same tokens in both (d held out by pair)")
    print("layer    d A    d B   B - A  95% interval        p cosine A on B B on A  moved")
    for layer, r in enumerate(result["conditions"]["prompt_end"]["layers"]):
        print(
            f"{layer:>5}  {number(r['d_a']):>5}  {number(r['d_b']):>5}  {number(r['difference']):>6} "
            f"{interval(r['difference_ci']):<15} {number(r['p_value'], 3):>6} {number(r['cosine']):>6} "
            f"{number(r['a_on_b']):>6} {number(r['b_on_a']):>6} {percent(r['relative_change'], 1):>6}"
        )
    print("moved: how far training moved an activation, by its own size (mean over prompts)")
    print("intervals are pointwise: each holds for a layer fixed beforehand")
    print_weights(result["weights"])
    print_change_space(result["change_space"])
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
    print(f"{'':<36}{'model A':>12}{'model B':>13}{result['names']['words']:>19}")
    for cell in next(iter(sources.values())):
        found = [records[cell] for records in sources.values()]
        a, b, words = (f"{number(r['cohens_d'])} ({percent(r['accuracy'])})" for r in found)
        print(f"{cell:<36.36}{a:>12}{b:>13}{words + ' ' + found[-1]['kind'].removesuffix(' difference'):>19}")
    print("word choice: the strongest of token embeddings (mean difference, LDA) and TF-IDF")
    if result["planted_truth"]:
        cosines = ", ".join(f"{layer}: {number(c, 3)}" for layer, c in result["planted_truth"].items())
        print("\n" + textwrap.fill(f"Cosine of the change of direction with the planted one, by layer: {cosines}", 78))
    parts = result["weights"], result["change_space"]
    for text in (result["summary"], *(part["summary"] for part in parts), result["transfer_summary"]):
        print("\n" + textwrap.fill(text, 78))


def print_weights(changes: dict) -> None:
    """The tensors that changed most; 80 columns."""
    if not changes["tensors"]:
        return
    from alignment_artifacts.comparison.weights import MOST_CHANGED

    print(f"\nThe weights: {len(changes['tensors'])} of {changes['num_tensors']} tensors differ")
    print(f"{'':<38}{'changed':>8}{'effective':>10}{'cosine of its':>15}{'cosine':>9}")
    print(f"{'':<38}{'by':>8}{'rank':>10}{'direction':>15}{'in B':>9}")
    for r in changes["tensors"][:MOST_CHANGED]:
        name = r["name"] if len(r["name"]) <= 38 else f"..{r['name'][-36:]}"
        cosines = [number(r.get(f"cosine_with_{what}")) for what in ("activations", "contrast")]
        print(
            f"{name:<38}{percent(r['relative_change'], 1):>8}{number(r['effective_rank'], 1):>10}"
            f"{cosines[0]:>15}{cosines[1]:>9}"
        )
    if planted := {r["layer"]: r["cosine_with_planted"] for r in changes["tensors"] if "cosine_with_planted" in r}:
        listed = ", ".join(f"{layer}: {number(abs(c), 3)}" for layer, c in sorted(planted.items()))
        print(textwrap.fill(f"Cosine of these directions with the planted ones, by layer: {listed}", 78))
    if direction := next((r for r in changes["tensors"] if "direction" in r), None):
        largest = sorted(enumerate(direction["direction"]), key=lambda both: -abs(both[1]))[:5]
        coordinates = ", ".join(f"{i}: {x:+.2f}" for i, x in largest)
        print(textwrap.fill(f"Direction that {direction['name']} {direction['stream']}, largest of "
                            f"{len(direction['direction'])} coordinates: {coordinates}", 78))  # fmt: skip
    text = (
        "changed by: norm of the change by that of the tensor in A; effective rank: participation ratio of its squared "
        "singular values; cosine of its direction: of the leading direction that it writes with how the output of its "
        "module moved at the prompt's end; in B: with what separates the two sides there."
    )
    print(textwrap.fill(text, 80))


def print_change_space(changes: dict) -> None:
    """How far both directions lie in the changes of the residual stream; 80 columns."""
    most = len(changes["random_95"])
    print("\nShare of the direction in what training changed in the residual stream")
    print("at the end of other prompts: in the first singular vector, in the first " + str(most))
    print(
        f"layer{'A, 1':>10}{f'A, {most}':>10}{'B, 1':>10}{'over folds':>14}{f'B, {most}':>10}{'of all changes, 1':>20}"
    )
    for layer, r in enumerate(changes["layers"]):
        low, high = (percent(end) for end in r["b_range"][0])
        folds = "-" if r["b_range"][0][0] is None else f"{low} to {high}"
        print(
            f"{layer:>5}{percent(r['a'][0]):>10}{percent(r['a'][-1]):>10}{percent(r['b'][0]):>10}"
            f"{folds:>14}{percent(r['b'][-1]):>10}{percent(r['of_changes'][0]):>20}"
        )
    limits = [percent(changes["random_95"][i], 1) for i in (0, -1)]
    print(f"95% of random directions stay below {limits[0]} (1) and {limits[1]} ({most}) at all layers.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
