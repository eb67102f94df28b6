"""An `ActivationSet` -> per-layer records, by category, by step, and what they mean in a sentence.

In a notebook:

from alignment_artifacts.analysis import load_run
run = load_run("collected_activations_output")
run.to_dataframe(), run.figures()["layer_scores"], run.data.prompt_vectors("prompt_end")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from alignment_artifacts import formatting
from alignment_artifacts import separation as st
from alignment_artifacts.activation_set import MAX_EXCLUDED, ActivationSet, load_activation_set, refuse_excluded
from alignment_artifacts.figures.data import layer_panels
from alignment_artifacts.pairs import PAIRS_JSON, load_pairs
from gemma_refactored.configuration import Seed
from gemma_refactored.files import jsonable
from gemma_refactored.settings import Between, check

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

Blocks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class Settings:
    """What the statistics depend on besides the data."""

    permutations: Annotated[int, Between(1)] = 1000
    """sign flips within pairs, for p"""
    resamples: Annotated[int, Between(1)] = 1000
    """bootstrap resamples, for intervals"""
    seed: Seed = 0
    """of all random choices"""
    top_layers: Annotated[int, Between(1)] = 5
    """best layers that are listed"""


NAMES = {"permutations": "num_permutations", "resamples": "num_bootstrap_resamples"}  # what scripts call them


@dataclass
class LayerScores:
    """Results of one set of prompt vectors.

    Attributes:
        layers: one record a layer (the keys are those of the design, section 4).
        best_layer: d and accuracy when the layer itself is chosen inside the training folds; None with
            fewer than eight pairs.
    """

    layers: list[dict]
    best_layer: dict | None


def score_layers(
    vectors: np.ndarray,
    strata: np.ndarray,
    settings: Settings,
    samples: Callable[[int], Blocks] | None = None,
) -> LayerScores:
    """Held-out separation of matched prompt vectors, one layer at a time (all of them may not fit in memory).

    Args:
        vectors: [pairs, 2, layers, hidden], natural and artifact.
        strata: [pairs] labels that the folds are balanced over.
        samples: layer -> vectors for the in-sample numbers, see `separation.in_sample_scores`; default the
            prompt vectors.
    """
    folds = st.assign_folds(strata, settings.seed)
    can_nest = len(folds) >= st.MIN_PAIRS_NESTED
    records, held_out, nulls = [], [], []
    inner_scores: list[np.ndarray] = []  # none, if there are too few pairs to nest
    for number in range(vectors.shape[2]):
        natural, artifact = vectors[:, 0, number], vectors[:, 1, number]
        layer = st.pair_vectors(natural, artifact)
        held_out.append(st.held_out_projections(layer, folds))
        nulls.append(st.sign_flip_d(layer, folds, settings.permutations, settings.seed))
        if can_nest:
            inner_scores.append(st.inner_scores(layer, folds))
        blocks = samples(number) if samples else lambda both=(natural, artifact): [both]
        records.append(_record(held_out[-1], natural, artifact, blocks, settings))
    null = st.best_of(nulls)
    for record in records:
        d = record["cohens_d"]
        record["p_value"] = st.p_value(d, null) if np.isfinite(d) else None
        record["null_95"] = float(np.quantile(null, 0.95))
    return LayerScores(records, _best_layer(held_out, inner_scores, settings) if can_nest else None)


def _record(
    held_out: st.HeldOut, natural: np.ndarray, artifact: np.ndarray, blocks: Blocks, settings: Settings
) -> dict:
    """What is known of a layer without looking at the others."""
    d_in_sample, shift_ratio, samples = st.in_sample_scores(blocks)
    return {
        **held_out_scores(held_out, settings),
        "auroc": held_out.auroc(),
        "p_value": None,
        "null_95": None,
        "cohens_d_in_sample": d_in_sample,
        "mean_shift_ratio": shift_ratio,
        "direction_norm": float(np.linalg.norm(artifact.mean(axis=0) - natural.mean(axis=0))),
        "mean_separation_on_axis": held_out.separation(),
        "num_natural_samples": samples[0],
        "num_artifact_samples": samples[1],
        "num_pairs": len(natural),
    }


def _best_layer(held_out: list[st.HeldOut], inner_scores: list[np.ndarray], settings: Settings) -> dict:
    best, chosen = st.nested_best_layer(held_out, inner_scores)
    return {**held_out_scores(best, settings), "layer_chosen_in_each_fold": chosen}


def held_out_scores(held_out: st.HeldOut, settings: Settings) -> dict:
    """d and accuracy with their intervals, as every record has them."""
    d_interval, accuracy_interval = held_out.intervals(settings.resamples, settings.seed)
    return {
        "cohens_d": held_out.d(),
        "cohens_d_ci": d_interval,
        "accuracy": held_out.accuracy(),
        "accuracy_ci": accuracy_interval,
    }


def headline_positions(data: ActivationSet) -> str:
    """The generated tokens; the prompt's end where none were collected."""
    return "generated" if data.values.shape[2] > 1 else "prompt_end"


