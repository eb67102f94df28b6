"""An `ActivationSet` -> per-layer records, by category, by step, and what they mean in a sentence.

In a notebook:

from alignment_artifacts.analysis import load_run
run = load_run("collected_activations_output")
run.to_dataframe(), run.figures()["layer_scores"], run.data.prompt_vectors("prompt_end")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.activation_set import MAX_EXCLUDED, ActivationSet, load_activation_set, refuse_excluded
from alignment_artifacts.baselines import score_baselines
from alignment_artifacts.blocks import independent_groups, undeclared_dependence
from alignment_artifacts.categories import score_categories
from alignment_artifacts.figures.data import layer_panels
from alignment_artifacts.pairs import PAIRS_JSON, SIDES, Pair, as_pairs
from alignment_artifacts.scores import (
    LayerScores,
    Settings,
    by_layer,
    layers_by_d,
    power,
    score_layers,
    significant_layers,
)
from alignment_artifacts.summary import summarise
from gemma_refactored.conversation import readable
from gemma_refactored.files import jsonable
from gemma_refactored.settings import check
from gemma_refactored.site_names import described

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go


def headline_positions(data: ActivationSet) -> str:
    """The generated tokens; the prompt's end where none were collected."""
    return "generated" if data.values.shape[2] > 1 else "prompt_end"


def analyse(data: ActivationSet, settings: Settings, config: dict) -> dict:
    """The main result: `alignment_artifact_analysis_results.json` as a dictionary."""
    strata, groups = np.array([pair.category for pair in data.pairs]), independent_groups(data.pairs)
    scored = {
        positions: score_layers(
            data.prompt_vectors(positions),
            strata,
            settings,
            partial(partial, data.step_vectors, positions),  # layer -> how to read it
            groups,
        )
        for positions in dict.fromkeys(["prompt_end", headline_positions(data)])
    }
    headline, prompt_end = scored[headline_positions(data)], scored["prompt_end"]
    answered, answer = score_answers(data, strata, settings, groups)
    baselines = score_baselines(data, scored, strata, groups, settings)
    result = {
        "model": data.model,
        "site": described(data.site),
        "behaviour": data.pairs.behaviour,
        "sides": list(data.pairs.sides),
        "layer_scores": by_layer(headline.layers),
        "layer_scores_prompt_end": by_layer(prompt_end.layers),
        "best_layer_nested": headline.best_layer,
        "best_layer_nested_prompt_end": prompt_end.best_layer,
        **(
            {"layer_scores_answer": by_layer(answer.layers), "best_layer_nested_answer": answer.best_layer}
            if answer
            else {}
        ),
        "thoughts": None if data.thoughts is None else {"pairs": len(data.pairs), "answered": len(answered)},
        **baselines,
        "top_layers_by_cohens_d": layers_by_d(headline.layers)[: settings.top_layers],
        "independence": {
            "num_pairs": len(groups),
            "num_groups": int(groups.max()) + 1,
            "p_floor": st.smallest_p(groups, settings.permutations),
            "warning": undeclared_dependence(data.pairs, groups),
        },
        "outliers": [
            {
                **outlier,
                "pair": data.pairs[outlier["pair"]].id,
                "category": strata[outlier["pair"]],
                "side": data.pairs.side(outlier["side"]),
            }
            for outlier in prompt_end.outliers
        ],
        "power": power(prompt_end),
        "excluded": data.excluded,
        "config": {**config, **asdict(settings)},
        "collection": data.manifest,
    }
    result = jsonable(result)
    return {**result, "summary": summarise(result)}


def score_answers(
    data: ActivationSet, strata: np.ndarray, settings: Settings, groups: np.ndarray
) -> tuple[np.ndarray, LayerScores | None]:
    """Of a model that thinks: which pairs have tokens of an answer on both sides, and the scores of these tokens.

    Scores are None where nothing is thought, or too few pairs have come to an answer.
    """
    rows = np.flatnonzero(data.mask("answer").any(axis=2).sum(axis=1) == len(SIDES))
    numbers = np.unique(groups[rows], return_inverse=True)[1]
    if data.thoughts is None or len(np.unique(numbers)) < st.MIN_PAIRS:
        return rows, None
    return rows, score_layers(data.prompt_vectors("answer")[rows], strata[rows], settings, groups=numbers)


def analyse_categories(data: ActivationSet, settings: Settings) -> dict:
    """Per category the same per-layer records, from that category's pairs alone, and how categories differ."""
    labels, positions = np.array([pair.category for pair in data.pairs]), headline_positions(data)
    scored = score_categories(data.prompt_vectors(positions), labels, independent_groups(data.pairs), settings)
    return jsonable({"positions": positions, **scored})


