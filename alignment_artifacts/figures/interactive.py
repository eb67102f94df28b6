"""The figures of the report and of notebooks, as Plotly objects: those of `paper`, with the same numbers.

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

from alignment_artifacts.figures import data

DIVERGING = "PuOr_r"
MARKERS = {"mlp": "circle", "residual": "triangle-up"}
GRID = "rgba(128, 128, 128, 0.25)"
HOVER_WIDTH = 60  # characters


def layer_scores(result: dict) -> go.Figure:
    """Cohen's d per layer with interval, null band and lexical baseline; accuracy and the rest on hover."""
    figure = go.Figure()
    layers = np.arange(len(result["layer_scores"]))
    null = data.column(result["layer_scores"].values(), "null_95")
    chance = np.stack([-null, null], axis=1)
    figure.add_trace(_band(layers, chance, data.GREY, "chance (95%, best layer)", showlegend=True))
    for positions, scores in data.layer_panels(result).items():
        records, name, colour = scores.values(), data.POSITION_NAMES[positions], data.POSITION_COLOURS[positions]
        marker = {"generated": "circle", "prompt_end": "square", "answer": "diamond"}[positions]
        figure.add_trace(_band(layers, data.column(records, "cohens_d_ci"), colour, f"{name}, pointwise 95% interval"))
        details = [
            *data.column(records, "cohens_d_ci").T,
            data.column(records, "accuracy"),
            *data.column(records, "accuracy_ci").T,
            data.column(records, "auroc"),
            data.column(records, "p_value"),
        ]
        figure.add_trace(
            go.Scatter(
                x=layers,
                y=data.column(records, "cohens_d"),
                name=name,
                mode="lines+markers",
                line={"color": colour},
                marker={"symbol": marker, "size": 8},
                customdata=np.stack(details, axis=1),
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
                line={"color": data.GREEN, "dash": "dot"},
                hovertemplate=f"words alone: d = %{{y:.2f}}, accuracy {lexical['accuracy']:.1%}",
            )
        )
    return _styled(figure, "layer", "Cohen's d, held out")


