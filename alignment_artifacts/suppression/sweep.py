"""Which setting suppresses best, chosen on some pairs and reported on others, with its controls.

Directions come from training pairs, the setting is chosen on development pairs, and what is
reported is measured once, on test pairs used for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

import mlx.core as mx
import numpy as np

from alignment_artifacts.behaviour.answers import Behaviour, observe
from alignment_artifacts.behaviour.evaluation import evaluate
from alignment_artifacts.behaviour.monitor import held_out_auroc
from alignment_artifacts.behaviour.score import Score, Wish
from alignment_artifacts.directions.estimate import Directions, measure_natural_tokens, random_like
from alignment_artifacts.directions.measurements import Measurements
from alignment_artifacts.edits.options import ModeOptions, Setting
from alignment_artifacts.edits.proof import prove
from alignment_artifacts.edits.setting import NOTHING, Intervention, intervene
from alignment_artifacts.separation import MIN_PAIRS
from alignment_artifacts.suppression.grid import Grid, Limits
from gemma_refactored.activation_capture import Edit
from gemma_refactored.errors import UserError
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.progress import counted

PARTS = ("training", "development", "test")


def split_pairs(categories: Sequence[str], shares: Sequence[int] = (20, 15, 15), seed: int = 0) -> list[np.ndarray]:
    """Indices of training, development and test pairs, each category spread over them in these shares."""
    rng, labels = np.random.default_rng(seed), np.array(categories)
    bounds = np.cumsum(shares)[:-1] / sum(shares)
    parts: list[list[int]] = [[] for _ in shares]
    for category in dict.fromkeys(categories):
        rows = rng.permutation(np.flatnonzero(labels == category))
        for part, chosen in zip(parts, np.split(rows, np.round(bounds * len(rows)).astype(int)), strict=True):
            part.extend(chosen)
    return [np.sort(np.array(part, int)) for part in parts]


class Bench:
    """Where settings are tried on a model: directions from training pairs, behaviour on the others; kept for reuse.

    Args:
        score: of answers; None: refusals.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        measured: Measurements,
        shares: Sequence[int],
        seed: int,
        max_tokens: int,
        score: Score | None = None,
    ):
        self.loaded, self.measured, self.max_tokens, self.score = loaded, measured, max_tokens, score
        rows = split_pairs([pair.category for pair in measured.pairs], shares, seed)
        self.rows = dict(zip(PARTS, rows, strict=True))
        if min(map(len, rows)) < 1 or len(rows[0]) < MIN_PAIRS:
            counts = ", ".join(f"{len(part)} for {name}" for name, part in self.rows.items())
            raise UserError(
                f"Shares of {', '.join(map(str, shares))} make {counts} of {counted(len(measured.pairs), 'pair')}; a "
                f"sweep needs at least {MIN_PAIRS} for training and one for each of the others. Use more pairs, or "
                "other shares."
            )
        self._directions: dict[tuple[str, str], Directions] = {}
        self._random: dict[tuple[str, str, int], Directions] = {}

    def behaviour(self, part: str) -> dict[str, Behaviour]:
        """Unedited answers of a part's prompts, by side."""
        pairs = [self.measured.pairs[i] for i in self.rows[part]]
        texts = {"artifact": [p.artifact for p in pairs], "natural": [p.natural for p in pairs]}
        known = self.measured.known_answer
        return {side: observe(self.loaded, t, self.max_tokens, known=known) for side, t in texts.items()}

    def with_natural_tokens(self, directions: Directions) -> Directions:
        return measure_natural_tokens(self.loaded, directions, self.measured.natural_sequences(self.rows["training"]))

    def directions(self, site: str, positions: str) -> Directions:
        if (site, positions) not in self._directions:
            estimated = self.measured.estimate(site, positions, self.rows["training"])
            self._directions[site, positions] = self.with_natural_tokens(estimated)
        return self._directions[site, positions]

    def random(self, site: str, positions: str, seed: int) -> Directions:
        """Random directions of the same norms."""
        if (site, positions, seed) not in self._random:
            drawn = random_like(self.directions(site, positions), seed)
            self._random[site, positions, seed] = self.with_natural_tokens(drawn)
        return self._random[site, positions, seed]

    def intervention(self, setting: Setting) -> Intervention:
        return intervene(self.loaded, self.directions(setting.site, setting.positions), setting)

    def evaluate(self, intervention: Intervention, sets: dict[str, Behaviour]) -> dict:
        return evaluate(self.loaded, intervention, sets, self.max_tokens, self.score)

    def settings(self, grid: Grid, edit_sinks: bool = False) -> list[Setting]:
        """Every setting of a grid that this model allows."""
        settings = []
        for site, positions, layer_set in product(self.measured.sites, grid.positions, grid.layer_sets):
            layers = list(range(self.loaded.num_layers))
            if layer_set == "best":
                layers = self.measured.best_layers(site, positions, self.rows["training"])
            for mode, scales in grid.scales.items():
                options = (
                    [ModeOptions(cap_quantile=q) for q in grid.cap_quantiles] if mode == "cap" else [ModeOptions()]
                )
                settings += [
                    Setting(mode, scale, tuple(layers), site, positions, option, where, edit_sinks)
                    for scale, option, where in product(scales, options, grid.where)
                ]
        return list(dict.fromkeys(settings))  # "best" may be all


