"""Which suppression works, at what cost? Searches modes, strengths, layers, sites and positions on a model.

Edit the constants. Directions come from the training pairs, the setting is chosen on development pairs, and its effect
is measured on others, beside random directions: on every pair, in the fold that has not seen it (FOLDS), or on test
pairs of a single split. `suppress.py --mode auto` then uses the setting for this model. Writes suppression_sweep.json
and a figure among the results of the model. A search that was killed continues.
"""

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from alignment_artifacts import places
from alignment_artifacts.behaviour.score import Wish
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.environment import unused
from alignment_artifacts.formatting import described_mean, interval, named_range, number, percent, rate
from alignment_artifacts.pairs import REFUSAL
from alignment_artifacts.suppression.space import Limits, Space
from gemma_refactored.configuration import Chat, Seed
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.files import write_json
from gemma_refactored.settings import Between, Must, from_constants
from gemma_refactored.settings import record as recorded

MODEL_NAME = DEFAULT_MODEL
ADAPTER = None  # a LoRA adapter to add to it: a folder of mlx-lm or PEFT
PAIRS_JSON = places.HOME / "alignment_artifact_prompt_pairs.json"
# Harmless requests that look like artifact requests, reported only; XSTest's CSV for real models.
TWINS = places.HOME / "model_organism/benign_twins.json"
CACHE = places.cache_folder()
FOLDS = 5  # every pair is tested in the fold that has not seen it; 0: one split, with pairs kept for the test
SHARES = (20, 15, 15)  # of the pairs: training, development, test (in a fold the first two, of the other pairs)
MAX_TOKENS = 48
SEED = 0
SYSTEM_PROMPT = None  # the system message before each prompt
CHAT_TEMPLATE = None  # the name of one of several, or a file
CHAT_TEMPLATE_ARGS = None  # variables of the template as JSON: '{"enable_thinking": false}'
SUPPRESSION = Space(
    scales={  # from, to
        "always": (0.2, 1.5), "proximity": (0.3, 2.0), "adaptive": (0.5, 4.0), "sphere": (0.5, 6.0),
        "subspace": (0.3, 2.0), "ablate": (0.3, 2.0), "cap": (0.5, 3.0),
    },
    positions=("prompt_end", "generated", "all"),
    trials=64,
    generated=6,
)  # fmt: skip
AMPLIFICATION = Space(scales={"add": (0.1, 2.0)}, where=("prompt_end", "everywhere"), trials=10, generated=2)
LIMITS = Limits(kl=0.05, changed=1.0)
SCORE = None  # None: refusal; "words:A,B", or a function (prompt, answer) -> number as "FILE.py:FUNCTION"
WISH = "lower"  # desired change of the score's mean on artifact prompts: "lower" or "higher"
RANDOM_CONTROLS = 5
EDIT_SINKS = False  # True: edit attention sinks too

RESULTS_DIR = places.HOME / "results"