def analyse_layers_and_steps(data: ActivationSet, result: dict, settings: Settings) -> dict:
    """Where the effect starts and peaks over layers, and its held-out d at every single step."""
    scores = result["layer_scores"]
    d = [scores[str(i)]["cohens_d"] for i in range(data.num_layers)]
    significant = significant_layers(scores)
    by_step = [np.flatnonzero(data.valid[:, :, step].all(axis=1)) for step in range(data.values.shape[2])]
    folds = _folds_of_steps(data, by_step, settings)
    by_layer = [_d_of_steps(data, layer, by_step, folds) for layer in range(data.num_layers)]
    steps = [
        {
            "step": "prefill" if step == 0 else step - 1,
            "num_pairs": len(own),
            "cohens_d": [d[step] for d in by_layer] if step in by_layer[0] else None,
        }
        for step, own in enumerate(by_step)
    ]
    known = [x if x is not None else -np.inf for x in d]
    return jsonable(
        {
            "first_significant_layer": significant[0] if significant else None,
            "significant_layers": significant,
            "peak_layer": int(np.argmax(known)),
            "cohens_d_by_layer": d,
            "steps": steps,
        }
    )


def project_prompts(data: ActivationSet, settings: Settings) -> dict:
    """Every prompt in two dimensions, per layer: on the direction of other pairs, and on what else varies most.

    "direction" is the held-out projection from the threshold, in units of activation (above 0 counts as artifact,
    so the layer's accuracy can be counted in it), "orthogonal" that on the leading component without the
    direction; both [pairs, 2 (natural, artifact)].
    """
    strata = np.array([pair.category for pair in data.pairs])
    folds = st.assign_divisions(strata, settings.seed, independent_groups(data.pairs))
    by_position: dict[str, list[dict]] = {}
    for positions in dict.fromkeys([headline_positions(data), "prompt_end"]):
        layers = by_position[positions] = []
        for vectors in np.moveaxis(data.prompt_vectors(positions), 2, 0):
            natural, artifact = vectors[:, 0], vectors[:, 1]
            held_out = st.held_out_projections(st.pair_vectors(natural, artifact), folds)
            sides = np.stack([held_out.natural, held_out.artifact]) - held_out.thresholds
            from_threshold = sides.mean(axis=1).T  # over the divisions into folds
            layers.append(
                {
                    "direction": from_threshold.tolist(),
                    "orthogonal": st.leading_orthogonal_component(natural, artifact).tolist(),
                }
            )
    return jsonable(
        {
            "pairs": [
                {**asdict(pair), **{side: readable(getattr(pair, side)) for side in SIDES}} for pair in data.pairs
            ],
            "sides": list(data.pairs.sides),
            "positions": by_position,
        }
    )


def _folds_of_steps(data: ActivationSet, pairs_of_step: list[np.ndarray], settings: Settings) -> dict[int, np.ndarray]:
    """Divisions into folds of the pairs at each step that enough of them have reached."""
    categories, groups = np.array([pair.category for pair in data.pairs]), independent_groups(data.pairs)
    return {
        step: st.assign_divisions(categories[rows], settings.seed, groups[rows])
        for step, rows in enumerate(pairs_of_step)
        if len(np.unique(groups[rows])) >= 2 * st.MIN_PAIRS_PER_FOLD
    }


def _d_of_steps(
    data: ActivationSet, layer: int, pairs_of_step: list[np.ndarray], folds_of_step: dict[int, np.ndarray]
) -> dict[int, float]:
    """Held-out d of a layer at each step that has folds."""
    scores = {}
    for step, folds in folds_of_step.items():
        natural, artifact = (data.values[pairs_of_step[step], side, step, layer] for side in (0, 1))
        scores[step] = float(st.held_out_d(st.pair_vectors(natural, artifact), folds))
    return scores


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

    def __post_init__(self):
        check(self.settings)

    def __repr__(self) -> str:
        return f"Run({self.data.model}, {described(self.data.site)}, {len(self.data.pairs)} pairs)"

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
        from alignment_artifacts.figures import interactive as figures

        return {
            "layer_scores": figures.layer_scores(self.results),
            "categories": figures.categories(self.by_category),
            "steps": figures.steps(self.pattern),
            "projections": figures.projections(self.projections),
        }


def load_run(
    folder: str | Path,
    pairs: str | Path | Sequence[Pair] = PAIRS_JSON,
    settings: Settings = Settings(),
    progress: Callable = lambda items: items,
    max_excluded: float = MAX_EXCLUDED,
    site: str | None = None,
) -> Run:
    """Read a collection.

    Args:
        folder: that `bash collect_activations.sh` has filled.
        pairs: the matched prompt pairs that were collected, or a file of them; those whose texts have changed are
            excluded.
        max_excluded: share of the pairs.
        site: "mlp", "attention" or "residual"; needed where a collection holds several.
    Raises:
        UserError: no collection there, a damaged one, or too many pairs that cannot be used.
    """
    data = load_activation_set(folder, as_pairs(pairs), progress=progress, site=site)
    refuse_excluded(data, max_excluded)
    return Run(data, settings)
