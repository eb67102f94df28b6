"""The numbers that figures show, taken from the result files in one place for both matplotlib and Plotly."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

# Okabe and Ito's colours, which survive colour blindness.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a"
MODE_COLOURS = {
    "always": GREY, "proximity": BLUE, "adaptive": "#E69F00", "sphere": PURPLE, "subspace": GREEN, "ablate": ORANGE,
    "cap": "#56B4E9", "add": "#444444",
}  # fmt: skip
SIDE_COLOURS = {"natural": BLUE, "artifact": ORANGE}
POSITION_NAMES = {"generated": "generated tokens", "prompt_end": "prompt end", "answer": "answer after the thought"}
POSITION_COLOURS = {"generated": BLUE, "prompt_end": ORANGE, "answer": PURPLE}
# What two models read; see `forced_reading.CONDITIONS`.
CONDITION_NAMES = {
    "prompt_end": "prompt end",
    "neutral": "neutral text",
    "answers_a": "answers of A",
    "answers_b": "answers of B",
    "own_answers": "own answers",
}
LEAST_KL = 1e-6  # nats per token; zero has no place on a logarithmic axis


def column(records: Iterable[dict], key: str) -> np.ndarray:
    """One number of per-layer records [layers], or one interval [layers, 2]; NaN where it is not defined."""
    return np.array([record[key] for record in records], float)  # None becomes NaN


def layer_panels(result: dict) -> dict[str, dict]:
    """Positions -> per-layer records; only the prompt's end if no tokens were generated, answers after thoughts."""
    panels = {"generated": result["layer_scores"], "prompt_end": result["layer_scores_prompt_end"]}
    if "layer_scores_answer" in result:
        panels["answer"] = result["layer_scores_answer"]
    if panels["generated"] == panels["prompt_end"]:
        del panels["generated"]
    return panels


def category_grids(by_category: dict) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the categories that have scores, and their d and p [categories, layers]."""
    rows = {name: c["layer_scores"] for name, c in by_category["categories"].items() if c["layer_scores"]}
    names = [name.replace("_", " ") for name in rows]
    d, p = (np.array([column(scores.values(), key) for scores in rows.values()]) for key in ("cohens_d", "p_value"))
    return names, d, p


def step_grid(pattern: dict) -> tuple[list[str], np.ndarray]:
    """Names of the steps ("end" of the prompt, then numbers) that enough pairs reached, and d [layers, steps]."""
    steps = [s for s in pattern["steps"] if s["cohens_d"] is not None]
    names = ["end" if s["step"] == "prefill" else str(s["step"]) for s in steps]
    grid = np.array([s["cohens_d"] for s in steps], float)  # None becomes NaN
    return names, grid.reshape(len(steps), len(pattern["cohens_d_by_layer"])).T


def step_labels(pattern: dict) -> list[str]:
    """The names of `step_grid`, each with how many pairs got there."""
    counts = [s["num_pairs"] for s in pattern["steps"] if s["cohens_d"] is not None]
    return [f"{name} (n = {count})" for name, count in zip(step_grid(pattern)[0], counts, strict=True)]


def colour_limit(grid: np.ndarray) -> float:
    """The largest absolute value, for a colour scale around 0."""
    finite = np.abs(grid[np.isfinite(grid)])
    return max(float(finite.max()), 1e-9) if finite.size else 1.0


def on_their_side(layer: dict) -> tuple[int, int]:
    """How many prompts of a layer of `analysis.project_prompts` lie on the right side of the threshold, of how many."""
    direction = np.array(layer["direction"])
    return int((direction[:, 0] < 0).sum() + (direction[:, 1] > 0).sum()), direction.size


def sides_of(result: dict) -> list[str]:
    """What the two sides of the pairs are called, in results of whatever kind."""
    return result.get("origin", {}).get("sides") or list(SIDE_COLOURS)


def sweep_point(record: dict) -> tuple[float, float]:
    """(KL on natural answers, share of artifact prompts refused or broken, or their mean score) of a setting."""
    return max(record["damage"]["kl_mean"], LEAST_KL), reached(record)


def reached(record: dict) -> float:
    judged = record["artifact"]
    return judged["score"]["mean"] if "score" in judged else judged["refused_or_broken"]["rate"]


def trial_points(result: dict) -> tuple[np.ndarray, np.ndarray]:
    """Of a sweep's trials: (KL at the first tokens, probability that an unwanted opening stays) [trials, 2], and which
    of them were judged by whole answers."""
    trials = [trial for trial in result["trials"] if trial["kept"] is not None]
    whole = [record["setting"] for record in result["tried"]]
    points = np.array([(max(t["kl"], LEAST_KL), t["kept"]) for t in trials], float).reshape(-1, 2)
    return points, np.array([trial["setting"] in whole for trial in trials], bool)


def sweep_axes(result: dict) -> tuple[str, str]:
    """What the two numbers of `sweep_point` are, for titles."""
    first, second = sides_of(result)
    score = result.get("score")
    what = f"mean {score['name']} of {second} prompts" if score else f"{second} prompts refused or broken"
    return f"KL on {first} answers (nats per token, at least 1e-6)", what


def unedited(result: dict) -> dict[str, float]:
    """What `sweep_point` is before any edit, by where it was measured: on the test pairs, and, of a score, on the
    development pairs, which the settings were tried on."""
    known = {"unedited, test": reached(result["test"]["unedited"])}
    judged = result["chosen"]["development"]["artifact"]
    if "score" in judged:
        known["unedited, development"] = judged["score"]["mean"] - judged["moved"]["mean"]
    return known


def sweep_modes(result: dict) -> dict[str, str]:
    """The modes that a sweep tried, each with its colour, in every sweep the same."""
    tried = {r["setting"]["mode"] for r in (*result["tried"], *result.get("trials", ()))}
    return {mode: colour for mode, colour in MODE_COLOURS.items() if mode in tried}


def description(setting: dict) -> str:
    """A suppression setting in words, from its record; an earlier version's record has only the mode."""
    return setting.get("description", setting["mode"])


