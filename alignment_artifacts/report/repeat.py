"""The commands that make the results on a page again, to be typed in the repository's folder."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from alignment_artifacts import places
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.edits.options import ModeOptions, Setting
from alignment_artifacts.pairs import PAIRS_JSON, Pair, PromptPairs, pairs_content
from alignment_artifacts.scores import NAMES, Settings
from gemma_refactored.configuration import Chat
from gemma_refactored.settings import record

from .contents import contrast

COLLECTION = "NEW"  # folder of the activations that are collected again
CONSTANTS = ("num_permutations", "num_bootstrap_resamples", "seed")  # that scripts take


@dataclass(frozen=True)
class Experiment:
    """What a page is about, as people type it; None: the default, or not known."""

    model: str | None = None
    adapter: str | None = None
    pairs: str | None = None
    manifest: str | None = None
    site: str | None = None
    chat: Chat = Chat()

    def options(self, model: str = "--model") -> list[str]:
        return [*self.model_options(model), *_option("--pairs", self.pairs)]

    def model_options(self, model: str = "--model") -> list[str]:
        """Of the model, with its adapter and what is written around its prompts."""
        adapter = "--adapter-b" if model == "--model-b" else "--adapter"
        return [*_option(model, self.model), *_option(adapter, self.adapter), *_options(asdict(self.chat))]


def experiment(sections: dict[str, dict], origin: dict) -> Experiment:
    """From the analysis, which alone knows where model, pairs and collection are."""
    analysis = sections["analysis"]
    if not analysis["available"]:
        return Experiment()
    config = analysis["settings"]
    pairs, collected = config.get("ORIGINAL_PAIRS_JSON_FOR_ITERATION"), config.get("RAW_ACTIVATIONS_BASE_DIR")
    return Experiment(
        _typed_model(analysis["manifest"].get("model_path")),
        _typed_model(analysis["manifest"].get("adapter_path")),
        None if pairs in (None, places.recorded(PAIRS_JSON)) else pairs,
        f"{collected}/manifest.json" if collected else None,
        origin.get("site"),
        Chat(**{name: analysis["manifest"].get(name) for name in asdict(Chat())}),
    )


def _typed_model(path: str | None) -> str | None:
    if path is None or path == DEFAULT_MODEL:
        return None
    return places.recorded(path) if Path(path).is_absolute() else path


def commands(of: Experiment, sections: dict[str, dict], several: dict[str, list[dict]]) -> list[str]:
    """One for each kind of results, in the order in which they build on each other."""
    lines = []
    if sections["analysis"]["available"] and sections["analysis"]["can_be_repeated"]:
        manifest = of.manifest or "manifest.json"
        lines.append(["run_model.py", "--from-manifest", manifest, "--activations-dir", COLLECTION])
        lines.append(_analysis(of, sections["analysis"]["settings"]))
    comparison = sections["comparison"]
    if comparison["available"] and comparison["repeat"]["typed"]:  # earlier versions have not kept it
        lines.append(_comparison(**comparison["repeat"]))
    for section in several["transcripts"]:
        if section["available"] and _can_be_named(section["score"]):
            lines.append(_transcripts(of, section))
    for section in several["sweep"]:
        if section["available"] and _can_be_named(section["score"]):
            lines.append(_sweep(of, section))
    if sections["vocabulary"]["available"]:
        lines.append(["suppress.py", "--explain", *of.options()])
    lines.append(["-m", "alignment_artifacts.report"])
    return [shlex.join(["python", *line]) for line in lines]


def pairs_file(sections: dict[str, dict], origin: dict) -> tuple[str, dict] | None:
    """Name and content of a file of the pairs, for whoever has nothing but the page."""
    if not sections["projections"]["available"]:
        return None
    behaviour, (first, second) = contrast(origin)
    pairs = PromptPairs([Pair(**pair) for pair in sections["projections"]["data"]], behaviour, (first, second))
    return f"{Path(origin['pairs_file']).stem}.json", pairs_content(pairs)


def _analysis(of: Experiment, config: dict) -> list[str]:
    line = ["analyze_collected_activations.py", "--raw-activations-base-dir", COLLECTION, *_option("--pairs", of.pairs)]
    if of.site in ("mlp", "attention", "residual"):
        line += ["--site", of.site]
    elif of.site:
        line += ["--key-pattern-template", of.site]
    return [*line, *_statistics(config)]


def _comparison(typed: dict, config: dict) -> list[str]:
    named = {name: config.get(name) for name in ("site", "max_tokens", "neutral_text")}
    return ["compare_models.py", *_options({**typed, **named}), *_statistics(config)]


def _statistics(config: dict) -> list[str]:
    """Settings of the statistics, of those in CONSTANTS that are not the usual ones."""
    usual = record(Settings(), NAMES)
    inner = {outer: name for name, outer in NAMES.items()}
    values = {name: config.get(inner.get(name, name), usual[name]) for name in CONSTANTS}
    return _options({name: value for name, value in values.items() if value != usual[name]})


def _transcripts(of: Experiment, section: dict) -> list[str]:
    setting = Setting.from_record(section["repeat"]["setting"])
    line = ["suppress.py", "--all-pairs", *of.options(), "--mode", setting.mode, f"--scale={setting.scale:g}"]
    line += ["--layers", ",".join(map(str, setting.layers))]
    for name in ("site", "positions", "where"):
        line += [f"--{name}", getattr(setting, name)]
    if setting.direction_layer is not None:
        line.append(f"--direction-layer={setting.direction_layer}")
    if setting.edit_sinks:
        line.append("--edit-sinks")
    usual = ModeOptions()
    for field in fields(usual):
        value = getattr(setting.options, field.name)
        if value != getattr(usual, field.name):
            line += _option(f"--{field.name.replace('_', '-')}", value)
    return [*line, *_option("--max-tokens", section["repeat"]["max_tokens"]), *_score(section)]


def _sweep(of: Experiment, section: dict) -> list[str]:
    config = section["repeat"]["config"]
    line = ["sweep_suppression.py", *of.options("--model-name"), *_score(section), *_option("--wish", section["wish"])]
    for name in ("folds", "shares", "max_tokens", "seed", "random_controls"):
        line += _option(f"--{name.replace('_', '-')}", config.get(name))
    for name, value in config["limits"].items():
        line += _option(f"--limits-{name}", value)
    line += ["--edit-sinks"] if config.get("edit_sinks") else []
    return [*line, *config.get("options", [])]


def _can_be_named(score: dict | None) -> bool:
    return score is None or bool(score.get("typed"))


def _score(section: dict) -> list[str]:
    return _option("--score", section["score"]["typed"]) if section["score"] else []


def _options(values: Mapping[str, object]) -> list[str]:
    """Args: values: field -> value."""
    return [text for name, value in values.items() for text in _option(f"--{name.replace('_', '-')}", value)]


def _option(flag: str, value: object) -> list[str]:
    if value is None:
        return []
    text = ",".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)
    return [flag, text]
