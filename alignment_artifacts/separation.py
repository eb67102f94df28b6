"""Held-out separation of two matched sets of vectors, with intervals and a null.

The independent unit is the pair: natural[i] and artifact[i] are one vector each for the two
prompts of pair i. A direction is the mean artifact minus natural vector of the *training*
pairs; every number but the ones called "in sample" is measured on pairs it has not seen, and that
share no prompt with those it has (the monitor's twins, `auroc_elsewhere`, share artifact prompts).
Pairs that depend on each other (a shared prompt, say) form a *group*: folds and swaps take it or
leave it as one (exchangeability blocks, Winkler et al. 2014).

With D the pair differences and M the (centred) pair means, a direction is a weighted sum of rows
of D, so projections of held-out prompts need only `D Dᵀ` and `M Dᵀ`. Swapping natural and artifact
within a pair flips a row of D and leaves M alone, which makes a permutation as cheap as a product
of [pairs, pairs]; where pairs outnumber dimensions, products with D and M themselves are cheaper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

MAX_FOLDS, MIN_PAIRS_PER_FOLD = 5, 5
MIN_PAIRS = 4
MIN_PAIRS_NESTED = 8  # folds within folds
# With fewer groups the luck of the folds moves d by 1 or 2: the mean over several divisions is taken.
FEW_GROUPS, DIVISIONS = 40, 10
FAR = 10  # median absolute deviations; of normal distances one in 10^10 is as far
LARGEST_D = 1e6
CHUNK = 256  # permutations worked on at once
LAYER_SHARE = 2 / 3  # layers are used whose d reaches this share of the best layer's


class PairVectors:
    """One layer's matched vectors, natural and artifact [pairs, hidden], ready to be projected.

    Args:
        differences: [pairs, hidden] D, artifact minus natural.
        means: [pairs, hidden] M, centred over all pairs of the layer.
        groups: [pairs] numbers of pairs that depend on each other; default: every pair by itself.
        sources: [pairs, hidden] whose weighted sums directions are; default: D.
    """

    def __init__(
        self,
        differences: np.ndarray,
        means: np.ndarray,
        groups: np.ndarray | None = None,
        sources: np.ndarray | None = None,
    ):
        self.differences, self.means = differences, means
        self.groups = np.arange(len(differences)) if groups is None else groups
        self.sources = differences if sources is None else sources

    @cached_property
    def inner(self) -> tuple[np.ndarray, np.ndarray] | None:
        is_wide = self.differences.shape[0] <= self.differences.shape[1]
        return (self.sources @ self.differences.T, self.sources @ self.means.T) if is_wide else None

    def along(self, weights: np.ndarray, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Rows of D and M projected on the direction `weights @ sources`, for weights [.., pairs]: [.., rows] each."""
        if self.inner is not None:
            return tuple(weights @ products[:, rows] for products in self.inner)
        direction = weights @ self.sources
        return direction @ self.differences[rows].T, direction @ self.means[rows].T


def pair_vectors(natural: np.ndarray, artifact: np.ndarray, groups: np.ndarray | None = None) -> PairVectors:
    """From one layer's prompt vectors, natural and artifact [pairs, hidden], and the pairs' groups."""
    natural, artifact = natural.astype(np.float64), artifact.astype(np.float64)
    means = (artifact + natural) / 2
    return PairVectors(artifact - natural, means - means.mean(axis=0), groups)


