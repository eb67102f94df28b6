"""Every number of one set of matched prompt vectors: per-layer records, the layer chosen blindly, and its power."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.intervals import MIN_GROUPS, Uncertainty, robust_sd
from gemma_refactored.configuration import Seed
from gemma_refactored.settings import Between

Blocks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class Settings:
    """What the statistics depend on besides the data."""

    permutations: Annotated[int, Between(1)] = 1000
    """sign flips within pairs, for p"""
    resamples: Annotated[int, Between(1)] = 1000
    """bootstrap resamples, for intervals of differences"""
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
        best_layer: the record of the layer chosen inside the training folds; None with fewer than eight groups.
        nested: its projections, and the spread of d there over sign flips.
        null: [flips] d of the best layer; what was observed comes first.
        folds: [divisions, pairs]; uncertainty: what intervals of these pairs are made with.
        held_out: projections of every layer, and the spread of d there over sign flips.
        outliers: prompts far from all others, the farthest first: index of the pair, side, layer, and how many median
            absolute deviations.
    """

    layers: list[dict]
    best_layer: dict | None
    nested: tuple[st.HeldOut, float] | None
    null: np.ndarray
    folds: np.ndarray
    uncertainty: Uncertainty
    held_out: list[tuple[st.HeldOut, float]]
    outliers: list[dict]

    def error(self, layer: int) -> float:
        """Standard error of d of a layer."""
        return self.uncertainty.estimate(*self.held_out[layer])[1]


def score_layers(
    vectors: np.ndarray,
    strata: np.ndarray,
    settings: Settings,
    samples: Callable[[int], Blocks] | None = None,
    groups: np.ndarray | None = None,
    signs: np.ndarray | None = None,
) -> LayerScores:
    """Held-out separation of matched prompt vectors, one layer at a time (all of them may not fit in memory).

    Args:
        vectors: [pairs, 2, layers, hidden], natural and artifact.
        strata: [pairs] labels that the folds are balanced over.
        samples: layer -> vectors for the in-sample numbers, see `separation.in_sample_scores`; default the
            prompt vectors, and then outliers are not looked for.
        groups: [pairs] labels of pairs that depend on each other; default: every pair by itself.
        signs: [flips, pairs] as `separation.sign_flips` gives them; default: drawn here.
    Raises:
        ValueError: fewer than four groups.
    """
    groups = st.group_numbers(groups, len(vectors))
    folds = st.assign_divisions(strata, settings.seed, groups)
    signs = st.sign_flips(groups, settings.permutations, settings.seed) if signs is None else signs
    uncertainty = Uncertainty(groups, settings.resamples, settings.seed)
    can_nest = groups.max() + 1 >= st.MIN_PAIRS_NESTED
    inner = st.inner_folds(folds, strata, groups) if can_nest else []
    records, held_out, nulls, spreads, inner_scores, outliers = [], [], [], [], [], []
    for number in range(vectors.shape[2]):
        natural, artifact = vectors[:, 0, number], vectors[:, 1, number]
        layer = st.pair_vectors(natural, artifact, groups)
        held_out.append(st.held_out_projections(layer, folds))
        nulls.append(st.sign_flip_d(layer, folds, signs))
        inner_scores.append(st.inner_scores(layer, inner))
        if samples:
            outliers += [{**outlier, "layer": number} for outlier in st.outlying_prompts(natural, artifact)]
        blocks = samples(number) if samples else lambda both=(natural, artifact): [both]
        spreads.append(robust_sd(nulls[-1][1:]))
        scores = held_out_scores(held_out[-1], uncertainty, spreads[-1])
        records.append({**scores, **_in_sample(natural, artifact, blocks), "num_groups": uncertainty.count})
    null = st.best_of(nulls)
    for record, own in zip(records, nulls, strict=True):
        record["p_value"] = st.p_value(own[0], null) if np.isfinite(own[0] + record["cohens_d"]) else None
        record["null_95"] = float(np.quantile(null, 0.95, method="higher"))
        record["p_floor"] = st.smallest_p(groups, settings.permutations)
    best, nested = None, None
    if can_nest:
        projections, chosen = st.nested_best_layer(held_out, inner_scores)
        spread = float(np.sqrt(np.mean([spreads[layer] ** 2 for layer in chosen])))
        nested = projections, spread
        best = {**held_out_scores(projections, uncertainty, spread), "layer_chosen_in_each_fold": chosen}
    worst: dict[tuple[int, str], dict] = {}
    for outlier in sorted(outliers, key=lambda outlier: -outlier["deviations"]):
        worst.setdefault((outlier["pair"], outlier["side"]), outlier)
    measured = list(zip(held_out, spreads, strict=True))
    return LayerScores(records, best, nested, null, folds, uncertainty, measured, list(worst.values()))


