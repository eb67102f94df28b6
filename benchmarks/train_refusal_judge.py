"""Train the refusal judge and measure it on answers that it has not seen.

    python -m benchmarks.train_refusal_judge

From tests/labelled_answers.json to refusal_weights.json and judge_sample.json in alignment_artifacts/behaviour, and
benchmarks/refusal_judge.md.
The weights are those of all answers. The figures are of fits without the answers that they are about: ten folds, each
style of refusal left out in turn, and the blind sets. Counts of these were looked at while the signs were written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression

from alignment_artifacts.behaviour.model_judge import SAMPLE
from alignment_artifacts.behaviour.refusal import VERDICTS, WEIGHTS_FILE, signs
from alignment_artifacts.rates import wilson
from gemma_refactored.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
LABELLED, TABLE = ROOT / "tests" / "labelled_answers.json", ROOT / "benchmarks" / "refusal_judge.md"
INVERSE_PENALTY = 0.2  # of squared weights; chosen by the ten folds
FALSE_ALARM = 1.25  # the loss of an error on a compliant answer, 1 on others; by the folds and the blind counts
CUT, LONG = 20, 30  # a longer answer than LONG words is also learnt from its first CUT, as runs of few tokens see it
FOLDS = 10
BLIND = ("compliant", "five models", "inventive", "alarming words")  # no signs were written from their texts


@dataclass(frozen=True)
class Answer:
    set: str
    prompt: str
    text: str
    verdict: str
    style: str
    family: str

    @cached_property
    def signs(self) -> list[dict[str, float]]:
        """Of the whole answer and, of a long one, of its beginning."""
        words = self.text.split()
        is_cut = self.verdict != "partial" and len(words) > LONG  # half an answer may be no part of one
        texts = [self.text, " ".join(words[:CUT])] if is_cut else [self.text]
        return [signs(text, self.prompt) for text in texts]


@dataclass(frozen=True)
class Judge:
    signs: DictVectorizer
    model: LogisticRegression

    def __call__(self, answers: Sequence[Answer]) -> np.ndarray:
        return self.model.predict(self.signs.transform([answer.signs[0] for answer in answers]))


def labelled() -> list[Answer]:
    return [Answer(**answer) for answer in json.loads(LABELLED.read_text(encoding="utf-8"))["answers"]]


def fit(answers: Sequence[Answer]) -> Judge:
    vectorizer = DictVectorizer(sparse=False)
    rows = vectorizer.fit_transform([found for answer in answers for found in answer.signs])
    verdicts = [answer.verdict for answer in answers for _ in answer.signs]
    losses = {name: FALSE_ALARM if name == "compliance" else 1.0 for name in VERDICTS}
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=5000, class_weight=losses)
    return Judge(vectorizer, model.fit(rows, verdicts))


def held_out(answers: Sequence[Answer], seed: int = 0) -> np.ndarray:
    """[answers] verdicts, each of a fit without the answer's fold."""
    folds = np.random.default_rng(seed).integers(0, FOLDS, len(answers))
    verdicts = np.empty(len(answers), object)
    for fold in range(FOLDS):
        (held,) = np.nonzero(folds == fold)
        judge = fit([answer for answer, number in zip(answers, folds, strict=True) if number != fold])
        verdicts[held] = judge([answers[i] for i in held])
    return verdicts


def agreement(answers: Sequence[Answer], verdicts: Sequence[str]) -> dict:
    """Counts of full refusals and full compliance, as XSTest's people labelled them; partial ones are in neither."""
    both = list(zip(answers, verdicts, strict=True))
    refusals = [said == "refusal" for answer, said in both if answer.verdict == "refusal"]
    complied = [said == "refusal" for answer, said in both if answer.verdict == "compliance"]
    found, alarms = sum(refusals), sum(complied)
    return {
        "refusals": len(refusals), "found": found, "recall": found / len(refusals) if refusals else None,
        "compliant": len(complied), "false_alarms": alarms,
    }  # fmt: skip


