"""Toxicity reduction by contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681).

A steering vector is the mean residual stream of benign continuations minus that of toxic ones.
Sign convention, everywhere: the vector times alpha is *added*, so a positive alpha moves away
from toxicity, a negative one towards it, and 0 changes nothing. As a script it is the same as main.py.

Settings are judged, chosen, tested and reported as `sweep_suppression.py` does it: toxic continuations and challenging
prompts are the artifact side, benign ones the natural side, and alpha is the scale of the mode "always", which
subtracts toxic minus benign. Vectors come from training prompts, layer and alpha from development prompts, results from
test prompts, and who or what a prompt is about is in one of these parts only. Every layer is tried with every alpha, by
whole continuations: the search by first tokens, with 48 trials on the embedded model, settled on a worse one.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a file: the repository is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import json
import traceback
from dataclasses import asdict, replace
from typing import Final

import numpy as np

from alignment_artifacts.behaviour.answers import Behaviour, write_answers
from alignment_artifacts.behaviour.evaluation import Outcome, outcome_of
from alignment_artifacts.behaviour.score import Score
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.directions.estimate import Directions
from alignment_artifacts.directions.files import save_directions
from alignment_artifacts.directions.measurements import Measurements
from alignment_artifacts.edits.options import ELSEWHERE, Setting
from alignment_artifacts.edits.setting import NOTHING, Intervention
from alignment_artifacts.pairs import SIDES, Pair, PromptPairs
from alignment_artifacts.rates import relative_change
from alignment_artifacts.suppression.search import judge_setting
from alignment_artifacts.suppression.space import Limits
from alignment_artifacts.suppression.sweep import (
    Bench,
    Choice,
    Rows,
    Tested,
    choose,
    choose_amplification,
    measure_choice,
    report,
    split_pairs,
)
from gemma_refactored.activation_capture import layer_sites, read
from gemma_refactored.attention_sinks import FACTOR
from gemma_refactored.errors import UserError
from gemma_refactored.files import is_file, locked, read_json, write_json
from gemma_refactored.generation import Sampling
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.progress import stage
from gemma_refactored.versions import library_versions
from toxicity_steering.config import Config
from toxicity_steering.data import ToxicityData
from toxicity_steering.metrics import TOXIC, distinct_n, toxicity_metrics

INTERMEDIATE, PARTIAL = "intermediate_experiment_output.json", "partial_experiment_results.json"
FULL, FAILED = "experiment_results.json", "failed_experiment_results.json"
VECTORS = "steering_vectors.safetensors"
WRONG_CONTENT = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # where a continued file is not ours
MIN_PAIRS = 4  # fewer cannot be held out
SHARES = (3, 3, 4)  # of what prompts are about: training, development, and test, whose intervals need the most
MIN_GROUPS = 6  # of these, two for each part
FINER = 3  # alphas that are tried between the best of the grid and the next larger one
SITE: Final = "residual"

Parts = dict[str, ToxicityData]  # training, development, test
Asked = dict[str, dict[str, Behaviour]]  # part of the prompts -> side -> unsteered continuations


def run_experiment(
    loaded: LoadedModel, data: ToxicityData, score: Score, output: Path, config: Config = Config(), quiet: bool = True
) -> dict:
    """Baseline, vectors, sweep, test and summary; saved after every step and continued from there.

    On interrupt or failure the results so far are saved under a name of their own.

    Args:
        score: toxicity of a continuation, in [0, 1].
        output: folder of the result files.
    Raises:
        UserError: the folder holds another experiment, the prompts are about too few things, too few continuations are
            toxic, or there is no such layer.
    """
    layers = config.layers if config.layers is not None else tuple(range(loaded.num_layers))
    if bad := [layer for layer in layers if layer >= loaded.num_layers]:
        raise UserError(f"There is no layer {bad[0]}: {loaded.name} has 0 to {loaded.num_layers - 1}.")
    parts = divided(data, config.seed)
    description = {
        **loaded.facts(),
        "scorer": score.name,
        "data": asdict(data),
        "config": asdict(config),
        "sign_convention": "positive alpha moves away from toxicity",
    }
    with locked(output):  # and if nothing can be written there, it is said before the work
        results = _resumed(output, {"experiment": description, "versions": library_versions()})
        is_continued = "baseline" in results
        try:
            _run(loaded, parts, score, output, replace(config, layers=layers), quiet, results)
        except KeyboardInterrupt:
            write_json(output / PARTIAL, results)
            raise
        except Exception as error:
            reason = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            write_json(output / FAILED, {**results, **reason})
            if is_continued and isinstance(error, WRONG_CONTENT):
                raise _unusable(output, reason["error"]) from error
            raise
        write_json(output / FULL, results)
    return results


def divided(data: ToxicityData, seed: int) -> Parts:
    """Prompts to learn vectors from, to choose on, and to report on; none is about what another part's are about.

    Raises:
        UserError: they are about too few things for that.
    """
    pairs = prompt_pairs(data)
    count = int(independent_groups(pairs).max()) + 1
    few = UserError(
        f'{data.name} has {len(pairs)} prompts of each kind about {count} different people or things ("group" in the '
        "prompts file), too few to learn on some, choose on others and report on others again: that takes at least "
        f"{MIN_GROUPS}, and {MIN_PAIRS} prompts to learn from. Use more prompts."
    )
    if count < MIN_GROUPS:
        raise few
    try:
        return {part: data.only(rows) for part, rows in split_pairs(pairs, SHARES, seed).items()}
    except UserError:
        raise few from None


def prompt_pairs(data: ToxicityData) -> list[Pair]:
    """Each benign prompt with the challenging one beside it, and what both are about."""
    each = zip(data.benign, data.challenging, data.groups, strict=True)
    return [Pair(str(i), "prompts", *pair) for i, pair in enumerate(each)]


def _run(
    loaded: LoadedModel, parts: Parts, score: Score, output: Path, config: Config, quiet: bool, results: dict
) -> None:
    """All steps; each adds to the results."""

    def save(**parts: object) -> None:
        results.update(parts)
        write_json(output / INTERMEDIATE, results)

    asked = unsteered(loaded, parts, config, results.get("baseline"))
    groups = {part: independent_groups(prompt_pairs(prompts)) for part, prompts in parts.items()}
    measured = {part: {side: measures(loaded, score, b, b.answers, groups[part], config) for side, b in both.items()}
                for part, both in asked.items()}  # fmt: skip
    save(
        parts={
            part: {"prompts": len(of_prompts), "groups": int(of_prompts.max()) + 1}
            for part, of_prompts in groups.items()
        },
        baseline=measured,
    )
    bench = bench_of(loaded, parts, asked, measured["training"], output, config, score)
    pairs, directions = bench.measured.pairs, bench.directions(SITE, ELSEWHERE)
    norms, separation = np.linalg.norm(directions.direction, axis=-1), bench.separation(SITE, ELSEWHERE)
    save_directions(_towards_benign(directions, config), output / VECTORS)
    vectors = {
        str(layer): {"norm": float(norm), "held_out_cohens_d": float(d)}
        for layer, (norm, d) in enumerate(zip(norms, separation, strict=True))
    }
    save(pairs=[pairs[i].id for i in bench.rows["training"]], vectors=vectors)
    settings = [
        Setting("always", alpha, (layer,), SITE, ELSEWHERE) for layer in config.layers or () for alpha in config.alphas
    ]
    judged, limits = results.get("sweep", {}), Limits(config.max_kl)
    steps = len(settings) + FINER + 2 * (1 + config.random_controls)
    with stage("steering", steps, "setting", quiet) as progress:

        def judge_all(settings: list[Setting]) -> list[dict]:
            names = [f"layer {setting.layers[0]}, alpha {setting.scale:g}" for setting in settings]
            for name, setting in zip(names, settings, strict=True):
                if is_new := name not in judged:
                    judged[name] = judge_setting(bench, setting, asked["development"])
                    save(sweep=judged)
                progress(1, kept=not is_new)
            return [judged[name] for name in names]

        between = finer(settings[choose(judge_all(settings), limits, bench.wish)], config.alphas)
        judge_all(between)
        records = list(judged.values())
        progress(FINER - len(between), kept=True)
        towards = [record for record in records if record["setting"]["scale"] < 0]
        choice = Choice(
            records, choose(records, limits, bench.wish), [],
            towards, choose_amplification(towards, bench.wish), [],
        )  # fmt: skip
        tested = measure_choice(bench, choice, range(config.random_controls), lambda _: progress(2))
    test = report(loaded, pairs, [tested], score)
    save(test=test, summary=summarised(loaded, score, choice, tested, test, groups["test"], config))


def summarised(
    loaded: LoadedModel,
    score: Score,
    choice: Choice,
    tested: Tested,
    test: dict,
    groups: np.ndarray,
    config: Config,
) -> dict:
    """What the chosen setting did on prompts about what it was not chosen on, in few numbers; "change" is that of the
    mean toxicity, of which controls have one for each of their seeds.

    Args:
        test: the report on `tested`.
        groups: [test prompts] number of what each is about.
    """

    def measured(outcome: Outcome) -> dict:
        return measures(loaded, score, outcome.behaviours["artifact"], outcome.answers["artifact"], groups, config)

    before = measured(tested.unedited)

    def changed(outcome: Outcome) -> dict:
        after = measured(outcome)
        first, second = (np.array(record["scores"]).sum(axis=1) for record in (before, after))
        return {**_without_texts(after), "change": relative_change(first, second, groups)}

    return {
        "baseline": _without_texts(before),
        "steered": changed(tested.chosen),
        "negative_alpha": changed(tested.amplified),
        "random_direction": [changed(outcome) for outcome in tested.random],
        "same_change_elsewhere": [changed(outcome) for outcome in tested.elsewhere],
        "layer": choice.setting.layers[0],
        "alpha": choice.setting.scale,
        "within_kl_limit": choice.records[choice.best]["damage"]["kl_mean"] <= config.max_kl,
        **test["damage"],
    }


def _without_texts(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in ("scores", "token_ids")}


def finer(best: Setting, alphas: tuple[float, ...]) -> list[Setting]:
    """Settings between the best one of the grid and the next larger alpha."""
    larger = [alpha for alpha in alphas if alpha > best.scale > 0]
    between = np.linspace(best.scale, min(larger), FINER + 2)[1:-1] if larger else ()
    return [replace(best, scale=round(float(alpha), 3)) for alpha in between]


def unsteered(loaded: LoadedModel, parts: Parts, config: Config, baseline: dict | None) -> Asked:
    """Continuations of all prompts, several of each, one after the other; from an earlier baseline if there is one."""

    def ask(part: str, side: str) -> Behaviour:
        data = parts[part]
        texts = data.benign if side == "natural" else data.challenging
        prompts = [text for text in texts for _ in range(config.samples)]
        token_ids = loaded.encode(prompts, data.chat_mode)
        if baseline:
            answers = baseline[part][side]["token_ids"]
        else:
            answers = write_answers(loaded, token_ids, NOTHING, config.max_tokens, _sampling(config))
        return Behaviour(prompts, token_ids, answers, loaded.thought_marks if data.chat_mode else None)

    return {part: {side: ask(part, side) for side in SIDES} for part in parts}


def _sampling(config: Config) -> Sampling:
    return Sampling(config.temperature, config.top_p, seed=config.seed)


def measures(
    loaded: LoadedModel,
    score: Score,
    behaviour: Behaviour,
    answers: list[list[int]],
    groups: np.ndarray,
    config: Config,
) -> dict:
    """Toxicity and diversity of continuations; of a model that thinks, of its answers.

    Args:
        groups: [prompts] number of what each is about.
    Raises:
        UserError: some continuations end inside a thought.
    """
    texts = [behaviour.answer_text(loaded.tokenizer, tokens) for tokens in answers]
    if unfinished := texts.count(None):
        raise UserError(
            f"{unfinished} of {len(texts)} completions end inside the model's thought, so there is no answer to "
            "score; raise MAX_TOKENS, or turn thinking off with CHAT_TEMPLATE_ARGS."
        )
    scores = score.of(behaviour.texts, [str(text) for text in texts]).astype(float).reshape(-1, config.samples)
    distinct = {f"distinct_{n}": distinct_n(answers, n) for n in (1, 2, 3)}
    return {**toxicity_metrics(scores, groups), **distinct, "scores": scores.tolist(), "token_ids": answers}


def contrastive_pairs(training: dict[str, dict], count: int) -> list[tuple[str, tuple[str, int], tuple[str, int]]]:
    """Benign and toxic continuations: of the same prompt if possible, else of matched ones.

    Args:
        training: side -> `measures` of the training prompts.
    Returns:
        Ids with the benign and the toxic continuation: side of the prompt, and number on that side.
    Raises:
        UserError: too few continuations are toxic.
    """
    scores = {side: np.array(measured["scores"]) for side, measured in training.items()}  # [prompts, samples]
    same: list[tuple] = []
    matched: list[tuple] = []
    for i, of_prompt in enumerate(scores["artifact"]):
        if of_prompt.max() > TOXIC:
            kind, kept, side = (
                ("same", same, "artifact") if of_prompt.min() < TOXIC else ("matched", matched, "natural")
            )
            benign, toxic = (i * len(of_prompt) + int(k) for k in (scores[side][i].argmin(), of_prompt.argmax()))
            kept.append((f"{i} {kind} prompt", (side, benign), ("artifact", toxic)))
    chosen = [*same, *matched][:count]
    if len(chosen) < MIN_PAIRS:
        raise UserError(
            f"Only {len(chosen)} of the training prompts got a toxic continuation; at least {MIN_PAIRS} are needed. "
            "Use more prompts or samples, or a ruder model."
        )
    return chosen


class SampledBench(Bench):
    """A bench whose prompts have several continuations, `asked`, sampled with the same random numbers whatever the
    steering is."""

    def __init__(
        self, loaded: LoadedModel, measured: Measurements, rows: Rows, asked: Asked, config: Config, score: Score
    ):
        super().__init__(loaded, measured, rows, config.max_tokens, score, "lower", config.seed)
        self.asked, self.sampling = asked, _sampling(config)

    def behaviour(self, part: str) -> dict[str, Behaviour]:
        return self.asked[part]

    def outcome(self, intervention: Intervention, sets: dict[str, Behaviour]) -> Outcome:
        each = [
            outcome_of(self.loaded, intervention, {name: behaviour}, self.max_tokens, self.sampling)
            for name, behaviour in sets.items()  # one by one: a continuation's random numbers go by its place
        ]
        answers = {name: written for one in each for name, written in one.answers.items()}
        return Outcome(sets, answers, next((one.damage for one in each if one.damage), None))


def bench_of(
    loaded: LoadedModel,
    parts: Parts,
    asked: Asked,
    training: dict[str, dict],
    output: Path,
    config: Config,
    score: Score,
) -> SampledBench:
    """Contrastive pairs of the training prompts, and every continuation of the others with its counterpart.

    Args:
        training: side -> `measures` of the training prompts.
    """
    contrast = [
        (name, [(asked["training"][side], i) for side, i in both])
        for name, *both in contrastive_pairs(training, config.num_pairs)
    ]
    pairs = [Pair(name, "training", *(b.texts[i] for b, i in both)) for name, both in contrast]
    rows = {"training": np.arange(len(pairs))}
    for part in ("development", "test"):
        new = [
            replace(pair, id=f"{part} {pair.id}.{k}", category=part)
            for pair in prompt_pairs(parts[part])
            for k in range(config.samples)
        ]
        rows[part] = len(pairs) + np.arange(len(new))
        pairs += new
    facts = {**loaded.facts(), "model_type": loaded.config["model_type"], "sinks_beyond": FACTOR}
    measured = Measurements(
        folder=output,
        facts={**facts, "versions": library_versions()},
        sites=(SITE,),
        pairs=PromptPairs(pairs, "toxicity", ("benign", "toxic")),
        # Of the training pairs, which come first and are all that is measured.
        prompts=[[b.token_ids[i] for b, i in both] for _, both in contrast],
        answers=[[b.answers[i] for b, i in both] for _, both in contrast],
        texts=[],
    )
    read_texts = [[*b.token_ids[i], *b.answers[i]] for _, both in contrast for b, i in both]
    states = _mean_states(loaded, read_texts, config.last_tokens)
    measured.vectors[SITE, ELSEWHERE] = states.reshape(len(contrast), 2, *states.shape[1:])
    return SampledBench(loaded, measured, rows, asked, config, score)


def _mean_states(loaded: LoadedModel, texts: list[list[int]], last: int) -> np.ndarray:
    """[texts, layers, hidden] residual stream after each block, mean over the last tokens."""
    means = {i: x[-last:].mean(axis=0) for i, x in read(loaded.model, texts, layer_sites(loaded.model, SITE))}
    return np.stack([means[i] for i in range(len(texts))])


def _towards_benign(directions: Directions, config: Config) -> Directions:
    """Benign minus toxic, for the file."""
    facts = {**directions.facts, "positions": f"last {config.last_tokens} tokens", "ends": ["toxic", "benign"]}
    return replace(
        directions, facts=facts, direction=-directions.direction, natural_mean=directions.artifact_mean,
        artifact_mean=directions.natural_mean, natural_tokens=None,
    )  # fmt: skip


def _resumed(output: Path, fresh: dict) -> dict:
    """Results of an earlier run of this experiment, or fresh ones.

    Raises:
        UserError: the folder holds another experiment, or something else.
    """
    path = output / INTERMEDIATE
    if not is_file(path, "intermediate results"):
        return fresh
    before = read_json(path, "intermediate results")
    if not isinstance(before, dict):
        raise _unusable(output, "it is no object")
    now = json.loads(json.dumps(fresh["experiment"]))  # in JSON tuples are lists
    if before.get("experiment") != now:
        names = ", ".join(_differing(before.get("experiment"), now))
        raise UserError(
            f"{output} holds another experiment (other {names}); name another folder (--output-dir), or delete it."
        )
    if before.get("versions") != fresh["versions"]:
        before["continued_with"] = fresh["versions"]
    return before


def _differing(earlier, now: dict) -> list[str]:
    """What differs between two experiments, by name."""
    if not isinstance(earlier, dict) or not isinstance(earlier.get("config"), dict):
        return list(now)
    first, second = ({**experiment, **experiment["config"], "config": None} for experiment in (earlier, now))
    return [name for name in second if first.get(name) != second[name]]


def _unusable(output: Path, why: str) -> UserError:
    return UserError(f"{output / INTERMEDIATE} cannot be continued from ({why}). Delete it to start anew.")


if __name__ == "__main__":
    from toxicity_steering.main import main

    sys.exit(main(sys.argv[1:]))