@dataclass(frozen=True)
class Constants:
    model_name: str
    """local folder, GGUF file or Hugging Face id"""
    adapter: str | None
    """LoRA adapter of mlx-lm or PEFT to add to it: folder or Hugging Face id"""
    pairs_json: Path
    """the matched prompt pairs"""
    twins: Path
    """harmless requests that look like artifact requests: JSON, or XSTest's CSV"""
    cache: Path
    """folder of measurements"""
    folds: Annotated[int | None, Between(0, 1000), Must(lambda folds: folds != 1, "be 0 or at least 2")]
    """of a cross-fit that tests every pair; 0 or None: one split"""
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
    """desired change of its mean on artifact prompts"""
    results_dir: Path
    """where numbers and figure go"""
    suppression: Space
    amplification: Space
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
    from alignment_artifacts.edits.setting import NOTHING
    from alignment_artifacts.figures.paper import plot_sweep
    from alignment_artifacts.pairs import load_pairs
    from alignment_artifacts.suppression import sweep
    from alignment_artifacts.suppression.library import sweep_file
    from alignment_artifacts.suppression.search import WHOLE_ANSWERS, seconds_of_a_trial, steps
    from gemma_refactored.model_loading import device_description, load
    from gemma_refactored.progress import duration, stage

    started = time.perf_counter()
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
    adapter = constants.adapter and places.find_model(constants.adapter)
    loaded = load(places.find_model(constants.model_name), chat=constants.chat, adapter=adapter)
    print(f"Model: {loaded.name} ({loaded.num_layers} layers) on {device_description()}")
    for sentence in unused({"SITE": "every site is tried"}):
        print(sentence)
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
    pairs, shares, seed = measured.pairs, constants.shares, constants.seed
    whole, folds = sweep.divide(pairs, constants.folds or 0, shares, seed)

    def bench_of(rows: sweep.Rows) -> sweep.Bench:
        return sweep.Bench(loaded, measured, rows, constants.max_tokens, score, wish, seed, constants.edit_sinks)

    final, benches = bench_of(whole), [bench_of(rows) for rows in folds]
    spaces = constants.suppression, constants.amplification
    of_search = sum(map(steps, spaces))
    of_test = WHOLE_ANSWERS * (2 + 2 * constants.random_controls)
    total = (1 + len(benches)) * of_search + max(len(benches), 1) * of_test
    seconds = seconds_of_a_trial(final, constants.suppression, final.behaviour("development"))
    counts = ", ".join(f"{len(rows)} {part}" for part, rows in whole.items())
    kind = f"{len(benches)} folds and all pairs ({counts})" if benches else f"pairs: {counts}"
    print(textwrap.fill(f"At most about {duration(total * seconds)} for the search; {kind}", 80), flush=True)
    with stage("searching", total, "step") as progress:
        choice = sweep.choose_settings(final, *spaces, constants.limits, progress)
        parts = []
        for bench in benches or [final]:
            chosen = sweep.choose_settings(bench, *spaces, constants.limits, progress) if benches else choice
            parts.append(sweep.measure_choice(bench, chosen, range(constants.random_controls), progress))
    trials = len(choice.trials) + len(choice.louder_trials)
    whole_answers = len(choice.records) + (0 if wish else len(choice.louder))  # with a wish they are among the records
    per_fold = "; as many per fold" if folds else ""
    print(f"{trials} settings tried, {whole_answers} of them judged by whole answers{per_fold}")
    test = sweep.report(loaded, pairs, parts, score)
    with stage("twins and the monitor", 3, "part") as progress:
        of_twins = observe(loaded, twins, constants.max_tokens) if twins else None
        progress(1)
        if of_twins:  # with the final setting, which was not chosen on them
            test |= final.evaluate(final.intervention(choice.setting), {"twins": of_twins})
            test["unedited"] |= final.evaluate(NOTHING, {"twins": of_twins})
        progress(1)
        monitor = {} if score else {"monitor": sweep.monitor_results(loaded, measured, of_twins)}
        progress(1)
    result = {
        "model": measured.facts,
        "config": {
            "folds": constants.folds or 0,
            "shares": shares,
            "max_tokens": constants.max_tokens,
            "seed": seed,
            "limits": asdict(constants.limits),
            "random_controls": constants.random_controls,
            "edit_sinks": constants.edit_sinks,
            "options": space_options(constants),
        },
        "pairs": {part: [pairs[i].id for i in rows] for part, rows in whole.items()},
        "chosen": {"setting": choice.setting.record(), "development": choice.records[choice.best]},
        "amplification": {
            "setting": choice.amplification.record(),
            "development": choice.louder[choice.loudest],
            "test": test.pop("amplified"),
        },
        "test": test,
        **about,
        **monitor,
        "pareto_front": sweep.pareto_front(choice.records, wish),
        "tried": choice.records,
        "trials": choice.trials,
        "amplification_tried": choice.louder,
        "amplification_trials": choice.louder_trials,
    }
    if folds:
        result["folds"] = sweep.fold_records(loaded, pairs, parts, score)
        result["stability"] = sweep.stability([part.setting for part in parts], choice.setting)
    if planted := planted_directions(loaded):
        result["planted_truth"] = sweep.planted_truth(final, choice.setting, final.behaviour("test"), planted)
    result["seconds"] = {"wall": time.perf_counter() - started, "cpu": time.process_time()}
    result = origin.stamp(result)
    name = score.file_name("suppression_sweep", wish) if score else "suppression_sweep"
    with places.written_together(results) as folder:
        write_json(folder / "data" / f"{name}.json", result)
        plot_sweep(result, folder / "figures" / f"{name}.png")
    write_json(measured.folder / sweep_file(score, constants.wish), result)
    print_score_tables(result) if score else print_tables(result)
    if folds:
        print_folds(result)
    print("\n" + places.told("Numbers", results / "data" / f"{name}.json"))
    print(places.told("Figure", results / "figures" / f"{name}.png"))