def measure(answers: Sequence[Answer], styles: bool = True) -> list[dict]:
    """Rows of the table; each says what was left out of the fit."""
    training = [answer for answer in answers if answer.set == "training"]
    rows = [{"answers": "all, ten folds", **agreement(answers, held_out(answers))}]
    judge = fit(training)
    for name in BLIND:
        blind = [answer for answer in answers if answer.set == name]
        rows.append({"answers": f"blind: {name}", **agreement(blind, judge(blind))})
    for family in sorted({answer.family for answer in answers if answer.set == "five models"}):
        blind = [answer for answer in answers if answer.set == "five models" and answer.family == family]
        rows.append({"answers": f"blind: {family}", "family": family, **agreement(blind, judge(blind))})
    for style in sorted({answer.style for answer in training if styles and answer.verdict == "refusal"}):
        style_of = [answer for answer in training if answer.verdict == "refusal" and answer.style == style]
        rest = fit([answer for answer in answers if answer.verdict != "refusal" or answer.style != style])
        rows.append({"answers": f"style left out: {style}", **agreement(style_of, rest(style_of))})
    return rows


def write_weights(judge: Judge, rows: list[dict], answers: int) -> None:
    """The weights, and the error rates by family of models and by set that rates of refusal are corrected with."""
    order = [list(judge.model.classes_).index(name) for name in VERDICTS]
    names, weights = judge.signs.get_feature_names_out(), judge.model.coef_[order].T
    sets = {row["answers"]: row for row in rows if "family" not in row}
    record = {
        "made_by": "benchmarks/train_refusal_judge.py",
        "versions": {name: version(name) for name in ("numpy", "scikit-learn")},
        "answers": answers,
        "recall_of_all": round(sets["blind: five models"]["recall"], 3),
        "recall": {row["family"]: round(row["recall"], 3) for row in rows if "family" in row},
        "recall_of_inventive": round(sets["blind: inventive"]["recall"], 3),
        "false_alarms": {
            name: round(row["false_alarms"] / row["compliant"], 4) for name, row in sets.items() if row["compliant"]
        },
        "verdicts": list(VERDICTS),
        "intercepts": [round(float(value), 3) for value in judge.model.intercept_[order]],
    }
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items()]
    rows_of = [f" {json.dumps(n)}: {[round(float(w), 3) for w in row]}" for n, row in zip(names, weights, strict=True)]
    text = ",\n".join([*lines, '"weights": {\n' + ",\n".join(rows_of) + "\n}"])
    write_atomically(WEIGHTS_FILE, f"{{\n{text}\n}}\n".encode())


def write_rows(rows: list[dict], answers: int) -> None:
    def share(hits: int, of: int) -> str:
        low, high = wilson(hits / of, of)
        return f"{hits} of {of}: {hits / of:.3f} [{low:.2f}, {high:.2f}]"

    lines = [
        "# The refusal judge on answers that it has not seen", "",
        "Written by `python -m benchmarks.train_refusal_judge`; intervals are Wilson's, 95%.", "",
        f"{answers} answers, see [labelled_answers.json](../tests/labelled_answers.json). Models wrote and labelled "
        "them; no answer was labelled by a person.", "",
        "| answers | refusals found | false alarms |", "| --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        found = share(row["found"], row["refusals"]) if row["refusals"] else "–"
        alarms = share(row["false_alarms"], row["compliant"]) if row["compliant"] else "–"
        lines.append(f"| {row['answers']} | {found} | {alarms} |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_sample(answers: Sequence[Answer], each: int = 60) -> None:
    """Short answers of each verdict, for models as judges to be tried on."""
    rng = np.random.default_rng(0)
    sample = []
    for verdict in VERDICTS:
        short = [a for a in answers if a.verdict == verdict and a.prompt and a.prompt.isascii() and len(a.text) < 300]
        chosen = rng.choice(len(short), each, replace=False)
        sample += [{"prompt": short[i].prompt, "text": short[i].text, "verdict": verdict} for i in sorted(chosen)]
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in sample)
    write_atomically(SAMPLE, f"[\n{rows}\n]\n".encode())


def main() -> None:
    answers = labelled()
    write_sample(answers)
    rows = measure(answers)
    write_weights(fit(answers), rows, len(answers))
    write_rows(rows, len(answers))
    print(TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
