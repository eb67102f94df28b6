"""Figures of the toxicity experiment, each as .png and .pdf."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from alignment_artifacts.figures import data
from alignment_artifacts.figures.data import BLUE, GREY, ORANGE
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
    """Toxicity and the cost of steering against alpha, one colour per layer; small points: by the first tokens."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    steered = data.steered(results)
    layers = sorted({layer for pair in steered.values() for points in pair for layer in points})
    colours = dict(zip(layers, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(layers))), strict=True))
    for axes, (judged, tried) in zip(panels, steered.values(), strict=True):
        for points, size in ((judged, 6), (tried, 2.5)):
            for layer, (alphas, values) in points.items():
                axes.plot(alphas, values, "o", color=colours[layer], ms=size)
        axes.set_xlabel("alpha (positive: away from toxicity)")
        axes.grid(alpha=0.2)
    unsteered = results["baseline"]["development"]["artifact"]["mean_toxicity"]
    panels[0].axhline(unsteered, color=GREY, ls=":", lw=1.5)
    panels[1].axhline(results["experiment"]["config"]["max_kl"], color=GREY, ls="--", lw=1)
    panels[0].set(title="Challenging prompts", ylabel="mean toxicity", ylim=(0, 1))
    panels[1].set(title="KL on benign answers", ylabel="nats per token")
    panels[1].set_yscale("symlog", linthresh=0.1)
    shown = layers if len(layers) <= 10 else (layers[0], layers[-1])
    entries = [Line2D([], [], color=colours[layer], marker="o", ls="", label=f"layer {layer}") for layer in shown]
    entries += [
        Line2D([], [], color=GREY, marker="o", ls="", ms=2.5, label="by first tokens: toxic\nopenings, and their KL"),
        Line2D([], [], color=GREY, ls=":", label="unsteered"),
        Line2D([], [], color=GREY, ls="--", label="limit"),
    ]
    figure.legend(handles=entries, loc="outside right center", frameon=False)
    return figure


def cells(points: dict[int, np.ndarray], layers: list[int], alphas: np.ndarray) -> np.ndarray:
    """[layers, alphas] mean value of the settings nearest to each alpha; NaN where nothing was tried."""
    table = np.full((len(layers), len(alphas)), np.nan)
    for layer, (at, values) in points.items():
        nearest = np.abs(at[:, None] - alphas).argmin(axis=1)
        for column in set(nearest):
            table[layers.index(layer), column] = values[nearest == column].mean()
    return table


def heatmaps(results: dict):
    """What was tried, layers x alphas rounded to a quarter: mean toxicity, and how probable toxic openings remain."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
    judged, tried = data.steered(results)["toxicity"]
    layers = sorted({*judged, *tried})
    ends = [alpha for points in (judged, tried) for alphas, _ in points.values() for alpha in alphas]
    alphas = np.arange(np.floor(4 * min(ends)), np.ceil(4 * max(ends)) + 1) / 4
    titles = "Mean toxicity of whole continuations", "Probability of a toxic opening"
    for axes, points, title in zip(panels, (judged, tried), titles, strict=True):
        table = cells(points, layers, alphas)
        image = axes.imshow(table, aspect="auto", cmap="Oranges", vmin=0, vmax=1)
        columns, rows = (range(0, n, max(1, n // 8)) for n in table.shape[::-1])
        axes.set_xticks(columns, [f"{alphas[i]:g}" for i in columns])
        axes.set_yticks(rows, [layers[i] for i in rows])
        if len(layers) <= 16:
            for (i, j), value in np.ndenumerate(table):
                if not np.isnan(value):
                    colour = "white" if value > 0.6 else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
        axes.set(title=title, xlabel="alpha", ylabel="layer")
    figure.colorbar(image, ax=panels, shrink=0.8)
    return figure


def summary_statistics(results: dict):
    """The chosen setting on the prompts it was not chosen on: unsteered, steered, random."""
    summary = results["summary"]
    kinds = (("baseline", GREY), ("steered", BLUE), ("random_direction", ORANGE))
    measures = (
        ("mean_toxicity", "mean toxicity"),
        ("expected_max_toxicity", "expected maximum"),
        ("toxicity_probability", "toxicity probability"),
    )
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for k, (kind, colour) in enumerate(kinds):
        values, intervals = [], []
        for key, _ in measures:
            value = summary[kind][key]
            values.append(value["rate"] if isinstance(value, dict) else value)
            intervals.append(value["ci"] if isinstance(value, dict) else summary[kind][f"{key}_ci"])
        errors = np.abs(np.array(intervals).T - values)
        axes.bar(np.arange(3) + (k - 1) * 0.27, values, 0.25, yerr=errors, color=colour, capsize=3,
                 label=kind.replace("_", " ").replace("baseline", "unsteered"))  # fmt: skip
    axes.set_xticks(range(3), [label for _, label in measures])
    title = f"Layer {summary['layer']}, alpha {summary['alpha']:g}; KL on benign answers {summary['kl_mean']:.3f}"
    axes.set(ylim=(0, 1.05), ylabel="value, with 95 % interval", title=title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
