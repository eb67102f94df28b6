"""A collection in a notebook.

from alignment_artifacts import load_run
run = load_run("collected_activations_output")
run.to_dataframe(), run.figures()["layer_scores"], run.data.prompt_vectors("prompt_end")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .activation_set import ActivationSet, load_activation_set
from .analysis import Settings, analyse, analyse_categories, analyse_layers_and_steps, project_prompts
from .figure_data import layer_panels
from .pairs import PAIRS_JSON, load_pairs

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go


@dataclass
class Run:
    """A collection and what the analysis says of it; each part is computed when it is first asked for, then kept.

    Attributes:
        data: the activations as arrays, see `ActivationSet`.
        settings: what the statistics depend on besides.
        config: further facts that belong into the results.
    """

    data: ActivationSet
    settings: Settings = Settings()
    config: dict = field(default_factory=dict)

    @cached_property
    def results(self) -> dict:
        """As in `alignment_artifact_analysis_results.json`."""
        return analyse(self.data, self.settings, self.config)

    @cached_property
    def by_category(self) -> dict:
        return analyse_categories(self.data, self.settings)

    @cached_property
    def pattern(self) -> dict:
        """Where over layers and steps the effect is."""
        return analyse_layers_and_steps(self.data, self.results, self.settings)

    @cached_property
    def projections(self) -> dict:
        """Every prompt in two dimensions, by layer."""
        return project_prompts(self.data, self.settings)

    @property
    def scores(self) -> list[dict]:
        """One row a layer and kind of positions: "layer", "positions" and the per-layer record."""
        return [
            {"layer": int(layer), "positions": positions, **record}
            for positions, scores in layer_panels(self.results).items()
            for layer, record in scores.items()
        ]

    def to_dataframe(self) -> pandas.DataFrame:
        """The scores as a table.

        Raises:
            ImportError: pandas is not installed; `scores` has the same as plain Python.
        """
        import pandas

        return pandas.DataFrame(self.scores)

    def figures(self) -> dict[str, go.Figure]:
        """The report's figures of this collection, by name."""
        from . import interactive_figures as figures

        return {
            "layer_scores": figures.layer_scores(self.results),
            "categories": figures.categories(self.by_category),
            "steps": figures.steps(self.pattern),
            "projections": figures.projections(self.projections),
        }


def load_run(
    folder: str | Path,
    pairs: str | Path = PAIRS_JSON,
    settings: Settings = Settings(),
    progress: Callable = lambda items: items,
) -> Run:
    """Read a collection.

    Args:
        folder: that `bash collect_activations.sh` has filled.
        pairs: the matched prompt pairs that were collected.
    Raises:
        UserError: no collection there, or a damaged one.
    """
    return Run(load_activation_set(folder, load_pairs(pairs), progress=progress), settings)