def random_controls(result: dict) -> dict[str, list[tuple[float, float]]]:
    """Points of the chosen setting's controls, measured on test pairs."""
    names = {"random_direction": "random direction", "same_change_elsewhere": "same change, random direction"}
    return {label: [sweep_point(r) for r in result["test"][name]] for name, label in names.items()}


def transfer_grid(result: dict) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """From a model comparison: what was learnt and tested, the sources (models and words), d [sources, cells], and
    what to write there: d, of words with the kind of model that is strongest."""
    sources = list(result["transfer"])
    cells = list(result["transfer"][sources[0]])
    records = [[result["transfer"][source][cell] for cell in cells] for source in sources]
    d = np.array([[r["cohens_d"] for r in row] for row in records], float)
    kinds = [[f" ({r['kind']})" if "kind" in r else "" for r in row] for row in records]
    numbers = [["-" if np.isnan(value) else f"{value:z.1f}" for value in row] for row in d]
    titles = [cell.replace("->", "\N{RIGHTWARDS ARROW}").replace("_", " ") for cell in cells]
    return titles, [result["names"][source] for source in sources], d, np.char.add(numbers, kinds)


def weight_grid(result: dict) -> tuple[list[str], np.ndarray, np.ndarray]:
    """From a model comparison: kinds of tensors in the blocks that changed anywhere, how much each did [kinds, layers]
    (of its norm; 0: not at all), and the effective rank of the change (NaN for vectors and where there is none)."""
    changed = [r for r in result["weights"]["tensors"] if r["layer"] is not None]
    kinds = sorted({r["kind"] for r in changed})
    moved = np.zeros((len(kinds), len(result["conditions"]["prompt_end"]["layers"])))
    ranks = np.full(moved.shape, np.nan)
    for r in changed:
        place = kinds.index(r["kind"]), r["layer"]
        moved[place] = np.nan if r["relative_change"] is None else r["relative_change"]
        ranks[place] = np.nan if r["effective_rank"] is None else r["effective_rank"]
    return kinds, moved, ranks


def moved_activations(result: dict) -> dict[str, np.ndarray]:
    """From a model comparison: what both models read -> how far activations moved, by their own size [layers]."""
    same = {name: title for name, title in CONDITION_NAMES.items() if name != "own_answers"}
    return {title: column(result["conditions"][name]["layers"], "relative_change") for name, title in same.items()}


def direction_shares(result: dict) -> tuple[dict[str, np.ndarray], float]:
    """From a model comparison: share of the directions' squared norm in what changed [layers], by model and number of
    singular vectors, and what 95% of random ones stay below in the first (NaN where nothing changed)."""
    layers, limits = result["change_space"]["layers"], result["change_space"]["random_95"]
    lines = {
        f"direction of {name.upper()}, in the first{f' {vectors}' if vectors > 1 else ''}": np.array(
            [record[name][vectors - 1] for record in layers], float
        )
        for name in "ba"
        for vectors in (1, len(limits))
    }
    return lines, limits[0]


def alpha_table(results: dict, name: str) -> tuple[list[int], list[float], np.ndarray]:
    """The toxicity sweep as (layers, alphas, [layers, alphas] of one number: "toxicity" or "kl"); NaN where nothing
    was tried. Alpha 0 is the unsteered model."""
    points = {(r["setting"]["layers"][0], r["setting"]["scale"]): r for r in results["sweep"].values()}
    layers, alphas = sorted({layer for layer, _ in points}), sorted({0.0, *(alpha for _, alpha in points)})
    table = np.full((len(layers), len(alphas)), np.nan)
    unsteered = results["baseline"]["development"]["artifact"]["mean_toxicity"]
    table[:, alphas.index(0.0)] = 0.0 if name == "kl" else unsteered
    for (layer, alpha), r in points.items():
        value = r["damage"]["kl_mean"] if name == "kl" else r["artifact"]["score"]["mean"]
        table[layers.index(layer), alphas.index(alpha)] = value
    return layers, alphas, table
