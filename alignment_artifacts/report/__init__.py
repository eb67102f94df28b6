"""One HTML file that shows what a run found: self-contained, for reading offline and for mailing.

Everything on the page comes from the result files; a section without results names the command that produces them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from alignment_artifacts import formatting, places
from alignment_artifacts.pairs import REFUSAL
from gemma_refactored.errors import UserError
from gemma_refactored.files import write_atomically

from . import contents

# What results of an unexpected shape raise, in Python and in the template.
WRONG_CONTENT = (KeyError, TypeError, ValueError, IndexError, AttributeError, UndefinedError)
ANALYSE = "python analyze_collected_activations.py"


@dataclass(frozen=True)
class Source:
    """A section of the report: where its numbers are, which command makes them, what the page takes from them."""

    name: str
    file: str  # below the folder of results
    command: str
    prepare: Callable[[Path], dict]


SOURCES = (
    Source("analysis", f"data/{places.ANALYSIS}", ANALYSE, contents.analysis),
    Source("categories", "data/alignment_artifacts_by_category.json", ANALYSE, contents.categories),
    Source("steps", "data/layer_analysis.json", ANALYSE, contents.steps),
    Source("projections", "data/projections.json", ANALYSE, contents.projections),
    Source("comparison", "data/model_comparison.json", "python compare_models.py", contents.comparison),
    Source("transcripts", "data/transcripts.json", "python suppress.py --all-pairs", contents.transcripts),
    Source("sweep", "data/suppression_sweep.json", "python sweep_suppression.py", contents.sweep),
)
TOXICITY_COMMAND = "python -m toxicity_steering.main"


def build(folder: Path) -> str:
    """The report on a folder of results, as HTML.

    Raises:
        UserError: there are no results at all, or a file was not written by this version.
    """
    sections = {source.name: _section(source, folder / source.file) for source in SOURCES}
    main = next((section for section in sections.values() if section["available"]), None)
    if main is None:
        raise UserError(
            f"There are no results in {folder.resolve()} to report on; run `bash collect_activations.sh` and "
            f"`{ANALYSE}` first."
        )
    # The second experiment needs no pairs: it belongs to the model alone.
    toxicity = Source("toxicity", "", TOXICITY_COMMAND, contents.toxicity)
    sections["toxicity"] = _section(toxicity, places.toxicity_results(main["origin"]["model_revision"]))
    available = [section for section in sections.values() if section["available"]]
    figures = {name: figure for section in available for name, figure in section["figures"].items()}
    for section in available:
        section["warnings"] = _differences(section["origin"], main["origin"])
    for_script = {section["name"]: section["data"] for section in available if "data" in section}
    try:
        return _render(
            sections=sections, title=_title(sections, main["origin"]["model"]), data={"figures": figures, **for_script}
        )
    except WRONG_CONTENT as error:
        raise UserError(f"Some results were not written by this version ({error}); run `make` again.") from None


def _title(sections: dict, model: str) -> str:
    behaviour = sections["analysis"].get("behaviour", REFUSAL)
    return f"Alignment artifacts in {model}" if behaviour == REFUSAL else f"{behaviour.capitalize()} in {model}"


def _differences(origin: dict, main: dict) -> list[str]:
    """In sentences, how a section's model or pairs differ from those that the page is about."""
    sentences = []
    if origin["model_revision"] != main["model_revision"]:
        model = f"{origin['model']} ({places.short(origin['model_revision'])})"
        sentences.append(f"Computed with different weights from the collection above: {model}.")
    if origin.get("pairs_hash", main["pairs_hash"]) != main["pairs_hash"]:
        pairs = [f"{one['pairs_file']} ({places.short(one['pairs_hash'])})" for one in (origin, main)]
        sentences.append(
            f"Computed with different prompt pairs from the analysis above: {pairs[0]} instead of {pairs[1]}."
        )
    return sentences


def _section(source: Source, path: Path | None) -> dict:
    section = {"name": source.name, "command": source.command, "available": False}
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
    environment.filters |= {
        function.__name__: lambda *values, function=function: formatting.typeset(function(*values))
        for function in (formatting.number, formatting.percent, formatting.percents, formatting.interval)
    }
    return environment.get_template("report.html").render(
        **values,
        data=data,
        style=Markup((here / "report.css").read_text()),
        script=Markup((here / "report.js").read_text()),
        plotly=Markup(get_plotlyjs()),
    )


def write_report(folder: Path, output: Path) -> None:
    """Build the report and write it, whole or not at all."""
    write_atomically(output, build(folder).encode())
