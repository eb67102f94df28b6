"""Does a direction that was learnt on one contrast work on another?

Natural prompts differ from artifact prompts in more than what safety training does with them; twins
(harmless prompts that look like artifact prompts) differ from them in less. A direction that only
knows words fails on the other contrast, and on a new category.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.baselines import Prepare, discriminant, score_texts, strength
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.formatting import interval, number, percent
from alignment_artifacts.intervals import Uncertainty
from alignment_artifacts.pairs import SIDES, Pair, as_pairs
from alignment_artifacts.scores import Settings, held_out_scores, score_layers
from gemma_refactored.files import jsonable

WORDS = "word choice"
# Known and asked rows -> values [asked, 2] and threshold.
Learn = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]]


def contrasts_of(sides: tuple[str, str]) -> tuple[str, str]:
    """What the two are called: "natural/artifact" for the pairs, "twin/artifact" for the twins."""
    return f"{sides[0]}/{sides[1]}", f"twin/{sides[1]}"


def cross_decoding(
    vectors: Mapping[str, np.ndarray],
    embeddings: np.ndarray,
    pairs: Sequence[Pair],
    twins: Sequence[Pair],
    settings: Settings,
) -> dict[str, dict[str, dict]]:
    """Every combination of learning and testing, with one record for each, by source: the models, and "words".

    What is tested was never learnt from: where both sets share prompts, the tested pairs are divided into folds, and
    each fold's direction, layer and threshold come from learnt pairs that share no prompt with it, directly or by way
    of others. Words are the strongest of `baselines`' three models of them, in each combination the one that separates
    what is tested best: the choice is in their favour.

    Args:
        vectors: of each model [pairs and then twins, 2 (natural or twin, artifact), layers, hidden].
        embeddings: [pairs and then twins, 2, hidden] mean token embeddings.
        twins: may be none.
    Returns:
        source -> "LEARNT -> TESTED" -> record. Both are of `contrasts_of` the pairs' sides, or the tested one is a
        category of the pairs and "others" are the other categories. Where both differ, "mean_separation_on_axis" is in
        units of the spread of what was learnt from. Records of models have "layers", chosen fold by
        fold, and "beyond_words", their d minus that of words with its paired interval; those of words have a "kind".
    """
    everything = [*pairs, *twins]
    labels, groups = np.array([pair.category for pair in everything]), independent_groups(everything)
    prompts = np.array([(pair.natural, pair.artifact) for pair in everything], dtype=object)
    of_words: dict[str, Learn] = {
        "mean difference": lambda known, asked: along(embeddings, known, asked)[1:],
        "lda": lambda known, asked: along(embeddings, known, asked, discriminant)[1:],
        "tf-idf": lambda known, asked: (score_texts(prompts[known], prompts[asked], np.ones((1, len(known))))[0], 0.0),
    }
    by_source: dict[str, dict[str, dict]] = {source: {} for source in (*vectors, "words")}
    for cell, (learnt, tested) in _cells(as_pairs(pairs).sides, labels, groups, len(pairs)).items():
        folds = _folds(learnt, tested, labels, groups, settings.seed)
        uncertainty = Uncertainty(st.group_numbers(groups[tested], len(tested)), settings.resamples, settings.seed)
        words = {kind: decode(learn, learnt, tested, folds, groups) for kind, learn in of_words.items()}
        chance = 0.0  # of embeddings, for all three: what other pairs have taught varies by no fold's chance
        if learnt is tested:
            own = score_layers(embeddings[tested][:, :, None], labels[tested], settings, groups=groups[tested])
            chance = own.held_out[0][1]
        records = {kind: held_out_scores(by, uncertainty, chance) for kind, by in words.items()}
        kind = max(records, key=lambda kind: strength(records[kind]))
        by_source["words"][cell] = {**records[kind], "num_pairs": len(tested), "kind": kind}
        for source, values in vectors.items():
            by, spread, layers = _by_model(values, learnt, tested, folds, labels, groups, settings)
            by_source[source][cell] = {
                **held_out_scores(by, uncertainty, spread),
                "num_pairs": len(tested),
                "layers": layers,
                "beyond_words": {
                    "difference": by.d() - words[kind].d(),
                    "difference_ci": uncertainty.difference_interval(words[kind], by, (chance, spread)),
                },
            }
    return jsonable(by_source)


def _cells(
    sides: tuple[str, str], labels: np.ndarray, groups: np.ndarray, pairs: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """ "LEARNT -> TESTED": the rows of both, the first `pairs` rows being those of the pairs."""
    rows = np.split(np.arange(len(labels)), [pairs])
    sets = {name: own for name, own in zip(contrasts_of(sides), rows, strict=True) if len(own)}
    cells = {f"{a} -> {b}": (learnt, tested) for a, learnt in sets.items() for b, tested in sets.items()}
    for category in dict.fromkeys(labels[:pairs].tolist()):
        inside = labels[:pairs] == category
        parts = rows[0][~inside], rows[0][inside]
        counts = [len(np.unique(groups[part])) for part in parts]
        needed = (st.MIN_PAIRS_NESTED,) * 2 if np.isin(*(groups[part] for part in parts)).any() else (st.MIN_PAIRS, 2)
        if counts[0] >= needed[0] and counts[1] >= needed[1]:
            cells[f"others -> {category}"] = parts
    return cells


def _folds(learnt: np.ndarray, tested: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Fold numbers of what is tested, as `separation.assign_divisions` gives them; one fold if nothing is shared."""
    shared = np.isin(groups[tested], groups[learnt])
    if not shared.any():
        return np.zeros(len(tested), int)
    # Shared ones first, evenly over the folds: none takes much more of what is learnt from than another.
    strata = np.array([f"{not own} {label}" for own, label in zip(shared, labels[tested], strict=True)])
    return st.assign_divisions(strata, seed, groups[tested])


