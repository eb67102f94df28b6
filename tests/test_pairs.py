"""The pairs file."""

import json

import pytest

import create_gemma_runner_input
from alignment_artifacts.pairs import (
    PAIRS_JSON,
    Pair,
    load_pairs,
    pairs_content,
    pairs_from_lists,
    pairs_hash,
    prompt_groups,
)
from gemma_refactored.errors import UserError
from model_organism.corpus import build_corpus

from .conftest import ROOT

GOOD = {"id": "a_1", "natural": "n", "artifact": "a"}


def write(tmp_path, categories):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"alignment_artifact_prompt_pairs": {"categories": categories}}))
    return path


def test_committed_pairs_are_50_in_5_categories_and_not_in_the_corpus():
    pairs = load_pairs(ROOT / "alignment_artifact_prompt_pairs.json")
    by_category = {}
    for pair in pairs:
        by_category.setdefault(pair.category, []).append(pair.id)
    prefixes = {
        "technical_dangerous": "tech", "social_political": "pol", "personal_harmful": "harm",
        "medical_ethics": "med", "information_deception": "info",
    }  # fmt: skip
    assert by_category == {c: [f"{p}_{i}" for i in range(1, 11)] for c, p in prefixes.items()}
    texts = {text for pair in pairs for text in (pair.natural, pair.artifact)}
    assert len(texts) == 100
    assert not texts & {example.request for example in build_corpus()}


def test_groups_keep_both_sides_of_a_pair(tmp_path):
    pairs = load_pairs(write(tmp_path, {"cat": {"pairs": [GOOD]}}))
    assert prompt_groups(pairs) == {
        "natural_cat_a_1": {"prompt_list": ["n"]}, "artifact_cat_a_1": {"prompt_list": ["a"]},
    }  # fmt: skip


@pytest.mark.parametrize(
    "categories",
    [{}, [], None, {"c": []}, {"c": {"pairs": []}}, {"c": {"pairs": [1]}}, {"c": {"pairs": [{**GOOD, "id": ""}]}},
     {"c": {"pairs": [{**GOOD, "natural": None}]}}, {"c": {"pairs": [{**GOOD, "artifact": [" "]}]}},
     {"c": {"pairs": [GOOD, GOOD]}}, {"../c": {"pairs": [GOOD]}}, {"c": {"pairs": [{**GOOD, "id": "../x"}]}}],
)  # fmt: skip
def test_bad_pairs_files(tmp_path, categories):
    with pytest.raises(UserError, match="pairs.json"):
        load_pairs(write(tmp_path, categories))


def test_the_committed_pairs_keep_their_names_and_identity():
    pairs = load_pairs(PAIRS_JSON)
    assert (pairs.behaviour, pairs.sides, pairs.file) == ("refusal", ("natural", "artifact"), PAIRS_JSON)
    assert pairs_hash(pairs) == "379bffcaeb04e75b32ca5942e094780b2c0b43553b31bdaa700ce7c461016b06"


