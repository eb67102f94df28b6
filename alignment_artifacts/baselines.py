"""What could separate the prompts without any alignment: which words they have, and how many tokens.

Each baseline is scored like a layer, on the same folds, learnt on training pairs only, with its own spread over sign
flips. The strongest of the models of word choice counts: one that misses half of what words tell would be a straw man.
It is chosen by the d that is reported, which can only flatter the words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.activation_set import ActivationSet
from alignment_artifacts.intervals import robust_sd
from alignment_artifacts.scores import LayerScores, Settings, held_out_scores, score_layers
from alignment_artifacts.separation import HeldOut, PairVectors, each_fold

# of one layer and the training pairs [pairs] bool: the vectors that their directions are made of and tried on
Prepare = Callable[[PairVectors, np.ndarray], PairVectors]
FLIPS = 200  # a spread needs no more of them
RIDGE = 4.0  # for labels of -1 and 1 the penalty of scikit-learn's logistic regression, to second order


def score_baselines(
    data: ActivationSet, scored: dict[str, LayerScores], strata: np.ndarray, groups: np.ndarray, settings: Settings
) -> dict:
    """What words and lengths give on the same folds, and what the activations have beyond them.

    Returns:
        "lexical_baseline": the strongest of "word_baselines", with its "kind"; "length_baseline": of token counts;
        "controls": positions -> "beyond_words" (nested d minus that of words, with its paired interval), "lda"
        (a stronger learner for the activations too) and "length_regressed" (d without what token counts explain),
        the last two at each fold's own layer, which was chosen without it; all None without a nested layer.
    """
    first = scored["prompt_end"]
    signs = st.sign_flips(groups, settings.permutations, settings.seed)
    candidates = {"tf-idf": held_out_texts([(p.natural, p.artifact) for p in data.pairs], first.folds, groups, signs)}
    extra: dict[str, dict] = {}
    if data.prompt_embeddings is not None:
        embeddings = data.prompt_embeddings[:, :, None]
        own = score_layers(embeddings, strata, settings, groups=groups, signs=signs)
        extra["mean difference"] = own.layers[0]
        candidates["mean difference"] = own.held_out[0]
        everywhere = [0] * len(each_fold(first.folds))
        candidates["lda"] = held_out_by_fold(embeddings, first.folds, everywhere, groups, signs, discriminant)
    records = {
        kind: {
            **held_out_scores(held_out, first.uncertainty, spread),
            "p_value": None,
            "num_pairs": len(groups),
            **extra.get(kind, {}),
            "kind": kind,
        }
        for kind, (held_out, spread) in candidates.items()
    }
    strongest = max(records, key=lambda kind: strength(records[kind]))
    lengths = data.prompt_lengths
    length = None
    if lengths is not None:
        counts = lengths[:, :, None, None].astype(float)
        length = score_layers(counts, strata, settings, groups=groups, signs=signs).layers[0]
    controls: dict[str, dict] = {}
    for positions, scores in scored.items():
        control: dict = dict.fromkeys(("beyond_words", "lda", "length_regressed"))
        controls[positions] = control
        if not scores.nested or not scores.best_layer:
            continue
        nested, spreads = scores.nested[0], (candidates[strongest][1], scores.nested[1])
        words = candidates[strongest][0]
        control["beyond_words"] = {
            "difference": nested.d() - words.d(),
            "difference_ci": scores.uncertainty.difference_interval(words, nested, spreads),
        }
        kinds: dict[str, Prepare] = {"lda": discriminant}
        if lengths is not None:
            kinds["length_regressed"] = without(lengths.astype(float))
        chosen = scores.best_layer["layer_chosen_in_each_fold"]
        for name, prepare in kinds.items():
            measured = held_out_by_fold(data.prompt_vectors(positions), scores.folds, chosen, groups, signs, prepare)
            control[name] = held_out_scores(measured[0], scores.uncertainty, measured[1])
    return {
        "lexical_baseline": records[strongest],
        "word_baselines": records,
        "length_baseline": length,
        "controls": controls,
    }


def strength(record: dict) -> float:
    """d; without any spread it is not defined, and what separates without a mistake then is as strong as can be."""
    if np.isfinite(record["cohens_d"]):
        return record["cohens_d"]
    return np.inf if record["auroc"] > 0.95 else -np.inf


def held_out_by_fold(
    vectors: np.ndarray,
    folds: np.ndarray,
    layers: Sequence[int],
    groups: np.ndarray,
    signs: np.ndarray,
    prepare: Prepare,
) -> tuple[HeldOut, float]:
    """Held-out projections at each fold's own layer, and the spread of d over sign flips at the layer most folds have.

    Args:
        vectors: [pairs, 2, layers, hidden]; layers: for each fold of `each_fold(folds)`.
        groups: [pairs] numbers from 0; signs: [flips, pairs] as `separation.sign_flips` gives them.
        prepare: what else is learnt from training pairs; it must not depend on which side is which, so that swaps
            need not learn it anew.
    """
    parts, signs = each_fold(folds), signs[: FLIPS + 1]
    usual = int(np.bincount(layers).argmax())
    by_layer = {n: st.pair_vectors(vectors[:, 0, n], vectors[:, 1, n], groups) for n in set(layers)}
    projections, null = [], np.zeros(len(signs))
    for layer, (_, _, training, rows) in zip(layers, parts, strict=True):
        prepared = prepare(by_layer[usual], training)
        null += st.fold_d(prepared, training, rows, signs) / len(parts)
        if layer != usual:
            prepared = prepare(by_layer[layer], training)
        projections.append(st.fold_projections(prepared, training, rows))
    return st.collect_folds(folds, groups, projections), robust_sd(null[1:])


def discriminant(layer: PairVectors, training: np.ndarray) -> PairVectors:
    """Directions of linear discriminant analysis with Ledoit and Wolf's (2004) shrunken covariance.

    The scatter within classes is the total less that of the mean difference w, and (T - c w wᵀ)⁻¹ w is parallel to
    T⁻¹ w (Sherman and Morrison 1950): with the total, which swaps leave alone, a direction is a sum over pairs. How far
    to shrink is taken from the classes as they are. With fewer vectors than dimensions everything is computed from
    their inner products.
    """
    differences, means = layer.differences[training], layer.means[training]
    n, hidden = 2 * differences.shape[0], differences.shape[1]
    half, centre = (differences - differences.mean(axis=0)) / 2, means - means.mean(axis=0)
    within, total = (np.concatenate([centre - x, centre + x]) for x in (half, differences / 2))
    products, of_total = (x @ x.T if n < hidden else x.T @ x for x in (within, total))
    squares = np.einsum("ij,ij->i", within, within)
    scale, size = squares.sum() / n / hidden, (products**2).sum() / n**2
    noise = ((squares**2).sum() / n - size) / (n * hidden)
    distance = size / hidden - scale**2
    shrinkage = min(noise / distance, 1.0) if distance > 0 else 1.0
    ridge, weight = shrinkage * scale, (1 - shrinkage) / n
    if ridge <= 0:
        return layer
    inverse = ridge * np.eye(len(products)) + weight * of_total
    sources = layer.differences
    if n < hidden:
        sources = (sources - weight * np.linalg.solve(inverse, total @ sources.T).T @ total) / ridge
    else:
        sources = np.linalg.solve(inverse, sources.T).T
    return PairVectors(layer.differences, layer.means, layer.groups, sources)


def without(confound: np.ndarray) -> Prepare:
    """Vectors less what a least-squares line on all training prompts says of them from the confound [pairs, 2]."""
    shift, centre = confound[:, 1] - confound[:, 0], confound.mean(axis=1)

    def prepare(layer: PairVectors, training: np.ndarray) -> PairVectors:
        around = centre - centre[training].mean()
        spread = (around[training] ** 2).sum() + (shift[training] ** 2).sum() / 4
        if spread == 0:
            return layer
        slope = (around[training] @ layer.means[training] + shift[training] @ layer.differences[training] / 4) / spread
        differences, means = layer.differences - np.outer(shift, slope), layer.means - np.outer(around, slope)
        return PairVectors(differences, means, layer.groups)

    return prepare


def held_out_texts(
    texts: list[tuple[str, str]], folds: np.ndarray, groups: np.ndarray, signs: np.ndarray
) -> tuple[HeldOut, float]:
    """Texts [pair](natural, artifact) by `score_texts`; the rest as `held_out_by_fold`."""
    pairs = np.array(texts, dtype=object)
    projections, nulls = [], []
    for _, _, training, rows in each_fold(folds):
        scores = score_texts(pairs[training], pairs[rows], signs[:, training])
        projections.append((scores[0, :, 0], scores[0, :, 1], 0.0))
        shift = signs[:, rows] * (scores[..., 1] - scores[..., 0])
        nulls.append(st.matched_d(shift, scores.mean(axis=2), groups[rows]))
    return st.collect_folds(folds, groups, projections), robust_sd(np.mean(nulls, axis=0)[1:])


def score_texts(known: np.ndarray, asked: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """[flips, pairs, 2] of texts [pairs, 2] by TF-IDF and ridge regression of the labels of known ones [others, 2],
    swapped by signs [flips, others]; its threshold is 0."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    if not any(map(vectorizer.build_analyzer(), known.ravel())):  # there is no word to learn from
        return np.zeros((len(signs), *asked.shape))
    features = vectorizer.fit_transform(known.ravel())
    labels = np.stack([-signs, signs], axis=2).reshape(len(signs), -1)
    model = Ridge(RIDGE, fit_intercept=False, solver="cholesky").fit(features, labels.T)
    return model.predict(vectorizer.transform(asked.ravel())).T.reshape(len(signs), *asked.shape)
