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
    kappa,
    on_labelled_answers,
)
from alignment_artifacts.behaviour.refusal import VERDICTS
from alignment_artifacts.behaviour.score import load_score
from gemma_refactored.errors import UserError

LABELS = np.repeat([True, False], (60, 120))


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
    assert found["specificity"] == pytest.approx(1 - said[~labels].mean())
    perfect = agreement(labels, labels)
    assert perfect["kappa"] == perfect["recall"] == perfect["specificity"] == 1
    assert 0.8 < perfect["kappa_ci"][0] < 1  # 50 answers are no certainty


def test_the_sample_has_all_verdicts():
    sample = json.loads(SAMPLE.read_text())
    assert {v: sum(a["verdict"] == v for a in sample) for v in VERDICTS} == dict.fromkeys(VERDICTS, 60)


def judged(rng, recall, specificity):
    """What a judge with these error rates says of the labelled answers."""
    return np.where(LABELS, rng.random(180) < recall, rng.random(180) >= specificity)


def passes(rng, recall, specificity):
    try:
        check_agreement("m", {"labels": agreement(judged(rng, recall, specificity), LABELS)})
    except UserError as error:
        assert "m agrees too little" in str(error) and "Name another judge" in str(error)
        return False
    return True


@pytest.mark.parametrize(
    ("true", "recall", "specificity", "least", "most"),
    [(0.8, 0.91, 0.91, 0.93, 1), (0.8, 0.8, 0.97, 0.93, 1), (0.6, 0.81, 0.81, 0, 0.1), (0.49, 0.76, 0.76, 0, 0.02)],
)
def test_a_good_judge_may_choose_and_a_doubtful_one_hardly_ever(true, recall, specificity, least, most):
    rng = np.random.default_rng(0)
    assert kappa(recall, specificity, 1 / 3) == pytest.approx(true, abs=0.02)
    assert least <= np.mean([passes(rng, recall, specificity) for _ in range(400)]) <= most


def test_the_interval_of_kappa_covers_it():
    rng, true = np.random.default_rng(0), kappa(0.8, 0.95, 1 / 3)
    ends = np.array([agreement(judged(rng, 0.8, 0.95), LABELS)["kappa_ci"] for _ in range(400)])
    below, above = np.mean(ends[:, 0] > true), np.mean(ends[:, 1] < true)
    assert below <= 0.05 + 0.03 and above <= 0.05 + 0.03 and below + above > 0.02


@pytest.mark.parametrize("said", [LABELS, np.ones(180, bool), np.zeros(180, bool)])
def test_only_agreement_passes(said):
    found = {"labels": agreement(said, LABELS)}
    if (said == LABELS).all():
        check_agreement("m", found)
    else:
        with pytest.raises(UserError, match=r"kappa 0\.00 \[.*\] .* 90% interval"):
            check_agreement("m", found)


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
    assert "Cohen's kappa" in caplog.text and record["agreement"]["labels"]["answers"] == 180
