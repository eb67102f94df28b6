"""The report, in a real browser, from the disk: what is on the page, what moves, and that nothing leaves it."""

import html
import json
import os
import re
import shlex
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compare_models
import suppress
import sweep_suppression
from alignment_artifacts import places
from alignment_artifacts.pairs import PAIRS_JSON
from alignment_artifacts.report import SOURCES, TOXICITY_COMMAND, build, contents, write_report
from alignment_artifacts.report.__main__ import is_about_something_else, main
from gemma_refactored.configuration import Chat
from gemma_refactored.errors import UserError
from toxicity_steering import main as toxicity

from .conftest import tries
from .report_results import (
    MARKUP,
    ORIGIN,
    write,
    write_analysis,
    write_comparison,
    write_sweep,
    write_toxicity,
    write_transcripts,
)

NEED_BROWSER = os.environ.get("NEED_BROWSER")  # set in continuous integration, where nothing may be skipped
BROWSER, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Where the results of the toxicity experiment are looked for."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "HOME", folder)
        yield folder


@pytest.fixture(scope="module")
def results(home, tmp_path_factory):
    """A folder with every result file, and what is in them."""
    folder = tmp_path_factory.mktemp("results")
    run = write_analysis(folder)
    transcripts, scores = write_transcripts(folder, run.data.pairs)
    found = {"run": run, "transcripts": transcripts, "scores": scores, "sweep": write_sweep(folder),
             "toxicity": write_toxicity(home), "comparison": write_comparison(folder), "folder": folder}  # fmt: skip
    assert main(["--folder", str(folder)]) == 0
    return found


@pytest.fixture(scope="module")
def browser():
    if not (BROWSER and DRIVER):
        assert not NEED_BROWSER, "chromium and chromedriver are not installed"
        pytest.skip("needs chromium and chromedriver (apt install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        yield driver
        driver.quit()


def show(browser, folder, width=1100, dark=False):
    """Open the report afresh; the requests that were made on the way."""
    wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get((folder / "report.html").as_uri())


@pytest.fixture
def page(browser, results):
    show(browser, results["folder"])
    return browser


def find(page, selector):
    return page.find_element("css selector", selector)


def plotted(page, name, trace, axis):
    """What Plotly has drawn, as numbers."""
    script = "return Array.from(document.getElementById(arguments[0])._fullData[arguments[1]][arguments[2]])"
    return page.execute_script(script, f"plot-{name}", trace, axis)


def press(page, selector, key, times=1):
    from selenium.webdriver.common.keys import Keys

    for _ in range(times):
        find(page, selector).send_keys(getattr(Keys, key))


def test_it_opens_from_disk_without_a_request_or_an_error(page):
    from selenium.webdriver.support.ui import Select

    press(page, "#projection-layer", "ARROW_RIGHT")
    press(page, "#token-layer", "ARROW_LEFT")
    Select(find(page, "#token-filter")).select_by_value("lifted")
    find(page, "#save-manifest").click()
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("data:", "chrome:", "blob:"))] == [page.current_url]
    assert len(page.find_elements("css selector", ".plot .main-svg")) > 0
    for plot in page.find_elements("css selector", ".plot"):
        assert plot.find_elements("css selector", ".main-svg"), plot.get_attribute("id")


