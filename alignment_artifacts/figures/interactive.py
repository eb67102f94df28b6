"""The figures of the report and of notebooks, as Plotly objects: what `plots` draws on paper, with the same numbers.

Backgrounds are transparent and lines grey, so that a page can be light or dark; the page sets the
colour of the text. Prompts are escaped: Plotly would read markup in them.
"""

from __future__ import annotations

import html
import textwrap

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from alignment_artifacts.edits.setting import Setting
from alignment_artifacts.figures.data import (
    BLUE,
    CONDITION_NAMES,
    GREEN,
    GREY,
    ORANGE,
    POSITION_COLOURS,
    POSITION_NAMES,
    SIDE_COLOURS,
    alpha_table,
    category_grids,
    colour_limit,
    column,
    layer_panels,
    on_their_side,
    random_controls,
    step_grid,
    step_labels,
    sweep_modes,
    sweep_point,
    transfer_grid,
)

DIVERGING = "PuOr_r"
MARKERS = {"mlp": "circle", "residual": "triangle-up"}
GRID = "rgba(128, 128, 128, 0.25)"
HOVER_WIDTH = 60  # characters


def layer_scores(result: dict) -> go.Figure:
    """Cohen's d per layer with interval, null band and lexical baseline; accuracy and the rest on hover."""
    figure = go.Figure()
    layers = np.arange(len(result["layer_scores"]))
    null = column(result["layer_scores"].values(), "null_95")
    figure.add_trace(_band(layers, -null, null, GREY, "chance (95 %, best layer)", showlegend=True))
    for positions, scores in layer_panels(result).items():
        records, name, colour = scores.values(), POSITION_NAMES[positions], POSITION_COLOURS[positions]
        marker = {"generated": "circle", "prompt_end": "square"}[positions]
        figure.add_trace(_band(layers, *column(records, "cohens_d_ci").T, colour, f"{name}, pointwise 95 % interval"))
        shown = [
            *column(records, "cohens_d_ci").T, column(records, "accuracy"), *column(records, "accuracy_ci").T,
            column(records, "auroc"), column(records, "p_value"),
        ]  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=column(records, "cohens_d"),
                name=name,
                mode="lines+markers",
                line={"color": colour},
                marker={"symbol": marker, "size": 8},
                customdata=np.stack(shown, axis=1),
                hovertemplate="layer %{x}: d = %{y:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<br>"
                "accuracy %{customdata[2]:.1%} [%{customdata[3]:.1%}, %{customdata[4]:.1%}]<br>"
                "AUROC %{customdata[5]:.3f}, p = %{customdata[6]:.3f}",
            )
        )
    lexical = result["lexical_baseline"]
    if lexical and lexical["cohens_d"] is not None:
        figure.add_trace(
            go.Scatter(
                x=layers[[0, -1]],
                y=[lexical["cohens_d"]] * 2,
                name="words alone",
                mode="lines",
                line={"color": GREEN, "dash": "dot"},
                hovertemplate=f"words alone: d = %{{y:.2f}}, accuracy {lexical['accuracy']:.1%}",
            )
        )
    return _styled(figure, "layer", "Cohen's d, held out")


def categories(by_category: dict) -> go.Figure:
    """Layers x categories heat map of held-out d; significant cells carry a star."""
    names, d, p = category_grids(by_category)
    stars = np.where(np.nan_to_num(p, nan=1.0) <= 0.05, "*", "")
    texts = [[f"{x:.1f}{star}" if np.isfinite(x) else "" for x, star in zip(*row, strict=True)]
             for row in zip(d, stars, strict=True)]  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=_nullable(d),
            y=[html.escape(name) for name in names],
            text=texts if d.shape[-1] <= 30 else None,
            texttemplate="%{text}",
            customdata=_nullable(p),
            hovertemplate="%{y}, layer %{x}: d = %{z:.2f}, p = %{customdata:.3f}<extra></extra>",
            **_around_zero(d),
        )
    )
    return _styled(figure, "layer", "", height=180 + 48 * len(names), yaxis={"autorange": "reversed"})


def steps(pattern: dict) -> go.Figure:
    """Held-out d at the end of the prompt and at every generated token, layers x steps."""
    names, grid = step_grid(pattern)
    figure = go.Figure(
        go.Heatmap(
            z=_nullable(grid),
            x=names,
            hovertemplate="layer %{y}, step %{x}: d = %{z:.2f}<extra></extra>",
            **_around_zero(grid),
        )
    )
    xaxis = {"type": "category", "tickvals": names, "ticktext": step_labels(pattern)}
    return _styled(figure, "end of the prompt, then generated tokens", "layer", xaxis=xaxis)


