"""What each section of the report shows: from a result file to the values of the template."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np

from alignment_artifacts.behaviour.refusal import without_refusals
from alignment_artifacts.figures import interactive as figures
from alignment_artifacts.figures.data import POSITION_NAMES, description, layer_panels, on_their_side, step_grid
from alignment_artifacts.summary import records_of
from alignment_artifacts.suppression.transcripts import load_transcripts
from gemma_refactored.files import read_json

SCORE_STEP = 0.05  # the page rounds scores of tokens to this: one byte each, up to 6.35
MOST_TENSORS = 30  # rows of the table of weights
MOST_SCORE_BYTES = 6_000_000  # beyond that some layers are omitted
# What a reader wants to know at a glance, from the manifest.
FACTS = (
    "model", "model_revision", "num_parameters", "num_layers", "hidden_size", "weights_dtype", "max_tokens", "temp",
    "repetition_penalty", "seed", "chat_mode", "batch_size", "activation_filter", "activation_dtype", "prompts",
    "versions", "machine", "created",
)  # fmt: skip


def analysis(path: Path) -> dict:
    result = read_json(path, "results file")
    manifest = result["collection"]
    return {
        "origin": _origin(result),
        "figures": {"analysis": figure_data(figures.layer_scores(result))},
        "summary": result["summary"],
        "site": result["site"],
        "behaviour": result["behaviour"],
        "sides": result["sides"],
        "pairs": result["layer_scores"]["0"]["num_pairs"],
        "excluded": result["excluded"],
        "certificate": result["certificate"],
        "panels": {POSITION_NAMES[positions]: scores for positions, scores in layer_panels(result).items()},
        "baselines": _baselines(result),
        "nested": {POSITION_NAMES[positions]: records_of(result, positions)[1] for positions in result["controls"]},
        "independence": result["independence"],
        "power": result["power"],
        "settings": result["config"],
        "facts": {name: manifest[name] for name in FACTS if name in manifest},
        "manifest": json.dumps(manifest, indent=1, ensure_ascii=False),
        "can_be_repeated": "prompt_groups" in manifest,
    }


def _baselines(result: dict) -> dict[str, dict]:
    """What separates the prompts without any model, by name."""
    records = {f"words, {kind}": record for kind, record in result["word_baselines"].items()}
    return records | ({"length": result["length_baseline"]} if result["length_baseline"] else {})


def categories(path: Path) -> dict:
    result = read_json(path, "results file")
    scored = {name: c["layer_scores"] for name, c in result["categories"].items() if c["layer_scores"]}
    return {
        "origin": _origin(result),
        "figures": {"categories": figure_data(figures.categories(result))} if scored else {},
        "rows": {name: list(scores.values()) for name, scores in scored.items()},
        "differences": [r for r in result["differences"] if r["difference"] is not None],
        "left_out": {name: c["reason"] for name, c in result["categories"].items() if not c["layer_scores"]},
        "positions": result["positions"].replace("_", " "),
    }


def steps(path: Path) -> dict:
    result = read_json(path, "results file")
    return {
        "origin": _origin(result),
        "figures": {"steps": figure_data(figures.steps(result))} if step_grid(result)[0] else {},
        "first": result["first_significant_layer"],
        "peak": result["peak_layer"],
    }


def projections(path: Path) -> dict:
    result = read_json(path, "results file")
    return {
        "origin": _origin(result),
        "figures": {"projections": figure_data(figures.projections(result))},
        "positions": {name: len(layers) for name, layers in result["positions"].items()},
        "data": result["pairs"],
        "sides": result["sides"],
        "start": int(np.argmax([on_their_side(layer)[0] for layer in result["positions"]["prompt_end"]])),
    }


def comparison(path: Path) -> dict:
    result = read_json(path, "results file")
    return {
        "origin": _origin(result),
        "figures": {
            "comparison": figure_data(figures.comparison(result)),
            "weights": figure_data(figures.weights(result)),
            "transfer": figure_data(figures.transfer(result)),
        },
        "behaviour": result["behaviour"],
        "sides": result["sides"],
        "site": result["site"],
        "weights": result["weights"],
        "most_changed": MOST_TENSORS,
        "planted_weights": any("cosine_with_planted" in tensor for tensor in result["weights"]["tensors"]),
        "summary": result["summary"],
        "transfer_summary": result["transfer_summary"],
        "names": result["names"],
        "twins": result["num_twins"],
        "pairs": result["conditions"]["prompt_end"]["num_pairs"],
        "layers": result["conditions"]["prompt_end"]["layers"],
        "transfer": result["transfer"],
        "planted": result["planted_truth"],
    }


def transcripts(path: Path) -> dict:
    result, scores = load_transcripts(path.parent)
    rounded = np.clip(np.rint(scores.astype(np.float32) / SCORE_STEP), -127, 127).astype(np.int8)
    before = result["refused"]["artifact"]["before"]
    every = -(-rounded.size // MOST_SCORE_BYTES)
    layers = list(range(0, rounded.shape[1], every))
    by_layer = np.ascontiguousarray(rounded[:, layers].T)
    return {
        "origin": _origin(result),
        "figures": {},
        "setting": description(result["setting"]),
        "chosen_by": result["chosen_by"],
        "refused": result["refused"],
        "without_refusals": without_refusals(result["origin"]["model"], before["hits"], before["n"]),
        "layers": layers,
        "start": min(layers, key=lambda layer: abs(layer - result["best_layer"])),
        "every": every,
        "categories": list(dict.fromkeys(pair["category"] for pair in result["pairs"])),
        "pairs": len(result["pairs"]),
        "data": {
            "pairs": result["pairs"],
            "pieces": result["pieces"],
            "layers": layers,
            "step": SCORE_STEP,
            "scores": base64.b64encode(by_layer.tobytes()).decode(),
        },
    }


def sweep(path: Path) -> dict:
    result = read_json(path, "results file")
    test = result["test"]
    rows = [
        ("artifact prompts, unedited", test["unedited"]["artifact"], None),
        ("artifact prompts, suppressed", test["artifact"], None),
        ("natural prompts, suppressed", test["natural"], test["damage"]),
        ("benign twins, unedited", test["unedited"]["twins"], None),
        ("benign twins, suppressed", test["twins"], None),
    ]
    for name, label in (
        ("random_direction", "artifact prompts, random direction"),
        ("same_change_elsewhere", "artifact prompts, same change in a random direction"),
    ):
        rows += [(label, control["artifact"], control["damage"]) for control in test[name][:1]]
    amplified = result["amplification"]["test"]
    rows.append(("natural prompts, amplified", amplified["natural"], amplified["damage"]))
    return {
        "origin": _origin(result),
        "figures": {"sweep": figure_data(figures.sweep(result))},
        "setting": description(result["chosen"]["setting"]),
        "tried": len(result["tried"]),
        "without_refusals": result.get("without_refusals"),
        "pairs": {part: len(names) for part, names in result["pairs"].items()},
        "rows": rows,
        "monitor": {site: m for site, m in result["monitor"].items() if m["auroc"] is not None},
    }


def toxicity(path: Path) -> dict:
    result = read_json(path, "results file")
    names = {"baseline": "unsteered", "steered": "steered", "random_direction": "random direction"}
    return {
        "origin": {name: str(result["experiment"][name]) for name in ("model", "model_revision")},
        "figures": {"toxicity": figure_data(figures.toxicity(result))},
        "summary": result["summary"],
        "scorer": result["experiment"]["scorer"],
        "rows": [(label, result["summary"][name]) for name, label in names.items()],
    }


def figure_data(figure) -> dict:
    """A Plotly figure as plain data."""
    return json.loads(figure.to_json())


def _origin(result: dict) -> dict:
    """What the results belong to, see `places.Origin`."""
    return {name: str(result["origin"][name]) for name in ("model", "model_revision", "pairs_file", "pairs_hash")}