def assign_folds(strata: np.ndarray, seed: int = 0, groups: np.ndarray | None = None) -> np.ndarray:
    """A fold number for each pair, each stratum spread evenly over the folds, no group split.

    Five folds where there are at least 25 groups; fewer groups make fewer folds (at least two), so
    that each keeps some pairs to measure a spread on.

    Args:
        strata: [pairs] any labels (the pairs' categories).
        groups: [pairs] labels of pairs that depend on each other; default: each pair by itself.
    Raises:
        ValueError: fewer than four groups.
    """
    groups = group_numbers(groups, len(strata))
    sizes, first = np.bincount(groups), np.unique(groups, return_index=True)[1]
    if len(sizes) < MIN_PAIRS:
        what = "pairs" if len(sizes) == len(strata) else "independent groups of pairs"
        raise ValueError(f"held-out statistics need at least {MIN_PAIRS} {what}, there are {len(sizes)}")
    folds = int(np.clip(len(sizes) // MIN_PAIRS_PER_FOLD, 2, MAX_FOLDS))
    rng, labels = np.random.default_rng(seed), np.asarray(strata)[first]
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == s)) for s in np.unique(labels)])
    fold_of_group, filled = np.empty(len(sizes), int), np.zeros((folds, 2), int)
    for group in order:  # to the fold with the fewest groups, and of those the fewest pairs
        fold = min(range(folds), key=lambda fold: tuple(filled[fold]))
        fold_of_group[group] = fold
        filled[fold] += 1, sizes[group]
    return fold_of_group[groups]


def assign_divisions(strata: np.ndarray, seed: int = 0, groups: np.ndarray | None = None) -> np.ndarray:
    """[divisions, pairs] fold numbers: one division into folds, or ten where groups are fewer than 40."""
    few = group_numbers(groups, len(strata)).max() + 1 < FEW_GROUPS
    return np.stack([assign_folds(strata, seed + number, groups) for number in range(DIVISIONS if few else 1)])


def group_numbers(groups: np.ndarray | None, pairs: int) -> np.ndarray:
    """[pairs] the groups' labels as numbers from 0; without groups each pair is one."""
    return np.arange(pairs) if groups is None else np.unique(groups, return_inverse=True)[1]


def each_fold(folds: np.ndarray) -> Sequence[tuple[int, int, np.ndarray, np.ndarray]]:
    """(division, fold, training [pairs] bool, rows held out) of folds [pairs] or [divisions, pairs]; -1: in neither."""
    return _each_fold(folds.astype(np.int64).tobytes(), folds.shape[-1])


@lru_cache(maxsize=64)  # the same folds are gone through for every layer
def _each_fold(numbers: bytes, pairs: int) -> Sequence[tuple[int, int, np.ndarray, np.ndarray]]:
    parts = []
    for division, folds in enumerate(np.frombuffer(numbers, np.int64).reshape(-1, pairs)):
        for fold in np.unique(folds[folds >= 0]):
            held = folds == fold
            parts.append((division, int(fold), ~held & (folds >= 0), np.flatnonzero(held)))
    return tuple(parts)


def hedges_d(natural: np.ndarray, artifact: np.ndarray) -> np.ndarray:
    """Cohen's d with pooled standard deviation (n-1) and Hedges' small-sample correction.

    Args:
        natural, artifact: [.., n] projections, n at least 2. Without any spread d is not defined: NaN.
    """
    n, m = natural.shape[-1], artifact.shape[-1]
    freedom = n + m - 2
    pooled = ((n - 1) * natural.var(-1, ddof=1) + (m - 1) * artifact.var(-1, ddof=1)) / freedom
    return _hedges(artifact.mean(-1) - natural.mean(-1), pooled, freedom)


