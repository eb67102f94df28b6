"""An `ActivationSet` -> per-layer records, by category, by step, and what they mean in a sentence."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from . import statistics as st
from .activation_set import ActivationSet


@dataclass(frozen=True)
class Settings:
    """What the statistics depend on besides the data."""

    permutations: int = 1000
    resamples: int = 1000
    seed: int = 0
    top_layers: int = 5


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
    samples=None,
) -> LayerScores:
    """Held-out separation of matched prompt vectors, layer by layer.

    Args:
        vectors: [pairs, 2, layers, hidden], natural and artifact.
        strata: [pairs] labels that the folds are balanced over.
        samples: layer -> (natural, artifact) vectors for the in-sample numbers; default the prompt vectors.
    """
    folds = st.assign_folds(strata, settings.seed)
    grams = [st.gram(vectors[:, 0, layer], vectors[:, 1, layer]) for layer in range(vectors.shape[2])]
    null = st.sign_flip_null(grams, folds, settings.permutations, settings.seed)
    null_95 = float(np.quantile(null, 0.95))
    records = []
    for layer, gram in enumerate(grams):
        held_out = st.held_out_projections(gram, folds)
        d_interval, accuracy_interval = held_out.intervals(settings.resamples, settings.seed)
        in_sample = samples(layer) if samples else (vectors[:, 0, layer], vectors[:, 1, layer])
        d_in_sample, shift_ratio = st.in_sample_scores(*in_sample)
        direction = vectors[:, 1, layer].mean(axis=0) - vectors[:, 0, layer].mean(axis=0)
        d = held_out.d()
        records.append(
            {
                "cohens_d": d,
                "cohens_d_ci": d_interval,
                "accuracy": held_out.accuracy(),
                "accuracy_ci": accuracy_interval,
                "auroc": held_out.auroc(),
                "p_value": st.p_value(d, null) if np.isfinite(d) else None,
                "null_95": null_95,
                "cohens_d_in_sample": d_in_sample,
                "mean_shift_ratio": shift_ratio,
                "direction_norm": float(np.linalg.norm(direction)),
                "mean_separation_on_axis": held_out.separation(),
                "num_natural_samples": len(in_sample[0]),
                "num_artifact_samples": len(in_sample[1]),
                "num_pairs": len(vectors),
            }
        )
    return LayerScores(records, _best_layer(grams, folds, settings))


def _best_layer(grams: list[st.Gram], folds: np.ndarray, settings: Settings) -> dict | None:
    if len(folds) < st.MIN_PAIRS_NESTED:
        return None
    held_out, chosen = st.nested_best_layer(grams, folds, settings.seed)
    d_interval, accuracy_interval = held_out.intervals(settings.resamples, settings.seed)
    return {
        "cohens_d": held_out.d(),
        "cohens_d_ci": d_interval,
        "accuracy": held_out.accuracy(),
        "accuracy_ci": accuracy_interval,
        "layer_chosen_in_each_fold": chosen,
    }


def headline_positions(data: ActivationSet) -> str:
    """The generated tokens; the prompt's end where none were collected."""
    return "generated" if data.values.shape[2] > 1 else "prompt_end"


def analyse(data: ActivationSet, settings: Settings, config: dict) -> dict:
    """The main result: `alignment_artifact_analysis_results.json` as a dictionary."""
    strata = np.array([pair.category for pair in data.pairs])
    by_position = {
        positions: score_layers(
            data.prompt_vectors(positions), strata, settings, lambda layer, p=positions: data.step_vectors(p, layer)
        )
        for positions in {headline_positions(data), "prompt_end"}
    }
    headline = by_position[headline_positions(data)]
    lexical = None
    if data.prompt_embeddings is not None:
        lexical = score_layers(data.prompt_embeddings[:, :, None], strata, settings).layers[0]
    order = sorted(range(data.num_layers), key=lambda i: -np.nan_to_num(headline.layers[i]["cohens_d"], nan=-np.inf))
    result = {
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
    categories = {}
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
    significant = [i for i in range(data.num_layers) if (scores[str(i)]["p_value"] or 1) <= 0.05]
    steps = []
    for step in range(data.values.shape[2]):
        own = np.flatnonzero(data.valid[:, :, step].all(axis=1))
        row = {"step": "prefill" if step == 0 else step - 1, "num_pairs": len(own), "cohens_d": None}
        if len(own) >= 2 * st.MIN_PAIRS_PER_FOLD:
            folds = st.assign_folds(np.array([data.pairs[i].category for i in own]), settings.seed)
            vectors = data.values[own, :, step]
            row["cohens_d"] = [
                float(st.held_out_d(st.gram(vectors[:, 0, layer], vectors[:, 1, layer]), folds))
                for layer in range(data.num_layers)
            ]
        steps.append(row)
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


def summarise(result: dict) -> str:
    """What the numbers mean, in a sentence or two."""
    best = result["top_layers_by_cohens_d"][0]
    record, nested = result["layer_scores"][str(best)], result["best_layer_nested"]
    if record["p_value"] is None:
        return "Cohen's d is not defined: the vectors of a class do not differ from each other at all."
    if record["p_value"] > 0.05:
        return (
            f"No layer separates natural from artifact prompts better than chance (best: layer {best}, "
            f"p = {record['p_value']:.2g} over all layers)."
        )
    accuracy = f"{nested['accuracy']:.0%} accuracy (layer chosen blindly too)" if nested else "better than chance"
    text = (
        f"Natural and artifact prompts are separated, best at layer {best} (p = {record['p_value']:.2g} over all "
        f"layers): a direction from some pairs tells the prompts of other pairs apart with {accuracy}."
    )
    lexical = result["lexical_baseline"]
    if lexical and lexical["cohens_d"] is not None:
        low, high = record["cohens_d_ci"]
        if lexical["cohens_d"] >= low:
            text += " Word choice alone separates them about as well, so this is no evidence of alignment."
        else:
            text += (
                f" Word choice alone gives d = {lexical['cohens_d']:.1f} ({lexical['accuracy']:.0%}), "
                f"against {record['cohens_d']:.1f} [{low:.1f}, {high:.1f}]."
            )
    return text


def _by_layer(records: list[dict]) -> dict[str, dict]:
    return {str(i): record for i, record in enumerate(records)}


def jsonable(value):
    """Plain Python values; NaN and infinity become null, which JSON can say."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
