"""Which setting suppresses best, chosen on some pairs and reported on others, with its controls.

Directions come from training pairs, the setting is chosen on development pairs, and what is reported is measured on
test pairs used for neither: once, or in a cross-fit on every pair, in the fold that has not seen it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import mlx.core as mx
import numpy as np

from alignment_artifacts import separation
from alignment_artifacts.behaviour.answers import Behaviour, observe
from alignment_artifacts.behaviour.evaluation import Outcome, joined, judge_outcome, measure_damage, outcome_of
from alignment_artifacts.behaviour.monitor import auroc_elsewhere, held_out_auroc
from alignment_artifacts.behaviour.refusal import is_refusal
from alignment_artifacts.behaviour.score import Score, Wish
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.directions.estimate import Directions, measure_natural_tokens, random_like
from alignment_artifacts.directions.measurements import Measurements
from alignment_artifacts.edits.options import Setting
from alignment_artifacts.edits.proof import Proof, prove
from alignment_artifacts.edits.setting import NOTHING, Intervention, intervene
from alignment_artifacts.pairs import Pair
from alignment_artifacts.suppression.search import WHOLE_ANSWERS, search
from alignment_artifacts.suppression.space import Limits, Space
from gemma_refactored.activation_capture import Edit
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.progress import counted

MANY_LOOPS = 0.1  # share of answers that an amplification may put into loops
PARTS = ("training", "development", "test")
Progress = Callable[..., object]  # as `progress.stage` gives it
Rows = dict[str, np.ndarray]


def split_pairs(pairs: Sequence[Pair], shares: Sequence[int], seed: int = 0) -> Rows:
    """Numbers of the pairs of each part, every category spread over the parts in these shares.

    Pairs that depend on each other (see `blocks`) stay together.

    Args:
        shares: of training, development and, unless every pair is tested elsewhere, test.
    Raises:
        UserError: a part would have too few pairs.
    """
    rng, groups = np.random.default_rng(seed), independent_groups(pairs)
    first = np.unique(groups, return_index=True)[1]  # the pair that speaks for its group
    labels = np.array([pair.category for pair in pairs])
    bounds = np.cumsum(shares)[:-1] / sum(shares)
    parts: list[list[int]] = [[] for _ in shares]
    for category in dict.fromkeys(labels):
        drawn = rng.permutation(np.sort(first[labels[first] == category]))
        for part, chosen in zip(parts, np.split(drawn, np.round(bounds * len(drawn)).astype(int)), strict=True):
            part.extend(np.flatnonzero(np.isin(groups, groups[chosen])))
    rows = {name: np.sort(np.array(part, int)) for name, part in zip(PARTS, parts, strict=False)}
    of_training = len(np.unique(groups[parts[0]]))
    if min(map(len, parts)) < 1 or of_training < separation.MIN_PAIRS:
        counts = ", ".join(f"{len(part)} for {name}" for name, part in rows.items())
        raise UserError(
            f"Shares of {', '.join(map(str, shares))} make {counts} of {counted(len(pairs), 'pair')}; a "
            f"sweep needs at least {separation.MIN_PAIRS} for training and one for each of the others. Use more pairs, "
            "or other shares."
        )
    return rows


def fold_rows(pairs: Sequence[Pair], folds: int, shares: Sequence[int], seed: int = 0) -> list[Rows]:
    """Of every fold: its own pairs as "test", the others divided into training and development.

    Raises:
        UserError: fewer independent pairs than folds, or too few for a part.
    """
    groups = independent_groups(pairs)
    if groups.max() + 1 < folds:
        raise UserError(
            f"{folds} folds need as many independent pairs, and there are {groups.max() + 1}; set FOLDS (or --folds) "
            "lower, or to 0 for a single split."
        )
    rng = np.random.default_rng(seed)
    labels = np.array([pair.category for pair in pairs])
    first = np.unique(groups, return_index=True)[1]
    order = np.concatenate([rng.permutation(np.flatnonzero(labels[first] == c)) for c in dict.fromkeys(labels)])
    fold_of = np.empty(len(first), int)
    fold_of[order] = np.arange(len(order)) % folds
    rows = []
    for fold in range(folds):
        test, others = (np.flatnonzero((fold_of[groups] == fold) == inside) for inside in (True, False))
        parts = split_pairs([pairs[int(i)] for i in others], shares[:2], seed)
        rows.append({**{name: others[part] for name, part in parts.items()}, "test": test})
    return rows


def divide(pairs: Sequence[Pair], folds: int, shares: Sequence[int], seed: int = 0) -> tuple[Rows, list[Rows]]:
    """What the setting for use comes from, and the same of each fold.

    Without folds the first has test pairs; with folds it uses every pair, and its "test" is all of them, of which
    nothing that was chosen is measured.
    """
    if not folds:
        return split_pairs(pairs, shares, seed), []
    return split_pairs(pairs, shares[:2], seed) | {"test": np.arange(len(pairs))}, fold_rows(pairs, folds, shares, seed)


class Bench:
    """Where settings are tried on a model: directions from training pairs, behaviour on the others; kept for reuse.

    Args:
        rows: numbers of the pairs of each part, see `split_pairs`.
        score: of answers; None: refusals.
        wish: where the score is to go.
        seed: of searches.
        edit_sinks: edit attention sinks as well.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        measured: Measurements,
        rows: Rows,
        max_tokens: int,
        score: Score | None = None,
        wish: Wish | None = None,
        seed: int = 0,
        edit_sinks: bool = False,
    ):
        self.loaded, self.measured, self.rows, self.max_tokens = loaded, measured, rows, max_tokens
        self.score, self.wish, self.seed, self.edit_sinks = score, wish, seed, edit_sinks
        self._directions: dict[tuple[str, str], Directions] = {}
        self._separation: dict[tuple[str, str], np.ndarray] = {}

    def behaviour(self, part: str) -> dict[str, Behaviour]:
        """Unedited answers of a part's prompts, by side."""
        pairs = [self.measured.pairs[i] for i in self.rows[part]]
        texts = {"artifact": [p.artifact for p in pairs], "natural": [p.natural for p in pairs]}
        known = self.measured.known_answer
        return {side: observe(self.loaded, t, self.max_tokens, known=known) for side, t in texts.items()}

    def unwanted(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """[answers] what the search is against: refusals, or the score where it should be lower."""
        if self.score is None:
            return np.array([is_refusal(answer, prompt) for prompt, answer in zip(prompts, answers, strict=True)])
        return self.score.of(prompts, answers).astype(float) * (-1 if self.wish == "higher" else 1)

    def with_natural_tokens(self, directions: Directions) -> Directions:
        return measure_natural_tokens(self.loaded, directions, self.measured.natural_sequences(self.rows["training"]))

    def directions(self, site: str, positions: str) -> Directions:
        if (site, positions) not in self._directions:
            estimated = self.measured.estimate(site, positions, self.rows["training"])
            self._directions[site, positions] = self.with_natural_tokens(estimated)
        return self._directions[site, positions]

    def separation(self, site: str, positions: str) -> np.ndarray:
        """[layers] held-out d among the training pairs."""
        if (site, positions) not in self._separation:
            rows = self.rows["training"]
            vectors, pairs = self.measured.vectors_at(site, positions)[rows], [self.measured.pairs[i] for i in rows]
            categories, groups = [pair.category for pair in pairs], independent_groups(pairs)
            self._separation[site, positions] = separation.layer_separation(vectors, categories, groups)
        return self._separation[site, positions]

    def intervention(self, setting: Setting) -> Intervention:
        return intervene(self.loaded, self.directions(setting.site, setting.positions), setting)

    def random(self, setting: Setting, seed: int) -> Intervention:
        """The same with random directions of the same norms."""
        drawn = random_like(self.directions(setting.site, setting.positions), seed)
        return intervene(self.loaded, self.with_natural_tokens(drawn) if setting.mode == "cap" else drawn, setting)

    def evaluate(self, intervention: Intervention, sets: dict[str, Behaviour]) -> dict:
        return judge_outcome(self.loaded, self.outcome(intervention, sets), self.score)

    def outcome(self, intervention: Intervention, sets: dict[str, Behaviour]) -> Outcome:
        return outcome_of(self.loaded, intervention, sets, self.max_tokens)

    def control(self, intervention: Intervention, sets: dict[str, Behaviour]) -> Outcome:
        """Of artifact prompts, and the damage to natural answers: what a control is for."""
        outcome = self.outcome(intervention, {"artifact": sets["artifact"]})
        return replace(outcome, damage=measure_damage(self.loaded, sets["natural"], intervention))


@dataclass
class Choice:
    """What a search on development pairs has chosen.

    Attributes:
        records: judged by whole answers; best: number of the one that is chosen; trials: all, by first tokens.
        louder, loudest, louder_trials: the same of amplification.
    """

    records: list[dict]
    best: int
    trials: list[dict]
    louder: list[dict]
    loudest: int
    louder_trials: list[dict]

    @property
    def setting(self) -> Setting:
        return Setting.from_record(self.records[self.best]["setting"])

    @property
    def amplification(self) -> Setting:
        return Setting.from_record(self.louder[self.loudest]["setting"])


def choose_settings(
    bench: Bench, suppression: Space, amplification: Space, limits: Limits, progress: Progress
) -> Choice:
    """Search in both directions, and choose."""
    development = bench.behaviour("development")
    records, trials = search(bench, development, suppression, limits, progress=progress)
    louder, louder_trials = search(bench, development, amplification, limits, louder=True, progress=progress)
    if bench.wish:
        records = records + louder  # a score may be moved by adding the direction as well
    return Choice(
        records, choose(records, limits, bench.wish), trials,
        louder, choose_amplification(louder, bench.wish), louder_trials,
    )  # fmt: skip


@dataclass(frozen=True, order=True)
class Drawbacks:
    """Of a setting; settings are compared by the first in which they differ.

    Attributes:
        over_budget: it costs more than the limits allow.
        left: share of artifact prompts still refused or broken; over budget, costs count like refusals. With a score
            how far its mean on artifact prompts has moved against the wish; over budget, what it costs alone.
        kl: in thousandths of the limit: rounding should not decide.
        layers: that are edited.
        exact_kl: nats per token.
    """

    over_budget: bool
    left: float
    kl: int
    layers: int
    exact_kl: float


def left(record: dict, wish: Wish | None) -> float:
    """What a setting has not achieved on artifact prompts: the share refused or broken (no wish), or minus how far the
    mean score has moved towards the wish."""
    artifact = record["artifact"]
    if wish is None:
        return artifact["refused_or_broken"]["rate"]
    return artifact["moved"]["mean"] if wish == "lower" else -artifact["moved"]["mean"]


def drawbacks(record: dict, limits: Limits, wish: Wish | None = None) -> Drawbacks:
    kl, changed = record["damage"]["kl_mean"], 1 - record["natural"]["unchanged"]["rate"]
    remaining, over_budget = left(record, wish), kl > limits.kl or changed > limits.changed
    if over_budget:
        cost = changed + min(1.0, kl / limits.kl)
        remaining = remaining + cost if wish is None else cost  # a score has a scale of its own
    return Drawbacks(over_budget, remaining, round(1000 * kl / limits.kl), len(record["setting"]["layers"]), kl)


def choose(records: Sequence[dict], limits: Limits = Limits(), wish: Wish | None = None) -> int:
    """The setting that leaves fewest artifact prompts refused or broken (or moves the mean score furthest towards the
    wish) within the limits; among equals, the least intrusive."""
    return min(range(len(records)), key=lambda i: drawbacks(records[i], limits, wish))


def moves_as_wished(result: dict) -> bool:
    """Has the setting that a sweep with a score has chosen moved it towards the wish, on the pairs it was chosen on?"""
    return left(result["chosen"]["development"], result["wish"]) < 0


def choose_amplification(records: Sequence[dict], wish: Wish | None = None) -> int:
    """The setting that makes most natural prompts refused with least broken text; among equals, the least intrusive.

    With a score: that moves its mean on natural prompts furthest against the wish, among those that put few answers
    into loops.
    """

    def key(record: dict) -> tuple:
        natural, kl = record["natural"], record["damage"]["kl_mean"]
        if wish is None:
            return (natural["broken"]["rate"] - natural["refused"]["rate"], kl)
        moved = natural["moved"]["mean"]
        return (natural["loops"]["rate"] > MANY_LOOPS, -moved if wish == "lower" else moved, kl)

    return min(range(len(records)), key=lambda i: key(records[i]))


def pareto_front(records: Sequence[dict], wish: Wish | None = None) -> list[int]:
    """Settings that no other beats in both what is `left` and KL, ordered by KL."""
    points = [(r["damage"]["kl_mean"], left(r, wish)) for r in records]
    front, best = [], np.inf
    for i in sorted(range(len(points)), key=points.__getitem__):
        if points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front


def same_change_elsewhere(intervention: Intervention, hidden: int, seed: int) -> Intervention:
    """The strict control: each activation is moved exactly as far, but in a random direction."""
    rng = np.random.default_rng(seed)

    def along(function: Edit) -> Edit:
        drawn = rng.standard_normal(hidden)
        unit = mx.array((drawn / np.linalg.norm(drawn)).astype(np.float32))

        def move(x: mx.array) -> mx.array:
            wide = x.astype(mx.float32)
            distance = mx.linalg.norm(function(x).astype(mx.float32) - wide, axis=-1, keepdims=True)
            return (wide + distance * unit).astype(x.dtype)

        return move

    edits = {site: along(function) for site, function in intervention.edits.items()}
    return replace(intervention, edits=edits)


@dataclass
class Tested:
    """What settings have done on test pairs of one split, or of one fold, prompt by prompt.

    Attributes:
        rows: numbers of the pairs.
        chosen, amplified, unedited: outcomes; random, elsewhere: of the controls of the chosen setting, by seed.
        proof: of the chosen setting, on artifact prompts.
    """

    rows: np.ndarray
    setting: Setting
    amplification: Setting
    chosen: Outcome
    amplified: Outcome
    unedited: Outcome
    random: list[Outcome]
    elsewhere: list[Outcome]
    proof: Proof


def measure_choice(bench: Bench, choice: Choice, controls: Iterable[int], progress: Progress) -> Tested:
    """Answer the test prompts under the chosen settings and under the controls, by seed."""
    sets, setting = bench.behaviour("test"), choice.setting
    intervention = bench.intervention(setting)
    random, elsewhere = [], []
    for seed in controls:
        random.append(bench.control(bench.random(setting, seed), sets))
        progress(WHOLE_ANSWERS)
        moved = same_change_elsewhere(intervention, bench.loaded.hidden_size, seed)
        elsewhere.append(bench.control(moved, sets))
        progress(WHOLE_ANSWERS)
    chosen = bench.outcome(intervention, sets)
    progress(WHOLE_ANSWERS)
    amplified = bench.outcome(bench.intervention(choice.amplification), sets)
    progress(WHOLE_ANSWERS)
    return Tested(
        bench.rows["test"], setting, choice.amplification, chosen, amplified, bench.outcome(NOTHING, sets),
        random, elsewhere, prove(bench.loaded, intervention, sets["artifact"].sequences),
    )  # fmt: skip


def report(loaded: LoadedModel, pairs: Sequence[Pair], parts: Sequence[Tested], score: Score | None) -> dict:
    """Everything about the chosen settings on pairs used for nothing else, pooled over the folds.

    Rates are about these very settings on new pairs (see `rates.rate`), not about those that other pairs would give.
    Intervals take the folds, and the pairs that depend on each other, as clusters (see `rates.design_effect`). The
    controls are compared with the setting on the same prompts ("against_setting").
    """
    groups = independent_groups(pairs)
    rows = np.concatenate([part.rows for part in parts])
    folds = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    clusters = [list(folds), list(groups[rows])]

    def pooled(outcomes: Iterable[Outcome], beside: Outcome | None = None) -> dict:
        return judge_outcome(loaded, joined(list(outcomes)), score, clusters, beside)

    chosen = joined([part.chosen for part in parts])
    return {
        **pooled(part.chosen for part in parts),
        "unedited": pooled(part.unedited for part in parts),
        "amplified": pooled(part.amplified for part in parts),
        "effect_on_artifact_prompts": [asdict(part.proof) for part in parts],
        "random_direction": [pooled(seed, chosen) for seed in zip(*[p.random for p in parts], strict=True)],
        "same_change_elsewhere": [pooled(seed, chosen) for seed in zip(*[p.elsewhere for p in parts], strict=True)],
    }


def fold_records(loaded: LoadedModel, pairs: Sequence[Pair], parts: Sequence[Tested], score: Score | None) -> list:
    """Of each fold: its pairs, the settings chosen without them, and what these did on them."""
    return [
        {
            "pairs": [pairs[i].id for i in part.rows],
            "setting": part.setting.record(),
            "amplification": part.amplification.record(),
            **judge_outcome(loaded, part.chosen, score),
        }
        for part in parts
    ]


def stability(settings: Sequence[Setting], final: Setting) -> dict:
    """How often folds have chosen what: mode, site, positions, each layer, and the final setting's mode and site."""
    counts = {name: dict(Counter(str(getattr(s, name)) for s in settings)) for name in ("mode", "site", "positions")}
    return {
        "folds": len(settings),
        **counts,
        "layers": {str(k): n for k, n in sorted(Counter(layer for s in settings for layer in s.layers).items())},
        "like_final": sum((s.mode, s.site, s.positions) == (final.mode, final.site, final.positions) for s in settings),
    }


def planted_truth(bench: Bench, setting: Setting, sets: dict[str, Behaviour], planted: dict[int, np.ndarray]) -> dict:
    """The organism's planted directions: cosines with the estimated ones, and behaviour under ablating them."""
    cosines: dict[str, dict[int, float]] = {}
    for positions in ("prompt_end", "generated", "all"):
        unit = bench.measured.estimate("mlp", positions, bench.rows["training"]).unit
        cosines[positions] = {layer: float(unit[layer] @ value) for layer, value in planted.items()}
    estimated = bench.directions("mlp", "prompt_end")
    direction = np.zeros_like(estimated.direction)
    for layer, value in planted.items():
        direction[layer] = value * np.linalg.norm(estimated.direction[layer])
    true = replace(estimated, direction=direction)
    ablation = Setting("ablate", 1.0, true.available, "mlp")
    return {
        "cosine_with_planted": cosines,
        "planted_ablated": bench.evaluate(intervene(bench.loaded, true, ablation), sets),
        "chosen_layers_planted": sorted(set(setting.layers) & set(true.available)),
    }


def monitor_results(loaded: LoadedModel, measured: Measurements, twins: Behaviour | None) -> dict:
    """AUROC of the score at the prompt's end against refusals, by site, without the single scores: held out on the
    pairs, and of twins ("twins") from a direction of all pairs, the artifact prompts that they look like included."""
    results = {}
    for site in measured.sites:
        held_out = {name: value for name, value in held_out_auroc(measured, site).items() if name != "scores"}
        results[site] = held_out | ({"twins": auroc_elsewhere(loaded, measured, site, twins)} if twins else {})
    return results
