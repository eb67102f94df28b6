"""One HTML file that shows what a run found: self-contained, for reading offline and for mailing.

Everything on the page comes from the result files; a section without results names the command that produces them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from alignment_artifacts import formatting, places
from alignment_artifacts.behaviour.vocabulary import VOCABULARY
from alignment_artifacts.pairs import REFUSAL
from gemma_refactored.errors import UserError
from gemma_refactored.files import write_atomically
from gemma_refactored.site_names import KIND_WORDS

from . import contents, repeat

# What results of an unexpected shape raise, in Python and in the template.
WRONG_CONTENT = (KeyError, TypeError, ValueError, IndexError, AttributeError, UndefinedError)
ANALYSE = "python analyze_collected_activations.py"


@dataclass(frozen=True)
class Source:
    """A section of the report: where its numbers are, which command makes them, what the page takes from them.

    Attributes:
        file: below the folder of results.
        others: further files of the kind, by a glob, each shown by itself.
        is_of_site: it was measured at one site; what is not may lie in the folder of another site.
    """

    name: str
    file: str
    command: str
    prepare: Callable[[Path], dict]
    others: str | None = None
    is_of_site: bool = True


SOURCES = (
    Source("analysis", f"data/{places.ANALYSIS}", ANALYSE, contents.analysis),
    Source("categories", "data/alignment_artifacts_by_category.json", ANALYSE, contents.categories),
    Source("steps", "data/layer_analysis.json", ANALYSE, contents.steps),
    Source("projections", "data/projections.json", ANALYSE, contents.projections),
    Source("comparison", "data/model_comparison.json", "python compare_models.py", contents.comparison),
    Source(
        "transcripts", "data/transcripts.json", "python suppress.py --all-pairs", contents.transcripts,
        others="data/transcripts_*.json", is_of_site=False,
    ),
    Source(
        "sweep", "data/suppression_sweep.json", "python sweep_suppression.py", contents.sweep,
        others="data/suppression_sweep_*.json", is_of_site=False,
    ),
)  # fmt: skip
EXPLAINED = Source(
    "vocabulary", f"data/{VOCABULARY}", "python suppress.py --explain", contents.vocabulary, is_of_site=False
)
TOXICITY_COMMAND = "python -m toxicity_steering.main"


def build(folder: str | Path) -> str:
    """The report on a folder of results, as HTML.

    Raises:
        UserError: there are no results at all, or a file was not written by this version.
    """
    folder = Path(folder)
    several = {source.name: _sections(source, folder) for source in (*SOURCES, EXPLAINED)}
    everything = [section for sections in several.values() for section in sections]
    main = next((section["origin"] for section in everything if section["available"]), None)
    if main is None:
        raise UserError(
            f"There are no results in {folder.resolve()} to report on; run `bash collect_activations.sh` and "
            f"`{ANALYSE}` first."
        )
    try:
        return _page(several, main)
    except WRONG_CONTENT as error:
        raise UserError(f"Some results were not written by this version ({error}); run `make` again.") from None


def _page(several: dict[str, list[dict]], main: dict) -> str:
    """Args: main: what the page is about."""
    behaviour, sides = contents.contrast(main)
    # The second experiment needs no pairs: it belongs to the model alone, and is not for every page.
    toxicity = Source("toxicity", "", TOXICITY_COMMAND, contents.toxicity)
    path = places.toxicity_results(main["model_revision"], main["model"]) if behaviour == REFUSAL else None
    several = {**several, "toxicity": [_section(toxicity, path)]}
    several = {name: [_only_of(main, section) for section in found] for name, found in several.items()}
    available = [section for found in several.values() for section in found if section["available"]]
    sections = {name: found[0] for name, found in several.items()}
    typed = repeat.experiment(sections, main)
    _complete_commands(several, typed, behaviour)
    files = repeat.pairs_file(sections, main)
    for_script: dict = {section["name"]: section["data"] for section in available if "data" in section}
    for_script["transcripts"] = [
        {"data": section["data"], "suffix": section["key"].removeprefix("transcripts")}
        for section in several["transcripts"]
        if section["available"]
    ]
    for_script["figures"] = {
        name if section["key"] == section["name"] else section["key"]: figure
        for section in available
        for name, figure in section["figures"].items()
    }
    return _render(
        sections=sections,
        several=several,
        behaviour=behaviour,
        sides=sides,
        is_about_refusal=behaviour == REFUSAL,
        title=f"{'Alignment artifacts' if behaviour == REFUSAL else behaviour.capitalize()} in {main['model']}",
        commands=repeat.commands(typed, sections, several),
        pairs_name=files[0] if files else None,
        data={"sides": sides, "pairs": files, "manifest": sections["analysis"].get("manifest"), **for_script},
    )


def _sections(source: Source, folder: Path) -> list[dict]:
    """One for each of its files; one that is not available if there is none."""
    if source.is_of_site:
        paths = [folder / source.file]
    else:
        paths = [path for name in (source.file, source.others) if name for path in places.result_files(folder, name)]
    return [
        {**_section(source, path), "key": source.name + (f"-{number}" if number else "")}
        for number, path in enumerate(paths or [None])
    ]


def _only_of(main: dict, section: dict) -> dict:
    """The section, if it belongs to what the page is about; else sentences that say how it differs."""
    differences = _differences(section["origin"], main, section["is_of_site"]) if section["available"] else []
    if not differences:
        return section
    return {**section, "available": False, "left_out": differences}


def _differences(origin: dict, main: dict, is_of_site: bool) -> list[str]:
    """In sentences, how a section's model, pairs or site differ from those that the page is about."""
    sentences = []
    if origin["model_revision"] != main["model_revision"]:
        model = f"{origin['model']} ({places.short(origin['model_revision'])})"
        sentences.append(f"Computed with different weights from the collection above: {model}.")
    if origin.get("pairs_hash", main["pairs_hash"]) != main["pairs_hash"]:
        pairs = [f"{one['pairs_file']} ({places.short(one['pairs_hash'])})" for one in (origin, main)]
        sentences.append(
            f"Computed with different prompt pairs from the analysis above: {pairs[0]} instead of {pairs[1]}."
        )
    elif any(origin.get(name) and main[name] and origin[name] != main[name] for name in ("behaviour", "sides")):
        named = [f"{one['behaviour']} ({', '.join(one['sides'])})" for one in (origin, main)]
        sentences.append(f"Computed when the pairs had other names: {named[0]} instead of {named[1]}.")
    if is_of_site and origin.get("site") and main["site"] and origin["site"] != main["site"]:
        sites = [KIND_WORDS.get(one["site"], one["site"]) for one in (origin, main)]
        sentences.append(f"Computed at another site than the analysis above: {sites[0]} instead of {sites[1]}.")
    return sentences


