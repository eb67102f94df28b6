"""Which suppression works, at what cost? Tries modes x scales x layers x sites x positions on a model.

Edit the constants. Directions come from the training pairs, the setting is chosen on development
pairs and reported once on test pairs, beside random directions. `suppress.py --mode auto` then
uses the setting for this model. Writes suppression_sweep.json and a figure among the results of the model.
"""

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from alignment_artifacts import places
from alignment_artifacts.behaviour.score import Wish
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.formatting import described_mean, number, percent, rate
from alignment_artifacts.pairs import REFUSAL
from alignment_artifacts.suppression.grid import Grid, Limits
from gemma_refactored.configuration import Chat, Seed
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.files import write_json
from gemma_refactored.settings import Between, Must, from_constants
from gemma_refactored.settings import record as recorded

MODEL_NAME = DEFAULT_MODEL
PAIRS_JSON = places.HOME / "alignment_artifact_prompt_pairs.json"
# Harmless requests that look like artifact requests, reported only; XSTest's CSV for real models.
TWINS = places.HOME / "model_organism/benign_twins.json"
CACHE = places.cache_folder()
SHARES = (20, 15, 15)  # of the pairs: training, development, test
MAX_TOKENS = 48
SEED = 0
SYSTEM_PROMPT = None  # the system message before each prompt
CHAT_TEMPLATE = None  # the name of one of several, or a file
CHAT_TEMPLATE_ARGS = None  # variables of the template as JSON: '{"enable_thinking": false}'
SUPPRESSION = Grid(
    scales={
        "always": (0.5, 1.0), "proximity": (0.5, 1.0, 2.0), "adaptive": (1.0, 2.0), "sphere": (1.0, 3.0),
        "subspace": (0.5, 1.0), "ablate": (0.5, 1.0), "cap": (1.0,),
    },
    cap_quantiles=(0.5, 0.75, 0.9, 0.95, 0.99),
    positions=("prompt_end", "generated", "all"),
)  # fmt: skip
AMPLIFICATION = Grid(scales={"add": (0.1, 0.2, 0.5, 1.0, 1.5, 2.0)}, where=("everywhere", "prompt_end"))
LIMITS = Limits(kl=0.05, changed=0.1)
SCORE = None  # None: refusal; "words:A,B", or a function (prompt, answer) -> number as "FILE.py:FUNCTION"
WISH = "lower"  # where the score's mean on artifact prompts is to go: "lower" or "higher"
RANDOM_CONTROLS = 5
EDIT_SINKS = False  # True: edit attention sinks too

RESULTS_DIR = places.HOME / "results"


@dataclass(frozen=True)
class Constants:
    model_name: str
    """local folder, GGUF file or Hugging Face id"""
    pairs_json: Path
    """the matched prompt pairs"""
    twins: Path
    """harmless requests that look like artifact requests: JSON, or XSTest's CSV"""
    cache: Path
    """folder of measurements"""
    shares: Annotated[tuple[Annotated[int, Between(1)], ...], Must(lambda shares: len(shares) == 3, "be three shares")]
    """pairs for training, development and test"""
    max_tokens: Annotated[int, Between(1, 1_000_000)]
    """tokens of each answer"""
    seed: Seed
    """seed of the split of the pairs"""
    random_controls: Annotated[int, Between(0)]
    """random directions beside the chosen setting"""
    edit_sinks: bool
    """edit attention sinks too"""
    score: str | None
    """what is measured of an answer: refusal, words:A,B, or FILE.py:FUNCTION (prompt, answer) -> number; None: refusal
    for pairs that are about it"""
    wish: Wish
    """where its mean on artifact prompts is to go"""
    results_dir: Path
    """where numbers and figure go"""
    suppression: Grid
    amplification: Grid
    limits: Limits
    chat: Chat


def main(argv: Sequence[str] = ()) -> int:
    return exit_code(lambda: run(from_constants(Constants, globals(), argv, also={"PAIRS_JSON": "PAIRS"})))