def analyse(data: ActivationSet, settings: Settings, config: dict) -> dict:
    """The main result: `alignment_artifact_analysis_results.json` as a dictionary."""
    strata = np.array([pair.category for pair in data.pairs])
    by_position = {
        positions: score_layers(
            data.prompt_vectors(positions),
            strata,
            settings,
            partial(partial, data.step_vectors, positions),  # layer -> how to read it
        )
        for positions in {headline_positions(data), "prompt_end"}
    }
    headline = by_position[headline_positions(data)]
    lexical = None
    if data.prompt_embeddings is not None:
        lexical = score_layers(data.prompt_embeddings[:, :, None], strata, settings).layers[0]
    order = sorted(range(data.num_layers), key=lambda i: -np.nan_to_num(headline.layers[i]["cohens_d"], nan=-np.inf))
    result: dict[str, Any] = {
        "model": data.model,
        "layer_scores": _by_layer(headline.layers),
        "layer_scores_prompt_end": _by_layer(by_position["prompt_end"].layers),
        "lexical_baseline": lexical,
        "best_layer_nested": headline.best_layer,
        "best_layer_nested_prompt_end": by_position["prompt_end"].best_layer,
        "top_layers_by_cohens_d": order[: settings.top_layers],
        "excluded": data.excluded,
        "config": {**config, **asdict(settings)},
        "collection": data.manifest,
    }
    result["summary"] = summarise(result)
    return jsonable(result)


def analyse_categories(data: ActivationSet, settings: Settings) -> dict:
    """Per category the same per-layer records, from that category's pairs alone."""
    labels = np.array([pair.category for pair in data.pairs])
    positions = headline_positions(data)
    vectors = data.prompt_vectors(positions)
    categories: dict[str, dict] = {}
    for category in dict.fromkeys(labels):
        own = labels == category
        if own.sum() < st.MIN_PAIRS:
            categories[category] = {"layer_scores": None, "reason": f"only {own.sum()} pairs, {st.MIN_PAIRS} needed"}
            continue
        scores = score_layers(vectors[own], labels[own], settings)
        categories[category] = {"layer_scores": _by_layer(scores.layers), "best_layer_nested": scores.best_layer}
    return jsonable({"positions": positions, "categories": categories})


def analyse_layers_and_steps(data: ActivationSet, result: dict, settings: Settings) -> dict:
    """Where the effect starts and peaks over layers, and its held-out d at every single step."""
    scores = result["layer_scores"]
    d = [scores[str(i)]["cohens_d"] for i in range(data.num_layers)]
    significant = significant_layers(scores)
    by_step = [np.flatnonzero(data.valid[:, :, step].all(axis=1)) for step in range(data.values.shape[2])]
    by_layer = [_d_of_steps(data, layer, by_step, settings) for layer in range(data.num_layers)]
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
    folds = st.assign_folds(strata, settings.seed)
    by_position: dict[str, list[dict]] = {}
    for positions in dict.fromkeys([headline_positions(data), "prompt_end"]):
        layers = by_position[positions] = []
        for vectors in np.moveaxis(data.prompt_vectors(positions), 2, 0):
            natural, artifact = vectors[:, 0], vectors[:, 1]
            held_out = st.held_out_projections(st.pair_vectors(natural, artifact), folds)
            from_threshold = np.stack([held_out.natural, held_out.artifact], axis=1) - held_out.thresholds[:, None]
            layers.append(
                {
                    "direction": from_threshold.tolist(),
                    "orthogonal": st.leading_orthogonal_component(natural, artifact).tolist(),
                }
            )
    return jsonable({"pairs": [asdict(pair) for pair in data.pairs], "positions": by_position})


