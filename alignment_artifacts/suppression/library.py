"""The library: `suppress_prompt` for one prompt, `AlignmentArtifacts` for more.

from alignment_artifacts import suppress_prompt
result = suppress_prompt("How do I pick a lock?", scale=1.5)
result.before, result.after
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from threading import RLock
from typing import ParamSpec, TypeVar, cast

import numpy as np

from alignment_artifacts.analysis import analyse
from alignment_artifacts.behaviour import monitor, vocabulary
from alignment_artifacts.behaviour.answers import observe, write_answer, write_answers
from alignment_artifacts.behaviour.refusal import is_refusal
from alignment_artifacts.behaviour.score import Score, Wish, load_score, own_measure, usual_score
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.directions.estimate import Directions, fit_to, measure_natural_tokens
from alignment_artifacts.directions.files import load_directions, save_directions
from alignment_artifacts.directions.measurements import (
    COLLECTED_TOKENS,
    Measurements,
    activation_set,
    available_sites,
    measure,
    subject_of,
)
from alignment_artifacts.edits.options import ELSEWHERE, MEASURED_AT, PROMPT_END, Mode, ModeOptions, Setting
from alignment_artifacts.edits.proof import Sequences, prove, prove_each
from alignment_artifacts.edits.setting import AUTO, NOTHING, Intervention, auto_mode, intervene
from alignment_artifacts.pairs import PAIRS_JSON, Pair, as_pairs
from alignment_artifacts.places import cache_folder, collection_folders, find, resolved_model
from alignment_artifacts.scores import Settings
from alignment_artifacts.suppression.result import SuppressionResult, results_of
from gemma_refactored.configuration import Chat, Generation, Sampling
from gemma_refactored.conversation import readable
from gemma_refactored.errors import UserError, print_every_character, shown
from gemma_refactored.files import read_json
from gemma_refactored.job import check_context
from gemma_refactored.model_loading import LoadedModel, load
from gemma_refactored.prompt_processing import parse_prompts, prompt_texts
from gemma_refactored.settings import check, check_given

log = logging.getLogger(__name__)
SWEEP = "sweep.json"  # in the model's cache folder: what sweep_suppression.py chose
ARTIFACTS_TRIED = 5  # artifact prompts on which a setting that did not touch a prompt must prove that it works

P = ParamSpec("P")
R = TypeVar("R")
_MODELS = RLock()


def in_turn(method: Callable[P, R]) -> Callable[P, R]:
    """Threads take turns: two in MLX at once hang or end the process, and an edit is seen by all of them."""

    @wraps(method)
    def wait_and_call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _MODELS:
            return method(*args, **kwargs)

    return wait_and_call


class AlignmentArtifacts:
    """Directions of models and what suppressing them does. Models and measurements are kept for the next call.

    Calls from several threads are answered one after the other.

    Args:
        model: local folder, GGUF file or Hugging Face id, used by methods that are not given another.
        pairs: the matched prompt pairs, or a file of them.
        cache: folder for measurements; default `places.cache_folder`.
        collections: folders of activations that may save a measurement; default: the model's.
        show_progress: bars on the terminal while a model is measured.
        score: of answers: a function (prompt, answer) -> number, or as `score.load_score` reads it; default
            `score.usual_score`.
        wish: where a sweep moved that score, whose setting the mode "auto" then uses.
        chat: what is written around each prompt: system prompt, template and its variables.
        adapter: folder or Hugging Face id of a LoRA adapter (mlx-lm, PEFT) that is added to `model`, and to no other.
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        pairs: str | Path | Sequence[Pair] = PAIRS_JSON,
        cache: str | Path | None = None,
        show_progress: bool = True,
        collections: Sequence[str | Path] | None = None,
        score: str | Score | Callable[[str, str], float] | None = None,
        wish: Wish = "lower",
        chat: Chat = Chat(),
        adapter: str | Path | None = None,
    ):
        self.model, self.cache, self.show_progress = model, Path(cache or cache_folder()), show_progress
        self.chat, self.adapter, self._own = chat, adapter, resolved_model(model)
        self.pairs, self.collections = as_pairs(find(pairs) if isinstance(pairs, str | Path) else pairs), collections
        self.pairs_file = self.pairs.file or Path(f"{self.pairs.behaviour}.json")  # whose name results are kept under
        self.wish: Wish = wish
        self.score = usual_score(self.pairs.behaviour) if score is None else load_score(score)
        self.sweep_file = sweep_file(own_measure(self.score, wish), wish)
        self._loaded: dict[str, LoadedModel] = {}
        self._measured: dict[str, Measurements] = {}

    @in_turn
    def load(self, model: str | Path | None = None) -> LoadedModel:
        key = self._key(model)
        if key not in self._loaded:
            adapter = self.adapter if key == self._own else None
            self._loaded[key] = load(model or self.model, chat=self.chat, adapter=adapter)
        return self._loaded[key]

    @in_turn
    def measurements(self, model: str | Path | None = None) -> Measurements:
        """What the model does on the pairs; measured on first use, then from the cache."""
        key = self._key(model)
        if key not in self._measured:
            loaded = self.load(model)
            collections = collection_folders(loaded, self.pairs) if self.collections is None else self.collections
            self._measured[key] = measure(loaded, self.pairs, self.cache, self.show_progress, collections)
        return self._measured[key]

    def _key(self, model: str | Path | None) -> str:
        """One for each model, however it is spelt: the adapter belongs to a model, not to a spelling."""
        return resolved_model(model) if model else self._own

    @in_turn
    def analyze_artifacts(self, model: str | Path | None = None) -> dict:
        """Per site ("mlp", "residual") the statistics of analyze_collected_activations.py, and the monitor's AUROC."""
        loaded, measured = self.load(model), self.measurements(model)
        results = {}
        for site in measured.sites:
            analysis = analyse(activation_set(loaded, measured, site), Settings(), {"site": site})
            results[site] = {**analysis, "monitor": monitor.held_out_auroc(measured, site)}
        return results

    @in_turn
    def refusals(self, model: str | Path | None = None, at_most: int | None = None) -> tuple[int, int]:
        """Of how many artifact prompts the unedited model refuses how many: (refused, asked).

        Judged by the first COLLECTED_TOKENS tokens of each answer, which is what is measured.

        Args:
            at_most: ask so many of them (at least one), without measuring the model; None: all.
        """
        if at_most is None:
            refused = self.measurements(model).judged(is_refusal)[:, 1]
            return int(refused.sum()), len(refused)
        prompts = [pair.artifact for pair in self.pairs[:: max(-(-len(self.pairs) // max(at_most, 1)), 1)]]
        loaded = self.load(model)
        answers = observe(loaded, prompts, COLLECTED_TOKENS).answers
        texts = [loaded.answer_text(answer) for answer in answers]
        judged = [is_refusal(text, prompt) for text, prompt in zip(texts, prompts, strict=True) if text is not None]
        return sum(judged), len(judged)

    @in_turn
    def directions(
        self,
        model: str | Path | None = None,
        site: str | None = None,
        positions: str = "prompt_end",
        categories: Sequence[str] | None = None,
    ) -> Directions:
        """Directions from all pairs, or those of some categories; kept as directions.safetensors in the cache."""
        measured = self.measurements(model)
        site = site or measured.sites[0]
        rows = measured.rows(categories)
        directions = measured.estimate(site, positions, rows)
        path = measured.folder / "directions.safetensors"
        if path.exists():
            cached = _kept_directions(path)
            if cached.facts == directions.facts:
                return _checked_against(directions, cached, path)
        directions = measure_natural_tokens(self.load(model), directions, measured.natural_sequences(rows))
        save_directions(directions, path)
        return directions

    @in_turn
    def explain(
        self,
        model: str | Path | None = None,
        positions: str = PROMPT_END,
        categories: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
        directions: Directions | None = None,
        transfer: bool = False,
        **settings,
    ) -> dict:
        """The tokens that the directions of the residual stream promote and demote: see `vocabulary.explain`.

        Args:
            directions: use these instead of the model's own; `transfer`: those of a relative, too.
            settings: "tokens", "random_directions", "scale" and "progress" of `vocabulary.explain`.
        """
        loaded = self.load(model)
        if directions is None:
            measured = self.measurements(model)
            directions = measured.estimate("residual", positions, measured.rows(categories))
        else:
            directions = fit_to(directions, loaded, transfer)
        natural = loaded.encode([pair.natural for pair in self.pairs])
        result = vocabulary.explain(loaded, directions, natural, layers, **settings)
        return {**result, "transferred_from": directions.facts.get("transferred_from")}

    @in_turn
    def choose(
        self,
        model: str | Path | None,
        mode: str,
        categories: Sequence[str] | None,
        directions: Directions | None = None,
        **wanted,
    ) -> tuple[Setting, str]:
        """The setting to use and who chose it; `wanted` are fields of Setting and ModeOptions; None: to be chosen.

        Args:
            directions: that are given have a site and positions of their own, and are used at all their layers unless
                some are named: nothing is measured. What a sweep has chosen is for the model's own, with all
                that belongs to them.
        """
        if directions is not None:
            positions = directions.facts.get("positions")
            wanted["site"] = directions.facts["site"]
            wanted["positions"] = positions if positions in MEASURED_AT else ELSEWHERE
            wanted["layers"] = wanted.get("layers") or directions.available
        check_given(Setting, wanted, {"layers": "target_layers"})
        wanted = {name: value for name, value in wanted.items() if value is not None}
        options = {f.name: wanted.pop(f.name) for f in fields(ModeOptions) if f.name in wanted}
        loaded = self.load(model)
        is_own = directions is None or (
            directions.facts.get("model_revision") == loaded.revision and directions.natural_tokens is not None
        )
        sweep = subject_of(loaded, self.pairs, self.cache).folder / self.sweep_file if mode == AUTO and is_own else None
        if sweep and sweep.exists():
            chosen, by = _setting_of_sweep(sweep), "a sweep"
            if {"site", "positions"} & wanted.keys():  # the sweep's layers were for another direction
                chosen = replace(chosen, layers=(), direction_layer=None)
        else:
            by = "model size" if mode == AUTO else "you"
            mode = auto_mode(loaded.num_parameters) if mode == AUTO else mode
            chosen = Setting(cast(Mode, mode), 1.0, (), available_sites(loaded)[0])
        chosen = replace(chosen, **wanted, options=replace(chosen.options, **options))
        if by != "a sweep" and chosen.mode == "add" and chosen.positions == PROMPT_END and "where" not in wanted:
            chosen = replace(chosen, where=PROMPT_END)
        if not chosen.layers:
            measured = self.measurements(model)
            rows = measured.rows(categories)
            chosen = replace(chosen, layers=tuple(measured.best_layers(chosen.site, chosen.positions, rows)))
        return chosen, by

    @in_turn
    def answer(
        self,
        prompts: Sequence[str | list[dict]] | str | Path,
        setting: Setting | None = None,
        sampling: Sampling = Sampling(),
        model: str | Path | None = None,
        categories: Sequence[str] | None = None,
        directions: Directions | None = None,
        max_tokens: int = 100,
        transfer: bool = False,
    ) -> list[str]:
        """The answers to many prompts (a list, or a file of them), in batches, under a setting; None: unedited.

        Thoughts before an answer are left out.

        `library.score.of(prompts, answers)` is what they score; other arguments as of `suppress`.

        Raises:
            UserError: bad settings, no prompt, an empty prompt, or one that is longer than the model can read.
        """
        check(sampling)
        check_given(Generation, {"max_tokens": max_tokens})
        loaded, intervention = self.load(model), NOTHING
        if setting is not None:
            check(setting)
            intervention, _ = self._intervention(model, setting, categories, directions, transfer)
        token_ids = _encoded(loaded, prompt_texts(prompts), max_tokens)
        answers = write_answers(loaded, token_ids, intervention, max_tokens, sampling)
        texts = [loaded.answer_text(answer) for answer in answers]
        if unfinished := texts.count(None):
            log.warning(
                "%d of %d answers end inside the model's thought and are empty here; raise max_tokens.",
                unfinished, len(texts),
            )  # fmt: skip
        return [text or "" for text in texts]

    @in_turn
    def suppress_and_generate(
        self,
        prompt: str | list[dict],
        model_name: str | Path | None = None,
        scale: float | None = None,
        mode: str = AUTO,
        categories: Sequence[str] | None = None,
        target_layers: Sequence[int] | None = None,
        temperature: float = 0.0,
        max_tokens: int = 100,
        repetition_penalty: float = 1.0,
        proximity_threshold: float | None = None,
        distance_threshold: float | None = None,
        decay_rate: float | None = None,
        pca_components: int | None = None,
        cap_quantile: float | None = None,
        positions: str | None = None,
        site: str | None = None,
        where: str | None = None,
        edit_sinks: bool | None = None,
        directions: Directions | None = None,
        seed: int = 0,
        compare: bool = True,
        ignore_end_tokens: bool = False,
        on_start: Callable[[str, Setting, str], object] = lambda which, setting, by: None,
        on_text: Callable[[str], object] = lambda text: None,
        transfer: bool = False,
        direction_layer: int | None = None,
    ) -> SuppressionResult:
        """Answer a prompt with and without suppression: `suppress`, choosing whatever is not given.

        Args:
            scale: 1 is the mean difference itself; negative values amplify.
            where: "everywhere" or "prompt_end"; by default everywhere, but `add` adds a direction that was
                measured at the prompt's end at that position only.
            direction_layer: its direction is used at all edited layers.
            edit_sinks: edit attention sinks too (default: no).
            directions: use these (imported, say) instead of the model's own; `transfer`: those of a relative, too.
        """
        sampling = Sampling(temperature, repetition_penalty=repetition_penalty, seed=seed)
        layers = tuple(target_layers) if target_layers is not None else None
        setting, by = self.choose(
            model_name, mode, categories, directions,
            scale=scale, layers=layers, positions=positions, site=site, where=where, edit_sinks=edit_sinks,
            proximity_threshold=proximity_threshold, distance_threshold=distance_threshold, decay_rate=decay_rate,
            pca_components=pca_components, cap_quantile=cap_quantile, direction_layer=direction_layer,
        )  # fmt: skip
        result = self.suppress(
            prompt, setting, sampling, model_name, categories, directions, max_tokens, compare, ignore_end_tokens,
            lambda which: on_start(which, setting, by), on_text, transfer,
        )  # fmt: skip
        return replace(result, chosen_by=by)

    @in_turn
    def suppress(
        self,
        prompt: str | list[dict],
        setting: Setting,
        sampling: Sampling = Sampling(),
        model: str | Path | None = None,
        categories: Sequence[str] | None = None,
        directions: Directions | None = None,
        max_tokens: int = 100,
        compare: bool = True,
        ignore_end_tokens: bool = False,
        on_start: Callable[[str], object] = lambda which: None,
        on_text: Callable[[str], object] = lambda text: None,
        transfer: bool = False,
    ) -> SuppressionResult:
        """Answer a prompt with and without a setting.

        Args:
            prompt: a text, or a list of messages {"role": .., "content": ..}.
            categories: of the pairs that the model's own directions come from; None: all.
            directions: use these instead.
            compare: also answer without the edit.
            on_start: called with "before" or "after" before each answer; on_text: with its text, piece by piece.
            transfer: the directions may be those of a relative, a model of the same type and shape.
        Raises:
            UserError: bad settings, or a setting that changes nothing, not even on artifact prompts.
        """

        def write(which: str, loaded: LoadedModel, token_ids: list[list[int]], used: Intervention) -> list[list[int]]:
            on_start(which)
            ends = () if ignore_end_tokens else loaded.end_tokens
            return [write_answer(loaded, token_ids[0], used, max_tokens, sampling, ends, on_text)]

        (result,) = self._suppress(
            prompt_texts([prompt]), setting, sampling, model, categories, directions,
            max_tokens, compare, transfer, write,
        )  # fmt: skip
        return result

    @in_turn
    def suppress_many(
        self,
        prompts: Sequence[str | list[dict]] | str | Path,
        setting: Setting,
        sampling: Sampling = Sampling(),
        model: str | Path | None = None,
        categories: Sequence[str] | None = None,
        directions: Directions | None = None,
        max_tokens: int = 100,
        compare: bool = True,
        ignore_end_tokens: bool = False,
        progress: Callable[[int], object] = lambda tokens: None,
        transfer: bool = False,
    ) -> list[SuppressionResult]:
        """What `suppress` gives for each of many prompts (a list, or a file of them), answered in batches.

        Args:
            progress: called with numbers of tokens: `max_tokens` per prompt, with `compare` twice that.
        """

        def write(which: str, loaded: LoadedModel, token_ids: list[list[int]], used: Intervention) -> list[list[int]]:
            ends = () if ignore_end_tokens else loaded.end_tokens
            return write_answers(loaded, token_ids, used, max_tokens, sampling, ends, progress)

        return self._suppress(
            prompt_texts(prompts), setting, sampling, model, categories, directions,
            max_tokens, compare, transfer, write,
        )  # fmt: skip

    def _suppress(
        self,
        prompts: list[str],
        setting: Setting,
        sampling: Sampling,
        model: str | Path | None,
        categories: Sequence[str] | None,
        directions: Directions | None,
        max_tokens: int,
        compare: bool,
        transfer: bool,
        write: Callable[[str, LoadedModel, list[list[int]], Intervention], list[list[int]]],
    ) -> list[SuppressionResult]:
        """Args: write: ("before" or "after", model, prompts' token ids, edits) -> token ids of the answers."""
        check(setting)
        check(sampling)
        check_given(Generation, {"max_tokens": max_tokens})
        loaded, is_own = self.load(model), directions is None
        token_ids = _encoded(loaded, prompts, max_tokens)
        intervention, directions = self._intervention(model, setting, categories, directions, transfer)
        before = write("before", loaded, token_ids, NOTHING) if compare else None
        after = write("after", loaded, token_ids, intervention)
        proofs = prove_each(loaded, intervention, Sequences(token_ids, after))
        if setting.scale != 0 and not any(proof.touched for proof in proofs):
            self._check_that_it_acts(model, intervention, setting, None if is_own else directions, categories)
        answers = {"before": before, "after": after}
        return results_of(loaded, prompts, token_ids, answers, setting, proofs, directions, self.score, is_own)

    def _intervention(
        self,
        model: str | Path | None,
        setting: Setting,
        categories: Sequence[str] | None,
        directions: Directions | None,
        transfer: bool,
    ) -> tuple[Intervention, Directions]:
        """A setting on a model, with the model's own directions unless others are given."""
        loaded = self.load(model)
        if directions is None:
            directions = self.directions(model, setting.site, setting.positions, categories)
        else:
            directions = fit_to(directions, loaded, transfer)
        if setting.mode == "cap" and directions.natural_tokens is None:
            log.info("Mode cap needs the projections of natural tokens, which the file lacks: measuring the pairs.")
            measured = self.measurements(model)
            directions = measure_natural_tokens(
                loaded, directions, measured.natural_sequences(measured.rows(categories))
            )
        return intervene(loaded, directions, setting), directions

    def _check_that_it_acts(
        self,
        model: str | Path | None,
        intervention: Intervention,
        setting: Setting,
        given: Directions | None,
        categories: Sequence[str] | None,
    ) -> None:
        """Raise UserError unless a setting that did not touch a prompt touches artifact prompts."""
        if given is None:
            measured = self.measurements(model)
            tried = measured.rows(categories)[:ARTIFACTS_TRIED]
            artifacts = Sequences([measured.prompts[i][1] for i in tried], [measured.answers[i][1] for i in tried])
        else:  # without measuring
            prompts = [pair.artifact for pair in self.pairs[:ARTIFACTS_TRIED]]
            artifacts = observe(self.load(model), prompts, COLLECTED_TOKENS).sequences
        if prove(self.load(model), intervention, artifacts).touched == 0:
            raise UserError(
                f"This setting ({setting.describe()}) changes nothing, neither here nor on {self.pairs.sides[1]} "
                "prompts. Use another mode, other layers or another threshold."
            )


def _encoded(loaded: LoadedModel, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """Token ids in the chat format of prompts that fit into the context with their answers."""
    token_ids = loaded.encode(prompts)
    check_context(parse_prompts(prompts, "prompts"), token_ids, max_tokens, loaded.context_length)
    return token_ids


def sweep_file(score: Score | None, wish: Wish) -> str:
    """In a model's cache folder: what sweep_suppression.py chose with a score; None: for fewer refusals."""
    return f"{score.file_name(Path(SWEEP).stem, wish)}.json" if score else SWEEP


def _kept_directions(path: Path) -> Directions:
    try:
        return load_directions(path)
    except UserError as error:
        raise UserError(f"{error} Delete it: it is only kept to save time.") from None


def _checked_against(estimated: Directions, kept: Directions, path: Path) -> Directions:
    """The kept directions, if they are the estimated ones, with the tokens that those have not."""
    for name in ("direction", "natural_mean", "artifact_mean", "spread"):
        mine, theirs = getattr(estimated, name), getattr(kept, name)
        if theirs is None or theirs.shape != mine.shape or not np.allclose(mine, theirs, rtol=1e-3, atol=1e-5):
            raise UserError(f"{path} cannot be used: its {name} is not this model's. Delete it; it is estimated anew.")
    if kept.natural_tokens is None or kept.components is None:
        raise UserError(f"{path} cannot be used: it is not complete. Delete it; it is estimated anew.")
    return kept


def _setting_of_sweep(path: Path) -> Setting:
    """What a sweep has chosen."""
    try:
        setting = Setting.from_record(read_json(path, "sweep")["chosen"]["setting"])
        check(setting)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not what sweep_suppression.py writes ({shown(str(error))}); delete it, and run that "
            "again to have its choice."
        ) from None
    return setting


def suppress_prompt(prompt: str | list[dict], model: str | Path = DEFAULT_MODEL, **settings) -> SuppressionResult:
    """Answer a prompt with and without suppression, print both side by side, and return them.

    Args:
        settings: those of `AlignmentArtifacts.suppress_and_generate`.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    result = AlignmentArtifacts(model).suppress_and_generate(prompt, **settings)
    # Text: square brackets in a prompt or an answer are not markup.
    caption = Text(result.about())
    table = Table(title=Text(readable(result.prompt)), caption=caption, expand=True)
    for heading in ("before", "after"):
        table.add_column(heading, ratio=1)
    table.add_row(Text(result.before or ""), Text(result.after))
    print_every_character()
    Console().print(table)
    return result
