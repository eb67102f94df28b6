"""What did training change? Two models on the same matched prompts, their weights, and twins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from alignment_artifacts.behaviour.answers import KnownAnswer, nothing_known
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.comparison import transfer, weights
from alignment_artifacts.comparison.change_space import direction_in_changes
from alignment_artifacts.comparison.difference import compare_layers, cosine
from alignment_artifacts.comparison.forced_reading import read_pairs, read_texts
from alignment_artifacts.directions.estimate import planted_directions
from alignment_artifacts.formatting import interval, named_layers, number, p_value
from alignment_artifacts.pairs import SIDES, Pair, as_pairs, texts
from alignment_artifacts.scores import Settings, is_significant
from alignment_artifacts.separation import MIN_PAIRS_NESTED
from gemma_refactored.activation_capture import block_sites, layer_sites
from gemma_refactored.errors import UserError
from gemma_refactored.files import jsonable
from gemma_refactored.job import mean_prompt_embeddings
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.site_names import described, pattern_of


def check_comparable(first: LoadedModel, second: LoadedModel, pairs: Sequence[Pair], twins: Sequence[Pair]) -> None:
    """Raise UserError unless two models have the same layers, width and vocabulary, and different weights, and there
    are enough pairs and twins (or none of the latter)."""
    groups = independent_groups([*pairs, *twins])  # a prompt may be in both
    for own, what in ((groups[: len(pairs)], "pairs"), (groups[len(pairs) :], "twins")):
        count = len(set(own))
        if count < MIN_PAIRS_NESTED and (len(own) or what == "pairs"):
            kind = what if count == len(own) else f"independent groups of {what}"
            raise UserError(f"A comparison needs at least {MIN_PAIRS_NESTED} {kind}; there are {count}.")
    for name, what in (("num_layers", "layers"), ("hidden_size", "hidden dimensions")):
        sizes = [getattr(model, name) for model in (first, second)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"{first.name} has {sizes[0]} {what} and {second.name} has {sizes[1]}; only models of one shape can be "
                "compared layer by layer."
            )
    vocabularies = [model.tokenizer.get_vocab() for model in (first, second)]
    if vocabularies[0] != vocabularies[1]:
        different = len(vocabularies[0].items() ^ vocabularies[1].items())
        raise UserError(
            f"The tokenizers of {first.name} and {second.name} differ ({different} entries), so the same tokens would "
            "not mean the same to both; compare models with one tokenizer."
        )
    if first.revision == second.revision:
        raise UserError(
            f"{first.name} and {second.name} have the same weights; set MODEL_A and MODEL_B to two different models, "
            "or ADAPTER_B to what training added."
        )


def compare(
    models: Sequence[LoadedModel],
    pairs: Sequence[Pair],
    twins: Sequence[Pair],
    neutral_text: str,
    max_tokens: int,
    site: str,
    settings: Settings,
    progress: Callable[..., object] = lambda texts, kept=False: None,
    known: Sequence[KnownAnswer] = (nothing_known, nothing_known),
    cache: Path | None = None,
    changes: list[weights.TensorChange] | str | None = None,
) -> dict:
    """`results/data/model_comparison.json` as a dictionary; in it the models are called "a" (before) and "b" (after).

    Args:
        twins: prompts that look like artifact prompts and are none; without any, what they would show is left out.
        neutral_text: what both models read after every prompt, in addition to each other's answers.
        max_tokens: of the answers.
        site: "mlp" or "residual".
        progress: called with numbers of texts, `texts_to_read` in total.
        known: for each model, a source of answers that have already been generated.
        cache: folder where what a model has read is kept, so that a comparison can be continued.
        changes: of `weights.changes_or_reason`; None: made here.
    Raises:
        UserError: models that cannot be compared, or too few pairs or twins.
    """
    pairs = as_pairs(pairs)
    check_comparable(models[0], models[1], pairs, twins)
    # One chat format for both: a model before its training may have none.
    with_chat = next((model for model in reversed(models) if model.tokenizer.chat_template), models[1])
    sites = layer_sites(models[1].model, site)
    neutral = with_chat.tokenizer.encode(neutral_text, add_special_tokens=False)
    readings = read_pairs(models, _encode(with_chat, pairs), neutral, max_tokens, sites, progress, known, cache)
    conditions: dict[str, dict] = {}
    for condition, (first, second, complete) in readings.items():
        these = [pairs[i] for i in complete]
        groups = independent_groups(these)
        if len(set(groups)) < MIN_PAIRS_NESTED:
            raise UserError(
                f"Only {len(complete)} of {len(pairs)} pairs have text to read under the condition {condition!r}: the "
                f"other answers are empty. A comparison needs {MIN_PAIRS_NESTED} independent ones; use other models or "
                "prompts."
            )
        layers = compare_layers(first, second, _categories(these), settings, groups)
        conditions[condition] = {"num_pairs": len(complete), "layers": layers}

    ends_a, ends_b, _ = readings["prompt_end"]
    vectors = {"a": ends_a, "b": ends_b}
    if twins:
        vectors = {
            name: np.concatenate([ends, _read_ends(model, with_chat, twins, sites, progress, cache)])
            for (name, ends), model in zip(vectors.items(), models, strict=True)
        }
    embeddings = mean_prompt_embeddings(models[1], texts([*pairs, *twins])).reshape(len(pairs) + len(twins), 2, -1)
    by_source = transfer.cross_decoding(vectors, embeddings, pairs, twins, settings)
    names = dict(zip("ab", short_names(models[0].name, models[1].name), strict=True)) | {"words": transfer.WORDS}
    planted = planted_directions(models[1])
    outputs = weights.output_sites(models[1].model)
    output_ends = [_read_ends(model, with_chat, pairs, outputs, progress, cache) for model in models]
    change = _directions(ends_b) - _directions(ends_a)
    stream = [outputs.index(name) for name in block_sites(models[1].model)]
    return jsonable(
        {
            "models": {name: model.facts() for name, model in zip("ab", models, strict=True)},
            "names": names,
            "behaviour": pairs.behaviour,
            "sides": list(pairs.sides),
            "site": described(pattern_of(sites[0])),
            "config": {"site": site, "max_tokens": max_tokens, "neutral_text": neutral_text, **asdict(settings)},
            "num_twins": len(twins),
            "conditions": conditions,
            "summary": summarise(conditions["prompt_end"]["layers"], (names["a"], names["b"]), pairs.sides),
            "weights": weights.compare_weights(
                models,
                weights.changes_or_reason(models) if changes is None else changes,
                outputs,
                (output_ends[1] - output_ends[0]).mean(axis=(0, 1)),
                _directions(output_ends[1]),
                pairs.sides,
                planted,
            ),
            "change_space": direction_in_changes(
                output_ends[0][:, :, stream],
                output_ends[1][:, :, stream],
                _categories(pairs),
                (names["a"], names["b"]),
                settings.seed,
                independent_groups(pairs),
            ),
            "transfer": by_source,
            "transfer_summary": transfer.summarise(by_source, names, pairs.sides),
            "planted_truth": {layer: cosine(change[layer], value) for layer, value in sorted(planted.items())}
            if site == "mlp" and planted
            else None,
        }
    )


def texts_to_read(pairs: Sequence[Pair], twins: Sequence[Pair]) -> int:
    """How many `compare` processes, for a progress bar: answers, three texts, prompts and twins, in two models."""
    return 2 * (2 * len(pairs) + 3 * 2 * len(pairs) + 2 * len(pairs) + 2 * len(twins))


def _categories(pairs: Sequence[Pair]) -> np.ndarray:
    return np.array([pair.category for pair in pairs])


def _encode(loaded: LoadedModel, pairs: Sequence[Pair]) -> list[list[list[int]]]:
    """Token ids, [pair][natural, artifact]."""
    flat = loaded.encode(texts(pairs))
    return [flat[i : i + 2] for i in range(0, len(flat), 2)]


def _read_ends(
    model: LoadedModel, with_chat: LoadedModel, pairs: Sequence[Pair], sites: list[str], progress, cache
) -> np.ndarray:
    """[pairs, 2, layers, hidden] at the prompts' ends."""
    flat = [ids for two in _encode(with_chat, pairs) for ids in two]
    ends, _ = read_texts(model, flat, [[]] * len(flat), sites, progress, cache)
    return ends.reshape(len(pairs), 2, *ends.shape[1:])


