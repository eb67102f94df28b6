"""Search for settings: many are tried by what they do to the first tokens, the best few by whole answers.

A trial is two passes over prompts with the first tokens of answers that are known, without generating any: how much
the prediction of natural answers changes (KL), and how probable the openings of unwanted answers remain, which is the
refusal score of Arditi et al. (2024, arXiv 2406.11717) for any score and several tokens. Settings are proposed by
Optuna's TPE (Bergstra et al. 2011; multivariate: Falkner et al. 2018). Its journal on disk keeps every trial and
every judgement, so that a search that was killed continues, and ends as it would have.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from alignment_artifacts.behaviour.answers import Behaviour
from alignment_artifacts.behaviour.evaluation import log_probabilities, token_damage
from alignment_artifacts.edits.options import ModeOptions, Setting
from alignment_artifacts.edits.setting import NOTHING, Intervention
from alignment_artifacts.suppression.space import Limits, Space
from gemma_refactored.files import locked
from gemma_refactored.settings import record as recorded

if TYPE_CHECKING:
    from optuna.study import Study

    from alignment_artifacts.suppression.sweep import Bench

OPENING = 8  # tokens of an answer that a trial looks at
# The first words of an answer carry 1.2 to 2 times the KL of its mean, so that this many times the limit is within it.
FIRST_WORDS = 1.5
# Times the limit: a trial beyond this bar ends after its first pass. It is a plain bar because there is only one step
# for a pruner to go by.
HOPELESS = 4
BROKEN_KL = 1e6  # of a model that an edit breaks so far that it predicts no numbers
RANDOM_TRIALS = 20  # with those that every search begins with, before TPE proposes
# Of log KL against log loss, within the limit and beyond it; KL far below the share NO_KL of it is as good as none.
KL_WEIGHT, EXCESS_WEIGHT, NO_KL = 0.1, 2.0, 0.002
WHOLE_ANSWERS = 6  # trials that take as long as judging one setting by whole answers, about: for estimates
FOLDER = "searches"  # of journals, among the measurements of the model


@dataclass
class Openings:
    """Prompts that a setting is to change, with the first tokens of unwanted answers.

    Attributes:
        behaviour: the prompts, and an opening each.
        unwanted: place -> tokens that are more frequent there among unwanted answers than among the others.
        natural: natural prompts with the first tokens of their own answers.
        louder: whether the openings are to become more probable instead.
        offset: added to their log odds: where they differ so much that none is probable even without an edit, what
            counts is how much less probable an edit makes them, and these log odds begin at 0.
    """

    behaviour: Behaviour
    unwanted: list[set[int]]
    natural: Behaviour
    louder: bool
    offset: np.ndarray | float = 0.0

    def kept(self, loaded, intervention: Intervention) -> np.ndarray:
        """[prompts] probability that an answer opens with unwanted tokens, along an opening that is one.

        A place whose token is as usual among the other answers says nothing and counts as certain.
        """
        probabilities = np.zeros(len(self.behaviour.answers))
        for rows, _, edited in log_probabilities(loaded, self.behaviour, intervention):
            lengths = [len(self.behaviour.answers[row]) for row in rows]
            starts = np.cumsum([0, *lengths[:-1]])
            total = np.zeros(len(rows))
            for place, tokens in enumerate(self.unwanted):
                telling = [
                    i for i, row in enumerate(rows)
                    if place < lengths[i] and self.behaviour.answers[row][place] in tokens
                ]  # fmt: skip
                if telling:
                    at = edited[mx.array(starts[telling] + place)][:, mx.array(sorted(tokens))]
                    total[telling] += np.array(mx.logsumexp(at, axis=-1))
            probabilities[list(rows)] = np.exp(np.minimum(total, 0))
        return probabilities

    @property
    def fence(self) -> float:
        """The loss if one prompt is at even odds and the others are as they should be."""
        return float(np.log(2)) / len(self.behaviour.answers)

    def loss(self, kept: np.ndarray) -> float:
        """Mean surprise in nats that answers open otherwise (or, louder, as unwanted)."""
        odds = log_odds(kept) + self.offset
        return float(np.logaddexp(0, -odds if self.louder else odds).mean())


def log_odds(probability: np.ndarray) -> np.ndarray:
    p = np.clip(probability, 1e-300, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def openings(bench: Bench, development: dict[str, Behaviour], louder: bool) -> Openings:
    """What the trials of a search look at; unwanted are refusals, or answers whose score is worse than the mean.

    They are taken from training and development pairs. If no artifact prompt has an unwanted answer, those of all
    artifact prompts are, against the natural ones: the direction points from one to the other.
    """
    measured, rows = bench.measured, [*bench.rows["training"], *bench.rows["development"]]
    scores = np.full((len(rows), 2), np.nan)  # stays where the answer has not come out of a thought
    for place, i in enumerate(rows):
        if None not in measured.texts[i]:
            pair = measured.pairs[i]
            scores[place] = bench.unwanted([pair.natural, pair.artifact], [str(text) for text in measured.texts[i]])
    finite = scores[np.isfinite(scores)]
    is_unwanted = scores > (finite.mean() if finite.size else 0)
    if not is_unwanted[:, 1].any():
        is_unwanted[:] = [False, True]
    cut = [[answer[:OPENING] for answer in measured.answers[i]] for i in rows]
    unwanted, wanted = (
        [both[side] for both, flags in zip(cut, is_unwanted, strict=True) for side in (0, 1) if flags[side] == flag]
        for flag in (True, False)
    )
    of_artifact = {i: both[1] for i, both, flags in zip(rows, cut, is_unwanted, strict=True) if flags[1]}
    usual = itertools.cycle(list(of_artifact.values()))
    side, natural = development["natural" if louder else "artifact"], development["natural"]
    look = Openings(
        Behaviour(side.texts, side.token_ids, [of_artifact.get(i) or next(usual) for i in bench.rows["development"]]),
        [_more_frequent(unwanted, wanted, place) for place in range(OPENING)],
        Behaviour(natural.texts, natural.token_ids, [answer[:OPENING] for answer in natural.answers]),
        louder,
    )
    if not louder and (unedited := look.kept(bench.loaded, NOTHING)).mean() < 0.5:
        look.offset = -log_odds(unedited)
    return look


def _more_frequent(unwanted: list[list[int]], wanted: list[list[int]], place: int) -> set[int]:
    """Tokens with a larger share of the unwanted answers there than of the others."""
    here, others = ([a[place] for a in answers if place < len(a)] for answers in (unwanted, wanted))
    return {t for t in here if here.count(t) * max(len(others), 1) > others.count(t) * len(here)}


def search(
    bench: Bench,
    development: dict[str, Behaviour],
    space: Space,
    limits: Limits,
    louder: bool = False,
    progress: Callable[..., object] = lambda steps, kept=False: None,
) -> tuple[list[dict], list[dict]]:
    """Try settings on development prompts.

    Args:
        louder: have natural prompts answered as artifact prompts are, instead of the opposite.
        progress: called with numbers of steps, `steps` in total, and kept=True for those of an earlier run.
    Returns:
        The settings that were judged, see `judge_setting`, and all trials: "setting", "kl" (nats per token at the
        first tokens), "kept" (mean probability of an unwanted opening) and "loss" (see `Openings`), both None of a
        trial that ended after its first pass.
    """
    look = openings(bench, development, louder)
    usual = usual_settings(bench, space)
    with _study(bench, space, limits, louder) as study:
        done = len(_results(study))
        progress(done, kept=True)
        for number in range(done, space.trials):
            _try(study, bench, space, usual[number] if number < len(usual) else None, number, look, limits)
            progress(1)
        trials = _results(study)
        records = []
        for number in most_promising(trials, look.fence, limits, space.generated, louder):
            name = f"judged {number}"
            if is_new := name not in study.user_attrs:
                setting = Setting.from_record(trials[number]["setting"])
                study.set_user_attr(name, judge_setting(bench, setting, development))
            records.append(study.user_attrs[name])
            progress(WHOLE_ANSWERS, kept=not is_new)
    progress(steps(space) - space.trials - WHOLE_ANSWERS * len(records), kept=True)
    return records, trials


def steps(space: Space) -> int:
    """Of a search, for its bar: as many as trials that take so long."""
    return space.trials + WHOLE_ANSWERS * min(space.generated, space.trials)


def seconds_of_a_trial(bench: Bench, space: Space, development: dict[str, Behaviour]) -> float:
    """Measured now, with a usual setting; the first time is not counted, which has the unedited model in it."""
    look, times = openings(bench, development, False), []
    for _ in range(2):
        start = time.perf_counter()
        intervention = bench.intervention(setting_of(bench, space, usual_settings(bench, space)[0]))
        token_damage(bench.loaded, look.natural, intervention)
        look.kept(bench.loaded, intervention)
        times.append(time.perf_counter() - start)
    return times[-1]


def judge_setting(bench: Bench, setting: Setting, sets: dict[str, Behaviour]) -> dict:
    """A setting judged by whole answers: of every set, and "damage"."""
    return {"setting": setting.record(), **bench.evaluate(bench.intervention(setting), sets)}


def drawback(trial: dict, fence: float, limits: Limits, louder: bool = False) -> float:
    """What TPE minimises: openings first; below the fence, where no whole prompt is undecided, KL alone.

    Within the limit KL weighs little: on real language, where hardly a setting suppresses everything, a search would
    otherwise stay with those that do nothing at no cost. Never does doing nothing win against leaving no prompt
    undecided. Beyond the limit KL weighs more than loss, except for amplification, which has no limit.
    """
    undecided = np.log(np.log(2) / fence)  # log of the number of prompts
    weight, kl = min(KL_WEIGHT, 0.95 * undecided / -np.log(NO_KL)), trial["kl"] / limits.kl
    excess = 0 if louder else np.log(max(kl / FIRST_WORDS, 1))
    return float(np.log(max(trial["loss"], fence) / fence) + weight * np.log(kl + NO_KL) + EXCESS_WEIGHT * excess)


def most_promising(trials: Sequence[dict], fence: float, limits: Limits, count: int, louder: bool = False) -> list[int]:
    """Trials that no other beats in both loss and KL, that of least drawback first; then the rest, those that ended
    early last. A loss of a tenth of the fence is as good as none. Of settings that hardly differ only one."""
    points = [(max(t["loss"], fence / 10), t["kl"]) for t in trials if t["loss"] is not None]

    def rank(number: int) -> tuple:
        trial = trials[number]
        if trial["loss"] is None:
            return (2, trial["kl"])
        loss, kl = max(trial["loss"], fence / 10), trial["kl"]
        is_beaten = any(x <= loss and y <= kl and (x, y) != (loss, kl) for x, y in points)
        return (int(is_beaten), drawback(trial, fence, limits, louder))

    chosen: dict[tuple, int] = {}
    for number in sorted(range(len(trials)), key=rank):
        setting = Setting.from_record(trials[number]["setting"])
        place = (setting.mode, setting.layers, setting.site, setting.positions, setting.where, setting.direction_layer)
        chosen.setdefault((*place, round(setting.scale, 1)), number)
    return list(chosen.values())[:count]


def _try(
    study: Study, bench: Bench, space: Space, usual: dict | None, number: int, look: Openings, limits: Limits
) -> None:
    """One trial, of parameters that are usual or (None) proposed by TPE.

    Random numbers are those of the trial's number, whatever has been interrupted before.
    """
    import optuna

    ranges, trial, parameters = _ranges(bench, space), None, usual
    if parameters is None:
        seed = int(np.random.SeedSequence([bench.seed, number]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, multivariate=True, seed=seed)
        trial = study.ask(ranges)
        parameters = trial.params
    setting = setting_of(bench, space, parameters)
    intervention = bench.intervention(setting)
    kl = token_damage(bench.loaded, look.natural, intervention)["kl_mean"]
    kl = kl if np.isfinite(kl) else BROKEN_KL
    result: dict[str, Any] = {"setting": setting.record(), "kl": kl, "kept": None, "loss": None}
    state, value = optuna.trial.TrialState.PRUNED, None  # TPE ranks these behind all others, by the KL reported
    if kl <= (BROKEN_KL / 2 if look.louder else HOPELESS * limits.kl):
        kept = look.kept(bench.loaded, intervention)
        result |= {"kept": float(kept.mean()), "loss": look.loss(kept)}
        state, value = optuna.trial.TrialState.COMPLETE, drawback(result, look.fence, limits, look.louder)
    if trial is None:
        study.add_trial(
            optuna.trial.create_trial(
                params=parameters, distributions=ranges, state=state, value=value, user_attrs={"result": result},
                intermediate_values={0: kl},
            )
        )  # fmt: skip
    else:
        trial.set_user_attr("result", result)
        trial.report(kl, 0)
        study.tell(trial, value, state)


def _results(study: Study) -> list[dict]:
    """Of the trials in their order, without those that were interrupted."""
    return [trial.user_attrs["result"] for trial in study.trials if trial.state.is_finished()]


def setting_of(bench: Bench, space: Space, parameters: dict) -> Setting:
    """What the numbers of a trial stand for: see `_ranges`."""
    mode, site, positions = (parameters[name] for name in ("mode", "site", "positions"))
    low, high = min(space.scales[mode]), max(space.scales[mode])
    width = parameters["width"]
    bands = bench.loaded.num_layers + 1 - width  # of this width, each as likely
    first = min(int(parameters["place"] * bands), bands - 1)
    layers = tuple(range(first, first + width))
    options = ModeOptions()
    if mode == "cap":
        options = ModeOptions(cap_quantile=round(1 - parameters["cap_tail"], 3))
    elif mode == "subspace":
        options = ModeOptions(pca_components=parameters["pca_components"])
    shared = None
    if parameters["share_direction"] and mode != "cap" and width > 1:
        shared = max(layers, key=lambda layer: bench.separation(site, positions)[layer])
    scale = round(low + parameters["strength"] * (high - low), 3)
    return Setting(mode, scale, layers, site, positions, options, parameters["where"], shared, bench.edit_sinks)


def _ranges(bench: Bench, space: Space) -> dict:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    return {
        "mode": CategoricalDistribution(list(space.scales)),
        "site": CategoricalDistribution(bench.measured.sites),
        "positions": CategoricalDistribution(space.positions),
        "where": CategoricalDistribution(space.where),
        "share_direction": CategoricalDistribution((False, True) if space.share_direction else (False,)),
        "strength": FloatDistribution(0, 1),
        "place": FloatDistribution(0, 1),
        "width": IntDistribution(*_widths(bench, space)),
        "cap_tail": FloatDistribution(*_tails(space), log=True),
        "pca_components": IntDistribution(min(space.pca_components), max(space.pca_components)),
    }


def _tails(space: Space) -> tuple[float, float]:
    """Shares of natural tokens above the quantiles of `cap`, of which the order of magnitude matters."""
    return max(1 - max(space.cap_quantiles), 1e-3), max(1 - min(space.cap_quantiles), 1e-3)


def _widths(bench: Bench, space: Space) -> tuple[int, int]:
    layers = bench.loaded.num_layers
    return min(*space.widths, layers), min(max(space.widths), layers)


def usual_settings(bench: Bench, space: Space) -> list[dict]:
    """Where a search begins: every mode at every site, at strength 1 on the layers that separate best."""
    settings = []
    layers = {
        s: bench.measured.best_layers(s, space.positions[0], bench.rows["training"]) for s in bench.measured.sites
    }
    for (site, best), mode in itertools.product(layers.items(), space.scales):
        low, high = min(space.scales[mode]), max(space.scales[mode])
        width = int(np.clip(best[-1] + 1 - best[0], *_widths(bench, space)))
        settings.append(
            {
                "mode": mode, "site": site, "positions": space.positions[0], "where": space.where[0],
                "share_direction": False, "width": width,
                "strength": (float(np.clip(1, low, high)) - low) / (high - low) if high > low else 0.0,
                "place": float(np.clip((best[0] + 0.5) / (bench.loaded.num_layers + 1 - width), 0, 1)),
                "cap_tail": float(np.clip(0.1, *_tails(space))),
                "pca_components": int(np.clip(2, min(space.pca_components), max(space.pca_components))),
            }
        )  # fmt: skip
    return settings[: space.trials]


@contextmanager
def _study(bench: Bench, space: Space, limits: Limits, louder: bool) -> Iterator[Study]:
    """The study of this search, new or as far as it has come; its name is a hash of all that decides the numbers."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    measured = bench.measured
    decisive = [
        {name: value for name, value in measured.facts.items() if name not in ("model", "pairs")},
        [[measured.prompts[i], measured.answers[i]] for part in ("training", "development") for i in bench.rows[part]],
        len(bench.rows["training"]), measured.sites, recorded(space), recorded(limits), bench.seed, bench.max_tokens,
        bench.score and bench.score.record()["source_hash"], bench.wish, louder, bench.edit_sinks,
        [OPENING, HOPELESS, FIRST_WORDS, RANDOM_TRIALS, KL_WEIGHT, EXCESS_WEIGHT, NO_KL, inspect.getsource(drawback)],
        inspect.getsource(setting_of),
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:12]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = measured.folder / FOLDER
    with locked(folder, wait=True), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / f"{name}.log")))
        yield optuna.create_study(study_name=name, storage=storage, load_if_exists=True)
