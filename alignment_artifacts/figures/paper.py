"""Figures for print, each written as .png and .pdf; `interactive` has the same figures for the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from alignment_artifacts.figures import data

SITE_MARKERS = {"mlp": "o", "residual": "^"}
RING: dict[str, Any] = {"s": 170, "facecolors": "none", "edgecolors": "black", "lw": 1.5}
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}


def plot_layer_scores(result: dict, path: str | Path) -> None:
    """Cohen's d per layer with interval, null band and lexical baseline; accuracy beside it."""
    layers = np.arange(len(result["layer_scores"]))
    lexical, (first, second) = result["lexical_baseline"], result["sides"]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for positions, scores in data.layer_panels(result).items():
            records, name, colour = scores.values(), data.POSITION_NAMES[positions], data.POSITION_COLOURS[positions]
            marker = {"generated": "o", "prompt_end": "s", "answer": "D"}[positions]
            for axes, key in ((left, "cohens_d"), (right, "accuracy")):
                low, high = data.column(records, f"{key}_ci").T
                axes.fill_between(layers, low, high, color=colour, alpha=0.15, lw=0)
                axes.plot(layers, data.column(records, key), color=colour, marker=marker, ms=4, label=name)
        null = data.column(result["layer_scores"].values(), "null_95")
        left.fill_between(layers, -null, null, color=data.GREY, alpha=0.25, lw=0, label="chance (95%, best layer)")
        right.axhline(0.5, color=data.GREY, ls="--", lw=1, label="chance")
        if lexical:
            left.axhline(lexical["cohens_d"] or 0, color=data.GREEN, ls=":", lw=1.6, label="words alone")
            right.axhline(lexical["accuracy"], color=data.GREEN, ls=":", lw=1.6, label="words alone")
        left.set(title=f"Separation of {second} from {first} prompts, held out", xlabel="layer", ylabel="Cohen's d")
        right.set(title="Accuracy on held-out pairs", xlabel="layer", ylabel="accuracy", ylim=(0.35, 1.03))
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.2)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        pairs = result["layer_scores"]["0"]["num_pairs"]
        title = f"{result['model']}, {result['site']}"
        title += f"\n{pairs} prompt pairs; bands: pointwise 95% intervals"
        figure.suptitle(title, fontsize=10, color="#444444")
        _save(figure, path)


def plot_categories(by_category: dict, path: str | Path) -> None:
    """Layers x categories heat map of held-out d; significant cells are marked."""
    names, d, p = data.category_grids(by_category)
    if not names:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(2.8 + 0.55 * d.shape[1], 1.6 + 0.5 * len(names)), layout="constrained")
        limit = data.colour_limit(d)
        image = axes.imshow(d, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit)
        for (row, layer), value in np.ndenumerate(d):
            if np.isfinite(value) and d.shape[1] <= 30:
                mark = "*" if p[row, layer] <= 0.05 else ""
                colour = "white" if abs(value) > 0.6 * limit else "black"
                axes.text(layer, row, f"{value:z.1f}{mark}", ha="center", va="center", fontsize=7.5, color=colour)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="layer", title="Held-out Cohen's d by category (* p ≤ 0.05 over layers and categories)")
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, label="Cohen's d", shrink=0.9)
        _save(figure, path)


def plot_layer_pattern(pattern: dict, path: str | Path) -> None:
    """Left: at which layers the effect starts and peaks. Right: d at every step and layer, given enough pairs."""
    d = np.array(pattern["cohens_d_by_layer"], float)
    names, grid = data.step_grid(pattern)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(11, 4), layout="constrained", gridspec_kw={"width_ratios": [2, 3]}
        )
        significant = set(pattern["significant_layers"])
        colours = [data.BLUE if i in significant else data.GREY for i in range(len(d))]
        left.bar(range(len(d)), d, color=colours)
        start = pattern["first_significant_layer"]
        where = (
            "no layer is significant"
            if start is None
            else f"is first significant at layer {start}, peaks at {pattern['peak_layer']}"
        )
        left.set(
            title=f"The effect {where}" if start is not None else where.capitalize(), xlabel="layer", ylabel="Cohen's d"
        )
        left.xaxis.get_major_locator().set_params(integer=True)
        left.legend(
            [plt.Rectangle((0, 0), 1, 1, color=c) for c in (data.BLUE, data.GREY)],
            ["p ≤ 0.05", "not significant"],
            frameon=False,
        )
        if names:
            _step_heat_map(figure, right, data.step_labels(pattern), grid)
        else:
            right.set_axis_off()
            right.text(0.5, 0.5, "too few pairs to score single steps", ha="center", va="center", color=data.GREY)
        _save(figure, path)


