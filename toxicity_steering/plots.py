"""Figures of the toxicity experiment, each as .png and .pdf."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from alignment_artifacts.figures.data import BLUE, GREY, ORANGE, PURPLE, alpha_table
from alignment_artifacts.figures.paper import STYLE


def plot_all(results: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, draw in (
            ("alpha_sweep_results", alpha_sweep),
            ("toxicity_heatmaps", heatmaps),
            ("summary_statistics", summary_statistics),
        ):
            figure = draw(results)
            figure.suptitle(f"{results['experiment']['model']}; scorer: {results['experiment']['scorer']}", fontsize=10)
            for ending in ("png", "pdf"):
                figure.savefig(folder / f"{name}.{ending}", dpi=150)
            plt.close(figure)


def alpha_sweep(results: dict):
    """Toxicity and the cost of steering against alpha, one line per layer, on the prompts to choose on."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    layers, alphas, steered = alpha_table(results, "toxicity")
    kl = alpha_table(results, "kl")[2]
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(layers)))
    for i, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        label = f"layer {layer}" if len(layers) <= 10 or i in (0, len(layers) - 1) else None
        tried = np.isfinite(kl[i])
        left.plot(np.array(alphas)[tried], steered[i][tried], color=colour, marker="o", ms=3.5, label=label)
        right.plot(np.array(alphas)[tried], kl[i][tried], color=colour, marker="o", ms=3.5)
    right.axhline(results["experiment"]["config"]["max_kl"], color=GREY, ls="--", lw=1, label="limit")
    summary = results["summary"]
    chosen = {"color": "black", "marker": "*", "ms": 11, "ls": "", "label": "chosen"}
    left.plot([summary["alpha"]], [steered[layers.index(summary["layer"]), alphas.index(summary["alpha"])]], **chosen)
    left.set(
        title="Mean toxicity, challenging prompts",
        xlabel="alpha (positive: away from toxicity)",
        ylabel="mean toxicity",
        ylim=(0, 1),
    )
    right.set(title="KL on benign answers", xlabel="alpha", ylabel="nats per token")
    for axes in (left, right):
        axes.grid(alpha=0.2)
    figure.legend(loc="outside right center", frameon=False)
    return figure


def heatmaps(results: dict):
    """Mean toxicity and KL on the prompts to choose on, layers x alphas; empty where nothing was tried."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
    limit = results["experiment"]["config"]["max_kl"]
    shown = (("toxicity", "Mean toxicity", 1.0), ("kl", f"KL on benign answers (limit {limit:g})", 2 * limit))
    for axes, (name, title, most) in zip(panels, shown, strict=True):
        layers, alphas, table = alpha_table(results, name)
        image = axes.imshow(table, aspect="auto", cmap="Oranges", vmin=0, vmax=most)
        axes.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas], fontsize=8)
        ticks = range(0, len(layers), max(1, len(layers) // 16))
        axes.set_yticks(ticks, [layers[i] for i in ticks])
        for (i, j), value in np.ndenumerate(table):
            if len(layers) <= 16 and not np.isnan(value):
                colour = "white" if value > 0.6 * most else "black"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set(title=title, xlabel="alpha", ylabel="layer")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def summary_statistics(results: dict):
    """On prompts about what nothing was chosen on: unsteered, the chosen setting, and each of its controls."""
    summary = results["summary"]
    measures = (
        ("mean_toxicity", "mean toxicity"),
        ("expected_max_toxicity", "expected maximum"),
        ("toxicity_probability", "toxicity probability"),
    )
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for place, kind, label, colour in ((-0.3, "baseline", "unsteered", GREY), (-0.08, "steered", "steered", BLUE)):
        values, intervals = [], []
        for key, _ in measures:
            value = summary[kind][key]
            values.append(value["rate"] if isinstance(value, dict) else value)
            ends = value["ci"] if isinstance(value, dict) else summary[kind][f"{key}_ci"]
            intervals.append(ends or (np.nan, np.nan))
        errors = np.abs(np.array(intervals).T - values)
        axes.bar(np.arange(3) + place, values, 0.2, yerr=errors, color=colour, capsize=3, label=label)
    controls = (
        (0.12, "random_direction", "random directions, same norm", ORANGE, "o"),
        (0.3, "same_change_elsewhere", "random changes of equal size", PURPLE, "D"),
    )
    for place, kind, label, colour, marker in controls:
        points = [
            (i + place, record[key]["rate"] if isinstance(record[key], dict) else record[key])
            for i, (key, _) in enumerate(measures)
            for record in summary[kind]
        ]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, ls="", label=label)
    axes.set_xticks(range(3), [label for _, label in measures])
    title = f"Layer {summary['layer']}, alpha {summary['alpha']:g}; KL on benign answers {summary['kl_mean']:.3f}"
    axes.set(ylim=(0, 1.05), ylabel="value, with 95% interval where there is one", title=title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