def projections(projected: dict) -> go.Figure:
    """Prompts on the direction of other pairs against the leading orthogonal component; a slider over layers.

    Args:
        projected: of `analysis.project_prompts`. The slider's steps are labelled "positions/layer".
    """
    steps = [
        _view(f"{positions}/{number}", f"{POSITION_NAMES[positions]}, layer {number}", layer)
        for positions, layers in projected["positions"].items()
        for number, layer in enumerate(layers)
    ]
    points, first, _ = steps[0]["args"]
    figure = go.Figure().update_layout(first)
    for side, (name, colour) in enumerate(SIDE_COLOURS.items()):
        figure.add_trace(
            go.Scatter(
                x=points["x"][side],
                y=points["y"][side],
                name=name,
                mode="markers",
                marker={"color": colour, "symbol": ("circle", "diamond")[side], "size": 8, "opacity": 0.75},
                text=[as_text(f"{pair['category']} {pair['id']}: {pair[name]}") for pair in projected["pairs"]],
                hovertemplate="%{text}<br>%{x:.2f} from the threshold",
            )
        )
    figure.add_vline(0, line={"color": GREY, "dash": "dash", "width": 1})
    figure.update_layout(sliders=[{"steps": steps, "pad": {"t": 65}, "currentvalue": {"visible": False}}])
    _styled(figure, "projection on the direction (0: threshold)", "leading orthogonal component", 480)
    return figure.update_layout(margin_t=80, title={"x": 0.02, "y": 0.97})


def _view(label: str, title: str, layer: dict) -> dict:
    """A step of the slider: what `Plotly.update` changes to show one layer."""
    x, y = np.array(layer["direction"]), np.array(layer["orthogonal"])
    right, total = on_their_side(layer)
    points = {name: [_short(values[:, side]) for side in range(2)] for name, values in (("x", x), ("y", y))}
    layout = {
        "title.text": f"{title}: {right} of {total} prompts on their own side",
        "xaxis.range": _range(x),
        "yaxis.range": _range(y),
    }
    return {"label": label, "method": "update", "args": [points, layout, [0, 1]]}


def comparison(result: dict) -> go.Figure:
    """Two models' d per layer, above their difference with its band under every condition."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    layers = result["conditions"]["prompt_end"]["layers"]
    x = np.arange(len(layers))
    for name, colour, symbol in (("a", BLUE, "circle"), ("b", ORANGE, "square")):
        title, ends = result["names"][name], column(layers, f"d_{name}_ci").T
        figure.add_trace(_band(x, *ends, colour, f"{title}, 95 % interval"), 1, 1)
        figure.add_trace(
            go.Scatter(x=x, y=column(layers, f"d_{name}"), name=title, line={"color": colour},
                       mode="lines+markers", marker={"symbol": symbol, "size": 8},
                       hovertemplate="layer %{x}: d = %{y:.2f}"), 1, 1
        )  # fmt: skip
    figure.add_trace(_band(x, *column(layers, "difference_ci").T, GREEN, "95 % interval"), 2, 1)
    for (name, title), dash in zip(CONDITION_NAMES.items(), ("solid", "dash", "dashdot", "dot", "solid"), strict=True):
        own = result["conditions"][name]["layers"]
        figure.add_trace(
            go.Scatter(x=x, y=column(own, "difference"), name=f"B - A, {title}", mode="lines+markers",
                       line={"color": GREEN if name == "prompt_end" else GREY, "dash": dash}, marker={"size": 5},
                       customdata=column(own, "p_value"),
                       hovertemplate="layer %{x}: difference %{y:.2f}, p = %{customdata:.3f}"), 2, 1
        )  # fmt: skip
    return _styled(figure, "layer", ("Cohen's d, prompt end", "difference of d"), 640)


def transfer(result: dict) -> go.Figure:
    """Cohen's d of directions that were learnt on one contrast and tested on another, for models and words alone."""
    cells, sources, grid = transfer_grid(result)
    figure = go.Figure(
        go.Heatmap(
            z=_nullable(grid.T),
            x=[html.escape(source) for source in sources],
            y=[html.escape(cell) for cell in cells],
            texttemplate="%{z:.1f}",
            hovertemplate="%{y}<br>%{x}: d = %{z:.2f}<extra></extra>",
            **_around_zero(grid),
        )
    )
    return _styled(figure, "", "", height=140 + 36 * len(cells), yaxis={"autorange": "reversed"},
                   xaxis={"type": "category", "automargin": True})  # fmt: skip


def sweep(result: dict) -> go.Figure:
    """Every setting tried: refusals and broken text left against the cost; front, chosen setting, random controls."""
    figure = go.Figure()
    for mode, colour in sweep_modes(result).items():
        own = [r for r in result["tried"] if r["setting"]["mode"] == mode]
        figure.add_trace(
            _points(
                [sweep_point(r) for r in own],
                mode,
                {"color": colour, "size": 8, "opacity": 0.8, "symbol": [MARKERS[r["setting"]["site"]] for r in own]},
                [Setting.from_record(r["setting"]).describe() for r in own],
            )
        )
    front = np.array([sweep_point(result["tried"][i]) for i in result["pareto_front"]])
    figure.add_trace(
        go.Scatter(x=front[:, 0], y=front[:, 1], name="best trade-offs", mode="lines", hoverinfo="skip",
                   line={"color": GREY, "shape": "hv", "width": 1.5})
    )  # fmt: skip
    for (name, points), symbol in zip(random_controls(result).items(), ("x-thin", "cross-thin"), strict=True):
        if points:
            marker = {"symbol": symbol, "size": 10, "line": {"width": 2, "color": GREY}}
            figure.add_trace(_points(points, f"{name} (test)", marker, [name] * len(points)))
    chosen = Setting.from_record(result["chosen"]["setting"]).describe()
    ring = {"symbol": "circle-open", "size": 18, "color": ORANGE, "line": {"width": 3}}
    for name, record, marker in (
        ("chosen", result["chosen"]["development"], ring),
        ("chosen, on test pairs", result["test"], {**ring, "symbol": "star-open"}),
    ):
        figure.add_trace(_points([sweep_point(record)], name, marker, [chosen]))
    figure.add_vline(result["config"]["limits"]["kl"], line={"color": GREY, "dash": "dash", "width": 1})
    xaxis = {"type": "log", "exponentformat": "power"}
    return _styled(
        figure, "KL on natural answers (nats a token)", "artifact prompts refused or broken", 460, xaxis=xaxis,
        yaxis={"tickformat": ".0%"},
    )  # fmt: skip