def _step_heat_map(figure, axes, names: list[str], grid: np.ndarray) -> None:
    limit = data.colour_limit(grid)
    image = axes.imshow(grid, aspect="auto", origin="lower", cmap="PuOr_r", vmin=-limit, vmax=limit)
    every = max(1, len(names) // 20)
    axes.set_xticks(range(0, len(names), every), names[::every], fontsize=8, rotation=90)
    axes.set(
        title="Held-out Cohen's d at single steps", xlabel="end of the prompt, then generated tokens", ylabel="layer"
    )
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="Cohen's d")


def plot_projections(projected: dict, path: str | Path, most: int = 12) -> None:
    """Prompts at their end: the direction against the leading orthogonal component, at up to `most` layers."""
    layers = projected["positions"]["prompt_end"]
    selected = sorted({round(i) for i in np.linspace(0, len(layers) - 1, min(most, len(layers)))})
    columns = min(4, len(selected))
    with plt.rc_context(STYLE):
        rows = -(-len(selected) // columns)
        figure, panels = plt.subplots(
            rows, columns, figsize=(2.7 * columns, 2.5 * rows), layout="constrained", squeeze=False
        )
        for axes, layer in zip(panels.flat, selected, strict=False):
            x, y = np.array(layers[layer]["direction"]), np.array(layers[layer]["orthogonal"])
            for side, (name, colour) in enumerate(zip(projected["sides"], data.SIDE_COLOURS.values(), strict=True)):
                axes.scatter(x[:, side], y[:, side], s=10, marker="os"[side], color=colour, alpha=0.7, lw=0, label=name)
            axes.axvline(0, color=data.GREY, ls="--", lw=1)
            right, total = data.on_their_side(layers[layer])
            axes.set_title(f"layer {layer}: {right} of {total} correct", fontsize=9)
        for axes in panels.flat[len(selected) :]:
            axes.set_visible(False)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        figure.supxlabel(
            "prompt end, projected on the direction learnt from other pairs (dashed: threshold)", fontsize=9
        )
        figure.supylabel("leading orthogonal component", fontsize=9)
        _save(figure, path)


def plot_comparison(result: dict, path: str | Path) -> None:
    """Two models' d per layer, their difference under every condition, and the transfer matrix."""
    layers = result["conditions"]["prompt_end"]["layers"]
    numbers = range(len(layers))
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(14, 5), layout="constrained", gridspec_kw={"width_ratios": [3, 3, 4]}
        )
        for name, colour, marker in (("a", data.BLUE, "o"), ("b", data.ORANGE, "s")):
            d, (low, high) = data.column(layers, f"d_{name}"), data.column(layers, f"d_{name}_ci").T
            left.fill_between(numbers, low, high, color=colour, alpha=0.15, lw=0)
            left.plot(numbers, d, color=colour, marker=marker, ms=4, label=name.upper())
        low, high = data.column(layers, "difference_ci").T
        middle.fill_between(numbers, low, high, color=data.GREEN, alpha=0.2, lw=0)
        for (name, title), style in zip(data.CONDITION_NAMES.items(), ("-o", "--", "-.", ":", "-"), strict=True):
            difference = data.column(result["conditions"][name]["layers"], "difference")
            colour = data.GREEN if name == "prompt_end" else data.GREY if name == "own_answers" else "#444444"
            middle.plot(numbers, difference, style, color=colour, ms=4, lw=1.3, label=title)
        middle.axhline(0, color="black", lw=0.8)
        left.set(
            title="Separation at the prompt's end\n(bands: pointwise 95% intervals)",
            xlabel="layer",
            ylabel="Cohen's d, held out",
        )
        middle.set(title="Difference B - A", xlabel="layer", ylabel="difference of d")
        for axes in (left, middle):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.2)
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        cells, sources, grid = data.transfer_grid(result)
        limit = data.colour_limit(grid)
        image = right.imshow(grid.T, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit)
        for (source, cell), value in np.ndenumerate(grid):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            right.text(source, cell, f"{value:z.1f}", ha="center", va="center", fontsize=8, color=colour)
        right.set_yticks(range(len(cells)), cells, fontsize=8)
        right.set_xticks(range(len(sources)), ["A", "B", "word\nembeddings"])
        right.set(title="Learnt on → tested on: Cohen's d")
        right.spines[:].set_visible(False)
        figure.colorbar(image, ax=right, shrink=0.9)
        figure.suptitle(f"A: {result['names']['a']}, B: {result['names']['b']}", fontsize=10, color="#444444")
        _save(figure, path)


