"""Is it alignment, or just different words? Two models, and twins, on the same matched prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np

from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.comparison import transfer
from alignment_artifacts.comparison.difference import compare_layers, cosine
from alignment_artifacts.comparison.forced_reading import read_pairs, read_texts
from alignment_artifacts.directions.estimate import planted_directions
from alignment_artifacts.pairs import Pair
from alignment_artifacts.scores import Settings, is_significant
from alignment_artifacts.separation import MIN_PAIRS_NESTED
from gemma_refactored.activation_capture import layer_sites
from gemma_refactored.errors import UserError
from gemma_refactored.files import jsonable
from gemma_refactored.job import mean_prompt_embeddings
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.prompt_processing import encode_prompts

WORDS = "words alone"


def check_comparable(first: LoadedModel, second: LoadedModel) -> None:
    """Raise UserError unless two models have the same layers, width and vocabulary, and different weights."""
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
        raise UserError(f"{first.name} and {second.name} are the same weights; set MODEL_A and MODEL_B to two models.")


def compare(
    models: Sequence[LoadedModel],
    pairs: Sequence[Pair],
    twins: Sequence[Pair],
    neutral_text: str,
    max_tokens: int,
    site: str,
    settings: Settings,
    progress: Callable[[int], object] = lambda texts: None,
) -> dict:
    """`results/data/model_comparison.json` as a dictionary; models are called "a" (before) and "b" (after) in it.

    Args:
        neutral_text: what both models read after every prompt, besides either's answers.
        max_tokens: of the answers.
        site: "mlp" or "residual".
        progress: called with numbers of texts; `texts_to_read` in all.
    Raises:
        UserError: models that cannot be compared, or too few pairs or twins.
    """
    check_comparable(*models)
    for found, what in ((pairs, "pairs"), (twins, "twins")):
        if len(found) < MIN_PAIRS_NESTED:
            raise UserError(f"A comparison needs at least {MIN_PAIRS_NESTED} {what}; there are {len(found)}.")
    # One chat format for both: a model from before the training may have none.
    tokenizer = next((m.tokenizer for m in reversed(models) if m.tokenizer.chat_template), models[1].tokenizer)
    sites = layer_sites(models[1].model, site)
    neutral = tokenizer.encode(neutral_text, add_special_tokens=False)
    read = read_pairs(models, _encode(tokenizer, pairs), neutral, max_tokens, sites, progress)
    conditions = {}
    for name, (first, second, known) in read.items():
        these = [pairs[i] for i in known]
        layers = compare_layers(first, second, _categories(these), settings, independent_groups(these))
        conditions[name] = {"num_pairs": len(known), "layers": layers}
    first, second, _ = read["prompt_end"]
    vectors = {name: [own, _read_ends(model, tokenizer, twins, sites, progress)]
               for name, model, own in zip("ab", models, (first, second), strict=True)}  # fmt: skip
    vectors["words"] = [_embed(models[1], these) for these in (pairs, twins)]
    by_source = {
        name: transfer.cross_decoding(
            *both,
            _categories(pairs),
            _categories(twins),
            settings,
            independent_groups(pairs),
            independent_groups(twins),
        )
        for name, both in vectors.items()
    }
    names = {"a": models[0].name, "b": models[1].name, "words": WORDS}
    change = (second[:, 1] - second[:, 0]).mean(axis=0) - (first[:, 1] - first[:, 0]).mean(axis=0)
    planted = planted_directions(models[1]) if site == "mlp" else {}
    return jsonable(
        {
            "models": {name: model.facts() for name, model in zip("ab", models, strict=True)},
            "names": names,
            "config": {"site": site, "max_tokens": max_tokens, "neutral_text": neutral_text, **asdict(settings)},
            "num_twins": len(twins),
            "conditions": conditions,
            "summary": summarise(conditions["prompt_end"]["layers"], (names["a"], names["b"])),
            "transfer": by_source,
            "transfer_summary": transfer.summarise(by_source, names),
            "planted_truth": {layer: cosine(change[layer], value) for layer, value in sorted(planted.items())} or None,
        }
    )


def texts_to_read(pairs: Sequence[Pair], twins: Sequence[Pair]) -> int:
    """Of `compare`, for a progress bar: answers of two models, three texts and the twins read by both."""
    return 2 * (2 * len(pairs) + 3 * 2 * len(pairs) + 2 * len(twins))


def _texts(pairs: Sequence[Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.natural, pair.artifact)]


def _categories(pairs: Sequence[Pair]) -> np.ndarray:
    return np.array([pair.category for pair in pairs])


def _encode(tokenizer, pairs: Sequence[Pair]) -> list[list[list[int]]]:
    """Token ids, [pair][natural, artifact]."""
    flat = encode_prompts(tokenizer, _texts(pairs))
    return [flat[i : i + 2] for i in range(0, len(flat), 2)]


def _read_ends(model: LoadedModel, tokenizer, pairs: Sequence[Pair], sites: list[str], progress) -> np.ndarray:
    """[pairs, 2, layers, hidden] at the prompts' ends."""
    flat = [ids for two in _encode(tokenizer, pairs) for ids in two]
    ends, _ = read_texts(model, flat, [[]] * len(flat), sites, progress)
    return ends.reshape(len(pairs), 2, *ends.shape[1:])


def _embed(model: LoadedModel, pairs: Sequence[Pair]) -> np.ndarray:
    """[pairs, 2, 1, hidden] mean token embeddings: what word choice alone is."""
    return mean_prompt_embeddings(model, _texts(pairs)).reshape(len(pairs), 2, 1, -1)


def summarise(records: list[dict], names: tuple[str, str]) -> str:
    """The comparison at one kind of positions in a sentence or two."""
    found = [i for i, r in enumerate(records) if is_significant(r)]
    same = [i for i, r in enumerate(records) if r["largest_change"] == 0]
    identical = f" At {named_layers(same)} they are identical." if same else ""
    if not found:
        return f"{names[1]} separates the prompts no better or worse than {names[0]} at any layer.{identical}"
    best = max(found, key=lambda i: abs(records[i]["difference"]))
    r = records[best]
    low, high = r["difference_ci"]
    interval = "" if low is None else f" [{low:.1f}, {high:.1f}]"
    return (
        f"On the same tokens {names[1]} separates the prompts differently from {names[0]} at {named_layers(found)}, "
        f"most at layer {best}: d = {r['d_b']:.1f} instead of {r['d_a']:.1f}, a difference of {r['difference']:+.1f}"
        f"{interval} (p = {r['p_value']:.2g} over all layers).{identical}"
    )


def named_layers(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "layers 0-2, 5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    listed = ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    return f"layer{'s' if len(numbers) > 1 else ''} {listed}"