def test_numbers_are_those_of_the_files(page, results):
    run = results["run"]
    scores = run.results["layer_scores"]
    d = [record["cohens_d"] for record in scores.values()]
    names = page.execute_script("return document.getElementById('plot-analysis').data.map(t => t.name)")
    assert plotted(page, "analysis", names.index("generated tokens"), "y") == d
    end = [record["cohens_d"] for record in run.results["layer_scores_prompt_end"].values()]
    assert plotted(page, "analysis", names.index("prompt end"), "y") == end
    find(page, "#layers summary").click()
    rows = page.find_elements("css selector", "#table-layers tbody tr")
    for row, record in zip(rows, scores.values(), strict=False):
        cells = [cell.text.replace("\N{MINUS SIGN}", "-") for cell in row.find_elements("css selector", "td")]
        low, high = record["cohens_d_ci"]
        d, accuracy = f"{record['cohens_d']:.2f}", f"{record['accuracy'] * 100:.0f}%"
        assert cells[:4] == [d, f"[{low:.2f}, {high:.2f}]", accuracy, f"{record['p_value']:.3f}"]
    assert find(page, ".answer").text == results["comparison"]["summary"]  # the controlled answer comes first
    separation = find(page, "#answer p:nth-of-type(2)").text
    assert separation.startswith("Separation alone") and separation.endswith(run.results["summary"])
    for category, grid in zip(run.by_category["categories"].values(), plotted(page, "categories", 0, "z"), strict=True):
        assert grid == [record["cohens_d"] for record in category["layer_scores"].values()]
    assert np.array_equal(plotted(page, "steps", 0, "z"), np.array([s["cohens_d"] for s in run.pattern["steps"]]).T)
    kl, left = (plotted(page, "sweep", 1, axis) for axis in "xy")
    caps = [r for r in results["sweep"]["tried"] if r["setting"]["mode"] == "cap"]
    assert kl == [r["damage"]["kl_mean"] for r in caps]
    assert left == [r["artifact"]["refused_or_broken"]["rate"] for r in caps]
    foretold = "among twins 0.83 [0.70, 0.91] (9 refused, 91 answered)."
    assert foretold in " ".join(find(page, "#sweep").get_attribute("textContent").split())
    sweep = results["toxicity"]["sweep"].values()
    toxicity = [r["artifact"]["score"]["mean"] for r in sweep if r["setting"]["layers"] == [0]]
    toxicity.insert(1, results["toxicity"]["baseline"]["development"]["artifact"]["mean_toxicity"])  # alpha 0
    assert plotted(page, "toxicity", 0, "y") == toxicity
    compared = results["comparison"]["conditions"]["prompt_end"]["layers"]
    names = page.execute_script("return document.getElementById('plot-comparison').data.map(t => t.name)")
    for name, key in (("before", "d_a"), ("simulated", "d_b"), ("B - A, prompt end", "difference")):
        assert plotted(page, "comparison", names.index(name), "y") == [record[key] for record in compared]
    shares = [record["b"][0] for record in results["comparison"]["change_space"]["layers"]]
    assert plotted(page, "change_space", 0, "y") == shares
    (changed,) = results["comparison"]["weights"]["tensors"]
    assert plotted(page, "weights", 0, "z")[0][changed["layer"]] == changed["relative_change"]
    moved = [record["relative_change"] for record in compared]
    assert plotted(page, "weights", 1, "y") == moved
    row = find(page, "#table-weights tbody tr").get_attribute("textContent")
    assert all(part in row for part in (changed["name"], "25.0", "writes", "0.99", "0.88"))
    assert find(page, "#weights-direction").get_attribute("textContent") == "0.6, 0.8"
    cells = results["comparison"]["transfer"]
    assert plotted(page, "transfer", 0, "z") == [
        [records[cell]["cohens_d"] for records in cells.values()] for cell in cells["a"]
    ]
    assert json.loads(find(page, "#manifest-text").get_attribute("textContent")) == run.results["collection"]


def test_the_slider_moves_the_points(page, results):
    layers = results["run"].projections["positions"]["prompt_end"]
    start = int(find(page, "#projection-layer").get_attribute("value"))
    for layer, key in ((start, None), (start - 1, "ARROW_LEFT"), (start, "ARROW_RIGHT")):
        if key:
            press(page, "#projection-layer", key)
        for side in range(2):
            expected = [row[side] for row in layers[layer]["direction"]]
            np.testing.assert_allclose(plotted(page, "projections", side, "x"), expected, rtol=1e-3)
        right = sum(n < 0 for n, _ in layers[layer]["direction"]) + sum(a > 0 for _, a in layers[layer]["direction"])
        assert f"layer {layer}: {right} of 40 prompts" in find(page, "#projection-caption").text
        wrong = page.execute_script(
            "return [...document.querySelectorAll('#projection-mistakes li')].map(li => li.textContent)"
        )
        assert len(wrong) == 40 - right
        pairs = results["run"].data.pairs
        for pair, (natural, artifact) in zip(pairs, layers[layer]["direction"], strict=True):
            assert (f"natural: {pair.natural} ({pair.category} {pair.id})" in wrong) == (natural >= 0)
            assert (f"artifact: {pair.artifact} ({pair.category} {pair.id})" in wrong) == (artifact <= 0)
        accuracy = results["run"].results["layer_scores_prompt_end"][str(layer)]["accuracy"]
        # Points are means over ten divisions into folds, the accuracy is the mean of ten accuracies.
        assert right / 40 == pytest.approx(accuracy, abs=0.1)
    assert find(page, "#projection-layer-shown").text == str(start)


