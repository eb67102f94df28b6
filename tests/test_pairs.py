"""The pairs file."""

import json

import pytest

from alignment_artifacts.pairs import load_pairs, prompt_groups
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