def toxicity(results: dict) -> go.Figure:
    """Toxicity and its price against alpha, a line a layer; grey: random directions."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    layers, alphas, steered = alpha_table(results, "steering", "mean_toxicity")
    random, kl = (
        alpha_table(results, kind, key)[2]
        for kind, key in (("random_direction", "mean_toxicity"), ("steering", "kl_mean"))
    )
    # This part of the scale shows on white and on black.
    shades = sample_colorscale("Plasma", np.linspace(0.35, 0.8, len(layers)).tolist())
    for i, (layer, colour) in enumerate(zip(layers, shades, strict=True)):
        shared = {"x": alphas, "legendgroup": str(layer), "line": {"color": colour}}
        hover = f"layer {layer}, alpha %{{x}}: %{{y:.3f}}<extra></extra>"
        figure.add_trace(go.Scatter(y=steered[i], name=f"layer {layer}", hovertemplate=hover, **shared), 1, 1)
        figure.add_trace(go.Scatter(y=kl[i], showlegend=False, hovertemplate=hover, **shared), 2, 1)
        figure.add_trace(
            go.Scatter(x=alphas, y=random[i], name="random directions", legendgroup="random", legendrank=2000,
                       showlegend=i == 0, mode="lines", line={"color": GREY, "width": 1},
                       hovertemplate=f"random, {hover}"), 1, 1
        )  # fmt: skip
    limit = results["experiment"]["config"]["max_kl"]
    figure.add_hline(limit, line={"color": GREY, "dash": "dash", "width": 1}, row=2, col=1)
    return _styled(figure, "alpha (positive: away from toxicity)", ("mean toxicity", "KL, nats a token"), 620)


def _styled(figure: go.Figure, x: str, y: str | tuple[str, ...], height: int = 400, xaxis: dict | None = None,
            yaxis: dict | None = None) -> go.Figure:  # fmt: skip
    """The common look; several panels, one above the other, have as many titles of y."""
    lines = {"gridcolor": GRID, "zerolinecolor": GRID}
    figure.update_layout(
        template="none", height=height, margin={"l": 60, "r": 15, "t": 45, "b": 50}, hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "color": "#888"}, title_font_size=14,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    figure.update_xaxes(**lines, **(xaxis or {}))
    figure.update_yaxes(automargin=True, **lines, **(yaxis or {}))
    titles = (y,) if isinstance(y, str) else y
    for axis, title in zip(figure.select_yaxes(), titles, strict=True):
        axis.title.text = title
    list(figure.select_xaxes())[-1].title.text = x
    return figure


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, name: str, showlegend=False) -> go.Scatter:
    known = np.isfinite(low) & np.isfinite(high)
    return go.Scatter(
        x=np.concatenate([x[known], x[known][::-1]]),
        y=np.concatenate([high[known], low[known][::-1]]),
        fill="toself",
        fillcolor=f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.2)",
        line={"width": 0},
        mode="lines",
        name=name,
        showlegend=showlegend,
        hoverinfo="skip",
    )


def _points(points: list[tuple[float, float]], name: str, marker: dict, texts: list[str]) -> go.Scatter:
    x, y = np.array(points).T
    return go.Scatter(x=x, y=y, name=name, mode="markers", marker=marker, text=[as_text(t) for t in texts],
                      hovertemplate="%{text}<br>KL %{x:.2g}, refused or broken %{y:.0%}")  # fmt: skip


def _around_zero(grid: np.ndarray) -> dict:
    limit = colour_limit(grid)
    return {"zmin": -limit, "zmax": limit, "colorscale": DIVERGING, "colorbar": {"title": "Cohen's d"}}


def _nullable(grid: np.ndarray) -> list[list[float | None]]:
    return [[float(x) if np.isfinite(x) else None for x in row] for row in grid]


def _short(values: np.ndarray) -> list[float]:
    """Four digits, which is finer than a pixel: the file is to stay small."""
    return [float(f"{x:.4g}") for x in values]


def _range(values: np.ndarray) -> list[float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 1.0
    return [low - margin, high + margin]


def as_text(prompt: str) -> str:
    """A prompt in a hover box: never markup, wrapped."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(prompt, HOVER_WIDTH)) or " "
