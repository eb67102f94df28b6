"""Does a direction that was learnt on one contrast work on another?

Natural prompts differ from artifact prompts in more than what safety training does with them; twins
(harmless prompts that look like artifact prompts) differ from them in less. A direction that only
knows words fails on the other contrast, and on a new category.
"""

from __future__ import annotations

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.formatting import interval, number, percent
from alignment_artifacts.intervals import Uncertainty
from alignment_artifacts.pairs import SIDES
from alignment_artifacts.scores import Settings, held_out_scores, score_layers
from alignment_artifacts.separation import layer_separation
from gemma_refactored.files import jsonable


def contrasts_of(sides: tuple[str, str]) -> tuple[str, str]:
    """What the two are called: "natural/artifact" for the pairs, "twin/artifact" for the twins."""
    return f"{sides[0]}/{sides[1]}", f"twin/{sides[1]}"


def cross_decoding(
    pairs: np.ndarray,
    twins: np.ndarray | None,
    categories: np.ndarray,
    twin_categories: np.ndarray,
    settings: Settings,
    groups: np.ndarray | None = None,
    twin_groups: np.ndarray | None = None,
    sides: tuple[str, str] = SIDES,
) -> dict[str, dict]:
    """Every combination of learning and testing, with one record for each.

    The layer is always chosen, and the threshold set, on what was learnt from.

    Args:
        pairs: [pairs, 2 (natural, artifact), layers, hidden]; twins: [twins, 2 (twin, artifact), layers, hidden], or
            None without any.
        categories, twin_categories: a label for each.
        groups, twin_groups: labels of those that depend on each other; default: each by itself.
        sides: what the two sides of a pair are called.
    Returns:
        "LEARNT -> TESTED": record, where both are of `contrasts_of(sides)` (held out where they are the same), or
        the tested one is a category of the pairs and "others" are the other categories.
    """
    of_pairs, of_twins = contrasts_of(sides)
    sets = {of_pairs: (pairs, np.asarray(categories), st.group_numbers(groups, len(pairs)))}
    if twins is not None:
        sets[of_twins] = twins, np.asarray(twin_categories), st.group_numbers(twin_groups, len(twins))
    records = {}
    for learnt, (training, labels, blocks) in sets.items():
        for tested, (other, _, other_blocks) in sets.items():
            name = f"{learnt} -> {tested}"
            if learnt == tested:
                records[name] = _held_out(training, labels, settings, blocks)
            else:
                records[name] = _record(*decode(training, labels, other, other_blocks), settings)
    _, labels, all_blocks = sets[of_pairs]
    for category in dict.fromkeys(labels.tolist()):
        inside = labels == category
        if inside.sum() >= 2 and (~inside).sum() >= st.MIN_PAIRS:
            blocks = st.group_numbers(all_blocks[inside], int(inside.sum()))
            projected = decode(pairs[~inside], labels[~inside], pairs[inside], blocks)
            records[f"others -> {category}"] = _record(*projected, settings)
    return jsonable(records)


def decode(
    training: np.ndarray, strata: np.ndarray, tested: np.ndarray, groups: np.ndarray
) -> tuple[st.HeldOut, list[int]]:
    """Learn layer, direction and threshold from some pairs, project others; both [pairs, 2, layers, hidden].

    Args:
        groups: [tested pairs] numbers from 0 of those that depend on each other.
    """
    layer = int(np.argmax(layer_separation(training, list(strata))))
    vectors = training[:, :, layer].astype(np.float64)
    direction = (vectors[:, 1] - vectors[:, 0]).mean(axis=0)
    direction /= np.linalg.norm(direction) or 1.0
    threshold = (vectors @ direction).mean()
    natural, artifact = (tested[:, :, layer].astype(np.float64) @ direction).T
    one_fold = np.zeros(len(tested), int)
    return st.HeldOut(natural, artifact, np.full(len(tested), threshold), one_fold, groups), [layer]


def _held_out(vectors: np.ndarray, strata: np.ndarray, settings: Settings, groups: np.ndarray) -> dict:
    """The same within one set, fold by fold: what the analysis calls the best layer, chosen inside the folds."""
    best = score_layers(vectors, strata, settings, groups=groups).best_layer
    if best is None:
        raise ValueError("choosing a layer inside the folds needs at least eight independent groups of pairs")
    layers = best.pop("layer_chosen_in_each_fold")
    return {**best, "num_pairs": len(vectors), "layers": layers}


def _record(held_out: st.HeldOut, layers: list[int], settings: Settings) -> dict:
    scores = held_out_scores(held_out, Uncertainty(held_out.groups, settings.resamples, settings.seed))
    return {**scores, "num_pairs": len(held_out.folds), "layers": layers}


def summarise(by_source: dict[str, dict[str, dict]], names: dict[str, str], sides: tuple[str, str] = SIDES) -> str:
    """What the transfer between pairs and twins says about model "b", beside "a" and "words"."""
    of_pairs, of_twins = contrasts_of(sides)
    if f"{of_pairs} -> {of_twins}" not in by_source["b"]:
        tried = "tried on other categories only" if len(by_source["b"]) > 1 else "not tried"
        return (
            f"There are no twins for these pairs: prompts that look like {sides[1]} prompts and are none (TWINS names "
            f"a file of them). What the directions know beyond words is {tried}."
        )
    verdicts = []
    for learnt, tested, what in (
        (of_pairs, of_twins, f"{sides[1]} prompts from their twins"),
        (of_twins, of_pairs, f"{sides[1]} from {sides[0]} prompts"),
    ):
        cell = f"{learnt} -> {tested}"
        record = by_source["b"][cell]
        others = {names[source]: by_source[source][cell]["cohens_d"] for source in ("a", "words")}
        low = record["cohens_d_ci"][0]
        d, *d_of_others = (number(d, 1, "undefined") for d in (record["cohens_d"], *others.values()))
        beside = ", ".join(f"{name} {other}" for name, other in zip(others, d_of_others, strict=True))
        if low is None or low <= 0:
            verdict = "no better than chance: it does not carry over"
        elif low <= max((d for d in others.values() if d is not None), default=0.0):
            verdict = "no more than words do: it may only know words"
        else:
            verdict = "which words do not explain"
        verdicts.append(
            f"learnt on {learnt} pairs, {names['b']}'s direction tells {what} with d = {d} "
            f"{interval(record['cohens_d_ci'], 1, 'undefined')} "
            f"({percent(record['accuracy'])} accuracy; {beside}), {verdict}"
        )
    text = "; ".join(verdicts)
    return text[0].upper() + text[1:] + "."
