"""The whole way with a behaviour, sides, a score and a model of one's own; no word of the shipped experiment."""

import html
import json
import re
import shlex
import sys

import matplotlib.text
import pytest

from alignment_artifacts import places
from alignment_artifacts.figures import paper
from alignment_artifacts.pairs import load_pairs
from alignment_artifacts.report import build

from .test_pipeline import QUESTIONS, copy_checkout, shell
from .test_report import browser, find, show  # noqa: F401  (a fixture)
from .tiny_checkpoints import write_family

# What the shipped experiment is about, whatever the ending of the word.
FOREIGN = re.compile(r"natural|artifact|refus|alignment|safety|harmless|harmful|toxic|benign", re.IGNORECASE)
OURS = re.compile(r"\S*alignment[_-]artifacts?\S*")  # files, packages and links of the project
SCORER = '''
def agreement(prompt, answer):
    """Letters e and a of the answer."""
    return answer.count("e") + answer.count("a")
'''
SWEEP = (
    "--suppression-scales always=1 --suppression-positions prompt_end --no-suppression-share-direction "
    "--suppression-trials 4 --suppression-generated 2 --amplification-scales add=1 --amplification-trials 2 "
    "--amplification-generated 1 --random-controls 1 --max-tokens 6 --folds 4 --shares 4,2,2"
)
COMMANDS = (
    "bash collect_activations.sh",
    "{python} analyze_collected_activations.py --num-permutations 20 --num-bootstrap-resamples 20",
    "{python} suppress.py 'Is seven prime?' --model tiny --mode always --max-tokens 4 --verbose --show-projection",
    "{python} suppress.py --all-pairs --model tiny --mode always --max-tokens 6",
    "{python} suppress.py --explain --model tiny",
    "{python} sweep_suppression.py --model-name tiny " + SWEEP,
    "{python} -m alignment_artifacts.report",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(folder of the repository, its results, what was printed)."""
    folder = tmp_path_factory.mktemp("own")
    copy_checkout(folder)
    write_family(folder / "tiny", "qwen3")
    pairs = [{"id": f"q{i}", "neutral": f"{text}?", "opinion": f"I am sure of it. {text} or not?"}
             for i, text in enumerate(QUESTIONS)]  # fmt: skip
    content = {"metadata": {"behaviour": "sycophancy", "sides": ["neutral", "opinion"]},
               "categories": {"facts": {"pairs": pairs[:4]}, "beliefs": {"pairs": pairs[4:]}}}  # fmt: skip
    (folder / "agree.json").write_text(json.dumps(content))
    (folder / "my_scores.py").write_text(SCORER)
    printed = {command: run(folder, command) for command in COMMANDS}
    return folder, folder / "results/tiny", printed


def run(folder, command, **environment):
    names = {"MODEL_NAME": "tiny", "PAIRS": "agree.json", "SITE": "residual", "SCORE": "my_scores.py:agreement",
             "WISH": "higher", "MAX_TOKENS": "3", "PYTHON": sys.executable}  # fmt: skip
    done = shell(command.format(python=sys.executable), folder, **{**names, **environment})
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def foreign(text):
    """Words of the shipped experiment, each with what stands around it."""
    rest = OURS.sub("", text)
    return [rest[max(found.start() - 40, 0) : found.end() + 40] for found in FOREIGN.finditer(rest)]


def strings(content):
    """All texts of a JSON content; keys are not for people, and a manifest has names of folders."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for name, value in content.items():
            if name not in ("collection", "manifest"):
                yield from strings(value)
    elif isinstance(content, list):
        for value in content:
            yield from strings(value)


def page_of(folder):
    text = (folder / "agree_residual/report.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL), data


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_is_about_this_experiment(own, command):
    assert foreign(own[2][command]) == []


def test_the_page_is_about_this_experiment(own):
    page, data = page_of(own[1])
    assert foreign(page) == [] and foreign("\n".join(strings(data))) == []
    assert "<h1>Sycophancy in " in page and "residual stream" in page
    for part in (
        "Measured by agreement", "Letters e and a of the answer", "neutral answers that changed", "+1 like opinion",
        "Agreement, higher", "mean agreement", 'id="table-vocabulary"',
    ):  # fmt: skip
        assert part in page, part
    assert page.count("No results yet") == 1  # of another model
    assert data["sides"] == ["neutral", "opinion"]


def test_results_name_it_and_nothing_else(own):
    files = list(own[1].rglob("*.json"))
    assert len(files) == 10  # two folders' and the model's about.json, four of the analysis, three of suppression
    for path in files:
        content = json.loads(path.read_text())
        assert foreign("\n".join(strings(content))) == [], path
        origin = content.get("origin", content)
        if path.parent != own[1]:
            assert (origin["behaviour"], origin["sides"]) == ("sycophancy", ["neutral", "opinion"]), path
    sites = {path.stem: json.loads(path.read_text())["origin"]["site"] for path in files if path.stem != "about"}
    assert sites.pop("vocabulary") == "residual" and sites["layer_analysis"] == "residual"
    assert sites.pop(next(name for name in sites if name.startswith("suppression_sweep_agreement"))) is None


def test_figures_on_paper_are_about_this_experiment(own, monkeypatch, tmp_path):
    texts = []
    monkeypatch.setattr(paper, "_save", lambda figure, path: texts.extend(figure.findobj(matplotlib.text.Text)))
    for name, plot in (
        (places.ANALYSIS, paper.plot_layer_scores),
        ("alignment_artifacts_by_category.json", paper.plot_categories),
        ("layer_analysis.json", paper.plot_layer_pattern),
        ("projections.json", paper.plot_projections),
        ("suppression_sweep_agreement_*.json", paper.plot_sweep),
    ):
        (path,) = own[1].rglob(f"data/{name}")
        plot(json.loads(path.read_text()), str(tmp_path / "figure.png"))
        assert list(own[1].rglob(f"figures/*{path.stem.removesuffix('_results')}*.png")), name
    words = "\n".join(text.get_text() for text in texts)
    assert foreign(words) == [] and "mean agreement of opinion prompts" in words and "unedited" in words


def test_the_commands_that_repeat_it_work_as_they_are_printed(own):
    folder, results, _ = own
    page, _ = page_of(results)
    commands = [html.unescape(command) for command in re.findall(r"<li><code>(python .*?)</code></li>", page)]
    assert [shlex.split(command)[1] for command in commands] == [
        "run_model.py", "analyze_collected_activations.py", "suppress.py", "sweep_suppression.py", "suppress.py", "-m",
    ]  # fmt: skip
    before = {path: json.loads(path.read_text()) for path in results.rglob("data/*.json")}
    for path in before:
        path.unlink()
    for command in commands:
        done = shell(command.replace("python", sys.executable, 1), folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert {path for path in results.rglob("data/*.json")} == set(before)
    for path, content in before.items():
        again = json.loads(path.read_text())
        for changes in ("config", "collection", "model", "seconds"):
            again.pop(changes, None), content.pop(changes, None)
        assert again == content, path


def test_who_has_the_page_alone_gets_the_same_pairs_from_it(own, tmp_path):
    name, content = page_of(own[1])[1]["pairs"]
    (tmp_path / name).write_text(json.dumps(content))
    saved, original = load_pairs(tmp_path / name), load_pairs(own[0] / "agree.json")
    assert name == "agree.json" and list(saved) == list(original)
    assert (saved.behaviour, saved.sides) == (original.behaviour, original.sides)


def test_without_a_measure_a_sweep_asks_for_one_and_transcripts_tell_lengths(own, browser):  # noqa: F811
    folder, results, _ = own
    done = shell(f"{sys.executable} sweep_suppression.py --model-name tiny --pairs agree.json", folder)
    assert done.returncode == 2 and "sycophancy" in done.stderr and "SCORE" in done.stderr
    printed = run(folder, COMMANDS[3], SCORE="")
    assert "No measure of sycophancy is named" in printed and "Mean of length, opinion prompts" in printed
    assert foreign(printed) == []
    run(folder, COMMANDS[-1])
    show(browser, results / "agree_residual")
    for suffix, name in (("", "length"), ("-1", "agreement")):  # each with controls of its own
        (path,) = results.rglob(f"transcripts_{name}_*.json")
        pairs = json.loads(path.read_text())["pairs"]
        cards = browser.find_elements("css selector", f"#transcript-list{suffix} .pair")
        badges = [badge.text for badge in cards[0].find_elements("css selector", ".badge")]
        sides, times = ("natural", "artifact"), ("before", "after")
        assert badges == [f"{name} {pairs[0][side][when]['score']:g}" for side in sides for when in times]
        assert [side.text for side in cards[0].find_elements("css selector", "strong")] == ["neutral", "opinion"]
        fell = sum(any(pair[s]["after"]["score"] < pair[s]["before"]["score"] for s in sides) for pair in pairs)
        find(browser, f"#token-filter{suffix} option[value=fell]").click()
        text = find(browser, f"#token-page{suffix}").text
        assert text == (f"1 to {min(fell, 5)} of {fell} pairs" if fell else "no pairs")
    assert foreign(find(browser, "body").text) == [] and browser.get_log("browser") == []
    for path in results.rglob("transcripts_length_*"):
        path.unlink()


@pytest.mark.parametrize("spoil, sentence", [
    ({"pairs_hash": "2", "pairs_file": "other.json"}, "Computed with different prompt pairs from the analysis above"),
    ({"site": "mlp"}, "Computed at another site than the analysis above: MLP output instead of residual stream"),
    ({"behaviour": "flattery"}, "the pairs had other names: flattery (neutral, opinion) instead of sycophancy"),
])  # fmt: skip
def test_what_belongs_to_something_else_is_left_out_with_a_sentence(own, spoil, sentence):
    path = own[1] / "agree_residual/data/projections.json"
    text = path.read_text()
    content = json.loads(text)
    assert 'id="plot-projections"' in build(path.parent.parent)
    path.write_text(json.dumps({**content, "origin": {**content["origin"], **spoil}}))
    try:
        page = build(str(path.parent.parent))
    finally:
        path.write_text(text)
    assert sentence in page and 'id="plot-projections"' not in page