def _complete_commands(several: dict[str, list[dict]], typed: repeat.Experiment, behaviour: str) -> None:
    """What a section without results says is to be run: for this model, these pairs and a score that is known."""
    scored = [section for name in ("sweep", "transcripts") for section in several[name] if section["available"]]
    scores = [section["score"]["typed"] for section in scored if section["score"] and section["score"].get("typed")]
    for section in (section for sections in several.values() for section in sections):
        options = typed.options("--model-name" if section["name"] == "sweep" else "--model")
        if section["name"] in ("transcripts", "sweep") and behaviour != REFUSAL:
            options += ["--score", scores[0] if scores else "FILE.py:FUNCTION"]
        if section["name"] in ("transcripts", "sweep", "vocabulary"):
            section["command"] = shlex.join([*section["command"].split(), *options])
        elif section["name"] == "toxicity":
            section["command"] = shlex.join([*section["command"].split(), *typed.model_options()])
        elif section["name"] == "comparison" and typed.model:
            models = ["--model-a", "MODEL_BEFORE_TRAINING", *typed.options("--model-b")]
            section["command"] = shlex.join([*section["command"].split(), *models])


def _section(source: Source, path: Path | None) -> dict:
    section = {
        "name": source.name, "key": source.name, "command": source.command, "is_of_site": source.is_of_site,
        "available": False, "left_out": [],
    }  # fmt: skip
    if path is None or not path.exists():
        return section
    try:
        return {**section, "available": True, **source.prepare(path)}
    except WRONG_CONTENT as error:
        raise UserError(
            f"{path} was not written by this version ({type(error).__name__}: {error}); run `{source.command}` again."
        ) from None


def _render(data: dict, **values) -> str:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # in their order: that of prompts is part of an experiment
    environment.filters |= {
        function.__name__: lambda *values, function=function: formatting.typeset(function(*values))
        for function in (
            formatting.number,
            formatting.percent,
            formatting.percents,
            formatting.interval,
            formatting.named_range,
        )
    }
    return environment.get_template("report.html").render(
        **values,
        data=data,
        style=Markup((here / "report.css").read_text()),
        script=Markup((here / "report.js").read_text()),
        plotly=Markup(get_plotlyjs()),
    )


def write_report(folder: str | Path, output: str | Path) -> None:
    """Build the report and write it, whole or not at all."""
    write_atomically(Path(output), build(folder).encode())
