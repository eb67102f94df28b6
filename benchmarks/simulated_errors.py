"""How often is something found where there is nothing, and does the headline cover the truth?

    python -m benchmarks.simulated_errors [--runs 2000] [--cases NAME ..]

Every case goes through `score_layers`, as the analysis does. "found" is the share of runs with p at most 0.05 (or, for
the cases about words, the share whose interval says "more than words"); "covers" that of nested intervals that hold
the truth, "bias" how far the nested d and the largest d are from it.
Writes benchmarks/simulated_errors.json and .md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from alignment_artifacts import baselines
from alignment_artifacts import separation as st
from alignment_artifacts.blocks import independent_groups, undeclared_dependence
from alignment_artifacts.pairs import Pair
from alignment_artifacts.scores import Settings, held_out_scores, score_layers
from benchmarks.tables import parse, write_table

HIDDEN, LAYERS, FLIPS = 32, 4, 199
OBJECTS = ["garden", "kitchen", "library", "harbour", "bakery", "theatre", "museum", "orchard", "workshop", "stable"]
ACTIONS = ["clean", "paint", "rent", "sell", "visit", "close", "guard", "rob", "burn", "flood"]


def noise(rng: np.random.Generator, pairs: int, layers: int = LAYERS) -> np.ndarray:
    return rng.normal(size=(pairs, 2, layers, HIDDEN))


def is_found(vectors: np.ndarray, seed: int, groups: np.ndarray | None = None) -> bool:
    scores = score_layers(vectors, np.zeros(len(vectors)), Settings(FLIPS, 2, seed), groups=groups)
    return min(record["p_value"] for record in scores.layers) <= 0.05


def independent(pairs: int) -> Callable:
    return lambda rng, seed: {"found": is_found(noise(rng, pairs), seed)}


def copied(rng: np.random.Generator, seed: int) -> dict:
    return {"found": is_found(np.repeat(noise(rng, 10), 5, axis=0), seed, np.repeat(np.arange(10), 5))}


def shared_prompt(rng: np.random.Generator, seed: int) -> dict:
    """The same artifact prompt in two pairs."""
    vectors = noise(rng, 50)
    vectors[1::2, 1] = vectors[::2, 1]
    pairs = [Pair(str(i), "all", f"natural {i}", f"Artifact {i // 2}?") for i in range(50)]
    return {"found": is_found(vectors, seed, independent_groups(pairs))}


def shared_object(declared: bool) -> Callable:
    """Ten groups of five pairs that share an object; half of the variance of the differences is the object's."""

    def run(rng: np.random.Generator, seed: int) -> dict:
        objects = np.repeat(rng.normal(size=(10, 1, LAYERS, HIDDEN)) / 2, 5, axis=0)
        vectors = noise(rng, 50) / np.sqrt(2) + np.concatenate([-objects, objects], axis=1)
        verbs = [rng.permutation(ACTIONS) for _ in OBJECTS]
        pairs = [
            Pair(f"{thing}_{k}", "all", f"How can I {verbs[i][k]} the {thing}?", f"Why {verbs[i][k + 5]} that {thing}?",
                 thing if declared else None)
            for i, thing in enumerate(OBJECTS) for k in range(5)
        ]  # fmt: skip
        groups = independent_groups(pairs)
        return {"found": is_found(vectors, seed, groups), "warned": undeclared_dependence(pairs, groups) is not None}

    return run


def headline(pairs: int) -> Callable:
    """26 layers that separate equally; the truth is that of the directions learnt, layer by layer and fold by fold."""

    def run(rng: np.random.Generator, seed: int) -> dict:
        vectors = noise(rng, pairs, 26)
        vectors[:, 1, :, 0] += 2
        scores = score_layers(vectors, np.arange(pairs) % 5, Settings(FLIPS, 2, seed))
        truth = []
        for (_, _, training, _), layer in zip(
            st.each_fold(scores.folds), scores.best_layer["layer_chosen_in_each_fold"], strict=True
        ):
            direction = (vectors[training, 1, layer] - vectors[training, 0, layer]).mean(axis=0)
            truth.append(2 * direction[0] / np.linalg.norm(direction))
        (low, high), d, truth = scores.best_layer["cohens_d_ci"], scores.best_layer["cohens_d"], np.mean(truth)
        largest = max(record["cohens_d"] for record in scores.layers)
        return {"covers": low <= truth <= high, "bias nested": d - truth, "bias largest": largest - truth}

    return run


