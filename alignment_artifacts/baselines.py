"""What could separate the prompts without any alignment: which words they have, and how many tokens.

Each baseline is scored like a layer, on the same folds, learnt on training pairs only. The strongest of
the models of word choice counts: one that misses half of what words tell would be a straw man.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from alignment_artifacts.activation_set import ActivationSet
from alignment_artifacts.scores import LayerScores, Settings, held_out_scores, score_layers
from alignment_artifacts.separation import HeldOut, each_fold

# (natural, artifact) of the training pairs -> direction of one [hidden]
Fit = Callable[[np.ndarray, np.ndarray], np.ndarray]


def score_baselines(
    data: ActivationSet, scored: dict[str, LayerScores], strata: np.ndarray, groups: np.ndarray, settings: Settings
) -> dict:
    """What words and lengths give on the same folds, and what the activations have beyond them.

    Returns:
        "lexical_baseline": the strongest of "word_baselines", with its "kind"; "length_baseline": of token counts;
        "controls": positions -> "beyond_words" (nested d minus that of words, with its paired interval), "lda"
        (a stronger learner for the activations too, at the layer that most folds chose) and "length_regressed" (d
        there without what token counts explain).
    """
    first = scored["prompt_end"]
    candidates = {"tf-idf": (held_out_texts([(p.natural, p.artifact) for p in data.pairs], first.folds), 0.0)}
    extra: dict[str, dict] = {}
    if data.prompt_embeddings is not None:
        own = score_layers(data.prompt_embeddings[:, :, None], strata, settings, groups=groups)
        extra["mean difference"] = own.layers[0]
        (held_out, spread), *_ = own.held_out
        candidates["mean difference"] = held_out, spread
        candidates["lda"] = held_out_along(data.prompt_embeddings, first.folds, lda_direction), spread
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
        length = score_layers(lengths[:, :, None, None].astype(float), strata, settings, groups=groups).layers[0]
    controls: dict[str, dict] = {}
    for positions, scores in scored.items():
        vectors = data.prompt_vectors(positions)[:, :, scores.usual_layer]
        control: dict = {"layer": scores.usual_layer, "beyond_words": None, "length_regressed": None}
        lda = held_out_along(vectors, scores.folds, lda_direction)
        control["lda"] = held_out_scores(lda, scores.uncertainty, scores.nested[1] if scores.nested else 0.0)
        if scores.nested:
            held_out, spread = candidates[strongest]
            control["beyond_words"] = {
                "difference": scores.nested[0].d() - held_out.d(),
                "difference_ci": scores.uncertainty.difference_interval(
                    held_out, scores.nested[0], (spread, scores.nested[1])
                ),
            }
        if lengths is not None:
            rest = held_out_along(vectors, scores.folds, mean_difference, lengths.astype(float))
            control["length_regressed"] = held_out_scores(rest, scores.uncertainty)
        controls[positions] = control
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


def lda_direction(natural: np.ndarray, artifact: np.ndarray) -> np.ndarray:
    """Linear discriminant [hidden] of vectors [n, hidden] with Ledoit and Wolf's (2004) shrunken covariance.

    With fewer vectors than dimensions everything is computed from their inner products.
    """
    shift = artifact.mean(axis=0) - natural.mean(axis=0)
    x = np.concatenate([natural - natural.mean(axis=0), artifact - artifact.mean(axis=0)])
    n, hidden = x.shape
    products = x @ x.T if n < hidden else x.T @ x
    squares = np.einsum("ij,ij->i", x, x)
    scale, size = squares.sum() / n / hidden, (products**2).sum() / n**2
    noise = ((squares**2).sum() / n - size) / (n * hidden)
    distance = size / hidden - scale**2
    shrinkage = min(noise / distance, 1.0) if distance > 0 else 1.0
    ridge, weight = shrinkage * scale, (1 - shrinkage) / n
    if ridge <= 0:
        return shift
    inverse = ridge * np.eye(len(products)) + weight * products
    if n < hidden:
        return (shift - weight * x.T @ np.linalg.solve(inverse, x @ shift)) / ridge
    return np.linalg.solve(inverse, shift)


def mean_difference(natural: np.ndarray, artifact: np.ndarray) -> np.ndarray:
    return artifact.mean(axis=0) - natural.mean(axis=0)


def held_out_along(vectors: np.ndarray, folds: np.ndarray, fit: Fit, confound: np.ndarray | None = None) -> HeldOut:
    """Vectors [pairs, 2, hidden] projected on directions that `fit` makes of the training pairs, as `HeldOut` has them.

    Args:
        confound: [pairs, 2] of each prompt, regressed out of all vectors by what training prompts say of it.
    """
    vectors = vectors.astype(np.float64)

    def project(training: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, float]:
        values = vectors if confound is None else vectors - _explained(vectors, confound, training)
        return along(values[training], values[rows], fit)

    return held_out(folds, project)


def along(known: np.ndarray, asked: np.ndarray, fit: Fit) -> tuple[np.ndarray, float]:
    """Vectors [pairs, 2, hidden] projected on what `fit` makes of known ones [others, 2, hidden]: values [pairs, 2],
    and the middle of the known."""
    direction = fit(known[:, 0], known[:, 1])
    direction = direction / (np.linalg.norm(direction) or 1.0)
    return asked @ direction, float((known @ direction).mean())


def held_out_texts(texts: list[tuple[str, str]], folds: np.ndarray) -> HeldOut:
    """Texts [pair](natural, artifact) by `score_texts`."""
    pairs = np.array(texts, dtype=object)
    return held_out(folds, lambda training, rows: score_texts(pairs[training], pairs[rows]))


def score_texts(known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, float]:
    """Texts [pairs, 2] by TF-IDF and logistic regression of known ones [others, 2]: its score before the sigmoid, and
    its threshold."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    try:
        features = vectorizer.fit_transform(known.ravel())
    except ValueError:  # prompts without a single word
        return np.zeros(asked.shape), 0.0
    model = LogisticRegression(max_iter=1000).fit(features, np.tile([0, 1], len(known)))
    return model.decision_function(vectorizer.transform(asked.ravel())).reshape(asked.shape), 0.0


def held_out(folds: np.ndarray, project: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]]) -> HeldOut:
    """Fold by fold what `project` makes of (training pairs [pairs] of bool, rows held out): values [rows, 2] and a
    threshold."""
    projected = np.empty((3, *np.atleast_2d(folds).shape))
    for division, _, training, rows in each_fold(folds):
        values, threshold = project(training, rows)
        projected[0, division, rows], projected[1, division, rows] = values.T
        projected[2, division, rows] = threshold
    natural, artifact, thresholds = projected.reshape(3, *folds.shape)
    return HeldOut(natural, artifact, thresholds, folds)


def _explained(vectors: np.ndarray, confound: np.ndarray, training: np.ndarray) -> np.ndarray:
    """What a least-squares line on training prompts says of all vectors [pairs, 2, hidden] from the confound."""
    centred = confound - confound[training].mean()
    spread = (centred[training] ** 2).sum()
    if spread == 0:
        return np.zeros_like(vectors)
    slope = np.einsum("ps,psh->h", centred[training], vectors[training]) / spread
    return centred[..., None] * slope
