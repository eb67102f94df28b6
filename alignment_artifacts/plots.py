"""Figures of the analysis. Colours are Okabe and Ito's, which survive colour blindness."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}


def _column(scores: dict, key: str) -> np.ndarray:
    return np.array([np.nan if scores[str(i)][key] is None else scores[str(i)][key] for i in range(len(scores))], float)


def _interval(scores: dict, key: str) -> np.ndarray:
    rows = [[np.nan if x is None else x for x in scores[str(i)][key]] for i in range(len(scores))]
    return np.array(rows, float).T


def plot_layer_scores(result: dict, path: Path) -> None:
    """Cohen's d per layer with interval, null band and lexical baseline; accuracy beside it."""
    panels = [("generated tokens", result["layer_scores"], BLUE, "o")]
    panels.append(("prompt end", result["layer_scores_prompt_end"], ORANGE, "s"))
    layers = np.arange(len(result["layer_scores"]))
    lexical = result["lexical_baseline"]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for name, scores, colour, marker in panels:
            for axes, key in ((left, "cohens_d"), (right, "accuracy")):
                low, high = _interval(scores, f"{key}_ci")
                axes.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(layers, _column(scores, key), color=colour, marker=marker, ms=4, label=name)
        null = _column(result["layer_scores"], "null_95")
        left.fill_between(layers, -null, null, color=GREY, alpha=0.25, lw=0, label="chance (95 %, best layer)")
        right.axhline(0.5, color=GREY, ls="--", lw=1, label="chance")
        if lexical:
            left.axhline(lexical["cohens_d"] or 0, color=GREEN, ls=":", lw=1.6, label="words alone")
            right.axhline(lexical["accuracy"], color=GREEN, ls=":", lw=1.6, label="words alone")
        left.set(title="Separation of artifact from natural prompts, held out", xlabel="layer", ylabel="Cohen's d")
        right.set(title="Accuracy on held-out pairs", xlabel="layer", ylabel="accuracy", ylim=(0.35, 1.03))
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.2)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        model = result["collection"].get("model", "unknown model")
        pairs = result["layer_scores"]["0"]["num_pairs"]
        figure.suptitle(f"{model}, {pairs} prompt pairs; bands: 95 % intervals", fontsize=10, color="#444444")
        _save(figure, path)


def plot_categories(by_category: dict, path: Path) -> None:
    """Layers x categories heat map of held-out d; significant cells are marked."""
    rows = {name: c["layer_scores"] for name, c in by_category["categories"].items() if c["layer_scores"]}
    if not rows:
        return
    d = np.array([_column(scores, "cohens_d") for scores in rows.values()])
    p = np.array([_column(scores, "p_value") for scores in rows.values()])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(2.8 + 0.55 * d.shape[1], 1.6 + 0.5 * len(rows)), layout="constrained")
        limit = max(np.nanmax(np.abs(d)), 1e-9)
        image = axes.imshow(d, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit)
        for (row, layer), value in np.ndenumerate(d):
            if np.isfinite(value) and d.shape[1] <= 30:
                mark = "*" if p[row, layer] <= 0.05 else ""
                colour = "white" if abs(value) > 0.6 * limit else "black"
                axes.text(layer, row, f"{value:.1f}{mark}", ha="center", va="center", fontsize=7.5, color=colour)
        axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
        axes.set(xlabel="layer", title="Held-out Cohen's d by category (* p ≤ 0.05 over layers)")
        axes.spines[:].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes, label="Cohen's d", shrink=0.9)
        _save(figure, path)


def plot_layer_pattern(pattern: dict, path: Path) -> None:
    """Left: where over the layers the effect starts and peaks. Right: d at every step and layer."""
    d = np.array([np.nan if x is None else x for x in pattern["cohens_d_by_layer"]], float)
    steps = [s for s in pattern["steps"] if s["cohens_d"] is not None]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4), layout="constrained", gridspec_kw={"width_ratios": [2, 3]}
        )
        significant = set(pattern["significant_layers"])
        colours = [BLUE if i in significant else GREY for i in range(len(d))]
        left.bar(range(len(d)), d, color=colours)
        start = pattern["first_significant_layer"]
        where = (
            "no layer is significant" if start is None else f"starts at layer {start}, peaks at {pattern['peak_layer']}"
        )
        left.set(
            title=f"The effect {where}" if start is not None else where.capitalize(), xlabel="layer", ylabel="Cohen's d"
        )
        left.xaxis.get_major_locator().set_params(integer=True)
        left.legend(
            [plt.Rectangle((0, 0), 1, 1, color=c) for c in (BLUE, GREY)], ["p ≤ 0.05", "not significant"], frameon=False
        )
        grid = np.array([[np.nan if x is None else x for x in s["cohens_d"]] for s in steps], float).T
        limit = max(np.nanmax(np.abs(grid)), 1e-9) if grid.size else 1
        image = right.imshow(grid, aspect="auto", origin="lower", cmap="PuOr_r", vmin=-limit, vmax=limit)
        names = ["end" if s["step"] == "prefill" else str(s["step"]) for s in steps]
        every = max(1, len(names) // 20)
        right.set_xticks(range(0, len(names), every), names[::every], fontsize=8)
        right.set(
            title="Held-out Cohen's d at single steps",
            xlabel="end of the prompt, then generated tokens",
            ylabel="layer",
        )
        right.yaxis.get_major_locator().set_params(integer=True)
        right.spines[:].set_visible(False)
        figure.colorbar(image, ax=right, label="Cohen's d")
        _save(figure, path)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_sweep(result: dict, path: Path) -> None:
    """Every setting tried: refusals and broken text left against the cost, the chosen one marked."""
    tried, chosen = result["tried"], result["chosen"]["development"]
    modes = list(dict.fromkeys(r["setting"]["mode"] for r in tried))
    palette = dict(
        zip(modes, ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#8a8a8a", "#009E73", "#D55E00"), strict=False)
    )

    def point(record: dict) -> tuple[float, float]:
        return max(record["damage"]["kl_mean"], 1e-6), record["artifact"]["refused_or_broken"]["rate"]

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for mode in modes:
            for site, marker in (("mlp", "o"), ("residual", "^")):
                own = [point(r) for r in tried if (r["setting"]["mode"], r["setting"]["site"]) == (mode, site)]
                if own:
                    x, y = np.array(own).T
                    axes.scatter(x, y, s=26, marker=marker, color=palette[mode], alpha=0.7, lw=0)
            axes.scatter([], [], color=palette[mode], label=mode)
        for marker, name in (("o", "MLP output"), ("^", "residual stream")):
            axes.scatter([], [], color="#444444", marker=marker, label=name)
        front = np.array([point(tried[i]) for i in result["pareto_front"]])
        axes.step(front[:, 0], front[:, 1], where="post", color="#444444", lw=1, label="best trade-offs")
        axes.scatter(*point(chosen), s=170, facecolors="none", edgecolors="black", lw=1.8, label="chosen")
        axes.axvline(result["config"]["limits"]["kl"], color=GREY, ls="--", lw=1, label="limit")
        axes.set(
            xscale="log", xlabel="KL from the unedited model on natural answers (nats a token)",
            ylabel="artifact prompts refused or broken", ylim=(-0.03, None),
        )  # fmt: skip
        axes.grid(alpha=0.2)
        figure.legend(loc="outside right upper", frameon=False)
        pairs = len(result["pairs"]["development"])
        axes.set_title(f"{result['model']['model']}: {len(tried)} settings on {pairs} development pairs")
        _save(figure, path)