def try_settings(bench: Bench, settings: Iterable[Setting], sets: dict[str, Behaviour]) -> list[dict]:
    """One record per setting: its judgement of every set, "damage", "dose" (see `Proof`), and the same setting
    with a random direction, judged on the artifact prompts."""
    records, artifact = [], sets["artifact"]
    for setting in settings:
        intervention = bench.intervention(setting)
        random = intervene(bench.loaded, bench.random(setting.site, setting.positions, 0), setting)
        records.append(
            {
                "setting": setting.record(),
                **bench.evaluate(intervention, sets),
                "dose": prove(bench.loaded, intervention, artifact.sequences).dose,
                "random_direction": bench.evaluate(random, {"artifact": artifact}),
            }
        )
    return records


@dataclass(frozen=True, order=True)
class Drawbacks:
    """Of a setting; settings are compared by the first in which they differ.

    Attributes:
        over_budget: it costs more than the limits allow.
        left: share of artifact prompts still refused or broken; over budget, costs count like refusals. With a score
            how far its mean on artifact prompts has moved against the wish; over budget, what it costs alone.
        kl: in hundredths of the limit: rounding should not decide.
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
    return Drawbacks(over_budget, remaining, round(100 * kl / limits.kl), len(record["setting"]["layers"]), kl)


def choose(records: Sequence[dict], limits: Limits = Limits(), wish: Wish | None = None) -> int:
    """The setting that leaves fewest artifact prompts refused or broken (or moves the mean score furthest towards the
    wish) within the limits; among equals, the least intrusive."""
    return min(range(len(records)), key=lambda i: drawbacks(records[i], limits, wish))


def moves_as_wished(result: dict) -> bool:
    """Has the setting that a sweep with a score has chosen moved it towards the wish, on the pairs it was chosen on?"""
    return left(result["chosen"]["development"], result["wish"]) < 0


def choose_amplification(records: Sequence[dict], limits: Limits = Limits(), wish: Wish | None = None) -> int:
    """The setting that makes most natural prompts refused with least broken text; among equals, the least intrusive.

    With a score: that moves its mean on natural prompts furthest against the wish, among those that put no more of
    the answers into loops than may change.
    """

    def key(record: dict) -> tuple:
        natural, kl = record["natural"], record["damage"]["kl_mean"]
        if wish is None:
            return (natural["broken"]["rate"] - natural["refused"]["rate"], kl)
        moved = natural["moved"]["mean"]
        return (natural["loops"]["rate"] > limits.changed, -moved if wish == "lower" else moved, kl)

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


def report(bench: Bench, setting: Setting, sets: dict[str, Behaviour], controls: Iterable[int]) -> dict:
    """Everything about one setting on pairs used for nothing else: behaviour, dose, random controls (by seed)."""
    loaded, hidden = bench.loaded, bench.loaded.hidden_size
    intervention = bench.intervention(setting)
    random, elsewhere = [], []
    for seed in controls:
        drawn = bench.random(setting.site, setting.positions, seed)
        random.append(bench.evaluate(intervene(loaded, drawn, setting), sets))
        moved = same_change_elsewhere(intervention, hidden, seed)
        elsewhere.append(bench.evaluate(moved, sets))
    artifact = sets["artifact"]
    return {
        "setting": setting.record(),
        **bench.evaluate(intervention, sets),
        "unedited": bench.evaluate(NOTHING, sets),
        "effect_on_artifact_prompts": asdict(prove(loaded, intervention, artifact.sequences)),
        "random_direction": random,
        "same_change_elsewhere": elsewhere,
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


def monitor_results(measured: Measurements) -> dict:
    """Held-out AUROC of the score at the prompt's end against refusals, by site, without the single scores."""
    results = {site: held_out_auroc(measured, site) for site in measured.sites}
    return {site: {k: v for k, v in result.items() if k != "scores"} for site, result in results.items()}