def space_options(constants: Constants) -> list[str]:
    """What has to be typed for spaces other than those on top."""
    options = []
    for name, space, on_top in (
        ("suppression", constants.suppression, SUPPRESSION),
        ("amplification", constants.amplification, AMPLIFICATION),
    ):
        usual = recorded(on_top)
        for part, value in recorded(space).items():
            flag = f"{name}-{part.replace('_', '-')}"
            if value == usual[part]:
                continue
            if isinstance(value, bool):
                options.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                values = value if isinstance(value, list) else [value]
                options += [f"--{flag}", (" " if part == "scales" else ",").join(map(str, values))]
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
    print(f"\n{tested(result):<25}{'refused':>13} {'broken':>13} {'unchanged':>13}       KL")
    _print_test(f"unedited, {second}", test["unedited"]["artifact"])
    _print_test(f"suppressed, {second}", test["artifact"])
    _print_test(f"unedited, {first}", test["unedited"]["natural"])
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
        f"Corrected for the judge's errors, which differ by family of models and kind of answer, {unedited} were "
        f"refused unedited and {suppressed} suppressed (docs/suppression.md)."
    )
    print(textwrap.fill(text, 80))
    for site, monitor in result["monitor"].items():
        print(textwrap.fill(described_monitor(site, monitor, result["origin"]["sides"]), 80))


def described_monitor(site: str, monitor: dict, sides: Sequence[str]) -> str:
    """How well refusals are predicted, of which prompts."""

    def told(name: str, of: dict) -> str:
        counts = f"{of['refused']} refused, {of['answered']} answered"
        known = "not measurable" if of["auroc"] is None else f"{number(of['auroc'])} {interval(of['auroc_ci'])}"
        return f"{name} {known} ({counts})"

    named = {"all pairs": monitor, f"{sides[1]} prompts alone": monitor["within_artifact"]}
    if "twins" in monitor:
        named["twins"] = monitor["twins"]
    listed = "; ".join(told(name, of) for name, of in named.items())
    return f"Refusals predicted by the score at the prompt's end ({site}), AUROC: {listed}."


def tested(result: dict) -> str:
    return f"Over {len(result['folds'])} folds" if "folds" in result else "Chosen, on test pairs"


def print_folds(result: dict) -> None:
    """80 columns: which number belongs to what, and what the folds have chosen."""
    stable, n = result["stability"], len(result["pairs"]["test"])

    def counts(name: str) -> str:
        return ", ".join(f"{key} {number}" for key, number in sorted(stable[name].items(), key=lambda item: -item[1]))

    text = (
        f"These are of the way to choose: in each of {stable['folds']} folds direction and setting come from the other "
        f"pairs, so that each of the {n} pairs is tested once; intervals are about these very settings on new pairs, "
        "not about how often the way to choose fails. The setting for use (*) comes from all pairs and has no test of "
        f"its own (but twins). The folds have chosen: mode {counts('mode')}; site {counts('site')}; direction from "
        f"{counts('positions')}; in {stable['like_final']} of {stable['folds']} all three as in the setting for use."
    )
    print("\n" + textwrap.fill(text, 80))


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
    print(f"\n{tested(result):<25}{'mean score':>22}{'moved by':>24}{'KL':>9}")
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