def plot_weights(result: dict, path: Path) -> None:
    """What training changed: tensors by layer, with the effective rank of each change; below, activations, and how far
    directions lie in their changes."""
    kinds, moved, ranks = data.weight_grid(result)
    with plt.rc_context(STYLE):
        figure, (top, bottom, lowest) = plt.subplots(
            3, 1, figsize=(min(max(7, 2.5 + 0.3 * moved.shape[1]), 14), 6 + 0.32 * len(kinds)), layout="constrained",
            sharex=True, gridspec_kw={"height_ratios": [0.6 + 0.32 * len(kinds), 2.2, 2.2]},
        )  # fmt: skip
        if kinds:
            image = top.imshow(moved, aspect="auto", cmap="Purples", vmin=0)
            for (kind, layer), rank in np.ndenumerate(ranks):
                if np.isfinite(rank) and moved.shape[1] <= 40:
                    colour = "white" if moved[kind, layer] > 0.6 * np.nanmax(moved) else "black"
                    text = f"{rank:.1f}" if rank < 10 else f"{rank:.0f}"
                    top.text(layer, kind, text, ha="center", va="center", fontsize=7, color=colour)
            top.set_yticks(range(len(kinds)), kinds, fontsize=8)
            colours = figure.colorbar(image, ax=top, format=PercentFormatter(1, None if np.nanmax(moved) > 0.03 else 1))
            colours.ax.tick_params(labelsize=8)
        else:
            top.set_axis_off()
            nothing = result["weights"]["not_compared"] and "not compared" or "no tensor of a block changed"
            top.text(0.5, 0.5, nothing, ha="center", va="center", color=data.GREY, transform=top.transAxes)
        top.set_title("Weights: relative change (numbers: its effective rank)")
        top.spines[:].set_visible(False)
        for (title, values), style in zip(data.moved_activations(result).items(), ("-o", "--", "-.", ":"), strict=True):
            colour = data.GREEN if style == "-o" else "#444444"
            bottom.plot(values, style, color=colour, ms=4, lw=1.3, label=title)
        bottom.set(title=f"Activations: relative change ({result['site'].split(' (')[0]})")
        shares, limit = data.direction_shares(result)
        for (title, values), style in zip(shares.items(), ("-o", "--", "-o", "--"), strict=True):
            lowest.plot(values, style, color=data.BLUE if " A," in title else data.ORANGE, ms=4, lw=1.3, label=title)
        lowest.axhline(limit, color=data.GREY, ls=":", label="95% of random directions, in the first")
        lowest.set(title="Directions: share in what changed in the residual stream", xlabel="layer")
        for axes in (bottom, lowest):
            axes.set_ylim(0, None)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.2)
            axes.legend(frameon=False, fontsize=8)
        figure.suptitle(f"A: {result['names']['a']}, B: {result['names']['b']}", fontsize=10, color="#444444")
        _save(figure, path)


