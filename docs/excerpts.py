"""What the documents need of the results of runs, taken into docs/results: see update_numbers.py --from-results."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXCERPTS = ROOT / "docs" / "results"
EMBEDDED = "results/aligned/alignment_artifact_prompt_pairs/data"
PACKAGES = ("mlx", "mlx-lm", "numpy", "transformers")


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
        "length_regressed": result["controls"]["prompt_end"]["length_regressed"],
        "independence": result["independence"],
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
            source: {key: cells[cell][key] for key in ("cohens_d", "accuracy", "kind") if key in cells[cell]}
            for source, cells in sources.items()
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


def excerpt_real_comparison(result: dict) -> dict:
    layers = result["conditions"]["prompt_end"]["layers"]
    cells = {
        "pairs": "natural/artifact -> natural/artifact",
        "to_twins": "natural/artifact -> twin/artifact",
        "from_twins": "twin/artifact -> natural/artifact",
    }
    peak = max(range(len(layers)), key=lambda i: abs(layers[i]["difference"]))
    return {
        "peak": {"layer": peak, **layers[peak]},
        "different_layers": [i for i, r in enumerate(layers) if r["p_value"] is not None and r["p_value"] <= 0.05],
        "identical_layers": [i for i, r in enumerate(layers) if r["largest_change"] == 0],
        "change_space": excerpt_change_space(result["change_space"]),
        "transfer": {
            name: {source: records[cell] for source, records in result["transfer"].items()}
            for name, cell in cells.items()
        },
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

    test, amplified = result["test"], result["amplification"]["test"]
    excerpt = {
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
            "unedited": judged(test["unedited"]["natural"]),
            "suppressed": {**judged(test["natural"], "unchanged"), "kl": test["damage"]["kl_mean"]},
            "amplified": judged(amplified["natural"]),
        },
        "twins": {
            "unedited": judged(test["unedited"]["twins"]),
            "suppressed": judged(test["twins"], "unchanged"),
        },
        "monitor": {
            site: {key: m[key] for key in ("auroc", "auroc_ci")}
            | {of: m[of] for of in ("within_artifact", "twins") if of in m}
            for site, m in result["monitor"].items()
        },
    }
    if planted := result.get("planted_truth"):
        cosines = list(planted["cosine_with_planted"]["prompt_end"].values())
        excerpt["planted_ablated"] = judged(planted["planted_ablated"]["artifact"])
        excerpt["planted_ablated"]["unchanged"] = planted["planted_ablated"]["natural"]["unchanged"]["rate"]
        excerpt["planted_cosines"] = {"smallest": min(cosines), "largest": max(cosines)}
    return excerpt


def excerpt_toxicity(result: dict) -> dict:
    config = result["experiment"]["config"]
    settings = {name: config[name] for name in ("num_pairs", "samples", "max_kl")}
    return {**result["summary"], "config": settings, "parts": result["parts"]}


def excerpt_second_organism(result: dict) -> dict:
    kinds = ("untouched", "tuned", "suppressed", "broken")
    rates = {
        name.replace(" ", "_"): {kind: record[kind] for kind in kinds if kind in record}
        for name, record in result.items()
    }
    return {"refusals": rates, "kl": result["ordinary chat"]["kl"]}


def excerpt_judge(weights: dict) -> dict:
    """Of the weights of the refusal judge: what it does on answers that it has not seen."""
    names = ("answers", "recall_of_inventive")
    return {name: weights[name] for name in names} | {
        "recall": weights["recall_of_all"],
        "least_recall": min(weights["recall"].values()), "largest_recall": max(weights["recall"].values()),
        "false_alarms": {
            name: weights["false_alarms"][of]
            for name, of in (
                ("folds", "all, ten folds"), ("good", "blind: compliant"), ("five", "blind: five models"),
                ("alarming", "blind: alarming words"),
            )
        },
    }  # fmt: skip


REAL = "results/SmolLM2-135M-Instruct.Q4_1.gguf_adapter_*/pairs{}/data"  # what `make real` writes
RUNS = {
    "analysis": (f"{EMBEDDED}/alignment_artifact_analysis_results.json", excerpt_analysis),
    "comparison": (f"{EMBEDDED}/model_comparison.json", excerpt_comparison),
    "sweep": (f"{EMBEDDED}/suppression_sweep.json", excerpt_sweep),
    "toxicity": ("toxicity_results/experiment_results.json", excerpt_toxicity),
    "organism": ("results/model_organism.json", lambda result: {"refusals": result}),
    "second_organism": ("results/second_organism.json", excerpt_second_organism),
    "real_analysis": (f"{REAL.format('_residual')}/alignment_artifact_analysis_results.json", excerpt_analysis),
    "real_comparison": (f"{REAL.format('_residual')}/model_comparison.json", excerpt_real_comparison),
    "real_sweep": (f"{REAL.format('')}/suppression_sweep.json", excerpt_sweep),
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
        source = max(ROOT.glob(file), key=lambda path: path.stat().st_mtime, default=None)
        if source is None:
            print(f"{name}: no {file}; its excerpt stays as it is")
            continue
        content = {"made": {"from": file, **made}, **excerpt(json.loads(source.read_text()))}
        (EXCERPTS / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: taken from {source.relative_to(ROOT)}")
