"""One HTML file that shows what a run found: self-contained, for reading offline and for mailing.

Everything on the page comes from the result files; what is missing names the command that makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from alignment_artifacts import formatting
from gemma_refactored.errors import UserError
from gemma_refactored.files import write_atomically

from . import contents

# What reading results of another shape than expected raises, in Python and in the template.
WRONG_CONTENT = (KeyError, TypeError, ValueError, IndexError, AttributeError, UndefinedError)
ANALYSE = "python analyze_collected_activations.py"


@dataclass(frozen=True)
class Source:
    """A section of the report: where its numbers are, what makes them, what the page gets of them."""

    name: str
    file: str  # below the folder that commands are run in
    command: str
    prepare: Callable[[Path], dict]


SOURCES = (
    Source("analysis", "alignment_artifact_analysis_results.json", ANALYSE, contents.analysis),
    Source("categories", "results/data/alignment_artifacts_by_category.json", ANALYSE, contents.categories),
    Source("steps", "results/data/layer_analysis.json", ANALYSE, contents.steps),
    Source("projections", "results/data/projections.json", ANALYSE, contents.projections),
    Source("comparison", "results/data/model_comparison.json", "python compare_models.py", contents.comparison),
    Source("transcripts", "results/data/transcripts.json", "python suppress.py --all-pairs", contents.transcripts),
    Source("sweep", "results/data/suppression_sweep.json", "python sweep_suppression.py", contents.sweep),
    Source("toxicity", "toxicity_results/experiment_results.json", "python -m toxicity_steering.main",
           contents.toxicity),
)  # fmt: skip


def build(folder: Path) -> str:
    """The report on the results below a folder, as HTML.

    Raises:
        UserError: there are no results at all, or a file is not what this version writes.
    """
    sections = {source.name: _section(source, folder) for source in SOURCES}
    there = [section for section in sections.values() if section["there"]]
    if not there:
        raise UserError(
            f"There are no results in {folder.resolve()} to report on; run `bash collect_activations.sh` and "
            f"`{ANALYSE}` there first."
        )
    figures = {name: figure for section in there for name, figure in section["figures"].items()}
    main = sections["analysis"] if sections["analysis"]["there"] else there[0]
    for section in there:
        section["of_another_model"] = section["revision"] not in (None, main["revision"])
    own = {section["name"]: section["data"] for section in there if "data" in section}
    try:
        return _render(sections=sections, model=main["model"], data={"figures": figures, **own})
    except WRONG_CONTENT as error:
        raise UserError(f"Some results are not what this version writes ({error}); run `make` again.") from None


def _section(source: Source, folder: Path) -> dict:
    path = folder / source.file
    section = {"name": source.name, "command": source.command, "there": path.exists()}
    if not section["there"]:
        return section
    try:
        return {**section, **source.prepare(path)}
    except WRONG_CONTENT as error:
        raise UserError(
            f"{path} is not what this version writes ({type(error).__name__}: {error}); run `{source.command}` again."
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