def categories(by_category: dict) -> go.Figure:
    """Layers x categories heat map of held-out d; significant cells carry a star."""
    names, d, p = data.category_grids(by_category)
    stars = np.where(np.nan_to_num(p, nan=1.0) <= 0.05, "*", "")
    texts = [[f"{x:z.1f}{star}" if np.isfinite(x) else "" for x, star in zip(*row, strict=True)]
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
    names, grid = data.step_grid(pattern)
    figure = go.Figure(
        go.Heatmap(
            z=_nullable(grid),
            x=names,
            hovertemplate="layer %{y}, step %{x}: d = %{z:.2f}<extra></extra>",
            **_around_zero(grid),
        )
    )
    xaxis = {"type": "category", "tickvals": names, "ticktext": data.step_labels(pattern), "tickangle": -90,
             "automargin": True}  # fmt: skip
    return _styled(figure, "end of the prompt, then generated tokens", "layer", xaxis=xaxis)


def projections(projected: dict) -> go.Figure:
    """Prompts: the direction learnt from other pairs against the leading orthogonal component; a slider over layers.

    Args:
        projected: of `analysis.project_prompts`. The slider's steps are labelled "positions/layer".
    """
    steps = [
        _view(f"{positions}/{number}", f"{data.POSITION_NAMES[positions]}, layer {number}", layer)
        for positions, layers in projected["positions"].items()
        for number, layer in enumerate(layers)
    ]
    points, first, _ = steps[0]["args"]
    figure = go.Figure().update_layout(first)
    for side, (name, colour) in enumerate(data.SIDE_COLOURS.items()):
        figure.add_trace(
            go.Scatter(
                x=points["x"][side],
                y=points["y"][side],
                name=projected["sides"][side],
                mode="markers",
                marker={"color": colour, "symbol": ("circle", "diamond")[side], "size": 8, "opacity": 0.75},
                text=[as_text(f"{pair['category']} {pair['id']}: {pair[name]}") for pair in projected["pairs"]],
                hovertemplate="%{text}<br>%{x:.2f} from the threshold",
            )
        )
    figure.add_vline(0, line={"color": data.GREY, "dash": "dash", "width": 1})
    figure.update_layout(sliders=[{"steps": steps, "pad": {"t": 65}, "currentvalue": {"visible": False}}])
    _styled(figure, "projection on the direction (0: threshold)", "leading orthogonal component", 480)
    return figure.update_layout(margin_t=80, title={"x": 0.02, "y": 0.97})


def _view(label: str, title: str, layer: dict) -> dict:
    """A step of the slider: what `Plotly.update` changes to show one layer."""
    x, y = np.array(layer["direction"]), np.array(layer["orthogonal"])
    right, total = data.on_their_side(layer)
    points = {name: [_short(values[:, side]) for side in range(2)] for name, values in (("x", x), ("y", y))}
    layout = {
        "title.text": f"{title}: {right} of {total} prompts on the right side",
        "xaxis.range": _range(x),
        "yaxis.range": _range(y),
    }
    return {"label": label, "method": "update", "args": [points, layout, [0, 1]]}


def comparison(result: dict) -> go.Figure:
    """Two models' d per layer; below, their difference under every condition, with a band."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    layers = result["conditions"]["prompt_end"]["layers"]
    x = np.arange(len(layers))
    for name, colour, symbol in (("a", data.BLUE, "circle"), ("b", data.ORANGE, "square")):
        title, ends = result["names"][name], data.column(layers, f"d_{name}_ci")
        figure.add_trace(_band(x, ends, colour, f"{title}, pointwise 95% interval"), 1, 1)
        figure.add_trace(
            go.Scatter(x=x, y=data.column(layers, f"d_{name}"), name=title, line={"color": colour},
                       mode="lines+markers", marker={"symbol": symbol, "size": 8},
                       hovertemplate="layer %{x}: d = %{y:.2f}"), 1, 1
        )  # fmt: skip
    figure.add_trace(_band(x, data.column(layers, "difference_ci"), data.GREEN, "pointwise 95% interval"), 2, 1)
    dashes = ("solid", "dash", "dashdot", "dot", "solid")
    for (name, title), dash in zip(data.CONDITION_NAMES.items(), dashes, strict=True):
        records = result["conditions"][name]["layers"]
        figure.add_trace(
            go.Scatter(x=x, y=data.column(records, "difference"), name=f"B - A, {title}", mode="lines+markers",
                       marker={"size": 5},
                       line={"color": data.GREEN if name == "prompt_end" else data.GREY, "dash": dash},
                       customdata=data.column(records, "p_value"),
                       hovertemplate="layer %{x}: difference %{y:.2f}, p = %{customdata:.3f}"), 2, 1
        )  # fmt: skip
    return _styled(figure, "layer", ("Cohen's d, prompt end", "difference of d"), 640)


def weights(result: dict) -> go.Figure:
    """What training changed: tensors by layer, ranks on hover; below, how far activations moved."""
    kinds, moved, ranks = data.weight_grid(result)
    heights = [40 + 30 * len(kinds), 200]
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.1, row_heights=heights)
    if kinds:
        figure.add_trace(
            go.Heatmap(z=_nullable(moved), x=list(range(moved.shape[1])), y=[html.escape(kind) for kind in kinds],
                       customdata=_nullable(ranks), zmin=0, colorscale="Purples", showscale=False,
                       texttemplate="%{z:.0%}" if moved.shape[1] <= 20 else None,
                       hovertemplate="%{y}, layer %{x}: changed by %{z:.2%} of its norm, effective rank "
                       "%{customdata:.1f}<extra></extra>"), 1, 1
        )  # fmt: skip
    for (title, values), dash in zip(
        data.moved_activations(result).items(), ("solid", "dash", "dashdot", "dot"), strict=True
    ):
        figure.add_trace(
            go.Scatter(x=list(range(len(values))), y=values, name=title, mode="lines+markers", marker={"size": 5},
                       line={"color": data.GREEN if dash == "solid" else data.GREY, "dash": dash},
                       hovertemplate="layer %{x}: moved by %{y:.2%}"), 2, 1
        )  # fmt: skip
    _styled(figure, "layer", ("", "activations moved by"), 180 + sum(heights))
    return figure.update_layout(yaxis2={"tickformat": ".0%", "rangemode": "tozero"})


def change_space(result: dict) -> go.Figure:
    """How far the directions of both models lie in what changed between them, and what chance gives."""
    shares, limit = data.direction_shares(result)
    figure = go.Figure()
    for (title, values), dash in zip(shares.items(), ("solid", "dash", "solid", "dash"), strict=True):
        figure.add_trace(
            go.Scatter(x=list(range(len(values))), y=values, name=title, mode="lines+markers", marker={"size": 5},
                       line={"color": data.BLUE if " A," in title else data.ORANGE, "dash": dash},
                       hovertemplate="layer %{x}: %{y:.1%}")
        )  # fmt: skip
    figure.add_hline(limit, line={"color": data.GREY, "dash": "dot"})
    return _styled(figure, "layer", "share of the direction", 360, yaxis={"tickformat": ".0%", "rangemode": "tozero"})


def transfer(result: dict) -> go.Figure:
    """Cohen's d of directions that were learnt on one contrast and tested on another, for models and words alone."""
    cells, sources, grid, written = data.transfer_grid(result)
    figure = go.Figure(
        go.Heatmap(
            z=_nullable(grid.T),
            x=[html.escape(source) for source in sources],
            y=[html.escape(cell) for cell in cells],
            text=written.T,
            texttemplate="%{text}",
            hovertemplate="%{y}<br>%{x}: d = %{z:.2f}<extra></extra>",
            **_around_zero(grid),
        )
    )
    return _styled(figure, "", "", height=140 + 36 * len(cells), yaxis={"autorange": "reversed"},
                   xaxis={"type": "category", "automargin": True})  # fmt: skip


def sweep(result: dict) -> go.Figure:
    """Every setting tried: remaining refusals and broken text, or the mean score, against cost; front, chosen setting,
    random controls."""
    figure = go.Figure()
    cost, reached = data.sweep_axes(result)
    is_score = bool(result.get("score"))
    hover = f"mean {html.escape(result['score']['name'])} %{{y:.2f}}" if is_score else "refused or broken %{y:.0%}"
    for mode, colour in data.sweep_modes(result).items():
        records = [r for r in result["tried"] if r["setting"]["mode"] == mode]
        if not records:
            continue  # tried by first tokens only
        figure.add_trace(
            _points(
                [data.sweep_point(r) for r in records],
                mode,
                {
                    "color": colour,
                    "size": 8,
                    "opacity": 0.8,
                    "symbol": [MARKERS[r["setting"]["site"]] for r in records],
                },
                [data.description(r["setting"]) for r in records],
                hover,
            )
        )
    front = np.array([data.sweep_point(result["tried"][i]) for i in result["pareto_front"]])
    figure.add_trace(
        go.Scatter(x=front[:, 0], y=front[:, 1], name="best trade-offs", mode="lines", hoverinfo="skip",
                   line={"color": data.GREY, "shape": "hv", "width": 1.5})
    )  # fmt: skip
    for (name, points), symbol in zip(data.random_controls(result).items(), ("x-thin", "cross-thin"), strict=True):
        if points:
            marker = {"symbol": symbol, "size": 10, "line": {"width": 2, "color": data.GREY}}
            figure.add_trace(_points(points, f"{name}, test", marker, [name] * len(points), hover))
    chosen = data.description(result["chosen"]["setting"])
    ring = {"symbol": "circle-open", "size": 18, "color": data.ORANGE, "line": {"width": 3}}
    for name, record, marker in (
        ("chosen", result["chosen"]["development"], ring),
        ("chosen, on test pairs", result["test"], {**ring, "symbol": "star-open"}),
    ):
        figure.add_trace(_points([data.sweep_point(record)], name, marker, [chosen], hover))
    figure.add_vline(result["config"]["limits"]["kl"], line={"color": data.GREY, "dash": "dash", "width": 1})
    for name, value in data.unedited(result).items():
        line = {"color": data.GREY, "dash": "dot", "width": 1.5}
        figure.add_hline(value, line=line, annotation={"text": name, "font_color": data.GREY})
    xaxis, yaxis = {"type": "log", "exponentformat": "power"}, {} if is_score else {"tickformat": ".0%"}
    return _styled(figure, cost, reached, 460, xaxis=xaxis, yaxis=yaxis)


def toxicity(results: dict) -> go.Figure:
    """Toxicity and the cost of steering against alpha, one line per layer."""
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.06)
    layers, alphas, steered = data.alpha_table(results, "toxicity")
    kl = data.alpha_table(results, "kl")[2]
    # This part of the scale is visible on white and on black.
    shades = sample_colorscale("Plasma", np.linspace(0.35, 0.8, len(layers)).tolist())
    for i, (layer, colour) in enumerate(zip(layers, shades, strict=True)):
        shared = {"x": alphas, "legendgroup": str(layer), "line": {"color": colour}, "connectgaps": True}
        hover = f"layer {layer}, alpha %{{x}}: %{{y:.3f}}<extra></extra>"
        figure.add_trace(go.Scatter(y=steered[i], name=f"layer {layer}", hovertemplate=hover, **shared), 1, 1)
        figure.add_trace(go.Scatter(y=kl[i], showlegend=False, hovertemplate=hover, **shared), 2, 1)
    limit = results["experiment"]["config"]["max_kl"]
    figure.add_hline(limit, line={"color": data.GREY, "dash": "dash", "width": 1}, row=2, col=1)
    return _styled(figure, "alpha (positive: away from toxicity)", ("mean toxicity", "KL, nats per token"), 620)


