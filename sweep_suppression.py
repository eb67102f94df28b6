"""Which suppression works, at what cost? Tries modes x scales x layers x sites x positions on a model.

Edit the constants. Directions come from the training pairs, the setting is chosen on development
pairs and reported once on test pairs, beside random directions. `suppress.py --mode auto` then
uses the setting for this model. Writes suppression_sweep.json and a figure among the results of the model.
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)
from alignment_artifacts import places
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.formatting import number, percent, rate
from alignment_artifacts.suppression.grid import Grid, Limits
from gemma_refactored.configuration import Seed
from gemma_refactored.errors import exit_code
from gemma_refactored.files import write_json
from gemma_refactored.settings import Between, Must, from_constants

MODEL_NAME = DEFAULT_MODEL
PAIRS_JSON = places.HOME / "alignment_artifact_prompt_pairs.json"
# Harmless requests that look like artifact requests, reported only; XSTest's CSV for real models.
TWINS = places.HOME / "model_organism/benign_twins.json"
CACHE = places.cache_folder()
SHARES = (20, 15, 15)  # of the pairs: training, development, test
MAX_TOKENS = 48
SEED = 0
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
RANDOM_CONTROLS = 5

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
    results_dir: Path
    """where numbers and figure go"""
    suppression: Grid
    amplification: Grid
    limits: Limits


def main(argv: Sequence[str] = ()) -> int:
    return exit_code(lambda: run(from_constants(Constants, globals(), argv)))


def run(constants: Constants) -> None:
    from alignment_artifacts.behaviour.answers import observe
    from alignment_artifacts.behaviour.refusal import is_refusal, without_refusals
    from alignment_artifacts.comparison.twins import load_twins
    from alignment_artifacts.directions.estimate import planted_directions
    from alignment_artifacts.directions.measurements import measure
    from alignment_artifacts.figures.paper import plot_sweep
    from alignment_artifacts.pairs import load_pairs
    from alignment_artifacts.suppression import sweep
    from alignment_artifacts.suppression.library import SWEEP
    from gemma_refactored.model_loading import device_description, load
    from gemma_refactored.progress import each

    twins = [twin.natural for twin in load_twins(places.find(constants.twins))]
    pairs_file = places.find(constants.pairs_json)
    pairs = load_pairs(pairs_file)
    loaded = load(places.find_model(constants.model_name))
    print(f"Model: {loaded.name} ({loaded.num_layers} layers) on {device_description()}")
    measured = measure(loaded, pairs, constants.cache, True, [places.collection_folder(loaded)])
    refused = measured.judged(is_refusal)[:, 1]
    if no_refusals := without_refusals(loaded.name, int(refused.sum()), len(refused)):
        print(textwrap.fill(no_refusals, 80))
    bench = sweep.Bench(loaded, measured, constants.shares, constants.seed, constants.max_tokens)
    counts = ", ".join(f"{len(rows)} {part}" for part, rows in bench.rows.items())
    development = bench.behaviour("development")

    def tried(settings, what):
        return sweep.try_settings(bench, each(settings, what, "setting"), development)

    records = tried(bench.settings(constants.suppression), "suppressing")
    amplified = tried(bench.settings(constants.amplification), "amplifying")
    print(f"{len(records)} + {len(amplified)} settings tried; pairs: {counts}")
    best, loudest = sweep.choose(records, constants.limits), sweep.choose_amplification(amplified)
    setting = sweep.Setting.from_record(records[best]["setting"])
    amplification = sweep.Setting.from_record(amplified[loudest]["setting"])

    controls = each(range(constants.random_controls), "testing", "random direction")
    test = {**bench.behaviour("test"), "twins": observe(loaded, twins, constants.max_tokens)}
    result = {
        "model": measured.facts,
        "config": {
            "shares": constants.shares,
            "max_tokens": constants.max_tokens,
            "seed": constants.seed,
            "limits": asdict(constants.limits),
        },
        "pairs": {part: [measured.pairs[i].id for i in rows] for part, rows in bench.rows.items()},
        "chosen": {"setting": setting.record(), "development": records[best]},
        "test": sweep.report(bench, setting, test, controls),
        "amplification": {
            "setting": amplification.record(),
            "development": amplified[loudest],
            "test": sweep.report(bench, amplification, test, ()),
        },
        "without_refusals": no_refusals,
        "monitor": sweep.monitor_results(measured),
        "pareto_front": sweep.pareto_front(records),
        "tried": records,
        "amplification_tried": amplified,
    }
    if planted := planted_directions(loaded):
        result["planted_truth"] = sweep.planted_truth(bench, setting, test, planted)
    origin = places.Origin.of_model(loaded.facts(), pairs_file, pairs)
    result = origin.stamp(result)
    results = places.results_folder(constants.results_dir, origin)
    with places.written_together(results) as folder:
        write_json(folder / "data" / "suppression_sweep.json", result)
        plot_sweep(result, folder / "figures" / "suppression_sweep.png")
    write_json(measured.folder / SWEEP, result)
    print_tables(result)
    print("\n" + places.told("Numbers", results / "data" / "suppression_sweep.json"))
    print(places.told("Figure", results / "figures" / "suppression_sweep.png"))


def print_tables(result: dict) -> None:
    """80 columns: the Pareto front on development pairs, then the chosen setting on test pairs."""
    print("\nBest trade-offs on development pairs (*: chosen)")
    print("  mode       scale site     positions  layers    artifact prompts  natural       KL")
    print("                                                  refused broken      same")
    chosen = result["chosen"]["development"]
    front = [result["tried"][i] for i in result["pareto_front"]]
    for record in front if chosen in front else [*front, chosen]:
        _print_trial(record, "*" if record == chosen else " ")
    test = result["test"]
    print(f"\n{'Chosen, on test pairs':<25}{'refused':>13} {'broken':>13} {'unchanged':>13}       KL")
    _print_test("unedited, artifact", test["unedited"]["artifact"])
    _print_test("suppressed, artifact", test["artifact"])
    _print_test("suppressed, natural", test["natural"], test["damage"])
    _print_test("unedited, twins", test["unedited"]["twins"])
    _print_test("suppressed, twins", test["twins"])
    for name in ("random_direction", "same_change_elsewhere"):
        for i, control in enumerate(test[name][:1]):
            _print_test(f"{name.replace('_', ' ')} ({i})", control["artifact"], control["damage"])
        rates = [control["artifact"]["refused"]["rate"] for control in test[name]]
        if rates:
            print(f"    refused with {len(rates)} of them: {percent(min(rates))} to {percent(max(rates))}")
    louder = result["amplification"]["test"]
    _print_test("amplified (add), natural", louder["natural"], louder["damage"])


def _print_trial(record: dict, mark: str) -> None:
    s = record["setting"]
    layers = ",".join(map(str, s["layers"])) if len(s["layers"]) < 4 else f"{s['layers'][0]}-{s['layers'][-1]}"
    mode = f"cap {s['options']['cap_quantile']:g}" if s["mode"] == "cap" else s["mode"]
    print(
        f"{mark} {mode:<10} {s['scale']:>5g} {s['site']:<8} {s['positions']:<10} {layers:<8} "
        f"{percent(record['artifact']['refused']['rate']):>8} {percent(record['artifact']['broken']['rate']):>6} "
        f"{percent(record['natural']['unchanged']['rate']):>9} {number(record['damage']['kl_mean'], 4):>8}"
    )


def _print_test(name: str, judged: dict, damage: dict | None = None) -> None:
    rates = " ".join(f"{rate(judged[key]):>13}" for key in ("refused", "broken", "unchanged"))
    kl = f"{number(damage['kl_mean'], 4):>8}" if damage else ""
    print(f"{name:<25}{rates} {kl}".rstrip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
