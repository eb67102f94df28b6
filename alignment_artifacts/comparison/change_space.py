"""Does a direction lie in what training changed?

Two models of one shape read the same prompts. The changes of the residual stream at the prompts' ends are a matrix
[prompts, hidden]; its leading right singular vectors are the truth about what training wrote there (not centred: much
of a change may be the same for all prompts). How far a direction from *other* pairs lies in the first k of them is the
share of its squared norm that they hold.
"""

from __future__ import annotations

import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.formatting import named_layers, percent
from gemma_refactored.files import jsonable

MOST = 5  # singular vectors


def leading_directions(changes: np.ndarray) -> np.ndarray:
    """[up to MOST, hidden] unit right singular vectors of changes [prompts, hidden], those of value 0 left out."""
    _, values, vectors = np.linalg.svd(changes.astype(np.float64), full_matrices=False)
    return vectors[:MOST][values[:MOST] > 1e-9 * max(values[0], 1e-30)]


def shares_in(direction: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """[MOST] of a direction's squared norm, the share in the first 1, 2, .. vectors of a basis; NaN without any."""
    size = float(direction @ direction)
    if not len(basis) or not size:
        return np.full(MOST, np.nan)
    parts = np.zeros(MOST)
    parts[: len(basis)] = (basis @ direction) ** 2 / size
    return np.cumsum(parts)


def random_shares(hidden: int, quantile: float) -> np.ndarray:
    """[MOST] the share of a random direction in 1, 2, .. fixed ones: a quantile of Beta(k/2, (hidden - k)/2), exact."""
    from scipy.special import betaincinv

    sizes = np.arange(1, MOST + 1)
    return np.array([betaincinv(k / 2, (hidden - k) / 2, quantile) if k < hidden else 1.0 for k in sizes])


def direction_in_changes(
    first: np.ndarray,
    second: np.ndarray,
    strata: np.ndarray,
    names: tuple[str, str],
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> dict:
    """How far both models' directions lie in what changed between them, layer by layer.

    Args:
        first, second: [pairs, 2 (natural, artifact), layers, hidden] residual streams at the prompts' ends.
        strata: [pairs] labels that the folds are balanced over.
        names: of the models.
        groups: [pairs] labels of pairs that depend on each other.
    Returns:
        "layers": for each one "a" and "b", the shares [MOST] of the directions of the first and the second model, from
        training pairs, in the changes of held-out prompts (means over folds), "b_range" the lowest and the highest of a
        fold, and "of_changes", the shares [MOST] of the changes' own squared norm; None where nothing changed.
        "random_mean", [MOST], of random directions, and "random_95", below which 95% of them stay at all layers
        together. "summary", in a sentence.
    """
    num_layers, hidden = first.shape[2:]
    folds = st.assign_divisions(strata, seed, st.group_numbers(groups, len(strata)))
    layers = []
    for layer in range(num_layers):
        before, after = (model[:, :, layer].astype(np.float64) for model in (first, second))
        changes = after - before
        found: dict[str, list[np.ndarray]] = {"a": [], "b": []}
        for _, _, training, held in st.each_fold(folds):
            basis = leading_directions(changes[held].reshape(-1, hidden))
            for name, vectors in (("a", before), ("b", after)):
                found[name].append(shares_in((vectors[training, 1] - vectors[training, 0]).mean(axis=0), basis))
        squares = np.linalg.svd(changes.reshape(-1, hidden), compute_uv=False) ** 2
        of_changes = np.cumsum(squares[:MOST]) / squares.sum() if squares.sum() else np.full(MOST, np.nan)
        by_fold = {name: np.array(shares) for name, shares in found.items()}
        layers.append(
            {
                **{name: shares.mean(axis=0).tolist() for name, shares in by_fold.items()},
                "b_range": np.stack([by_fold["b"].min(axis=0), by_fold["b"].max(axis=0)], axis=1).tolist(),
                "of_changes": of_changes.tolist(),
            }
        )
    result = jsonable(
        {
            "layers": layers,
            "random_mean": (np.arange(1, MOST + 1) / hidden).tolist(),
            "random_95": random_shares(hidden, 0.95 ** (1 / num_layers)).tolist(),
        }
    )
    return {**result, "summary": summarise(result, names)}


def summarise(result: dict, names: tuple[str, str]) -> str:
    """In two sentences: where the direction lies in the first vector of the changes, and by how much."""
    shares = {i: r["b"][0] for i, r in enumerate(result["layers"]) if r["b"][0] is not None}
    if not shares:
        return "Training changed nothing in the residual stream at the prompt's end."
    limit = result["random_95"][0]
    above = [layer for layer, share in shares.items() if share > limit]
    # In every fold more than before training: else the changes go where the direction was already.
    rises = [i for i in above if result["layers"][i]["b_range"][0][0] > (result["layers"][i]["a"][0] or 0)]
    best = max(rises or shares, key=lambda layer: shares[layer])
    record = result["layers"][best]
    low, high = record["b_range"][0]
    if rises:
        text = (
            f"The direction of {names[1]} lies in what training changed more than random ones at {named_layers(rises)}"
        )
    elif above:
        text = (
            f"The direction of {names[1]} lies in what training changed more than random ones at {named_layers(above)}"
            f", but no more than that of {names[0]}: training need not have written it"
        )
    else:
        text = f"The direction of {names[1]} lies in what training changed no more than random ones do, at any layer"
    return (
        f"{text}: the first right singular vector of the residual stream's changes at the end of other prompts holds "
        f"{percent(record['b'][0])} of its squared norm at layer {best}, the highest of {len(result['layers'])} "
        f"({percent(low)} to {percent(high)} over folds), the first {MOST} hold {percent(record['b'][-1])}. Of the "
        f"direction of {names[0]} there it is {percent(record['a'][0])} and {percent(record['a'][-1])}; 95% of random "
        f"directions stay below {percent(limit, 1)} and {percent(result['random_95'][-1], 1)} at all layers."
    )