def decode(learn: Learn, learnt: np.ndarray, tested: np.ndarray, folds: np.ndarray, groups: np.ndarray) -> st.HeldOut:
    """Fold by fold of `tested` rows what `learn` makes of the `learnt` rows that are of no group in that fold."""

    def project(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        asked = tested[rows]
        values, threshold = learn(learnt[~np.isin(groups[learnt], groups[asked])], asked)
        return values[:, 0], values[:, 1], threshold

    projections = (project(rows) for _, _, _, rows in st.each_fold(folds))
    return st.collect_folds(folds, st.group_numbers(groups[tested], len(tested)), projections)


def along(
    vectors: np.ndarray, known: np.ndarray, asked: np.ndarray, prepare: Prepare = lambda layer, training: layer
) -> tuple[np.ndarray, np.ndarray, float]:
    """Vectors [.., 2, hidden] of known and of asked rows projected on the direction of the known ones: values
    [known, 2] and [asked, 2], and the threshold."""
    both = vectors[np.append(known, asked)]
    training = np.arange(len(both)) < len(known)
    layer = prepare(st.pair_vectors(both[:, 0], both[:, 1]), training)
    natural, artifact, threshold = st.fold_projections(layer, training, np.arange(len(both)))
    values = np.stack([natural, artifact], axis=1)
    return values[: len(known)], values[len(known) :], threshold


def _by_model(
    values: np.ndarray,
    learnt: np.ndarray,
    tested: np.ndarray,
    folds: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    settings: Settings,
) -> tuple[st.HeldOut, float, list[int]]:
    """Projections, the spread of d by chance (0 where the direction is another set's), and each fold's layer."""
    if learnt is tested:  # what the analysis calls the best layer
        scores = score_layers(values[tested], labels[tested], settings, groups=groups[tested])
        if scores.nested is None or scores.best_layer is None:
            raise ValueError("choosing a layer inside the folds needs at least eight independent groups of pairs")
        return *scores.nested, scores.best_layer["layer_chosen_in_each_fold"]
    layers = []

    def learn(known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, float]:
        layer = int(np.argmax(st.layer_separation(values[known], list(labels[known]), groups[known])))
        layers.append(layer)
        of_known, projected, threshold = along(values[:, :, layer], known, asked)
        spread = of_known.std(axis=0).mean() or 1.0  # layers may differ in scale from fold to fold
        return projected / spread, threshold / spread

    return decode(learn, learnt, tested, folds, groups), 0.0, layers


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
        before, record, words = (by_source[source][cell] for source in ("a", "b", "words"))
        d, d_before, d_words = (number(r["cohens_d"], 1, "undefined") for r in (record, before, words))
        low, beyond = record["cohens_d_ci"][0], record["beyond_words"]["difference_ci"]
        if low is None or low <= 0:
            verdict = "no better than chance: it does not carry over"
        elif beyond[0] is None:
            verdict = "and whether words explain it cannot be told"
        elif beyond[0] <= 0:
            verdict = "no more than words do for sure: it may only know words"
        else:
            verdict = "which words do not explain"
        verdicts.append(
            f"learnt on {learnt} pairs, {names['b']}'s direction tells {what} with d = {d} "
            f"{interval(record['cohens_d_ci'], 1, 'undefined')} "
            f"({percent(record['accuracy'])} accuracy; {names['a']} {d_before}; {names['words']} ({words['kind']}) "
            f"{d_words}, less by {number(record['beyond_words']['difference'], 1, 'undefined')} "
            f"{interval(beyond, 1, 'undefined')}), {verdict}"
        )
    text = "; ".join(verdicts)
    return text[0].upper() + text[1:] + "."
