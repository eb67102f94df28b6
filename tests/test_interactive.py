"""The same numbers on paper (matplotlib) and on the screen (Plotly), and those of the results."""

import numpy as np
import pytest

from alignment_artifacts.figures import interactive, paper
from alignment_artifacts.figures.data import on_their_side

from .report_results import write_analysis, write_comparison, write_sweep, write_toxicity


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_analysis(tmp_path_factory.mktemp("run"))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws with matplotlib and gives the axes instead of writing a file."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(paper, "_save", lambda figure, path: figures.append(figure))

    def draw(function, *arguments):
        function(*arguments, tmp_path / "x.png")
        return figures[-1].axes

    yield draw
    plt.close("all")


def trace(figure, name):
    return next(t for t in figure.data if t.name == name)


def test_layer_scores(run, drawn):
    left, right = drawn(paper.plot_layer_scores, run.results)[:2]
    screen = interactive.layer_scores(run.results)
    for line, name in ((0, "generated tokens"), (1, "prompt end")):
        shown = trace(screen, name)
        np.testing.assert_array_equal(left.lines[line].get_ydata(), shown.y)
        np.testing.assert_array_equal(right.lines[line].get_ydata(), shown.customdata[:, 2])
    record = run.results["layer_scores"]["2"]
    assert trace(screen, "generated tokens").y[2] == record["cohens_d"]
    expected = [*record["cohens_d_ci"], record["accuracy"], *record["accuracy_ci"], record["auroc"], record["p_value"]]
    assert list(trace(screen, "generated tokens").customdata[2]) == expected
    assert trace(screen, "words alone").y[0] == run.results["lexical_baseline"]["cohens_d"]


def test_categories_and_steps(run, drawn):
    grid = drawn(paper.plot_categories, run.by_category)[0].images[0].get_array()
    np.testing.assert_array_equal(grid, interactive.categories(run.by_category).data[0].z)
    grid = drawn(paper.plot_layer_pattern, run.pattern)[1].images[0].get_array()
    shown = interactive.steps(run.pattern).data[0]
    np.testing.assert_array_equal(grid, shown.z)
    assert list(shown.x) == ["end", "0", "1", "2", "3", "4"]


def test_projections(run, drawn):
    panels = drawn(paper.plot_projections, run.projections)
    screen = interactive.projections(run.projections)
    views = {step.label: step.args for step in screen.layout.sliders[0].steps}
    assert list(views) == [f"{p}/{i}" for p in ("generated", "prompt_end") for i in range(4)]
    assert list(screen.data[1].x) == views["generated/0"][0]["x"][1]
    for layer in range(4):
        points, layout, _ = views[f"prompt_end/{layer}"]
        for side in range(2):
            on_paper = panels[layer].collections[side].get_offsets()
            np.testing.assert_allclose(on_paper, np.transpose([points["x"][side], points["y"][side]]), rtol=1e-3)
            low, high = layout["xaxis.range"]
            assert low < min(points["x"][side]) and max(points["x"][side]) < high
    right, total = on_their_side(run.projections["positions"]["generated"][2])
    # Points are means over ten divisions into folds, the accuracy is the mean of ten accuracies.
    assert right / total == pytest.approx(run.results["layer_scores"]["2"]["accuracy"], abs=0.1)
    assert f"layer 2: {right} of 40" in views["generated/2"][1]["title.text"]


def test_sweep_and_toxicity(tmp_path, drawn):
    result = write_sweep(tmp_path)
    panel = drawn(paper.plot_sweep, result)[1]
    shown = interactive.sweep(result)
    on_paper = {tuple(point) for collection in panel.collections for point in collection.get_offsets().tolist()}
    for mode in ("always", "cap", "random direction, test", "chosen"):
        points = trace(shown, mode)
        assert set(zip(points.x, points.y, strict=True)) <= on_paper
    assert list(trace(shown, "cap").marker.symbol) == ["circle", "triangle-up"]
    assert trace(shown, "chosen").text == ("cap x1, residual, layers 1-2, direction from prompt_end",)
    del result["chosen"]["setting"]["description"]  # as an earlier version wrote it
    assert trace(interactive.sweep(result), "chosen").text == ("cap",)
    from toxicity_steering.plots import alpha_sweep

    results = write_toxicity(tmp_path)
    shown = interactive.toxicity(results)
    for line in [line for line in alpha_sweep(results).axes[0].lines if "layer" in str(line.get_label())]:
        assert any(np.array_equal(line.get_ydata(), t.y) for t in shown.data)


def test_a_sweep_whose_trials_all_went_too_far_has_a_figure(tmp_path):
    result = write_sweep(tmp_path)
    for trial in result["trials"]:
        trial |= {"kept": None, "loss": None}
    paper.plot_sweep(result, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 0 and interactive.sweep(result).data


def test_comparison(tmp_path, drawn):
    result = write_comparison(tmp_path)
    left, middle, right = drawn(paper.plot_comparison, result)[:3]
    shown = interactive.comparison(result)
    for line, name in zip(left.lines, ("before", "simulated"), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), trace(shown, name).y)
    np.testing.assert_array_equal(middle.lines[0].get_ydata(), trace(shown, "B - A, prompt end").y)
    np.testing.assert_array_equal(right.images[0].get_array(), interactive.transfer(result).data[0].z)
    words = result["transfer"]["words"].values()
    expected = [f"{r['cohens_d']:z.1f} ({r['kind']})" for r in words]
    written = [text.get_text() for text in right.texts]
    assert written[-len(expected) :] == expected == list(interactive.transfer(result).data[0].text[:, -1])


def test_prompts_in_hover_boxes_are_escaped_and_wrapped():
    assert interactive.as_text("<b>" + "word " * 30) == "<br>".join(
        ["&lt;b&gt;word" + " word" * 10, "word" + " word" * 11, "word" + " word" * 6]
    )
