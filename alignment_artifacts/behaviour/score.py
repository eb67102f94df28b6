"""What is measured of an answer: refusal, words of a list, or any function `(prompt, answer) -> number` of your own.

    def agreement(prompt: str, answer: str) -> float:
        '''Words of agreement.'''
        return len(re.findall(r"\\b(yes|right|agree)\\b", answer.lower()))

is `--score my_scores.py:agreement`. A function that returns True and False is counted as a rate."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Literal, get_args

import numpy as np

from alignment_artifacts import pairs
from alignment_artifacts.behaviour.refusal import is_refusal
from alignment_artifacts.places import find, find_model, hashed_name, recorded
from alignment_artifacts.rates import mean
from gemma_refactored.errors import UserError, shown

Wish = Literal["lower", "higher"]
WORDS, JUDGE = "words:", "judge:"
FORMS = (
    "refusal, length, words:A,B (how often these words occur), judge:MODEL (a model is asked whether it is a refusal), "
    "or FILE.py:FUNCTION (prompt, answer) -> number"
)
# What code of others may raise; Ctrl-C and lack of memory are not about a score.
ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Score:
    """A measure of answers.

    Attributes:
        function: (prompt, answer) -> a finite number, or True or False; the same for the same texts, and therefore
            called once for each.
        meaning: what values mean, in a few words.
        source: tells it from others of that name: its text, say.
        typed: what names it on the command line; None: nothing does.
        agreement: of a model as judge, see `model_judge.on_labelled_answers`; None for others.
    """

    name: str
    function: Callable[[str, str], float]
    meaning: str
    source: str = field(repr=False)
    typed: str | None = None
    agreement: dict | None = field(default=None, repr=False)
    _values: dict[tuple[str, str], float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """[prompts] the score of each answer, bool if all are True or False, else float64.

        Raises:
            UserError: the function fails, or returns something else than a finite number.
        """
        for prompt, answer in zip(prompts, answers, strict=True):
            if (prompt, answer) not in self._values:
                self._values[prompt, answer] = self._value(prompt, answer)
        values = [self._values[both] for both in zip(prompts, answers, strict=True)]
        return np.array(values, bool if values and all(isinstance(value, bool) for value in values) else float)

    def each(self, prompts: Sequence[str], answers: Sequence[str | None]) -> list[float | bool | None]:
        """The score of each answer, in its own type; None of one that has not come out of the model's thought."""
        both = zip(prompts, answers, strict=True)
        return [None if answer is None else self.of([prompt], [answer])[0].item() for prompt, answer in both]

    def _value(self, prompt: str, answer: str) -> float:
        try:
            value = self.function(prompt, answer)
        except ERRORS as error:
            raise UserError(
                f"The score {self.name} fails on the prompt {shown(prompt)} with the answer {shown(answer)}: "
                f"{_where(error)}."
            ) from None
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        if not isinstance(value, Real) or not np.isfinite(value):
            raise UserError(
                f"The score {self.name} of the prompt {shown(prompt)} is {shown(value)}; it must be a finite "
                "number, True or False."
            )
        return float(value)

    def record(self) -> dict:
        """Name, meaning, what was typed, a hash of the source, and how well a judge agrees, for result files."""
        agreement = {"agreement": self.agreement} if self.agreement else {}
        return {
            **agreement,
            "name": self.name,
            "meaning": self.meaning,
            "typed": self.typed,
            "source_hash": hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest(),
        }

    def file_name(self, stem: str, wish: Wish | None = None) -> str:
        """Of results with this score, which no other score and wish have: "sweep_agreement_1a2b3c4d_lower"."""
        return "_".join(filter(None, (stem, hashed_name(self.name, self.source), wish)))

    def compared(
        self, prompts: Sequence[str], before: Sequence[str], after: Sequence[str], *clusters: Sequence[int]
    ) -> dict:
        """ "score": the mean after an edit, and "moved": by how much it changed per prompt; each with its interval.

        Args:
            clusters: of the prompts, see `rates.design_effect`.
        """
        unedited, edited = self.of(prompts, before), self.of(prompts, after)
        moved = edited.astype(float) - unedited.astype(float)
        return {"score": mean(edited, *clusters), "moved": mean(moved, *clusters)}


def _refused(prompt: str, answer: str) -> bool:
    return is_refusal(answer, prompt)


def _length(prompt: str, answer: str) -> int:
    return len(answer.split())


REFUSAL = Score("refusal", _refused, "True: the answer declines to do what was asked", "alignment_artifacts", "refusal")
LENGTH = Score("length", _length, "words of the answer", "alignment_artifacts", "length")