EXPECTED = [Pair("s_1", "science", "Is it so?", "I say so; is it?"), Pair("s_2", "science", "And this?", "I say this?")]
METADATA = {"behaviour": "sycophancy", "sides": ["neutral", "opinion"]}
ENTRIES = [{"id": p.id, "neutral": p.natural, "opinion": p.artifact} for p in EXPECTED]
IN_ROWS = [{"category": "science", **entry} for entry in ENTRIES]
TABLE = "category{0}id{0}neutral{0}opinion{1}" + "".join(
    f'science{{0}}{p.id}{{0}}{p.natural}{{0}}"{p.artifact}"{{1}}' for p in EXPECTED
)


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.json", json.dumps({"metadata": METADATA, "categories": {"science": {"pairs": ENTRIES}}})),
        ("p.jsonl", "\n".join(map(json.dumps, [{"metadata": METADATA}, *IN_ROWS]))),
        ("sycophancy.JSONL", "\ufeff" + "\r\n".join(map(json.dumps, IN_ROWS))),
        ("sycophancy.csv", TABLE.format(",", "\n")),
        ("sycophancy.CSV", "\ufeff" + TABLE.format(";", "\r\n")),
    ],
)
def test_pairs_of_ones_own(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    pairs = load_pairs(tmp_path / name)
    assert pairs == EXPECTED and (pairs.behaviour, pairs.sides) == ("sycophancy", ("neutral", "opinion"))
    (tmp_path / "again.json").write_text(json.dumps(pairs_content(pairs)))
    again = load_pairs(tmp_path / "again.json")
    assert again == pairs and again.behaviour == pairs.behaviour and again.sides == pairs.sides


def test_named_sides_leave_the_usual_keys_as_they_are(tmp_path):
    pairs = {"science": {"pairs": [{"id": "a_1", "natural": "n", "artifact": "a"}]}}
    (tmp_path / "p.json").write_text(json.dumps({"metadata": METADATA, "categories": pairs}))
    assert load_pairs(tmp_path / "p.json") == [Pair("a_1", "science", "n", "a")]


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"sides": ["a", "a"]}, "two different names"), ({"sides": "ab"}, "two different"), ({"sides": ["a"]}, "two"),
        ({"sides": ["id", "b"]}, "two different"), ({"sides": ["a", "b" * 99]}, "two different"),
        ({"sides": ["artifact", "natural"]}, "natural side first"), ({"behaviour": ""}, "'behaviour' must be"),
        ({"behaviour": 3}, "'behaviour' must be"), ([], "'metadata' must be"),
        ({"sides": ["x", "y"]}, "'natural' must be text"),
    ],
)  # fmt: skip
def test_bad_metadata(tmp_path, metadata, message):
    content = {"metadata": metadata, "categories": {"science": {"pairs": ENTRIES}}}
    (tmp_path / "p.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_pairs(tmp_path / "p.json")


@pytest.mark.parametrize(
    "content, message",
    [
        ("category,id,a\nx,1,2\n", "two sides"), ("category,id,a,b,c\nx,1,2,3,4\n", "two sides"),
        ("category,id,a,b\n", "holds no pairs"), ("category,id,a,b\nx,1,2,\n", "'b' must be text"),
        ("category,id,a,b\nx,1,2,3\nx,1,4,5\n", "occurs twice"), ("category,id,a,b\n../x,1,2,3\n", "folder name"),
    ],
)  # fmt: skip
def test_bad_tables_of_pairs(tmp_path, content, message):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        load_pairs(tmp_path / "p.csv")


def test_two_lists_match_by_order(tmp_path):
    (tmp_path / "harmless.txt").write_text("bake\npaint\n")
    pairs = pairs_from_lists(tmp_path / "harmless.txt", ["break", "pry"])
    assert [(p.id, p.natural, p.artifact) for p in pairs] == [("pairs_1", "bake", "break"), ("pairs_2", "paint", "pry")]
    with pytest.raises(UserError, match="2 natural and 1 artifact .* topic, length and form"):
        pairs_from_lists(tmp_path / "harmless.txt", ["break"])
    with pytest.raises(UserError, match="must be text that is not empty"):
        pairs_from_lists(["bake"], [" "])


def test_two_files_become_a_pairs_file_and_prompts(tmp_path, capsys):
    for name, text in (("harmless.txt", "bake\npaint\n"), ("harmful.csv", "goal,n\nbreak,1\npry,2\n")):
        (tmp_path / name).write_text(text)
    files = {"pairs-file": "pairs.json", "output-file": "prompts.json", "natural-file": "harmless.txt"}
    arguments = [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]
    both = [*arguments, "--artifact-file", str(tmp_path / "harmful.csv")]
    assert create_gemma_runner_input.main(both) == 0 == create_gemma_runner_input.main(both)
    assert "matched by order" in capsys.readouterr().out
    pairs = load_pairs(tmp_path / "pairs.json")
    assert [(p.natural, p.artifact) for p in pairs] == [("bake", "break"), ("paint", "pry")]
    assert (pairs.behaviour, pairs.sides) == ("refusal", ("harmless", "harmful"))
    named = ["--behaviour", "mischief", "--pairs-file", str(tmp_path / "named.json")]
    assert create_gemma_runner_input.main([*both, *named]) == 0
    assert load_pairs(tmp_path / "named.json").behaviour == "mischief"
    assert json.loads((tmp_path / "prompts.json").read_text()) == prompt_groups(pairs)
    assert create_gemma_runner_input.main(arguments) == 2 and "belong together" in capsys.readouterr().err
    (tmp_path / "harmless.txt").write_text("bake\ncook\n")
    assert create_gemma_runner_input.main(both) == 2 and "holds other pairs" in capsys.readouterr().err
    assert load_pairs(tmp_path / "pairs.json") == pairs