def tokens_on_page(page):
    """[(text, background, title)] of the tokens of the first pair's natural prompt and answer before."""
    script = """return [...document.querySelectorAll('.pair:first-child .side:first-of-type .token')].map(
        t => [t.firstChild.textContent, getComputedStyle(t).backgroundImage, t.title, Number(t.dataset.index)])"""
    return page.execute_script(script)


def test_transcripts_change_colour_with_the_layer(page, results):
    shown = {}
    for layer in (2, 1):
        press(page, "#token-layer", "ARROW_LEFT", times=layer == 1)
        assert find(page, "#token-layer-shown").text == str(layer)
        shown[layer] = tokens_on_page(page)
        for _, _, title, index in shown[layer]:
            value = float(title.removeprefix("score "))
            assert value == pytest.approx(results["scores"][index, layer], abs=contents.SCORE_STEP / 2 + 1e-2)
    assert [t[0] for t in shown[1]] == [t[0] for t in shown[2]]
    changed = [a[1] != b[1] for a, b in zip(shown[1], shown[2], strict=True)]
    assert sum(changed) > 0.8 * len(changed)
    ids = results["transcripts"]["pairs"][0]["natural"]
    pieces = results["transcripts"]["pieces"]
    expected = [pieces[str(i)] for i in ids["prompt_tokens"] + ids["before"]["tokens"] + ids["after"]["tokens"]]
    assert [text.replace("\u21b5", "\n") for text, *_ in shown[1]] == expected
    assert not find(page, ".pair .token i").is_displayed()
    find(page, "#token-numbers").click()
    assert find(page, ".pair .token i").text == shown[1][0][2].removeprefix("score ")


def test_refusals_are_marked_and_can_be_filtered(page, results):
    from selenium.webdriver.support.ui import Select

    badges = [b.text for b in page.find_elements("css selector", ".pair:nth-child(2) .badge")]
    assert badges == ["answered", "answered", "refused", "answered"]
    for name, number in (("all", 20), ("stayed", 5), ("lifted", 15), ("new", 0)):
        Select(find(page, "#token-filter")).select_by_value(name)
        text = find(page, "#token-page").text
        assert text == (f"1 to 5 of {number} pairs" if number else "no pairs")
    Select(find(page, "#token-filter")).select_by_value("all")
    find(page, "#token-next").click()
    assert find(page, "#token-page").text == "6 to 10 of 20 pairs"
    Select(find(page, "#token-category")).select_by_value("category_3")
    assert find(page, "#token-page").text == "1 to 4 of 4 pairs"
    assert all("category 3" in h.text for h in page.find_elements("css selector", ".pair h3"))
    Select(find(page, "#token-category")).select_by_value("")
    find(page, "#token-search").send_keys("window.hacked")
    assert find(page, "#token-page").text == "1 to 1 of 1 pairs"