def matched_d(shift: np.ndarray, centre: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """`hedges_d` of projections given as artifact minus natural and as their mean; [.., n pairs] each.

    Args:
        groups: [n] numbers; what the members of a group share makes the spread no smaller, see `variance`.
    """
    n = shift.shape[-1]
    average = np.full(n, 1 / n)  # products are faster than reductions over few numbers
    mean = shift @ average
    # Twice the sum of the squares of these two is the sum of both sides' squares.
    pooled, freedom, _ = variance([centre - (centre @ average)[..., None], (shift - mean[..., None]) / 2], groups)
    return _hedges(mean, pooled, 2 * freedom)


def variance(
    parts: Sequence[np.ndarray], groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray | float, np.ndarray | float]:
    """Of the sum of independent parts [.., n], each with mean 0.

    Deviations from a mean that few groups share are too small. The sum of the components between and within groups
    (analysis of variance, Searle et al. 1992, section 3.6) is right whatever pairs of a group have in common; where
    each pair is a group it is the variance as everyone knows it.

    Args:
        groups: [n] numbers.
    Returns:
        The variance; its degrees of freedom in each part (Satterthwaite 1946); and the share of it that is between
        groups, the intraclass correlation, which may come out below 0.
    """
    n, (count, size, means) = len(groups), _groups(groups.astype(np.int64).tobytes())
    total = sum(np.einsum("...i,...i->...", x, x) for x in parts)
    if count in (1, n):
        return total / (n - 1), n - 1, 0.0
    between = sum(np.einsum("...i,...i->...", x, x) for x in (x @ means for x in parts))
    within = (total - between) / (n - count)
    outer, inner = between / (count - 1) / size, within * (1 - 1 / size)
    whole = outer + inner
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = whole**2 / (outer**2 / (count - 1) + inner**2 / (n - count))
        return whole, freedom, 1 - within / whole


@lru_cache(maxsize=1024)  # those of each fold are asked for at every layer
def _groups(labels: bytes) -> tuple[int, float, np.ndarray]:
    """How many groups, the size of equal groups that would do as well, and who is in which [n, groups], normed."""
    numbers = np.unique(np.frombuffer(labels, np.int64), return_inverse=True)[1]
    sizes, n = np.bincount(numbers), len(numbers)
    members = (numbers[:, None] == np.arange(len(sizes))) / np.sqrt(sizes)
    return len(sizes), (n - (sizes**2).sum() / n) / max(len(sizes) - 1, 1), members


def _hedges(shift: np.ndarray, pooled: np.ndarray, freedom: np.ndarray | float) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        d = shift / np.sqrt(pooled)
    d = np.where(np.abs(d) < LARGEST_D, d, np.nan)  # also where the spread is nothing but rounding
    return d * (1 - 3 / (4 * freedom - 1))


def auroc(natural: np.ndarray, artifact: np.ndarray) -> float:
    """Probability that an artifact projection exceeds a natural one (ties count half)."""
    difference = artifact[:, None] - natural[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def project(
    layer: PairVectors, training: np.ndarray, signs: np.ndarray | None = None, rows: np.ndarray | slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Project prompts on the direction learnt from the training pairs.

    Args:
        training: [pairs] bool.
        signs: [.., pairs] of +1/-1; -1 swaps natural and artifact in that pair. Default: none swapped.
        rows: of which pairs.
    Returns:
        natural, artifact: [.., rows] projections (on the unnormalised direction).
    """
    if signs is None:
        signs = np.ones(len(training))
    differences, centre = layer.along(signs * training / training.sum(), rows)
    shift = signs[..., rows] * differences  # D_j · direction, after the swaps
    return centre - shift / 2, centre + shift / 2


def held_out_d(layer: PairVectors, folds: np.ndarray, signs: np.ndarray | None = None) -> np.ndarray:
    """Cohen's d of the held-out pairs, averaged over folds and divisions; [..] for signs [.., pairs]."""
    signs = np.ones(folds.shape[-1]) if signs is None else signs
    return np.mean([fold_d(layer, training, rows, signs) for _, _, training, rows in each_fold(folds)], axis=0)


def fold_d(layer: PairVectors, training: np.ndarray, rows: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """[..] d of the pairs `rows` on the direction of the training pairs, for signs [.., pairs]."""
    differences, centre = layer.along(signs * (training / training.sum()), rows)
    return matched_d(signs[..., rows] * differences, centre, layer.groups[rows])


@dataclass
class HeldOut:
    """Out-of-fold projections of one layer, each fold's in units of its own direction's length.

    All are [pairs], or [divisions, pairs] where the pairs were divided into folds more than once; every
    number is the mean over divisions.
    """

    natural: np.ndarray
    artifact: np.ndarray
    thresholds: np.ndarray  # midpoint of the training projections
    folds: np.ndarray
    groups: np.ndarray  # [pairs]

    def d(self) -> float:
        rows = (rows for _, _, _, rows in each_fold(self.folds))
        parts = zip(self.by_fold(), rows, strict=True)
        return float(np.mean([matched_d(a - n, (a + n) / 2, self.groups[rows]) for (n, a), rows in parts]))

    def accuracy(self) -> float:
        return float(self.right().mean())

    def right(self) -> np.ndarray:
        """[pairs] the share of a pair's prompts on their own side of the threshold, mean over divisions."""
        sides = (self.natural < self.thresholds) * 0.5 + (self.artifact > self.thresholds) * 0.5
        return np.atleast_2d(sides).mean(axis=0)

    def pair_accuracy(self) -> float:
        """Share of artifact prompts above their own natural partner (ties count half): what matching is for."""
        return float((self.artifact > self.natural).mean() + (self.artifact == self.natural).mean() / 2)

    def auroc(self) -> float:
        return float(np.mean([auroc(n, a) for n, a in self.by_fold()]))

    def separation(self) -> float:
        """Mean artifact minus natural projection, in units of activation."""
        return float(np.mean([a.mean() - n.mean() for n, a in self.by_fold()]))

    def by_fold(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Natural and artifact projections of each fold."""
        natural, artifact = np.atleast_2d(self.natural), np.atleast_2d(self.artifact)
        return [(natural[i, rows], artifact[i, rows]) for i, _, _, rows in each_fold(self.folds)]


def stabilised(d: np.ndarray | float) -> np.ndarray:
    """d on the scale where its sampling error does not depend on its size (Hedges and Olkin 1985)."""
    return np.arcsinh(np.asarray(d) / np.sqrt(8))


def held_out_projections(layer: PairVectors, folds: np.ndarray) -> HeldOut:
    """Each pair projected on the direction of the other folds, normalised to unit length."""
    return collect_folds(folds, layer.groups, (fold_projections(layer, part[2], part[3]) for part in each_fold(folds)))


def fold_projections(
    layer: PairVectors, training: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Natural and artifact projections [rows] on the unit direction of the training pairs, and its threshold."""
    natural, artifact = project(layer, training)
    length = np.linalg.norm(training / training.sum() @ layer.sources) or 1.0
    threshold = (natural[training].mean() + artifact[training].mean()) / 2 / length
    return natural[rows] / length, artifact[rows] / length, threshold


def collect_folds(
    folds: np.ndarray, groups: np.ndarray, projections: Iterable[tuple[np.ndarray, np.ndarray, float]]
) -> HeldOut:
    """Of natural, artifact and threshold of each fold, in the order of `each_fold`."""
    projected = np.empty((3, *np.atleast_2d(folds).shape))
    for (division, _, _, rows), values in zip(each_fold(folds), projections, strict=True):
        for kept, of_fold in zip(projected, values, strict=True):
            kept[division, rows] = of_fold
    natural, artifact, thresholds = projected.reshape(3, *folds.shape)
    return HeldOut(natural, artifact, thresholds, folds, groups)


def sign_flips(groups: np.ndarray, permutations: int, seed: int = 0) -> np.ndarray:
    """[flips, pairs] of +1/-1, one sign a group; the first row swaps nothing: it is what was observed.

    Swapping everything changes no d, so n groups have 2^(n-1) different flips. Where they are fewer than
    `permutations` each comes once, otherwise `permutations` are drawn.

    Args:
        groups: [pairs] numbers from 0, see `group_numbers`.
    """
    count = groups.max() + 1
    if 2.0 ** (count - 1) <= permutations:
        bits = np.arange(2 ** (count - 1))[:, None] >> np.arange(count) & 1  # the last group is never swapped
        return 1.0 - 2.0 * bits[:, groups]
    drawn = np.random.default_rng(seed).choice([-1.0, 1.0], (permutations, count))
    return np.concatenate([np.ones((1, count)), drawn])[:, groups]


def smallest_p(groups: np.ndarray, permutations: int) -> float:
    """The smallest p value that `sign_flips` can give."""
    return max(2.0 ** -int(groups.max()), 1 / (permutations + 1))


def sign_flip_d(layer: PairVectors, folds: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """[flips] held-out d of one layer with natural and artifact swapped as `sign_flips` says; observed comes first.

    The same swaps have to be used for every layer: see `best_of`.
    """
    return np.concatenate([held_out_d(layer, folds, signs[i : i + CHUNK]) for i in range(0, len(signs), CHUNK)])


def best_of(layers: Sequence[np.ndarray]) -> np.ndarray:
    """The null of the best layer: maximum of `sign_flip_d` over layers, for family-wise error."""
    return np.fmax.reduce(layers)


def p_value(observed: float, null: np.ndarray) -> float:
    """Share of flips that give at least what was seen, which is one of them (Phipson & Smyth 2010).

    Equal sums in another order differ in their last bits; they are ties.

    Args:
        null: [flips] of the statistic, the observed one among them.
    """
    return float((null >= observed - 1e-9 * max(1.0, abs(observed))).mean())


def inner_folds(
    folds: np.ndarray, strata: np.ndarray | None = None, groups: np.ndarray | None = None
) -> list[np.ndarray]:
    """For each fold of `each_fold` [pairs] the folds inside its training pairs, -1 for those held out.

    Raises:
        ValueError: fewer than eight groups.
    """
    pairs = folds.shape[-1]
    groups, strata = group_numbers(groups, pairs), np.zeros(pairs) if strata is None else np.asarray(strata)
    if groups.max() + 1 < MIN_PAIRS_NESTED:
        raise ValueError(f"choosing a layer inside the folds needs at least {MIN_PAIRS_NESTED} pairs")
    inner = []
    for division, _, training, _ in each_fold(folds):
        numbers = np.where(training, np.atleast_2d(folds)[division], -1)
        if len(np.unique(numbers[training])) < 2:  # two outer folds: divide the training half again
            numbers[training] = assign_folds(strata[training], 0, groups[training])
        inner.append(numbers)
    return inner


def inner_scores(layer: PairVectors, inner: Sequence[np.ndarray]) -> np.ndarray:
    """[folds] held-out d inside each fold's training pairs, to choose a layer without the fold; see `inner_folds`."""
    return np.array([held_out_d(layer, folds) for folds in inner])


def nested_best_layer(held_out: Sequence[HeldOut], scores: Sequence[np.ndarray]) -> tuple[HeldOut, list[int]]:
    """The best layer, chosen inside the training folds, measured on the fold left out.

    Args:
        held_out: of every layer; scores: `inner_scores` of every layer.
    Returns:
        The out-of-fold projections, and the layer chosen for each fold.
    """
    folds, groups = held_out[0].folds, held_out[0].groups
    chosen = [int(np.nanargmax(d)) if np.isfinite(d).any() else 0 for d in np.transpose(scores)]
    projections = (
        tuple(np.atleast_2d(x)[division, rows] for x in (best.natural, best.artifact, best.thresholds))
        for best, (division, _, _, rows) in zip((held_out[layer] for layer in chosen), each_fold(folds), strict=True)
    )
    return collect_folds(folds, groups, projections), chosen


def leading_orthogonal_component(natural: np.ndarray, artifact: np.ndarray) -> np.ndarray:
    """Where prompts lie on the axis along which they differ most once the mean difference is projected out.

    Args:
        natural, artifact: [pairs, hidden].
    Returns:
        [pairs, 2] projections, in units of activation, centred; the sign is that of the largest weight.
    """
    vectors = np.concatenate([natural, artifact]).astype(np.float64)
    vectors -= vectors.mean(axis=0)
    direction = vectors[len(natural) :].mean(axis=0) - vectors[: len(natural)].mean(axis=0)
    direction /= np.linalg.norm(direction) or 1.0
    vectors -= np.outer(vectors @ direction, direction)
    if len(vectors) <= vectors.shape[1]:
        component = vectors.T @ np.linalg.eigh(vectors @ vectors.T)[1][:, -1]
    else:
        component = np.linalg.eigh(vectors.T @ vectors)[1][:, -1]
    component /= np.linalg.norm(component) or 1.0
    component *= np.sign(component[np.abs(component).argmax()])
    return (vectors @ component).reshape(2, -1).T


def in_sample_scores(
    blocks: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]],
) -> tuple[float, float, tuple[int, int]]:
    """Two numbers that are often called Cohen's d, for contrast; both flatter.

    Args:
        blocks: gives the vectors anew at each call, natural and artifact [samples, hidden], in one or more
            parts: for example all steps of all prompts pooled.
    Returns:
        d on the direction made from the same vectors; the mean shift ratio
        `|direction| / sqrt((mean_j sd_nat_j + mean_j sd_art_j) / 2)`, which grows with the dimension;
        and the numbers of samples.
    """
    origin: np.ndarray | None = None  # sums of squares are taken from a point among the data, so that nothing cancels
    count, total, squares = np.zeros((2, 1)), np.zeros(1), np.zeros(1)
    for block in blocks():
        origin = block[0][:1].astype(np.float64) if origin is None else origin
        parts = [side - origin for side in block]
        count += [[len(part)] for part in parts]
        total = total + np.array([part.sum(axis=0) for part in parts])
        squares = squares + np.array([(part * part).sum(axis=0) for part in parts])
    mean = total / count
    deviation = np.sqrt(np.maximum(squares - count * mean**2, 0) / (count - 1))
    direction = mean[1] - mean[0]
    projections = [[(side - origin) @ direction for side in block] for block in blocks()]
    d = hedges_d(*(np.concatenate(side) for side in zip(*projections, strict=True)))
    spread = deviation.mean(axis=1).sum() / 2
    ratio = np.linalg.norm(direction) / np.sqrt(spread) if spread > 0 else np.nan
    return float(d), float(ratio), (int(count[0, 0]), int(count[1, 0]))


def outlying_prompts(natural: np.ndarray, artifact: np.ndarray) -> list[dict]:
    """Prompts of one layer whose distance from the mean is beyond ten median absolute deviations of all distances.

    Args:
        natural, artifact: [pairs, hidden].
    Returns:
        "pair" (index), "side", and "deviations".
    """
    sides = np.stack([natural, artifact]).astype(np.float64)
    distances = np.linalg.norm(sides - np.median(sides, axis=(0, 1)), axis=2)
    middle = np.median(distances)
    deviation = np.median(np.abs(distances - middle))
    if deviation == 0:
        return []
    deviations = (distances - middle) / deviation
    return [
        {"pair": int(pair), "side": ("natural", "artifact")[side], "deviations": float(deviations[side, pair])}
        for side, pair in np.argwhere(deviations > FAR)
    ]


def separating_layers(vectors: np.ndarray, categories: list[str], groups: np.ndarray | None = None) -> list[int]:
    """Layers whose held-out d comes near that of the best; arguments as of `layer_separation`."""
    d = layer_separation(vectors, categories, groups)
    return [int(i) for i in np.flatnonzero(d >= min(LAYER_SHARE * d.max(), d.max()))]


def layer_separation(vectors: np.ndarray, categories: list[str], groups: np.ndarray | None = None) -> np.ndarray:
    """[layers] held-out Cohen's d of prompt vectors [pairs, 2, layers, hidden]; groups [pairs] as in `assign_folds`.

    Raises:
        ValueError: too few pairs to hold any out.
    """
    folds = assign_folds(np.array(categories), groups=groups)
    layers = [pair_vectors(vectors[:, 0, layer], vectors[:, 1, layer]) for layer in range(vectors.shape[2])]
    return np.nan_to_num([held_out_d(layer, folds) for layer in layers])