def _d_of_steps(
    data: ActivationSet, layer: int, pairs_of_step: list[np.ndarray], settings: Settings
) -> dict[int, float]:
    """Held-out d of a layer at each step that enough pairs have reached."""
    categories = np.array([pair.category for pair in data.pairs])
    scores = {}
    for step, own in enumerate(pairs_of_step):
        if len(own) >= 2 * st.MIN_PAIRS_PER_FOLD:
            natural, artifact = (data.values[own, side, step, layer] for side in (0, 1))
            folds = st.assign_folds(categories[own], settings.seed)
            scores[step] = float(st.held_out_d(st.pair_vectors(natural, artifact), folds))
    return scores


def significant_layers(scores: dict) -> list[int]:
    """Layers that separate better than the best layer does by chance (p at most 0.05 over all of them)."""
    return [int(layer) for layer, record in scores.items() if is_significant(record)]


def is_significant(record: dict) -> bool:
    """p of a per-layer record is at most 0.05 over all layers; None (not defined) is not."""
    return record["p_value"] is not None and record["p_value"] <= 0.05


def summarise(result: dict) -> str:
    """What the numbers mean, in a sentence or two."""
    best = result["top_layers_by_cohens_d"][0]
    record, nested = result["layer_scores"][str(best)], result["best_layer_nested"]
    if record["p_value"] is None:
        return "Cohen's d is not defined: the vectors of a class do not differ from each other at all."
    if record["p_value"] > 0.05:
        return (
            f"No layer separates natural from artifact prompts better than chance (best: layer {best}, "
            f"p = {formatting.p_value(record['p_value'])} over all layers)."
        )
    accuracy = (
        f"{formatting.percent(nested['accuracy'])} accuracy (layer chosen blindly too)"
        if nested
        else "better than chance"
    )
    significant = significant_layers(result["layer_scores"])
    where = f"{len(significant)} of {len(result['layer_scores'])} layers, best at layer {best}"
    d = f"d = {formatting.number(record['cohens_d'], 1)} {formatting.interval(record['cohens_d_ci'], 1)}"
    strength = f"{d}, p = {formatting.p_value(record['p_value'])} over all layers"
    text = (
        f"Natural and artifact prompts are separated at {where} ({strength}): "
        f"a direction from some pairs tells the prompts of other pairs apart with {accuracy}."
    )
    lexical = result["lexical_baseline"]
    if lexical and lexical["cohens_d"] is not None:
        beside = f"d = {formatting.number(lexical['cohens_d'], 1)} ({formatting.percent(lexical['accuracy'])} accuracy)"
        as_much = lexical["cohens_d"] >= record["cohens_d_ci"][0]
        text += f" Word choice alone gives {beside}"
        text += ": about as much, so this is no evidence of alignment." if as_much else "."
    return text


def _by_layer(records: list[dict]) -> dict[str, dict]:
    return {str(i): record for i, record in enumerate(records)}


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
    pairs: str | Path = PAIRS_JSON,
    settings: Settings = Settings(),
    progress: Callable = lambda items: items,
    max_excluded: float = MAX_EXCLUDED,
) -> Run:
    """Read a collection.

    Args:
        folder: that `bash collect_activations.sh` has filled.
        pairs: the matched prompt pairs that were collected; pairs whose texts have changed are excluded.
        max_excluded: share of the pairs.
    Raises:
        UserError: no collection there, a damaged one, or too many pairs that cannot be used.
    """
    data = load_activation_set(folder, load_pairs(pairs), progress=progress)
    refuse_excluded(data, max_excluded)
    return Run(data, settings)
