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
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from alignment_artifacts.formatting import least_to_most, signed_percent
from alignment_artifacts.summary import toxicity_rows

ROOT = Path(__file__).resolve().parent.parent
EXCERPTS = ROOT / "docs" / "results"
BENCHMARKS = {
    "speed": "results", "scaling": "analysis_scaling", "simulated_d": "simulated_cohens_d",
    "simulated_comparison": "simulated_model_comparison", "simulated_coverage": "simulated_coverage",
    "architectures": "architectures",
}  # fmt: skip
DOCUMENTS = ("*.md", "docs/*.md", "toxicity_steering/*.md", "gemma_refactored/*.md")
MARKER = re.compile(r"<!--=([^>\s]+)(?: ([^>]+?))?-->(.*?)<!--=-->", re.DOTALL)

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
    if value is None and spec.startswith("["):
        return "(no interval)"
    if isinstance(value, list) and spec.startswith("["):
        separator = "-" if "%" in spec else ", "
        return f"[{separator.join(printed(v, spec[1:-1]).removesuffix('%') for v in value)}]"
    if isinstance(value, list):
        words = [printed(v, spec) for v in value]
        return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if spec.endswith("%"):
        return f"{100 * value:{spec[:-1]}.0f}%"
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
    return low if low == high else f"{low.removesuffix('%')}-{high}"


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
        "untrained_forms": "artifact requests of forms and topics that training does not have",
        "natural": "natural prompts of the held-out pairs",
        "twins": "harmless twins",
        "ordinary_chat": "ordinary chat",
        "other_twins": "XSTest's safe prompts",
        "what_they_look_like": "the unsafe ones that they look like",
    }
    rates = numbers["second_organism"]["refusals"]

    def refused(rate: dict) -> str:
        return f"{printed(rate['rate'], '%')} {printed(rate['ci'], '[%]')}"

    models = ("untouched", "tuned", "suppressed")  # the last only on what the sweep has not seen
    rows = {
        label: [rates[name]["untouched"]["n"], *(refused(rates[name][m]) if m in rates[name] else "" for m in models)]
        for name, label in names.items()
        if name in rates  # other people's twins only where a run was given some
    }
    return refusals_table("model_organism.smollm2.evaluate", models, rows)


def refusals_table(module: str, models: Sequence[str], rows: dict[str, list]) -> str:
    """What a module has measured: by kind of request, how many there are and what each model refuses."""
    header = [f"requests (`python -m {module}`)", "n", *(f"{model} refuses" for model in models)]
    return table(header, [[label, *map(str, cells)] for label, cells in rows.items()])


@computed
def transfer_table(numbers: dict) -> str:
    rows = []
    for cell, by_source in numbers["comparison"]["transfer"].items():
        shares = [
            printed(r["cohens_d"], ".1f")
            + (f" ({printed(r['accuracy'], '%')})" if "accuracy" in r else "")
            + (f", {r['kind']}" if "kind" in r else "")
            for r in by_source.values()
        ]
        rows.append([cell, *shares])
    return table(["learnt on → tested on", "before", "after", "word choice"], rows)


@computed
def sweep_table(numbers: dict) -> str:
    return suppression_table(numbers["sweep"])


@computed
def real_untouched_until(numbers: dict) -> int:
    return numbers["real_comparison"]["identical_layers"][-1]


@computed
def real_random_directions(numbers: dict) -> str:
    return span(numbers["real_sweep"]["artifact"]["random"]["refused"], "%")


@computed
def real_random_changes(numbers: dict) -> str:
    return span(numbers["real_sweep"]["artifact"]["same_change_elsewhere"]["refused"], "%")


@computed
def real_random_changes_broken(numbers: dict) -> str:
    return span(numbers["real_sweep"]["artifact"]["same_change_elsewhere"]["broken"], "%")


@computed
def sweep_random_changes(numbers: dict) -> str:
    return span(numbers["sweep"]["artifact"]["same_change_elsewhere"]["refused"], "%")


@computed
def real_sweep_table(numbers: dict) -> str:
    return suppression_table(numbers["real_sweep"])


def suppression_table(sweep: dict) -> str:
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
            *([judged("natural prompts, unedited", natural["unedited"])] if "unedited" in natural else []),
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
def architectures_table(numbers: dict) -> str:
    """Seconds of ours and of transformers with hooks at its best batch size, by model."""
    rows = []
    for name, result in numbers["architectures"]["models"].items():
        seconds = dict(result["seconds"])
        ours, best = seconds.pop("ours"), min(seconds.values())
        rows.append([name, printed(ours, ".1f"), printed(best, ".1f"), printed(ours / best, ".2f")])
    return table(["whole process, seconds", "this repository", "transformers + hooks, best batch", "ratio"], rows)


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
    return table(["true d", "held-out d (ours)", "95% interval", "in-sample d", "mean shift ratio"], rows)


def share_span(shares: list[float]) -> str:
    low, high = printed(min(shares), "%"), printed(max(shares), "%")
    return low if low == high else f"{low.removesuffix('%')} to {high}"


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
    return share_span([row["found"] for row in rows if abs(row["true difference"]) < 0.1])


def _medians(numbers: dict, prefix: str) -> float:
    return min(v["seconds"] for name, v in numbers["speed"]["medians"].items() if name.startswith(prefix))


@computed
def toxicity_table(numbers: dict) -> str:
    result = numbers["toxicity"]
    rows = [[label, mean, change] for label, mean, _, change in toxicity_rows(result)]
    return table([f"{result['parts']['test']['prompts']} test prompts", "mean toxicity", "change"], rows)


@computed
def toxicity_reduction(numbers: dict) -> float:
    return -numbers["toxicity"]["steered"]["change"]["mean"]


@computed
def toxicity_reduction_ci(numbers: dict) -> list[float]:
    return [-end for end in reversed(numbers["toxicity"]["steered"]["change"]["ci"])]


@computed
def toxicity_of_controls(numbers: dict) -> str:
    """Change of mean toxicity under every control."""
    controls = (numbers["toxicity"][name] for name in ("random_direction", "same_change_elsewhere"))
    return least_to_most([record["change"]["mean"] for records in controls for record in records], signed_percent)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a document is out of date")
    parser.add_argument("--from-results", action="store_true", help="first take new excerpts from the latest results")
    arguments = parser.parse_args()
    if arguments.check and arguments.from_results:
        parser.error("--check changes nothing, so it cannot take new excerpts")
    if arguments.from_results:
        from excerpts import take_excerpts  # beside this script

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