def test_prompts_are_text_and_never_markup(page, results):
    assert page.execute_script("return window.hacked") is None
    assert find(page, ".pair .token").text.startswith("<script>window.hacked")
    assert page.execute_script("return document.querySelectorAll('main script, main img, main b').length") == 0
    page.execute_script("Plotly.Fx.hover('plot-projections', [{curveNumber: 1, pointNumber: 0}])")
    hover = page.execute_script("return document.querySelector('#plot-projections .hoverlayer').textContent")
    assert "<script>" in hover and "<b>bold</b>" in hover
    assert page.execute_script("return window.hacked") is None


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_in_light_and_dark(browser, results, dark):
    show(browser, results["folder"], width=390, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    text, background = ([int(x) for x in c[4:-1].split(",")] for c in browser.execute_script(colours))
    assert (sum(text) > sum(background)) == dark and abs(np.mean(text) - np.mean(background)) > 150
    font = "return document.getElementById('plot-analysis')._fullLayout.font.color"
    assert browser.execute_script(font) == browser.execute_script("return getComputedStyle(document.body).color")
    assert browser.get_log("browser") == []


def test_every_control_has_a_label_and_takes_the_focus(page):
    for control in page.find_elements("css selector", "main input, main select, main button, main summary"):
        label = "const c = arguments[0]; return c.ariaLabel || c.labels?.[0]?.textContent || c.textContent"
        assert page.execute_script(label, control).strip(), control.get_attribute("outerHTML")
        if control.is_enabled():
            page.execute_script("arguments[0].focus()", control)
            assert page.switch_to.active_element == control


def test_missing_sections_name_the_command(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(places, "HOME", tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(results["folder"] / SOURCES[0].file, tmp_path / "data")
    assert main(["--folder", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 0
    assert f"Report: file://{tmp_path}/r.html" in capsys.readouterr().out
    text = (tmp_path / "r.html").read_text()
    for command in (*(source.command for source in SOURCES[1:]), TOXICITY_COMMAND):
        assert f"Run <code>{command}</code>, then" in text
    assert results["run"].results["summary"] in text


def test_commands_name_the_model_the_adapter_and_the_chat_format(results, tmp_path, monkeypatch):
    """Those for missing sections and those that repeat the page, as their scripts read them."""
    monkeypatch.setattr(places, "HOME", tmp_path)
    for path in (SOURCES[0].file, "data/transcripts.json", "data/transcripts.npz"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(results["folder"] / path, tmp_path / path)
    path = tmp_path / SOURCES[0].file
    content = json.loads(path.read_text())
    of_model = {"model_path": "who/model", "adapter_path": "who/it's an adapter", "system_prompt": "Be <brief>."}
    write(path, {**content, "collection": {**content["collection"], **of_model}})
    printed = re.findall(r"<code>python (?:-m )?([^<]*)</code>", build(tmp_path))
    commands = [shlex.split(html.unescape(command)) for command in printed]
    expected = ("who/model", "who/it's an adapter", Chat(system_prompt="Be <brief>."))
    asked = []
    for module, name, model, adapter in (
        (compare_models, "compare_models.py", "model_b", "adapter_b"),
        (sweep_suppression, "sweep_suppression.py", "model_name", "adapter"),
        (toxicity, "toxicity_steering.main", "model", "adapter"),
    ):
        monkeypatch.setattr(module, "run", asked.append)
        ((_, *options),) = [command for command in commands if command[0] == name]
        assert module.main(options) == 0
        assert (getattr(asked[-1], model), getattr(asked[-1], adapter), asked[-1].chat) == expected
    of_suppress = [command[1:] for command in commands if command[0] == "suppress.py"]
    assert len(of_suppress) == 2  # transcripts again, tokens for the first time
    for arguments in map(suppress.build_parser().parse_args, of_suppress):
        assert (arguments.model, arguments.adapter, Chat(system_prompt=arguments.system_prompt)) == expected


def test_few_pairs_make_a_report_too(tmp_path):
    write_analysis(tmp_path, pairs=8)
    text = build(tmp_path)
    assert "too few pairs to score single steps" in text and "only 2 pairs, 4 needed" in text


@pytest.mark.parametrize("source", SOURCES[1:], ids=lambda source: source.name)
def test_a_section_of_another_model_or_other_pairs_says_so(results, tmp_path, source):
    copy = tmp_path / "copy"
    shutil.copytree(results["folder"], copy)
    path, model, pairs = copy / source.file, "different weights from the collection", "with different prompt pairs from"
    content = json.loads(path.read_text())
    assert content["origin"] == ORIGIN and model not in build(copy) and pairs not in build(copy)
    revision, other = f"sha256:{'2a' * 32}", "3b" * 32
    write(path, {**content, "origin": {**ORIGIN, "model": "someone else", "model_revision": revision}})
    text = build(copy)
    assert f"{model} above: someone else (sha256:2a2a2a2a2a2a)." in text and pairs not in text
    write(path, {**content, "origin": {**ORIGIN, "pairs_file": "mine.json", "pairs_hash": other}})
    text = build(copy)
    assert f"{pairs} the analysis above: mine.json (3b3b3b3b3b3b) instead of simulated.json (1)" in text
    assert model not in text


def test_only_the_toxicity_results_of_this_model_are_in_it(results, home):
    page = build(results["folder"])
    assert 'id="plot-toxicity"' in page and "<td>0.80 (no interval)</td>" in page
    path = home / "toxicity_results/experiment_results.json"
    original = path.read_text()
    try:
        write_toxicity(home, {"model": "someone else", "model_revision": "sha256:2"})
        assert f"Run <code>{TOXICITY_COMMAND}</code>, then" in build(results["folder"])
    finally:
        path.write_text(original)


def test_without_a_folder_it_is_the_last_analysis_that_is_shown(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(places, "HOME", tmp_path)
    assert main([]) == 2 and "There are no results in" in capsys.readouterr().err
    for name in ("first", "second"):
        shutil.copytree(results["folder"], tmp_path / f"results/{name}/pairs")
    for name in ("first", "second", "first"):
        write(tmp_path / places.ANALYSIS, {"results": f"results/{name}/pairs"})
        assert main([]) == 0 and f"results/{name}/pairs/report.html" in capsys.readouterr().out
        assert main(["--folder", str(tmp_path)]) == 0 and f"results/{name}/" in capsys.readouterr().out
    (tmp_path / places.ANALYSIS).unlink()  # a sweep without an analysis, say: the newest results
    os.utime(tmp_path / "results/second/pairs/data/projections.json", (2e9, 2e9))
    assert main([]) == 0 and "results/second/pairs/report.html" in capsys.readouterr().out
    write(tmp_path / places.ANALYSIS, {"results": "results/gone"})
    assert main([]) == 2 and "analyze_collected_activations.py` again" in capsys.readouterr().err


def test_whether_a_page_is_about_what_the_environment_names(tmp_path, monkeypatch):
    collection = {"model_path": "who/model", "system_prompt": "Be brief."}
    write(tmp_path / "data" / places.ANALYSIS, {"collection": collection, "origin": {**ORIGIN, "site": "mlp"}})
    brief = {"MODEL_NAME": "who/model", "SYSTEM_PROMPT": "Be brief."}
    for variables, other in (
        ({}, False), (brief, False), ({**brief, "SITE": "mlp"}, False), ({**brief, "SITE": "residual"}, True),
        ({"MODEL_NAME": "who/model"}, True), ({**brief, "MODEL_NAME": "who/other"}, True),
        ({**brief, "ADAPTER": "who/adapter"}, True), ({"PAIRS": str(PAIRS_JSON)}, True),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert is_about_something_else(tmp_path) == other
    assert not is_about_something_else(tmp_path / "nothing")


def test_a_thousand_pairs_stay_below_20_mb(tmp_path):
    run = write_analysis(tmp_path, pairs=1000, layers=26)
    write_transcripts(tmp_path, run.data.pairs, layers=26, tokens=40)
    write_report(tmp_path, tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 20e6
    assert "holds one layer in 2" in (tmp_path / "r.html").read_text()


def spots(content, path=()):
    """Paths to everything inside a JSON value; of long lists the first items only."""
    items = (
        content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from spots(value, (*path, key))


TOXICITY_FILE = "toxicity_results/experiment_results.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    run = write_analysis(folder, pairs=10, layers=3)
    write_transcripts(folder, run.data.pairs, layers=3)
    for write_one in (write_sweep, write_comparison):
        write_one(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "HOME", folder)
        write_toxicity(folder)
        yield folder


@tries(60)
@given(data=st.data())
def test_any_spoiled_number_is_shown_or_refused(small, data):
    path = small / data.draw(st.sampled_from([*(source.file for source in SOURCES), TOXICITY_FILE]))
    content = json.loads(path.read_text())
    *way, last = data.draw(st.sampled_from(list(spots(content))))
    inside = content
    for key in way:
        inside = inside[key]
    inside[last] = data.draw(st.sampled_from([None, "x", "<b>", -1, 1e300, [], {}, [None], True]))
    original = path.read_text()
    try:
        write(path, content)
        text = build(small)
    except UserError as error:
        assert "not written by this version" in str(error) or "cannot be read" in str(error) or "same run" in str(error)
    else:
        assert "<script>window.hacked" not in text
    finally:
        path.write_text(original)


def test_bad_input_is_one_sentence(results, tmp_path, capsys):
    assert main(["--folder", str(tmp_path)]) == 2
    assert "There are no results in" in capsys.readouterr().err
    shutil.copytree(results["folder"], tmp_path / "copy")
    data = tmp_path / "copy/data"
    for spoil, message in (
        (
            lambda: write(data / "layer_analysis.json", {"steps": 3}),
            "layer_analysis.json was not written by this version",
        ),
        (lambda: (data / "layer_analysis.json").write_text("{"), "not valid JSON"),
        (lambda: (data / "transcripts.npz").unlink(), "run `python suppress.py --all-pairs`"),
        (lambda: np.savez(data / "transcripts.npz", scores=np.zeros((3, 4))), "are not from the same run"),
    ):
        spoil()
        assert main(["--folder", str(tmp_path / "copy")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        (data / "layer_analysis.json").unlink(missing_ok=True)
    assert MARKUP not in error