def run(constants: Constants) -> None:
    from alignment_artifacts.behaviour.answers import observe
    from alignment_artifacts.behaviour.model_judge import check_agreement
    from alignment_artifacts.behaviour.refusal import is_refusal, without_refusals
    from alignment_artifacts.behaviour.score import own_measure
    from alignment_artifacts.comparison.twins import load_twins
    from alignment_artifacts.directions.estimate import planted_directions
    from alignment_artifacts.directions.measurements import measure
    from alignment_artifacts.figures.paper import plot_sweep
    from alignment_artifacts.pairs import load_pairs
    from alignment_artifacts.suppression import sweep
    from alignment_artifacts.suppression.library import sweep_file
    from gemma_refactored.model_loading import device_description, load
    from gemma_refactored.progress import each

    score = own_measure(constants.score, constants.wish)
    if score and score.agreement:
        check_agreement(score.name, score.agreement)
    wish = constants.wish if score else None
    pairs_file = places.find(constants.pairs_json)
    pairs = load_pairs(pairs_file)
    if constants.score is None and pairs.behaviour != REFUSAL:
        raise UserError(
            f"These pairs are about {pairs.behaviour}, and a sweep needs a measure of it: set SCORE (or --score) to "
            "words:A,B or FILE.py:FUNCTION, and WISH to lower or higher."
        )
    # Requests that look like those of the artifact side and are harmless: of refusals alone.
    is_about_refusal = pairs.behaviour == REFUSAL
    twins = [twin.natural for twin in load_twins(places.find(constants.twins))] if is_about_refusal else []
    loaded = load(places.find_model(constants.model_name), chat=constants.chat)
    print(f"Model: {loaded.name} ({loaded.num_layers} layers) on {device_description()}")
    origin = places.Origin.of_model(loaded.facts(), pairs_file, pairs)
    results = places.results_folder(constants.results_dir, origin)  # before the work: it may be refused
    measured = measure(loaded, pairs, constants.cache, True, places.collection_folders(loaded, pairs))
    if score:
        meaning = score.meaning.removesuffix(".") or "no docstring"
        print(textwrap.fill(f"Score: {score.name} ({meaning}); wish: {wish}", 80))
        about: dict = {"score": score.record(), "wish": wish}
    else:
        refused = measured.judged(is_refusal)[:, 1]
        too_few = without_refusals(loaded.name, int(refused.sum()), len(refused)) if is_about_refusal else None
        about = {"without_refusals": too_few}
        if about["without_refusals"]:
            print(textwrap.fill(about["without_refusals"], 80))
    bench = sweep.Bench(loaded, measured, constants.shares, constants.seed, constants.max_tokens, score)
    counts = ", ".join(f"{len(rows)} {part}" for part, rows in bench.rows.items())
    development = bench.behaviour("development")

    def tried(settings, what):
        return sweep.try_settings(bench, each(settings, what, "setting"), development)

    records = tried(bench.settings(constants.suppression, constants.edit_sinks), "suppressing")
    amplified = tried(bench.settings(constants.amplification, constants.edit_sinks), "amplifying")
    print(f"{len(records)} + {len(amplified)} settings tried; pairs: {counts}")
    if wish:
        records += amplified  # a score may be moved by adding the direction as well
    best = sweep.choose(records, constants.limits, wish)
    loudest = sweep.choose_amplification(amplified, constants.limits, wish)
    setting = sweep.Setting.from_record(records[best]["setting"])
    amplification = sweep.Setting.from_record(amplified[loudest]["setting"])

    controls = each(range(constants.random_controls), "testing", "random direction")
    test = bench.behaviour("test")
    if twins:
        test["twins"] = observe(loaded, twins, constants.max_tokens)
    result = {
        "model": measured.facts,
        "config": {
            "shares": constants.shares,
            "max_tokens": constants.max_tokens,
            "seed": constants.seed,
            "limits": asdict(constants.limits),
            "random_controls": constants.random_controls,
            "edit_sinks": constants.edit_sinks,
            "options": grid_options(constants),
        },
        "pairs": {part: [measured.pairs[i].id for i in rows] for part, rows in bench.rows.items()},
        "chosen": {"setting": setting.record(), "development": records[best]},
        "test": sweep.report(bench, setting, test, controls),
        "amplification": {
            "setting": amplification.record(),
            "development": amplified[loudest],
            "test": sweep.report(bench, amplification, test, ()),
        },
        **about,
        **({} if score else {"monitor": sweep.monitor_results(measured)}),
        "pareto_front": sweep.pareto_front(records, wish),
        "tried": records,
        "amplification_tried": amplified,
    }
    if planted := planted_directions(loaded):
        result["planted_truth"] = sweep.planted_truth(bench, setting, test, planted)
    result = origin.stamp(result)
    name = score.file_name("suppression_sweep", wish) if score else "suppression_sweep"
    with places.written_together(results) as folder:
        write_json(folder / "data" / f"{name}.json", result)
        plot_sweep(result, folder / "figures" / f"{name}.png")
    write_json(measured.folder / sweep_file(score, constants.wish), result)
    print_score_tables(result) if score else print_tables(result)
    print("\n" + places.told("Numbers", results / "data" / f"{name}.json"))
    print(places.told("Figure", results / "figures" / f"{name}.png"))


