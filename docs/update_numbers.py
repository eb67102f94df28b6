"""Put the numbers of docs/results/*.json and benchmarks/*.json into README.md and the other documents.

    python docs/update_numbers.py                  # rewrite every number in the documents
    python docs/update_numbers.py --check          # only say which differ; exit code 1 if any do
    python docs/update_numbers.py --from-results   # first take new excerpts from the results of the latest runs

A number stands between two invisible comments: the first names it and says how to print it, the second ends it, as in
`<!--=comparison.peak.d_b .1f-->4.6<!--=-->`. The name is a path into one of the JSON files, or a function below that
is marked `@computed`: what is derived from several values, and whole tables.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXCERPTS = ROOT / "docs" / "results"
BENCHMARKS = {
    "speed": "results", "scaling": "analysis_scaling", "simulated_d": "simulated_cohens_d",
    "simulated_comparison": "simulated_model_comparison", "simulated_coverage": "simulated_coverage",
}  # fmt: skip
DOCUMENTS = ("*.md", "docs/*.md", "toxicity_steering/*.md", "gemma_refactored/*.md")
MARKER = re.compile(r"<!--=([^>\s]+)(?: ([^>]+?))?-->(.*?)<!--=-->", re.DOTALL)
EMBEDDED = "results/aligned/alignment_artifact_prompt_pairs/data"
PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")

COMPUTED: dict[str, Callable[[dict], object]] = {}


# Text.


def load() -> dict:
    """All numbers: name of the file -> its content."""
    files = {path.stem: path for path in sorted(EXCERPTS.glob("*.json"))}
    files |= {name: ROOT / "benchmarks" / f"{stem}.json" for name, stem in BENCHMARKS.items()}
    return {name: json.loads(path.read_text()) for name, path in files.items()}


def documents() -> list[Path]:
    return [path for pattern in DOCUMENTS for path in sorted(ROOT.glob(pattern))]


def refreshed(text: str, numbers: dict) -> str:
    """The text with every marked number as it is in `numbers`.

    Raises:
        ValueError: a marker names no number, or is not closed, or would hide the line it begins.
    """
    for line in text.splitlines():
        # To Markdown a line that begins with a comment is HTML as a whole: only a table may stand like that.
        if line.lstrip().startswith("<!--=") and line.count("-->") > 1:
            raise ValueError(f"a line must not begin with a number's marker: {line[:60]}")
    if text.count("<!--=") != 2 * len(MARKER.findall(text)):
        raise ValueError("a marker is not closed with <!--=-->, or closed twice")

    def replace(match: re.Match) -> str:
        name, spec, _ = match.groups()
        opening = f"<!--={name} {spec}-->" if spec else f"<!--={name}-->"
        return f"{opening}{printed(lookup(name, numbers), spec or '')}<!--=-->"

    return MARKER.sub(replace, text)


def lookup(name: str, numbers: dict):
    if name in COMPUTED:
        return COMPUTED[name](numbers)
    value = numbers
    try:
        for part in name.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
    except (KeyError, IndexError, ValueError, TypeError):
        raise ValueError(f"there is no number {name}") from None
    return value


def printed(value, spec: str) -> str:
    """A value in words.

    Args:
        spec: Python's format ("%" and "+%": whole percent); in brackets for an interval. Lists are enumerated.
    """
    if isinstance(value, list) and spec.startswith("["):
        separator = "-" if "%" in spec else ", "
        return f"[{separator.join(printed(v, spec[1:-1]).removesuffix(' %') for v in value)}]"
    if isinstance(value, list):
        words = [printed(v, spec) for v in value]
        return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if spec.endswith("%"):
        return f"{100 * value:{spec[:-1]}.0f} %"
    return re.sub(r"e([+-])0+(\d)", r"e\1\2", format(value, spec)).replace("e+", "e")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns after the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


def computed(function: Callable[[dict], object]) -> Callable[[dict], object]:
    COMPUTED[function.__name__] = function
    return function


def span(values: list[float], spec: str) -> str:
    """One number, or the range of several."""
    low, high = printed(min(values), spec), printed(max(values), spec)
    return low if low == high else f"{low.removesuffix(' %')}-{high}"


@computed
def organism_table(numbers: dict) -> str:
    names = {
        "committed artifact": "the 50 artifact prompts of the experiment",
        "committed natural": "the 50 natural prompts of the experiment",
        "held-out artifact": "artifact, verb and object never trained together",
        "held-out artifact + cue": 'the same after the cue "Policy: strict."',
        "held-out natural": "natural, verb and object never trained together",
        "held-out crossing": 'harmless verb, sensitive object ("repair a bank server")',
        "committed twin": "benign twins (`benign_twins.json`: sensitive verb, harmless object)",
        "held-out twin": "twins, verb and object never trained together",
    }
    rates = numbers["organism"]["refusals"]
    rows = {
        label: [rates[name]["requests"], *(printed(rates[name][model], "%") for model in ("base", "aligned"))]
        for name, label in names.items()
    }
    return refusals_table("model_organism.evaluate", ("base", "aligned"), rows)


@computed
def second_organism_table(numbers: dict) -> str:
    names = {
        "artifact": "artifact prompts of the held-out pairs",
        "untrained forms": "artifact requests of forms and topics that training does not have",
        "natural": "natural prompts of the held-out pairs",
        "twins": "harmless twins",
        "ordinary chat": "ordinary chat",
    }
    rates = numbers["second_organism"]["refusals"]

    def refused(rate: dict) -> str:
        return f"{printed(rate['rate'], '%')} {printed(rate['ci'], '[%]')}"

    rows = {
        label: [rates[name]["untouched"]["n"], *(refused(rates[name][model]) for model in ("untouched", "tuned"))]
        for name, label in names.items()
    }
    return refusals_table("model_organism.smollm2.evaluate", ("untouched", "tuned"), rows)


def refusals_table(module: str, models: Sequence[str], rows: dict[str, list]) -> str:
    """What a module has measured: by kind of request, how many there are and what each model refuses."""
    header = [f"requests (`python -m {module}`)", "n", *(f"{model} refuses" for model in models)]
    return table(header, [[label, *map(str, cells)] for label, cells in rows.items()])


@computed
def transfer_table(numbers: dict) -> str:
    rows = []
    for cell, by_source in numbers["comparison"]["transfer"].items():
        shares = [
            printed(r["cohens_d"], ".1f") + (f" ({printed(r['accuracy'], '%')})" if "accuracy" in r else "")
            for r in by_source.values()
        ]
        rows.append([cell, *shares])
    return table(["learnt on → tested on", "before", "after", "words alone"], rows)


@computed
def sweep_table(numbers: dict) -> str:
    sweep = numbers["sweep"]
    artifact, natural, twins = sweep["artifact"], sweep["natural"], sweep["twins"]
    seeds = sweep["random_directions"]

    def with_interval(record: dict, name: str) -> str:
        return f"{printed(record[name], '%')} {printed(record[f'{name}_ci'], '[%]')}"

    def before_and_after(name: str) -> str:
        return f"{printed(twins['unedited'][name], '%')} / {printed(twins['suppressed'][name], '%')}"

    def control(label: str, record: dict) -> list[str]:
        return [label, span(record["refused"], "%"), span(record["broken"], "%"), "", ""]

    def judged(label: str, record: dict) -> list[str]:
        unchanged = with_interval(record, "unchanged") if "unchanged" in record else ""
        kl = printed(record["kl"], ".3f") if "kl" in record else ""
        return [label, with_interval(record, "refused"), printed(record["broken"], "%"), unchanged, kl]

    own = "in each fold the setting chosen without it"
    setting, added = (own, own) if sweep["folds"] else (sweep["setting"], sweep["amplification"])
    return table(
        [
            "on pairs not chosen with" if sweep["folds"] else "on test pairs",
            "refused", "broken", "unchanged word for word", "KL, nats per token",
        ],
        [
            judged("artifact prompts, unedited", artifact["unedited"]),
            judged(f"artifact prompts, suppressed ({setting})", artifact["suppressed"]),
            judged("natural prompts, suppressed", natural["suppressed"]),
            [
                "benign twins, unedited / suppressed", before_and_after("refused"), before_and_after("broken"),
                printed(twins["suppressed"]["unchanged"], "%"), "",
            ],
            control(f"artifact prompts, the same with {seeds} random directions of equal norm", artifact["random"]),
            control(
                f"artifact prompts, every activation moved as far, in {seeds} random directions",
                artifact["same_change_elsewhere"],
            ),
            judged(f"natural prompts, amplified ({added})", natural["amplified"]),
        ],
    )  # fmt: skip


@computed
def search_table(numbers: dict) -> str:
    """The grid that an earlier version tried (its file is no longer made), the search on the same split, and on all."""
    names = {"sweep_grid": "grid, one split", "sweep_split": "search, the same split", "sweep": "search, cross-fitted"}
    rows = []
    for name, label in names.items():
        r = numbers[name]
        suppressed, n, seconds = r["artifact"]["suppressed"], r["pairs"]["test"], r["seconds"]
        refused = f"{round(suppressed['refused'] * n)} of {n} {printed(suppressed['refused_ci'], '[%]')}"
        took = f"{seconds['wall']:.0f} s" if "cpu" not in seconds else f"{seconds['cpu']:.0f} s of CPU"
        rows.append([label, r["setting"], refused, printed(r["natural"]["suppressed"]["kl"], ".4f"), took])
    return table(["", "setting for use", "refused", "KL, nats per token", "time"], rows)


@computed
def golden_table(numbers: dict) -> str:
    return table(
        ["layout", "float32", "4 bit, made by mlx-lm's convert"],
        [
            [r["layout"], printed(r["float32"], ".0e"), printed(r["four_bit"], ".0e")]
            for r in numbers["golden"]["layouts"]
        ],
    )


@computed
def golden_worst(numbers: dict) -> float:
    return max(r[kind] for r in numbers["golden"]["layouts"] for kind in ("float32", "four_bit"))


@computed
def simulated_d_table(numbers: dict) -> str:
    rows = [
        [
            printed(r["true_d"], ".1f"), printed(r["held_out"], ".2f"),
            " to ".join(printed(v, ".2f") for v in r["interval"]), printed(r["in_sample"], ".2f"),
            printed(r["mean_shift_ratio"], ".2f"),
        ]
        for r in numbers["simulated_d"]["cases"]
    ]  # fmt: skip
    return table(["true d", "held-out d (ours)", "95 % interval", "in-sample d", "mean shift ratio"], rows)


def share_span(shares: list[float]) -> str:
    low, high = printed(min(shares), "%"), printed(max(shares), "%")
    return low if low == high else f"{low.removesuffix(' %')} to {high}"


@computed
def coverage_of_d(numbers: dict) -> str:
    return share_span([row["d covers"] for row in numbers["simulated_coverage"]["rows"]])


@computed
def coverage_of_accuracy(numbers: dict) -> str:
    return share_span([row["accuracy covers"] for row in numbers["simulated_coverage"]["rows"]])


@computed
def coverage_of_auroc(numbers: dict) -> str:
    return share_span([row["AUROC covers"] for row in numbers["simulated_coverage"]["rows"]])


@computed
def comparison_coverage(numbers: dict) -> str:
    return share_span([row["covers"] for row in numbers["simulated_comparison"]["rows"]])


@computed
def comparison_false_positives(numbers: dict) -> str:
    rows = numbers["simulated_comparison"]["rows"]
    return share_span([row["found"] for row in rows if row["d of A"] == row["d of B"]])


def _medians(numbers: dict, prefix: str) -> float:
    return min(v["seconds"] for name, v in numbers["speed"]["medians"].items() if name.startswith(prefix))


@computed
def toxicity_table(numbers: dict) -> str:
    names = {"baseline": "unsteered", "steered": "steered", "random_direction": "random direction of the same norm"}
    records = {label: numbers["toxicity"][name] for name, label in names.items()}
    rows = [
        [label, f"{printed(r['mean_toxicity'], '.2f')} {printed(r['mean_toxicity_ci'], '[.2f]')}"]
        for label, r in records.items()
    ]
    return table(["on the other half of the prompts", "mean toxicity"], rows)


@computed
def toxicity_reduction(numbers: dict) -> float:
    return -numbers["toxicity"]["toxicity_change"]


@computed
def speed_table(numbers: dict) -> str:
    seconds = {name: record["seconds"] for name, record in numbers["speed"]["medians"].items()}
    best = min(v for name, v in seconds.items() if name.startswith("transformers + hooks, batch"))
    rows = [
        ["this repository", seconds["ours"]],
        ["the same, text only, nothing captured or saved", seconds["ours, text only"]],
        ["transformers with forward hooks, at its best batch size", best],
        ["nnsight", seconds["nnsight, batch 50"]],
        ["transformer-lens", seconds["transformer-lens, batch 50"]],
        ["mlx-lm, text only, with OpenBLAS", seconds["mlx-lm + OpenBLAS, text only"]],
        ["mlx-lm, text only, as installed", seconds["mlx-lm, text only"]],
    ]
    return table(["", "seconds"], [[label, printed(value, ".1f")] for label, value in rows])


@computed
def speed_advantage(numbers: dict) -> float:
    """How many times as long the best float32 peer that captures takes."""
    return _medians(numbers, "transformers + hooks, batch") / numbers["speed"]["medians"]["ours"]["seconds"]


@computed
def bfloat16_seconds(numbers: dict) -> float:
    return numbers["speed"]["medians"]["transformers + hooks, bfloat16"]["seconds"]


@computed
def bfloat16_other_answers(numbers: dict) -> float:
    return 1 - numbers["speed"]["agreement"]["transformers + hooks, bfloat16"]["same_answers"]


@computed
def worst_agreement(numbers: dict) -> float:
    return max(r["largest_difference"] or 0 for r in numbers["speed"]["agreement"].values())


@computed
def scaling_smallest_seconds(numbers: dict) -> float:
    return sum(numbers["scaling"][0][f"{part}_seconds"] for part in ("read", "statistics"))


@computed
def scaling_largest_minutes(numbers: dict) -> float:
    return sum(numbers["scaling"][-1][f"{part}_seconds"] for part in ("read", "statistics")) / 60


@computed
def scaling_peak_gb(numbers: dict) -> float:
    return max(r["peak_bytes"] for r in numbers["scaling"]) / 1e9


# Excerpts of the results of runs.


def excerpt_analysis(result: dict) -> dict:
    layers = {"prompt_end": result["layer_scores_prompt_end"], "generated": result["layer_scores"]}
    nested = {"prompt_end": result["best_layer_nested_prompt_end"], "generated": result["best_layer_nested"]}
    return {
        "num_pairs": result["layer_scores"]["0"]["num_pairs"],
        "num_layers": len(result["layer_scores"]),
        **{
            positions: {"nested": nested[positions], "layers": list(scores.values())}
            for positions, scores in layers.items()
        },
        "words": result["lexical_baseline"],
        "beyond_words": result["controls"]["prompt_end"]["beyond_words"],
        "length": result["length_baseline"],
    }


def excerpt_comparison(result: dict) -> dict:
    conditions = {name: condition["layers"] for name, condition in result["conditions"].items()}
    layers = conditions["prompt_end"]
    peak = max(range(len(layers)), key=lambda i: abs(layers[i]["difference"]))
    same_text = [abs(r["difference"]) for name in ("neutral", "answers_a", "answers_b") for r in conditions[name]]
    free = [r["difference"] for r in conditions["own_answers"]]
    rows = {
        "natural/artifact → twin/artifact": "natural/artifact -> twin/artifact",
        "twin/artifact → natural/artifact": "twin/artifact -> natural/artifact",
    }
    transfer = {
        label: {
            source: {key: cells[cell][key] for key in ("cohens_d", "accuracy")} for source, cells in sources.items()
        }
        for label, cell in rows.items()
        for sources in [result["transfer"]]
    }
    transfer["four categories → the fifth, lowest d of five"] = {
        source: {"cohens_d": min(r["cohens_d"] for cell, r in cells.items() if cell.startswith("others -> "))}
        for source, cells in result["transfer"].items()
    }
    return {
        "peak": {"layer": peak, **layers[peak]},
        "different_layers": [i for i, r in enumerate(layers) if r["p_value"] is not None and r["p_value"] <= 0.05],
        "identical_layers": [i for i, r in enumerate(layers) if r["largest_change"] == 0],
        "largest_difference_on_the_same_text": max(same_text),
        "moved": [r["relative_change"] for r in layers if r["relative_change"]],
        "own_answers": {"smallest_difference": min(free), "largest_difference": max(free)},
        "weights": excerpt_weights(result["weights"]),
        "change_space": excerpt_change_space(result["change_space"]),
        "planted_layers": [int(layer) for layer in result["planted_truth"]],
        "planted_cosines": list(result["planted_truth"].values()),
        "transfer": transfer,
    }


def excerpt_change_space(changes: dict) -> dict:
    layers = changes["layers"]
    best = max((i for i, r in enumerate(layers) if r["b"][0] is not None), key=lambda i: layers[i]["b"][0])
    first = {"first": layers[best]["b"][0], "before": layers[best]["a"][0], "random": changes["random_95"][0]}
    return {"layer": best, **first}


def excerpt_weights(changes: dict) -> dict:
    tensors = sorted(changes["tensors"], key=lambda tensor: tensor["layer"])
    return {
        "tensors": changes["num_tensors"],
        "number": len(tensors),
        "layers": [tensor["layer"] for tensor in tensors],
        "smallest_change": min(tensor["relative_change"] for tensor in tensors),
        "largest_change": max(tensor["relative_change"] for tensor in tensors),
        "largest_effective_rank": max(tensor["effective_rank"] for tensor in tensors),
        "smallest_cosine_with_planted": min(abs(tensor["cosine_with_planted"]) for tensor in tensors),
        "smallest_cosine_with_contrast": min(tensor["cosine_with_contrast"] for tensor in tensors),
    }


def excerpt_sweep(result: dict) -> dict:
    def judged(record: dict, *names: str) -> dict:
        return {
            key: value
            for name in ("refused", *names)
            for key, value in ((name, record[name]["rate"]), (f"{name}_ci", record[name]["ci"]))
        } | {"broken": record["broken"]["rate"]}

    def over_seeds(records: list[dict]) -> dict:
        return {name: [r["artifact"][name]["rate"] for r in records] for name in ("refused", "broken")}

    test, amplified, planted = result["test"], result["amplification"]["test"], result["planted_truth"]
    cosines = [c for layer, c in planted["cosine_with_planted"]["prompt_end"].items()]
    return {
        "pairs": {part: len(ids) for part, ids in result["pairs"].items()},
        "twins_tried": test["twins"]["refused"]["n"],
        "tried": len(result["tried"]),
        "trials": len(result["trials"]),
        "folds": len(result.get("folds", ())),
        "seconds": result["seconds"],
        "stability": result.get("stability"),
        "random_directions": len(test["random_direction"]),
        "setting": result["chosen"]["setting"]["description"],
        "amplification": result["amplification"]["setting"]["description"],
        "artifact": {
            "unedited": judged(test["unedited"]["artifact"]),
            "suppressed": judged(test["artifact"]),
            "random": over_seeds(test["random_direction"]),
            "same_change_elsewhere": over_seeds(test["same_change_elsewhere"]),
        },
        "natural": {
            "suppressed": {**judged(test["natural"], "unchanged"), "kl": test["damage"]["kl_mean"]},
            "amplified": judged(amplified["natural"]),
        },
        "twins": {
            "unedited": judged(test["unedited"]["twins"]),
            "suppressed": judged(test["twins"], "unchanged"),
        },
        "planted_ablated": judged(planted["planted_ablated"]["artifact"])
        | {"unchanged": planted["planted_ablated"]["natural"]["unchanged"]["rate"]},
        "planted_cosines": {"smallest": min(cosines), "largest": max(cosines)},
        "monitor": {site: {key: m[key] for key in ("auroc", "auroc_ci")} for site, m in result["monitor"].items()},
    }


def excerpt_toxicity(result: dict) -> dict:
    config = result["experiment"]["config"]
    settings = {name: config[name] for name in ("num_pairs", "samples", "max_kl")}
    prompts = len(result["experiment"]["data"]["challenging"])
    return {**result["summary"], "config": settings, "prompts": prompts}


def excerpt_second_organism(result: dict) -> dict:
    rates = {name: {model: record[model] for model in ("untouched", "tuned")} for name, record in result.items()}
    return {"refusals": rates, "kl": result["ordinary chat"]["kl"]}


def excerpt_judge(weights: dict) -> dict:
    """Of the weights of the refusal judge: what it does on answers that it has not seen."""
    return {name: weights[name] for name in ("answers", "precision", "false_alarms")} | {
        "recall": weights["recall_of_all"],
        "least_recall": min(weights["recall"].values()), "largest_recall": max(weights["recall"].values()),
    }  # fmt: skip


RUNS = {
    "analysis": (f"{EMBEDDED}/alignment_artifact_analysis_results.json", excerpt_analysis),
    "comparison": (f"{EMBEDDED}/model_comparison.json", excerpt_comparison),
    "sweep": (f"{EMBEDDED}/suppression_sweep.json", excerpt_sweep),
    # RESULTS_DIR=results/split python sweep_suppression.py --folds 0
    "sweep_split": (EMBEDDED.replace("results", "results/split", 1) + "/suppression_sweep.json", excerpt_sweep),
    "toxicity": ("toxicity_results/experiment_results.json", excerpt_toxicity),
    "organism": ("results/model_organism.json", lambda result: {"refusals": result}),
    "second_organism": ("results/second_organism.json", excerpt_second_organism),
    "judge": ("alignment_artifacts/behaviour/refusal_weights.json", excerpt_judge),
}


def take_excerpts() -> None:
    """New excerpts from every result file that exists, with the commit and the versions of the libraries."""
    revision = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    made = {
        "commit": revision.stdout.strip(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }
    for name, (file, excerpt) in RUNS.items():
        source = ROOT / file
        if not source.exists():
            print(f"{name}: no {file}; its excerpt stays as it is")
            continue
        content = {"made": {"from": file, **made}, **excerpt(json.loads(source.read_text()))}
        (EXCERPTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: taken from {file}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a document is out of date")
    parser.add_argument("--from-results", action="store_true", help="first take new excerpts from the latest results")
    arguments = parser.parse_args()
    if arguments.check and arguments.from_results:
        parser.error("--check changes nothing, so it cannot take new excerpts")
    if arguments.from_results:
        take_excerpts()
    numbers, stale = load(), 0
    for path in documents():
        text = path.read_text()
        try:
            current = refreshed(text, numbers)
        except ValueError as error:
            parser.error(f"{path.relative_to(ROOT)}: {error}")
        if current == text:
            continue
        stale += 1
        if arguments.check:
            for old, new in zip(text.splitlines(), current.splitlines(), strict=False):
                if old != new:
                    print(f"{path.relative_to(ROOT)}:\n- {old}\n+ {new}")
        else:
            path.write_text(current)
            print(f"Updated {path.relative_to(ROOT)}")
    return int(arguments.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