def _save(figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the layout is computed once, for both files
    for ending in (".png", ".pdf"):
        figure.savefig(path.with_suffix(ending), dpi=150)
    plt.close(figure)


def plot_sweep(result: dict, path: str | Path) -> None:
    """Left all trials by their effect on the first tokens, right what whole answers say of the most promising."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
        _trials(left, result)
        _whole_answers(right, result)
        for axes in (left, right):
            axes.grid(alpha=0.2)
        figure.suptitle(result["origin"]["model"], fontsize=10, color="#444444", x=0.01, ha="left")
        figure.legend(loc="outside right upper", frameon=False)
        _save(figure, path)


def _trials(axes, result: dict) -> None:
    """Faint unless judged by whole answers; the chosen one is ringed."""
    points, whole = data.trial_points(result)
    settings = [t["setting"] for t in result["trials"] if t["kept"] is not None]
    kinds = np.array([(s["mode"], s["site"]) for s in settings]).reshape(-1, 2)
    for mode, colour in data.sweep_modes(result).items():
        axes.scatter([], [], color=colour, label=mode)
        for site, marker in SITE_MARKERS.items():
            is_kind = (kinds == (mode, site)).all(axis=1)
            for is_whole, alpha in ((False, 0.3), (True, 1.0)):
                these = points[is_kind & (whole == is_whole)]
                axes.scatter(*these.T, s=22, color=colour, marker=marker, alpha=alpha, lw=0)
    axes.scatter(*points[[setting == result["chosen"]["setting"] for setting in settings]].T, **RING)
    most = points[:, 1].max(initial=0.0) or 1.0  # may be tiny, where unwanted answers open like any other
    axes.set(xscale="log", ylim=(-0.03 * most, 1.05 * most), xlabel="KL at the first tokens (nats per token)",
             ylabel="probability of an unwanted opening",
             title=f"{len(result['trials'])} trials by first tokens, {int(whole.sum())} judged")  # fmt: skip


def _whole_answers(axes, result: dict) -> None:
    """Refusals and broken text that remain, or the mean score, against cost.

    The chosen setting is ringed on development pairs and a star on test pairs, on which its controls are, too.
    """
    tried = result["tried"]
    for mode, colour in data.sweep_modes(result).items():
        for site, marker in SITE_MARKERS.items():
            these = [r for r in tried if (r["setting"]["mode"], r["setting"]["site"]) == (mode, site)]
            points = np.array([data.sweep_point(r) for r in these]).reshape(-1, 2)
            axes.scatter(*points.T, s=34, marker=marker, color=colour, lw=0)
    for site, name in (("mlp", "MLP output"), ("residual", "residual stream")):
        axes.scatter([], [], color="#444444", marker=SITE_MARKERS[site], label=name)
    front = np.array([data.sweep_point(tried[i]) for i in result["pareto_front"]])
    axes.step(front[:, 0], front[:, 1], where="post", color="#444444", lw=1, label="best trade-offs")
    axes.scatter(*data.sweep_point(result["chosen"]["development"]), **RING, label="chosen")
    axes.scatter(*data.sweep_point(result["test"]), **RING, marker="*", label="chosen, test")
    for (name, controls), marker in zip(data.random_controls(result).items(), "x+", strict=True):
        if controls:
            axes.scatter(*np.array(controls).T, s=40, marker=marker, color="black", lw=1.2, label=f"{name}, test")
    axes.axvline(result["config"]["limits"]["kl"], color=data.GREY, ls="--", lw=1, label="limit")
    for (name, value), colour in zip(data.unedited(result).items(), ("black", data.GREY), strict=False):
        axes.axhline(value, color=colour, ls=":", lw=1.4, label=name)
    if not result.get("score"):
        axes.set(ylim=(-0.03, None))
    (cost, reached), pairs = data.sweep_axes(result), len(result["pairs"]["development"])
    axes.set(xscale="log", xlabel=cost, ylabel=reached, title=f"Whole answers to {pairs} development pairs")
