"""What each section of the report shows: from a result file to the values of the template."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np

from alignment_artifacts.behaviour.refusal import NAME, without_refusals
from alignment_artifacts.figures import interactive as figures
from alignment_artifacts.figures.data import (
    POSITION_NAMES,
    description,
    layer_panels,
    on_their_side,
    sides_of,
    step_grid,
)
from alignment_artifacts.formatting import typeset
from alignment_artifacts.pairs import REFUSAL, SIDES
from alignment_artifacts.summary import records_of, toxicity_rows
from alignment_artifacts.suppression.sweep import moves_as_wished
from alignment_artifacts.suppression.transcripts import load_transcripts
from gemma_refactored.files import read_json
from gemma_refactored.site_names import KIND_WORDS

SCORE_STEP = 0.05  # the page rounds scores of tokens to this: one byte each, up to 6.35
MOST_TENSORS = 30  # rows of the table of weights
MOST_SCORE_BYTES = 6_000_000  # beyond that some layers are omitted
TOKENS_SHOWN = 5  # of the tokens that a direction promotes, say
# What a reader wants to know at a glance: its name in the manifest -> on the page.
FACTS = {
    "model": "model", "model_revision": "revision", "num_parameters": "parameters", "num_layers": "layers",
    "hidden_size": "hidden size", "weights_dtype": "type of the weights", "max_tokens": "tokens of an answer, at most",
    "temp": "temperature", "repetition_penalty": "repetition penalty", "seed": "seed", "chat_mode": "chat format",
    "batch_size": "batch size", "activation_filter": "sites", "activation_dtype": "type of the activations",
    "prompts": "prompts", "versions": "versions", "machine": "machine", "created": "created",
}  # fmt: skip


def analysis(path: Path) -> dict:
    result = read_json(path, "results file")
    manifest = result["collection"]
    return {
        "origin": _origin(result),
        "figures": {"analysis": figure_data(figures.layer_scores(result))},
        "summary": result["summary"],
        "site": result["site"],
        "pairs": result["layer_scores"]["0"]["num_pairs"],
        "excluded": result["excluded"],
        "certificate": result["certificate"],
        "panels": {POSITION_NAMES[positions]: scores for positions, scores in layer_panels(result).items()},
        "has_words": bool(result["lexical_baseline"]) and result["lexical_baseline"]["cohens_d"] is not None,
        "baselines": _baselines(result),
        "nested": {POSITION_NAMES[positions]: records_of(result, positions)[1] for positions in layer_panels(result)},
        "independence": result["independence"],
        "power": result["power"],
        "settings": result["config"],
        "facts": {title: manifest[name] for name, title in FACTS.items() if name in manifest},
        "manifest": manifest,
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
        "start": int(np.argmax([on_their_side(layer)[0] for layer in result["positions"]["prompt_end"]])),
    }


def comparison(path: Path) -> dict:
    result = read_json(path, "results file")
    return {
        "origin": _origin(result),
        "figures": {
            "comparison": figure_data(figures.comparison(result)),
            "weights": figure_data(figures.weights(result)),
            "change_space": figure_data(figures.change_space(result)),
            "transfer": figure_data(figures.transfer(result)),
        },
        "behaviour": result["behaviour"],
        "sides": result["sides"],
        "site": result["site"],
        "weights": result["weights"],
        "most_changed": MOST_TENSORS,
        "change_space": result["change_space"],
        "planted_weights": any("cosine_with_planted" in tensor for tensor in result["weights"]["tensors"]),
        "summary": result["summary"],
        "transfer_summary": result["transfer_summary"],
        "names": result["names"],
        "twins": result["num_twins"],
        "pairs": result["conditions"]["prompt_end"]["num_pairs"],
        "layers": result["conditions"]["prompt_end"]["layers"],
        "transfer": result["transfer"],
        "planted": result["planted_truth"],
        "repeat": {"typed": result.get("typed"), "config": result.get("config")},
    }


def transcripts(path: Path) -> dict:
    result, scores = load_transcripts(path)
    rounded = np.clip(np.rint(scores.astype(np.float32) / SCORE_STEP), -127, 127).astype(np.int8)
    every = -(-rounded.size // MOST_SCORE_BYTES)
    layers = list(range(0, rounded.shape[1], every))
    by_layer = np.ascontiguousarray(rounded[:, layers].T)
    return {
        "origin": _origin(result),
        "figures": {},
        "setting": description(result["setting"]),
        "chosen_by": result["chosen_by"],
        "site": KIND_WORDS.get(result["setting"]["site"], result["setting"]["site"]),
        "score": _score(result),
        "measured": result["scored" if "score" in result else "refused"],
        "judge": result.get("judge"),
        "corrected": result.get("refused_corrected"),
        "without_refusals": _too_few_refusals(result),
        "repeat": {name: result[name] for name in ("setting", "max_tokens")},
        "layers": layers,
        "start": min(layers, key=lambda layer: abs(layer - result["best_layer"])),
        "every": every,
        "categories": list(dict.fromkeys(pair["category"] for pair in result["pairs"])),
        "pairs": len(result["pairs"]),
        "data": {
            "pairs": result["pairs"],
            "pieces": result["pieces"],
            "layers": layers,
            "score": result["score"]["name"] if "score" in result else None,
            "step": SCORE_STEP,
            "scores": base64.b64encode(by_layer.tobytes()).decode(),
        },
    }


def _score(result: dict) -> dict | None:
    """What was measured instead of refusals; its meaning stands within sentences."""
    score = result.get("score")
    return score and {**score, "meaning": score["meaning"].removesuffix(".")}


def _too_few_refusals(result: dict) -> str | None:
    if "score" in result or result["origin"].get("behaviour", REFUSAL) != REFUSAL:
        return None
    before = result["refused"]["artifact"]["before"]
    return without_refusals(result["origin"]["model"], before["hits"], before["n"])


def sweep(path: Path) -> dict:
    result = read_json(path, "results file")
    (first, second), test, score = sides_of(result), result["test"], _score(result)
    suppressed = "edited" if score else "suppressed"
    rows = [
        (f"{second} prompts, unedited", test["unedited"]["artifact"], None),
        (f"{second} prompts, {suppressed}", test["artifact"], None),
        (f"{first} prompts, unedited", test["unedited"]["natural"], None),
        (f"{first} prompts, {suppressed}", test["natural"], test["damage"]),
    ]
    if "twins" in test:
        rows += [
            ("benign twins, unedited", test["unedited"]["twins"], None),
            (f"benign twins, {suppressed}", test["twins"], None),
        ]
    for name, label in (
        ("random_direction", f"{second} prompts, random direction"),
        ("same_change_elsewhere", f"{second} prompts, same change in a random direction"),
    ):
        rows += [(label, control["artifact"], control["damage"]) for control in test[name][:1]]
    opposite, other_way = "the other way" if score else "amplified", result["amplification"]["test"]
    rows.append((f"{first} prompts, {opposite}", other_way["natural"], other_way["damage"]))
    return {
        "origin": _origin(result),
        "figures": {"sweep": figure_data(figures.sweep(result))},
        "setting": description(result["chosen"]["setting"]),
        "tried": len(result["tried"]),
        "trials": len(result.get("trials", ())),
        "folds": [{**fold, "setting": description(fold["setting"])} for fold in result.get("folds", ())],
        "stability": result.get("stability"),
        "without_refusals": result.get("without_refusals"),
        "score": score,
        "judge": NAME,
        "wish": result.get("wish"),
        "fails": score is not None and not moves_as_wished(result),
        "repeat": {"config": result["config"]},
        "pairs": {part: len(names) for part, names in result["pairs"].items()},
        "rows": rows,
        "controls": {
            label: [min(moved), max(moved), len(moved)]
            for name, label in (("random_direction", "random direction"), ("same_change_elsewhere", "equal change"))
            if (moved := [control["artifact"]["moved"]["mean"] for control in test[name] if score])
        },
        "monitor": {site: m for site, m in result.get("monitor", {}).items() if m["auroc"] is not None},
    }


def vocabulary(path: Path) -> dict:
    result = read_json(path, "results file")
    columns, rows = ("promoted", "demoted", "steered"), []
    for record in result["layers"]:
        for number, direction in enumerate([record, *record["random"]]):
            tokens = {name: [token["token"] for token in direction[name][:TOKENS_SHOWN]] for name in columns}
            rows.append({"layer": record["layer"], "drawn": number, "agreement": direction["agreement"], **tokens})
    return {
        "origin": _origin(result),
        "figures": {},
        "rows": rows,
        **{name: result[name] for name in ("prompts", "scale")},
        "positions": POSITION_NAMES.get(result["positions"], result["positions"]),
    }


def toxicity(path: Path) -> dict:
    result = read_json(path, "results file")
    return {
        "origin": {name: str(result["experiment"][name]) for name in ("model", "model_revision")},
        "figures": {"toxicity": figure_data(figures.toxicity(result))},
        "summary": result["summary"],
        "scorer": result["experiment"]["scorer"],
        "parts": result["parts"],
        "rows": [tuple(map(typeset, row)) for row in toxicity_rows(result["summary"])],
    }


def figure_data(figure) -> dict:
    """A Plotly figure as plain data."""
    return json.loads(figure.to_json())


def _origin(result: dict) -> dict:
    """What the results belong to, see `places.Origin`; results of earlier versions do not say all of it."""
    origin = result["origin"]
    known = {name: str(origin[name]) for name in ("model", "model_revision", "pairs_file", "pairs_hash")}
    named = {name: origin.get(name) or result.get(name) for name in ("behaviour", "sides")}
    return {**known, **named, "site": origin.get("site")}


def contrast(origin: dict) -> tuple[str, list[str]]:
    """Behaviour and sides."""
    return str(origin.get("behaviour") or REFUSAL), [str(side) for side in origin.get("sides") or SIDES]
