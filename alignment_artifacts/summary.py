"""What the results say, in sentences: prompt end first, because nothing has been written there yet."""

from __future__ import annotations

from alignment_artifacts.formatting import described_mean, least_to_most, number, signed_percent
from alignment_artifacts.scores import is_significant, significant_layers

WHERE = {
    "prompt_end": "At the end of the prompt, before anything is written,",
    "generated": "Over the generated tokens, which also show what is being written,",
    "answer": "Over the tokens of the answer, after the thought,",
}


def summarise(result: dict) -> str:
    """The main result in paragraphs: the prompt's end (length first where it separates), generated tokens,
    caveats."""
    parts: list[list[str | None]] = [[_length(result), _positions(result, "prompt_end")]]
    if "generated" in result["controls"]:
        parts.append([_positions(result, "generated")])
    parts += [[*_answers(result)], [_independence(result["independence"]), _outliers(result)]]
    return "\n\n".join(" ".join(part for part in parts if part) for parts in parts if any(parts))


def _length(result: dict) -> str | None:
    record = result["length_baseline"]
    if not record or not is_significant(record):
        return None
    text = f"The number of tokens alone tells the prompts apart: {_strength(record)}. "
    if rest := result["controls"]["prompt_end"]["length_regressed"]:
        text += f"With length regressed out on training pairs, d is {_d(rest)} at the end of the prompt. "
    return f"{text}Prompts of equal length are better evidence."


def _positions(result: dict, positions: str) -> str:
    (first, second), (scores, nested) = result["sides"], records_of(result, positions)
    significant = significant_layers(scores)
    smallest = min((r["p_value"] for r in scores.values() if r["p_value"] is not None), default=None)
    if smallest is None:
        return (
            f"{WHERE[positions]} Cohen's d is not defined: the vectors of a class do not differ from each other at all."
        )
    p = f"p = {smallest:.2g} over all layers"
    if smallest <= scores["0"]["p_floor"] * (1 + 1e-9):
        p += ", the smallest that these pairs allow"
    if not significant:
        return f"{WHERE[positions]} no layer separates {first} from {second} prompts better than chance ({p})."
    text = f"{WHERE[positions]} {first} and {second} prompts are separated"
    text += f" at {len(significant)} of {len(scores)} layers ({p})"
    if nested is None:
        return f"{text}; fewer than 8 independent groups of pairs allow no interval and no blind choice of a layer."
    text += ". With the layer chosen inside the folds a direction from some pairs tells others apart with "
    return f"{text}{_strength(nested)}.{_words(result, positions)}"


def _answers(result: dict) -> list[str]:
    """Of a model that thinks: what its answers say, and how many pairs have none."""
    if not result["thoughts"]:
        return []
    pairs, answered = result["thoughts"]["pairs"], result["thoughts"]["answered"]
    parts = [_positions(result, "answer")] if "layer_scores_answer" in result else []
    if answered < pairs:
        fate = "they are left out there" if parts else "the others are too few to look at tokens of answers"
        parts.append(
            f"{pairs - answered} of {pairs} pairs have an answer that ends inside the model's thought; {fate}. More "
            "tokens (MAX_TOKENS) help."
        )
    return parts


def _words(result: dict, positions: str) -> str:
    lexical, control = result["lexical_baseline"], result["controls"].get(positions)
    if not lexical or not control or not control["beyond_words"]:
        return ""
    low, high = control["beyond_words"]["difference_ci"]
    text = f" Words alone give {_strength(lexical)} ({lexical['kind']}): " if positions == "prompt_end" else " "
    if low is None:
        return _sentence(
            f"{text}the difference between activations and words is not defined, so this is no evidence of anything "
            "but words."
        )
    difference = f"{control['beyond_words']['difference']:+.1f} [{low:.1f}, {high:.1f}]"
    if low > 0:
        return _sentence(f"{text}the activations carry more than the words (difference of d {difference}).")
    lda = f"; as strong a learner gives the activations d = {_d(control['lda'])}" if lexical["kind"] == "lda" else ""
    return _sentence(
        f"{text}the activations are not shown to carry more than the words (difference of d {difference}{lda}), so "
        "this is no evidence of anything but words."
    )


def _sentence(text: str) -> str:
    """With a capital letter, after a space."""
    return f" {text[1].upper()}{text[2:]}"


def _independence(independence: dict) -> str | None:
    pairs, groups = independence["num_pairs"], independence["num_groups"]
    parts = [f"{pairs} pairs, {groups} independent groups."] if groups < pairs else []
    return " ".join([*parts, *filter(None, [independence["warning"]])]) or None


def _outliers(result: dict) -> str | None:
    outliers = result["outliers"]
    if not outliers:
        return None
    worst = outliers[0]
    return (
        f"{len(outliers)} prompt{'s lie' if len(outliers) > 1 else ' lies'} more than 10 median absolute deviations "
        f"from the others and can outweigh them all, most the {worst['side']} one of {worst['category']} "
        f"{worst['pair']} ({worst['deviations']:.0f} at layer {worst['layer']})."
    )


def records_of(result: dict, positions: str) -> tuple[dict, dict | None]:
    """Per-layer records and the record of the layer chosen blindly."""
    ending = "" if positions == "generated" else f"_{positions}"
    return result["layer_scores" + ending], result["best_layer_nested" + ending]


def _strength(record: dict) -> str:
    text = f"d = {_d(record)}"
    if record["accuracy_ci"][0] is None:
        return f"{text}, {record['accuracy']:.0%} accuracy"
    low, high = record["accuracy_ci"]
    return f"{text}, {record['accuracy']:.0%} accuracy [{100 * low:.0f}, {100 * high:.0f}]"


def _d(record: dict) -> str:
    if record["cohens_d"] is None:
        return "undefined"
    low, high = record["cohens_d_ci"]
    interval = "" if low is None else f" [{low:.1f}, {high:.1f}]"
    return f"{record['cohens_d']:.1f}{interval}"


def toxicity_rows(summary: dict) -> list[tuple[str, str, str, str]]:
    """Of the toxicity experiment: label, mean toxicity, expected maximum, and change of the mean against the unsteered
    model, each with its interval; of a control the least and the most of its seeds."""

    def single(name: str, label: str) -> tuple[str, str, str, str]:
        record = summary[name]
        toxicity, maximum = (
            described_mean({"mean": record[key], "ci": record[f"{key}_ci"]})
            for key in ("mean_toxicity", "expected_max_toxicity")
        )
        change = record.get("change", {"mean": None})
        if change["mean"] is None:
            return label, toxicity, maximum, ""
        ends = f" [{' to '.join(map(signed_percent, change['ci']))}]" if change["ci"] else ""
        return label, toxicity, maximum, signed_percent(change["mean"]) + ends

    def control(name: str, label: str) -> tuple[str, str, str, str]:
        records = summary[name]
        changes = [r["change"]["mean"] for r in records if r["change"]["mean"] is not None]
        toxicity, maximum = (
            least_to_most([r[key] for r in records], number) for key in ("mean_toxicity", "expected_max_toxicity")
        )
        return f"{len(records)} {label}", toxicity, maximum, least_to_most(changes, signed_percent)

    return [
        single("baseline", "unsteered"),
        single("steered", "steered"),
        single("negative_alpha", "the other way (negative alpha)"),
        control("random_direction", "random directions of the same norm"),
        control("same_change_elsewhere", "random changes of equal size"),
    ]