def usual_score(behaviour: str) -> Score:
    """Where none is named: refusal for pairs that are about it. No other behaviour has a measure until one is named;
    the length of an answer is at least a property of any."""
    return REFUSAL if behaviour == pairs.REFUSAL else LENGTH


def word_list(words: Sequence[str]) -> Score:
    """How often words or phrases occur in an answer, whatever their case."""
    kept = list(dict.fromkeys(word.strip().lower() for word in words if word.strip()))
    if not kept:
        raise UserError(f"The list of words is empty; write {WORDS}A,B.")
    longest_first = "|".join(re.escape(word) for word in sorted(kept, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{longest_first})(?!\w)")

    def count(prompt: str, answer: str) -> int:
        return len(pattern.findall(answer.lower().replace("’", "'")))

    meaning = f"how often the answer says {shown(', '.join(kept))}"
    return Score("words", count, meaning, "\n".join(sorted(kept)), WORDS + ",".join(kept))


def load_score(score: str | Score | Callable[[str, str], float]) -> Score:
    """A score by its name on the command line, or one made of a Python function.

    Raises:
        UserError: there is no such file or function, it cannot be run, or it does not take a prompt and an answer.
    """
    if isinstance(score, Score):
        return score
    if not isinstance(score, str):
        return _of_function(score, None, None)
    for named in (REFUSAL, LENGTH):
        if score.strip() == named.name:
            return named
    if score.startswith(WORDS):
        return word_list(score.removeprefix(WORDS).split(","))
    if score.startswith(JUDGE):
        return _of_model(score)
    file, colon, name = score.rpartition(":")
    if score.endswith(".py"):
        file, name = score, ""
    elif not colon or not file.endswith(".py"):
        raise UserError(f"There is no score {shown(score)}; a score is {FORMS}.")
    path = find(file)
    module, text = _load_module(path)
    functions = [
        n for n, value in vars(module).items() if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    if not name or not callable(getattr(module, name, None)):
        what = f"has no function {shown(name)}" if name else "needs the name of a function behind it, FILE.py:FUNCTION"
        raise UserError(f"{path} {what}; it defines {', '.join(functions) or 'none'}.")
    return _of_function(getattr(module, name), text, f"{recorded(path)}:{name}")


def own_measure(score: str | Score | Callable[[str, str], float] | None, wish: Wish) -> Score | None:
    """The score of an experiment of your own; None for the built-in one, fewer refusals, which is told in rates."""
    chosen = REFUSAL if score is None else load_score(score)
    if wish not in get_args(Wish):
        raise UserError(f"wish must be one of {', '.join(get_args(Wish))}, not {shown(wish)}.")
    return None if chosen == REFUSAL and wish == "lower" else chosen


def _of_model(typed: str) -> Score:
    """A model that is asked whether an answer is a refusal; loaded now, and tried on labelled answers."""
    from alignment_artifacts.behaviour.model_judge import QUESTION, ModelJudge, on_labelled_answers
    from gemma_refactored.model_loading import load

    judge = ModelJudge(load(find_model(typed.removeprefix(JUDGE))))
    loaded, meaning = judge.loaded, "True: the model takes the answer for a refusal"
    source = json.dumps([loaded.identity(), QUESTION])
    return Score(f"judge {loaded.name}", judge, meaning, source, typed, on_labelled_answers(judge))


def _of_function(function: Callable[[str, str], float], text: str | None, typed: str | None) -> Score:
    name = getattr(function, "__name__", type(function).__name__)
    if not callable(function):
        raise UserError(f"A score is {FORMS}, not {shown(function)}.")
    try:
        inspect.signature(function).bind("prompt", "answer")
    except TypeError:
        raise UserError(f"The score {name} must take two arguments, the prompt and the answer.") from None
    except ValueError:
        pass  # no signature: some functions of C
    if text is None:
        try:
            text = inspect.getsource(function)
        except (OSError, TypeError):
            text = repr(function)  # typed in an interpreter, or an object: itself alone
    meaning = (inspect.getdoc(function) or "").strip().split("\n")[0]
    return Score(name, function, meaning, f"{name}\n{text}", typed)


def _load_module(path: Path) -> tuple[ModuleType, str]:
    """A file of Python, run, and its text; modules beside it can be imported by it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"The score's file {path} cannot be read: {error}.") from None
    spec = importlib.util.spec_from_file_location(f"score_{path.stem}", path)
    assert spec and spec.loader  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except ERRORS as error:
        raise UserError(f"The score's file {path} cannot be run: {_where(error)}.") from None
    return module, text


def _where(error: BaseException) -> str:
    """ "NameError: name 'x' is not defined (line 3)"."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    if line is None:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
        line = frames[-1].lineno if frames else None
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {shown(text)}" + (f" (line {line})" if line else "")