def _styled(figure: go.Figure, x: str, y: str | tuple[str, ...], height: int = 400, xaxis: dict | None = None,
            yaxis: dict | None = None) -> go.Figure:  # fmt: skip
    """The common look; panels one above the other have one y title each."""
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


def _band(x: np.ndarray, ends: np.ndarray, colour: str, name: str, showlegend=False) -> go.Scatter:
    low, high = ends.T
    defined = np.isfinite(low) & np.isfinite(high)
    return go.Scatter(
        x=np.concatenate([x[defined], x[defined][::-1]]),
        y=np.concatenate([high[defined], low[defined][::-1]]),
        fill="toself",
        fillcolor=f"rgba({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))}, 0.2)",
        line={"width": 0},
        mode="lines",
        name=name,
        showlegend=showlegend,
        hoverinfo="skip",
    )


def _points(points: list[tuple[float, float]], name: str, marker: dict, texts: list[str], hover: str) -> go.Scatter:
    x, y = np.array(points).T
    return go.Scatter(x=x, y=y, name=name, mode="markers", marker=marker, text=[as_text(t) for t in texts],
                      hovertemplate=f"%{{text}}<br>KL %{{x:.2g}}, {hover}")  # fmt: skip


def _around_zero(grid: np.ndarray) -> dict:
    limit = data.colour_limit(grid)
    return {"zmin": -limit, "zmax": limit, "colorscale": DIVERGING, "colorbar": {"title": "Cohen's d"}}


def _nullable(grid: np.ndarray) -> list[list[float | None]]:
    return [[float(x) if np.isfinite(x) else None for x in row] for row in grid]


def _short(values: np.ndarray) -> list[float]:
    """Four digits, which is finer than a pixel: the file must stay small."""
    return [float(f"{x:.4g}") for x in values]


def _range(values: np.ndarray) -> list[float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 1.0
    return [low - margin, high + margin]


def as_text(prompt: str) -> str:
    """A prompt in a hover box: never markup, wrapped."""
    return "<br>".join(html.escape(line) for line in textwrap.wrap(prompt, HOVER_WIDTH)) or " "