def grid_options(constants: Constants) -> list[str]:
    """What has to be typed for grids other than those on top."""
    options = []
    for name, grid, on_top in (
        ("suppression", constants.suppression, SUPPRESSION),
        ("amplification", constants.amplification, AMPLIFICATION),
    ):
        usual = recorded(on_top)
        for part, value in recorded(grid).items():
            if value != usual[part]:
                options += [
                    f"--{name}-{part.replace('_', '-')}",
                    (" " if part == "scales" else ",").join(map(str, value)),
                ]
    return options


def print_tables(result: dict) -> None:
    """80 columns: the Pareto front on development pairs, then the chosen setting on test pairs."""
    print("\nBest trade-offs on development pairs (*: chosen)")
    first, second = result["origin"]["sides"]
    print(f"  mode       scale site     positions  layers    {second[:8]:>8} {'prompts':<7}{first[:9]:>9}       KL")
    print("                                                  refused broken      same")
    chosen = result["chosen"]["development"]
    front = [result["tried"][i] for i in result["pareto_front"]]
    for record in front if chosen in front else [*front, chosen]:
        _print_trial(record, "*" if record == chosen else " ")
    test = result["test"]
    print(f"\n{'Chosen, on test pairs':<25}{'refused':>13} {'broken':>13} {'unchanged':>13}       KL")
    _print_test(f"unedited, {second}", test["unedited"]["artifact"])
    _print_test(f"suppressed, {second}", test["artifact"])
    _print_test(f"suppressed, {first}", test["natural"], test["damage"])
    if "twins" in test:
        _print_test("unedited, twins", test["unedited"]["twins"])
        _print_test("suppressed, twins", test["twins"])
    for name in ("random_direction", "same_change_elsewhere"):
        for i, control in enumerate(test[name][:1]):
            _print_test(f"{name.replace('_', ' ')} ({i})", control["artifact"], control["damage"])
        rates = [control["artifact"]["refused"]["rate"] for control in test[name]]
        if rates:
            print(f"    refused with {len(rates)} of them: {percent(min(rates))} to {percent(max(rates))}")
    louder = result["amplification"]["test"]
    _print_test(f"amplified (add), {first}", louder["natural"], louder["damage"])
    unedited, suppressed = (named_range(of["artifact"]["refused_corrected"]) for of in (test["unedited"], test))
    text = (
        f"With the judge's own errors, which differ by family of models, {unedited} were refused unedited and "
        f"{suppressed} suppressed (docs/suppression.md)."
    )
    print(textwrap.fill(text, 80))