def regressed(d: float) -> Callable:
    """26 layers that separate equally and lengths that say nothing: both controls at the layers of the folds."""

    def run(rng: np.random.Generator, seed: int) -> dict:
        pairs = np.arange(50)
        vectors, lengths = noise(rng, 50, 26), rng.integers(8, 20, (50, 2)).astype(float)
        vectors[:, 1, :, 0] += d
        settings = Settings(FLIPS, 2, seed)
        scores, signs = score_layers(vectors, pairs % 5, settings), st.sign_flips(pairs, FLIPS, seed)
        chosen = scores.best_layer["layer_chosen_in_each_fold"]
        covered, biases = [], []
        for prepare in (baselines.without(lengths), baselines.discriminant):
            truth = []
            for (_, _, training, _), layer in zip(st.each_fold(scores.folds), chosen, strict=True):
                prepared = prepare(st.pair_vectors(vectors[:, 0, layer], vectors[:, 1, layer]), training)
                direction = prepared.sources[training].mean(axis=0)
                truth.append(d * direction[0] / np.linalg.norm(direction))
            measured = baselines.held_out_by_fold(vectors, scores.folds, chosen, pairs, signs, prepare)
            record = held_out_scores(measured[0], scores.uncertainty, measured[1])
            covered.append(record["cohens_d_ci"][0] <= np.mean(truth) <= record["cohens_d_ci"][1])
            biases.append(record["cohens_d"] - np.mean(truth))
        return {"covers": np.mean(covered), "bias nested": np.mean(biases)}

    return run


def words(beyond: float) -> Callable:
    """26 layers and the words separate with d = 2; the layers with `beyond` more."""

    def run(rng: np.random.Generator, seed: int) -> dict:
        vectors, embeddings = noise(rng, 50, 26), noise(rng, 50, 1)
        vectors[:, 1, :, 0] += 2 + beyond
        embeddings[:, 1, :, 0] += 2
        settings = Settings(FLIPS, 300, seed)
        scores, own = (score_layers(v, np.arange(50) % 5, settings) for v in (vectors, embeddings))
        by_words, spread = own.held_out[0]
        low, _ = scores.uncertainty.difference_interval(by_words, scores.nested[0], (spread, scores.nested[1]))
        return {"found": low > 0}

    return run


CASES = {
    "4 pairs": independent(4),
    "10 pairs": independent(10),
    "50 pairs": independent(50),
    "ten pairs, each five times": copied,
    "an artifact prompt in two pairs each": shared_prompt,
    "shared objects, declared": shared_object(True),
    "shared objects, not declared": shared_object(False),
    "26 equal layers, 10 pairs": headline(10),
    "26 equal layers, 50 pairs": headline(50),
    "length and LDA, 26 equal layers, d = 0": regressed(0.0),
    "length and LDA, 26 equal layers, d = 2": regressed(2.0),
    "words as good as 26 layers": words(0.0),
    "26 layers better than words by 2": words(2.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parse(parser)
    columns = ("found", "warned", "covers", "bias nested", "bias largest")

    def row(name: str) -> dict:
        runs = [CASES[name](np.random.default_rng(seed), seed) for seed in range(arguments.runs)]
        means = {key: round(float(np.mean([run[key] for run in runs])), 3) for key in runs[0]}
        return {"case": name, **{key: means.get(key, "") for key in columns}}

    write_table("simulated_errors", __doc__, map(row, arguments.cases), arguments)


if __name__ == "__main__":
    main()