def _in_sample(natural: np.ndarray, artifact: np.ndarray, blocks: Blocks) -> dict:
    """What is known of a layer without holding anything out."""
    d_in_sample, shift_ratio, samples = st.in_sample_scores(blocks)
    return {
        "p_value": None,
        "null_95": None,
        "cohens_d_in_sample": d_in_sample,
        "mean_shift_ratio": shift_ratio,
        "direction_norm": float(np.linalg.norm(artifact.mean(axis=0) - natural.mean(axis=0))),
        "num_natural_samples": samples[0],
        "num_artifact_samples": samples[1],
        "num_pairs": len(natural),
    }


def held_out_scores(held_out: st.HeldOut, uncertainty: Uncertainty, null_sd: float = 0.0) -> dict:
    """d, accuracy and AUROC with their intervals, as every record has them.

    Args:
        null_sd: `intervals.robust_sd` of d over sign flips; 0 where the direction comes from other pairs altogether.
    """
    return {
        "cohens_d": held_out.d(),
        "accuracy": held_out.accuracy(),
        "pair_accuracy": held_out.pair_accuracy(),
        "auroc": held_out.auroc(),
        "mean_separation_on_axis": held_out.separation(),
        **uncertainty.intervals(held_out, null_sd),
    }


def layers_by_d(layers: list[dict]) -> list[int]:
    """Layers, the largest d first; where it is not defined, last."""
    return sorted(range(len(layers)), key=lambda i: -np.nan_to_num(layers[i]["cohens_d"], nan=-np.inf))


def power(scores: LayerScores) -> dict:
    """The smallest d that as many pairs as these find with 80% power, from their own sign-flip null.

    d is that of the directions which so many pairs learn, and the layer is among as many as these; needs are
    scaled from it, chance shrinking as one over the square root of the groups.
    """
    null = scores.null[1:][np.isfinite(scores.null[1:])]
    groups, floor = scores.uncertainty.count, scores.layers[0]["p_floor"]
    if len(null) == 0 or floor > 0.05 or groups < MIN_GROUPS:
        return {"smallest_d": None, "groups_needed": None}
    threshold, spread = st.stabilised(np.quantile(null, 0.95)), robust_sd(st.stabilised(null))
    spread = max(spread, 0.5 / np.sqrt(groups))
    smallest = float(np.sqrt(8) * np.sinh(threshold + 0.8416 * spread))
    needed = {str(d): int(np.ceil(groups * (smallest / d) ** 2)) for d in (0.3, 0.5, 0.8)}
    return {"smallest_d": smallest, "groups_needed": needed}


def significant_layers(scores: dict) -> list[int]:
    """Layers that separate better than the best layer does by chance (p at most 0.05 over all of them)."""
    return [int(layer) for layer, record in scores.items() if is_significant(record)]


def is_significant(record: dict) -> bool:
    """p of a per-layer record is at most 0.05 over all layers; None (not defined) is not."""
    return record["p_value"] is not None and record["p_value"] <= 0.05


def by_layer(records: list[dict]) -> dict[str, dict]:
    return {str(i): record for i, record in enumerate(records)}