def _directions(vectors: np.ndarray) -> np.ndarray:
    """[layers, hidden] mean artifact minus mean natural of vectors [pairs, 2, layers, hidden]."""
    return (vectors[:, 1] - vectors[:, 0]).mean(axis=0)


def short_names(*names: str) -> tuple[str, ...]:
    """Names without the folders that lead to the models, where these still tell them apart."""
    parts = [name.partition(" (") for name in names]
    short = tuple(f"{path.rpartition('/')[2]}{bracket}{rest}" for path, bracket, rest in parts)
    return short if len(set(short)) == len(set(names)) else names


def summarise(records: list[dict], names: tuple[str, str], sides: tuple[str, str] = SIDES) -> str:
    """The comparison at one kind of position, in a sentence or two."""
    significant = [i for i, r in enumerate(records) if is_significant(r)]
    same = [i for i, r in enumerate(records) if r["largest_change"] == 0]
    identical = f" At {named_layers(same)} they are identical." if same else ""
    if not significant:
        return (
            f"On the same tokens {names[1]} separates {sides[1]} from {sides[0]} prompts no better or worse than "
            f"{names[0]} at any layer.{identical}"
        )
    best = max(significant, key=lambda i: abs(records[i]["difference"]))
    r, signs = records[best], {records[i]["difference"] > 0 for i in significant}
    how = "differently from" if len(signs) > 1 else "better than" if signs == {True} else "less well than"
    return (
        f"On the same tokens {names[1]} separates {sides[1]} from {sides[0]} prompts {how} {names[0]} "
        f"at {named_layers(significant)}, most at layer {best}: d = {number(r['d_b'], 1)} against "
        f"{number(r['d_a'], 1)}, a difference of {r['difference']:+z.1f} {interval(r['difference_ci'], 1)} "
        f"(pointwise, the largest of {len(records)} layers; p = {p_value(r['p_value'])} over all layers).{identical}"
    )