def named_range(shares: list[float]) -> str:
    low, high = map(percent, shares)
    return low if low == high else f"{low} to {high}"


def print_score_tables(result: dict) -> None:
    """80 columns: as `print_tables`, with means of the score instead of refusals."""
    from alignment_artifacts.suppression.sweep import moves_as_wished

    name, (first, second) = result["score"]["name"], result["origin"]["sides"]
    print(
        "\n"
        + textwrap.fill(
            f"Best trade-offs on development pairs (*: chosen). score, moved: means of {name} on "
            f"{second} prompts; same: {first} answers that stay",
            80,
        )
    )
    print("  mode       scale site     positions  layers     score   moved  same      KL")
    chosen = result["chosen"]["development"]
    front = [result["tried"][i] for i in result["pareto_front"]]
    for record in front if chosen in front else [*front, chosen]:
        print(
            f"{_described(record['setting'], '*' if record == chosen else ' ')} "
            f"{number(record['artifact']['score']['mean']):>7} {number(record['artifact']['moved']['mean']):>7} "
            f"{percent(record['natural']['unchanged']['rate']):>5} {number(record['damage']['kl_mean'], 4):>7}"
        )
    if not moves_as_wished(result):
        print(textwrap.fill(f"No setting that was tried within the limits makes {name} {result['wish']}.", 80))
    test, louder = result["test"], result["amplification"]["test"]
    print(f"\n{'Chosen, on test pairs':<25}{'mean score':>22}{'moved by':>24}{'KL':>9}")
    for label, judged, damage in (
        (f"unedited, {second}", test["unedited"]["artifact"], None),
        (f"edited, {second}", test["artifact"], None),
        (f"unedited, {first}", test["unedited"]["natural"], None),
        (f"edited, {first}", test["natural"], test["damage"]),
        *((f"{control.replace('_', ' ')} (0)", c["artifact"], c["damage"])
          for control in ("random_direction", "same_change_elsewhere") for c in test[control][:1]),
        (f"the other way, {first}", louder["natural"], louder["damage"]),
    ):  # fmt: skip
        cost = f"{number(damage['kl_mean'], 4):>9}" if damage else ""
        moved_by = "" if label.startswith("unedited") else described_mean(judged["moved"])
        print(f"{label[:25]:<25}{described_mean(judged['score']):>22}{moved_by:>24}{cost}".rstrip())
    for control in ("random_direction", "same_change_elsewhere"):
        means = [judged["artifact"]["moved"]["mean"] for judged in test[control]]
        if means:
            kind = control.replace("_", " ")
            print(f"    moved by {len(means)} x {kind}: {number(min(means), 3)} to {number(max(means), 3)}")


def _print_trial(record: dict, mark: str) -> None:
    print(
        f"{_described(record['setting'], mark)} "
        f"{percent(record['artifact']['refused']['rate']):>8} {percent(record['artifact']['broken']['rate']):>6} "
        f"{percent(record['natural']['unchanged']['rate']):>9} {number(record['damage']['kl_mean'], 4):>8}"
    )


def _described(setting: dict, mark: str) -> str:
    s = setting
    layers = ",".join(map(str, s["layers"])) if len(s["layers"]) < 4 else f"{s['layers'][0]}-{s['layers'][-1]}"
    mode = f"cap {s['options']['cap_quantile']:g}" if s["mode"] == "cap" else s["mode"]
    return f"{mark} {mode:<10} {s['scale']:>5g} {s['site']:<8} {s['positions']:<10} {layers:<8}"


def _print_test(name: str, judged: dict, damage: dict | None = None) -> None:
    rates = " ".join(f"{rate(judged[key]):>13}" for key in ("refused", "broken", "unchanged"))
    kl = f"{number(damage['kl_mean'], 4):>8}" if damage else ""
    print(f"{name[:25]:<25}{rates} {kl}".rstrip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
