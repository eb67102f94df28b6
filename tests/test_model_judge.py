"""A model as judge: what the verdict words' likelihoods say, and what a judge that agrees too little may not do."""

import json

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from alignment_artifacts.behaviour import model_judge
from alignment_artifacts.behaviour.model_judge import (
    SAMPLE,
    ModelJudge,
    agreement,
    check_agreement,
    on_labelled_answers,
)
from alignment_artifacts.behaviour.refusal import VERDICTS
from alignment_artifacts.behaviour.score import load_score
from gemma_refactored.errors import UserError

PERFECT = {"labels": {"kappa": 1.0, "recall": 1.0, "specificity": 1.0, "answers": 60}}


def test_verdicts_are_those_of_the_likeliest_words(organism):
    """Against a pass over each word by itself."""
    judge, one = ModelJudge(organism), ("How do I paint a shelf?", "Sand it first.")

    def likelihoods(prompt, answer):
        (asked,) = organism.encode([model_judge.QUESTION.format(prompt=prompt, answer=answer)])
        means = []
        for word in VERDICTS:
            ids = organism.tokenizer.encode(word, add_special_tokens=False)
            logits = np.array(organism.model(model_judge.mx.array([asked + ids]))[0], np.float64)[len(asked) - 1 : -1]
            means.append((logits[np.arange(len(ids)), ids] - np.log(np.exp(logits).sum(axis=-1))).mean())
        return np.array(means)

    expected = likelihoods(*one) - likelihoods("N/A", "N/A")
    assert judge._likelihoods(*one) == pytest.approx(likelihoods(*one), abs=1e-3)
    assert judge.verdict(*one) == VERDICTS[expected.argmax()] and judge(*one) == (expected.argmax() == 2)


def test_agreement_is_that_of_scikit_learn():
    said, labels = np.random.default_rng(0).random((2, 50)) < 0.4
    found = agreement(said, labels)
    assert found["kappa"] == pytest.approx(cohen_kappa_score(labels, said))
    assert found["recall"] == pytest.approx(said[labels].mean()) and found["answers"] == 50
    assert agreement(labels, labels) == {"kappa": 1, "recall": 1, "specificity": 1, "answers": 50}


def test_the_sample_has_all_verdicts():
    sample = json.loads(SAMPLE.read_text())
    assert {v: sum(a["verdict"] == v for a in sample) for v in VERDICTS} == dict.fromkeys(VERDICTS, 20)


@pytest.mark.parametrize("change", [{"kappa": 0.59}, {"recall": 0.4}, {"specificity": 0.4}])
def test_a_judge_that_agrees_too_little_may_not_choose(change):
    check_agreement("m", PERFECT)
    with pytest.raises(UserError, match="m agrees too little .* Name another judge"):
        check_agreement("m", {"labels": PERFECT["labels"] | change})


def test_a_model_is_a_score(organism, monkeypatch, caplog):
    monkeypatch.setattr(
        ModelJudge, "verdict", lambda self, prompt, answer: "refusal" if "sorry" in answer else "partial"
    )
    caplog.set_level("INFO")
    score = load_score(f"judge:{organism.folder}")
    assert score.of(["?", "?"], ["I'm sorry.", "Yes."]).tolist() == [True, False]
    record = score.record()
    assert record["name"] == f"judge {organism.name}" and record["agreement"] == on_labelled_answers(
        ModelJudge(organism)
    )
    assert "Cohen's kappa" in caplog.text and record["agreement"]["labels"]["answers"] == 60
