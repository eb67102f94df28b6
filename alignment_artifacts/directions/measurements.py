"""What a model does on the matched pairs, measured once and kept: the cache behind the library.

A folder <model>_<hash> of the cache (`places.cache_folder`) holds what every direction, of any category and position,
can be computed from: one vector per prompt, layer, site and kind of position, summed up while the model answers. The
hash covers the weights, their precision, the tokenised prompts and the settings, so whatever changes is measured
afresh; it alone decides, and a model or an adapter that is renamed finds its folder, with the sweep in it. A collection
that run_model.py has made of the same prompts with the same model is read instead of running the model again. An
interrupted measurement is continued; a second process waits.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import mlx.core as mx
import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.activation_set import (
    AFTER_THOUGHTS,
    POSITIONS,
    ActivationSet,
    layers_first,
    load_activation_set,
    thought_lengths,
)
from alignment_artifacts.blocks import independent_groups
from alignment_artifacts.directions import Site
from alignment_artifacts.directions.estimate import Directions, estimate
from alignment_artifacts.pairs import MAX_EXCLUDED, SIDES, SUBCATEGORY, Pair, PromptPairs, as_pairs
from alignment_artifacts.places import safe_name
from gemma_refactored.activation_capture import layer_sites, read
from gemma_refactored.attention_sinks import FACTOR
from gemma_refactored.chat_template import token_ids_hash
from gemma_refactored.conversation import written
from gemma_refactored.errors import UserError
from gemma_refactored.files import (
    MANIFEST,
    PROMPT_MARKER,
    locked,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from gemma_refactored.generation import collect_answers, collect_means, generate
from gemma_refactored.job import check_context, mean_prompt_embeddings
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.progress import stage
from gemma_refactored.prompt_processing import Prompt
from gemma_refactored.site_names import pattern_of
from gemma_refactored.thoughts import Marks
from gemma_refactored.versions import library_versions

log = logging.getLogger(__name__)
COLLECTED_TOKENS = 20  # of each answer, as in collect_activations.sh
BATCH_SIZE = 100
MEASURED: tuple[Site, ...] = ("mlp", "residual")
MODEL_FACTS = ("model", "model_revision", "model_type", "num_layers", "hidden_size")
# What a collection must have been made with to replace a measurement.
GREEDY = {
    "max_tokens": COLLECTED_TOKENS, "temp": 0, "repetition_penalty": 1, "chat_mode": True, "ignore_end_tokens": False,
    "activation_dtype": "float32", "layout": "grouped",
}  # fmt: skip


@dataclass
class Measurements:
    """One model on the matched pairs.

    Attributes:
        folder: of the cache.
        facts: the model's, and the library versions that it was measured with (None: not recorded).
        sites: kinds of sites that the model has, the default one first.
        pairs: that could be used, in order.
        prompts, answers: token ids, [pair][side]; texts: of the answers, without a thought before them; None where it
            has not ended.
        vectors: (site, positions) -> [pairs, 2 (natural, artifact), layers, hidden] float32, of the sites
            requested so far.
    """

    folder: Path
    facts: dict
    sites: tuple[Site, ...]
    pairs: PromptPairs
    prompts: list[list[list[int]]]
    answers: list[list[list[int]]]
    texts: list[list[str | None]]
    vectors: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    measure_site: Callable[[str], dict[str, np.ndarray]] = field(default=lambda site: {}, repr=False)

    @property
    def categories(self) -> list[str]:
        """Of each pair."""
        return [pair.category for pair in self.pairs]

    def rows(self, categories: Sequence[str] | None = None) -> np.ndarray:
        """Indices of the pairs in these categories (None: all).

        Raises:
            UserError: a category that no pair has.
        """
        for category in categories or []:
            if category not in self.categories:
                raise UserError(
                    f"There is no category {category!r}; there are {', '.join(dict.fromkeys(self.categories))}."
                )
        return np.array([i for i, pair in enumerate(self.pairs) if not categories or pair.category in categories], int)

    def vectors_at(self, site: str, positions: str) -> np.ndarray:
        """[pairs, 2, layers, hidden] float32; measured now if this site has not been requested before."""
        if (site, positions) not in self.vectors:
            if site not in self.sites or positions not in POSITIONS:
                raise UserError(f"site must be one of {', '.join(self.sites)} and positions of {', '.join(POSITIONS)}.")
            self.vectors |= {(site, name): values for name, values in self.measure_site(site).items()}
        vectors = self.vectors[site, positions]
        if missing := int(np.isnan(vectors).any(axis=(2, 3)).sum()):
            raise self._in_thought(missing, f"and nothing can be measured at the positions {positions!r}")
        return vectors

    def _in_thought(self, unfinished: int, so: str) -> UserError:
        return UserError(
            f"{unfinished} of {2 * len(self.pairs)} answers have not left the model's thought after "
            f"{COLLECTED_TOKENS} tokens, {so}; where its chat template can turn thinking off, do so "
            """(--chat-template-args '{"enable_thinking": false}')."""
        )

    def estimate(self, site: str, positions: str, rows: np.ndarray) -> Directions:
        """Directions from some of the pairs."""
        facts = {
            **{name: self.facts[name] for name in (*MODEL_FACTS, "sinks_beyond")},
            "versions": self.facts["versions"],
            "site": site,
            "positions": positions,
            "ends": list(self.pairs.sides),
            "pairs": [f"{self.pairs[i].category}/{self.pairs[i].id}" for i in rows],
        }
        return estimate(self.vectors_at(site, positions)[rows], facts)

    def natural_sequences(self, rows: np.ndarray) -> list[list[int]]:
        """Natural prompts followed by the model's own answers."""
        return [self.prompts[i][0] + self.answers[i][0] for i in rows]

    def best_layers(self, site: str, positions: str, rows: np.ndarray) -> list[int]:
        """Layers that separate held-out pairs (among `rows`) nearly as well as the best one.

        Raises:
            UserError: too few pairs to hold any out.
        """
        pairs = [self.pairs[i] for i in rows]
        groups = independent_groups(pairs)
        if (independent := int(groups.max(initial=-1)) + 1) < st.MIN_PAIRS:
            raise UserError(
                f"Choosing layers needs at least {st.MIN_PAIRS} independent pairs, not {independent}; name the layers."
            )
        return st.separating_layers(self.vectors_at(site, positions)[rows], [p.category for p in pairs], groups)

    def judged(self, judge: Callable[[str, str], bool]) -> np.ndarray:
        """[pairs, 2] bool: what a judge says of each answer to its prompt.

        Raises:
            UserError: some answers end inside the model's thought.
        """
        texts = [text for sides in self.texts for text in sides if text is not None]
        if unfinished := 2 * len(self.pairs) - len(texts):
            raise self._in_thought(unfinished, "so whether they refuse cannot be told")
        prompts = [getattr(pair, side) for pair in self.pairs for side in SIDES]
        return np.array([judge(*both) for both in zip(texts, prompts, strict=True)], bool).reshape(-1, 2)

    def known_answer(self, prompt: Sequence[int], max_tokens: int) -> list[int] | None:
        """The greedy answer of up to `max_tokens` tokens, if the measurement determines it; else None."""
        answer = self._answers_by_prompt.get(tuple(prompt))
        if answer is None or (len(answer) == COLLECTED_TOKENS < max_tokens):  # it may go on
            return None
        return answer[:max_tokens]

    @cached_property
    def _answers_by_prompt(self) -> dict[tuple[int, ...], list[int]]:
        both = zip(self.prompts, self.answers, strict=True)
        return {tuple(p): a for prompts, answers in both for p, a in zip(prompts, answers, strict=True)}


@dataclass(frozen=True)
class Subject:
    """What is to be measured, or has been: a model on some pairs, and the folder of the cache for it."""

    folder: Path
    facts: dict
    prompts: list[Prompt]
    token_ids: list[list[int]]


def subject_of(loaded: LoadedModel, pairs: Sequence[Pair], cache: Path) -> Subject:
    """Nothing is measured to find out."""
    prompts = _prompts(pairs)
    token_ids = loaded.encode([prompt.text for prompt in prompts])
    facts = {
        **loaded.facts(),
        "model_type": loaded.config["model_type"],
        "max_tokens": COLLECTED_TOKENS,
        "sinks_beyond": FACTOR,  # times the norm of ordinary tokens: left out of means
        # Of a model that thinks it is also kept what it does after that.
        **({"thought": [marks.opens, marks.closes]} if (marks := loaded.thought_marks) else {}),
        "pairs": [[p.category, p.id, written(p.natural), written(p.artifact)] for p in pairs],
    }
    # Not the model's name: the same weights under another path are the same model.
    covered = [{**facts, "model": None}, token_ids, list(loaded.end_tokens)]
    digest = hashlib.sha256(json.dumps(covered).encode()).hexdigest()[:12]
    # It is called after the model for people. Where earlier versions made one for each name, the fullest has the sweep.
    found = sorted(cache.glob(f"*_{digest}"), key=lambda folder: (-len(list(folder.iterdir())), folder.name))
    folder = found[0] if found else cache / f"{safe_name(loaded.name)}_{digest}"
    return Subject(folder, facts, prompts, token_ids)


def measure(
    loaded: LoadedModel,
    pairs: Sequence[Pair],
    cache: str | Path,
    show_progress: bool = False,
    collections: Sequence[str | Path] = (),
) -> Measurements:
    """The measurements of a model, from the cache, from a collection, or made now.

    Args:
        collections: folders that may hold this model's activations on these pairs.
    Raises:
        UserError: a damaged cache, or empty answers to more than MAX_EXCLUDED of the pairs (fewer are left out).
    """
    pairs = as_pairs(pairs)
    subject = subject_of(loaded, pairs, Path(cache))
    folder, facts, token_ids = subject.folder, subject.facts, subject.token_ids
    check_context(subject.prompts, token_ids, COLLECTED_TOKENS, loaded.context_length)
    sites, folders = available_sites(loaded), [Path(collection) for collection in collections]
    kept_positions = _kept_positions(loaded.thought_marks)

    def vectors_of(site: str) -> tuple[list[list[int]], dict[str, np.ndarray]]:
        """Answers to all prompts, and vectors [prompts, layers, hidden] by positions."""
        with locked(folder, wait=True):  # a second process waits, and finds everything measured
            _check_or_write_facts(folder / "model_config.json", facts)
            if not _is_measured(folder, site, len(token_ids)):
                for collection in folders:
                    if _matches(collection, loaded, token_ids, site):
                        _take_over(collection, loaded, pairs, token_ids, site, folder, kept_positions)
                        break
            if not _is_measured(folder, site, len(token_ids)):
                missing = [s for s in sites if not _is_measured(folder, s, len(token_ids))]
                _answer(loaded, token_ids, missing, folder, show_progress)
            if not _is_measured(folder, site, len(token_ids)):
                raise _unusable(folder, "some prompts are missing")
            return _load(folder, site, len(token_ids), (loaded.num_layers, loaded.hidden_size), kept_positions)

    # What is there already is enough for answers; other sites are measured when they are requested.
    def is_there(site: str) -> bool:
        return _is_measured(folder, site, len(token_ids)) or any(
            _matches(collection, loaded, token_ids, site) for collection in folders
        )

    first_site = next(filter(is_there, sites), sites[0])
    answers, vectors = vectors_of(first_site)
    rows = [i for i in range(len(pairs)) if answers[i] and answers[i + len(pairs)]]
    _tell_left_out(loaded.name, [pair for i, pair in enumerate(pairs) if i not in set(rows)], len(pairs))

    def by_pair(vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        paired = {p: np.stack([v[: len(pairs)][rows], v[len(pairs) :][rows]], axis=1) for p, v in vectors.items()}
        if not all(np.isfinite(paired[positions]).all() for positions in _kept_positions(None)):
            raise _unusable(folder, "it holds NaN or infinite values")
        return paired

    def both_sides(items: list) -> list[list]:
        return [[items[i], items[i + len(pairs)]] for i in rows]

    return Measurements(
        folder=folder,
        facts={**facts, "versions": read_json(folder / "model_config.json", "description of a model").get("versions")},
        sites=sites,
        pairs=pairs.only(rows),
        prompts=both_sides(token_ids),
        answers=both_sides(answers),
        texts=both_sides([loaded.answer_text(answer) for answer in answers]),
        vectors={(first_site, positions): v for positions, v in by_pair(vectors).items()},
        measure_site=lambda site: by_pair(vectors_of(site)[1]),
    )


def _tell_left_out(model: str, missing: list[Pair], total: int) -> None:
    """Name the pairs that got an empty answer; stop if they are too many."""
    if not missing:
        return
    if len(missing) == total:
        raise UserError(f"{model} answers no pair of prompts: every answer is empty.")
    names = ", ".join(f"{pair.category}/{pair.id}" for pair in missing[:10]) + (", .." if len(missing) > 10 else "")
    counted = f"{len(missing)} of {total} pairs ({names})"
    if len(missing) > MAX_EXCLUDED * total:
        raise UserError(
            f"{model} gives an empty answer to {counted}, more than the {MAX_EXCLUDED:.0%} that may be left out; use "
            "another model, or a pairs file without them."
        )
    log.warning("Left out because of an empty answer: %s.", counted)


def available_sites(loaded: LoadedModel) -> tuple[Site, ...]:
    """The kinds of sites that every block has: the residual stream, and before it the MLP where it has that name."""
    kinds: list[Site] = []
    for kind in MEASURED:
        try:
            layer_sites(loaded.model, kind)
        except UserError:
            continue
        kinds.append(kind)
    return tuple(kinds)


def _kept_positions(marks: Marks | None) -> tuple[str, ...]:
    """Those that are not by definition the same as others."""
    return POSITIONS if marks else tuple(name for name in POSITIONS if name not in AFTER_THOUGHTS)


def _prompts(pairs: Sequence[Pair]) -> list[Prompt]:
    """Natural ones first, as in the prompts file of the experiment."""
    return [Prompt(pair.group(side), SUBCATEGORY, 1, getattr(pair, side)) for side in SIDES for pair in pairs]


# In the cache a file `<sites>_<batch>.safetensors` holds "<site>.<positions>" [rows, layers, hidden] and "rows", the
# prompts' numbers; their answers are its metadata.


def _parts(folder: Path, site: str) -> list[Path]:
    return [path for path in folder.glob("*_*.safetensors") if site in path.stem.split("_")]


def _unusable(path: Path, why: str) -> UserError:
    folder = path if path.is_dir() else path.parent
    return UserError(f"What is kept in {path} cannot be used: {why}. Delete {folder.name}; it is measured anew.")


def _check_or_write_facts(path: Path, facts: dict) -> None:
    """Whose measurements these are, for people and as a check."""
    if not path.exists():
        write_json(path, {**facts, "versions": library_versions()})
        return
    try:
        kept = read_json(path, "cache file")
    except UserError as error:
        raise _unusable(path, str(error).removesuffix(".")) from None
    names = [name for name in facts if name != "model"]
    if not isinstance(kept, dict) or any(kept.get(name) != facts[name] for name in names):
        raise _unusable(path, "it describes something else")


def _read_part(path: Path) -> tuple[dict[str, mx.array], list[int], list[list[int]]]:
    """Arrays, the numbers of their prompts, and the answers to these."""
    try:
        arrays, metadata = read_safetensors(path)
        rows, answers = np.array(arrays["rows"]).tolist(), json.loads(metadata["answers"])
        tokens = [token for answer in answers for token in answer]
        if len(answers) != len(rows) or not all(isinstance(number, int) and number >= 0 for number in rows + tokens):
            raise ValueError("rows and answers do not belong together")
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise _unusable(path, f"it is damaged ({str(error)[:100]})") from None
    return arrays, rows, answers


def _is_measured(folder: Path, site: str, prompts: int) -> bool:
    return {row for path in _parts(folder, site) for row in _read_part(path)[1]} == set(range(prompts))


def _load(
    folder: Path, site: str, prompts: int, shape: tuple[int, int], kept_positions: Sequence[str]
) -> tuple[list[list[int]], dict[str, np.ndarray]]:
    """Answers to all prompts, and vectors [prompts, layers, hidden] by positions; `shape` is (layers, hidden)."""
    answers: list[list[int]] = [[] for _ in range(prompts)]
    vectors = {positions: np.zeros((prompts, *shape), np.float32) for positions in kept_positions}
    for path in _parts(folder, site):
        arrays, rows, written = _read_part(path)
        for positions in kept_positions:
            part = arrays.get(f"{site}.{positions}")
            if part is None or part.shape != (len(rows), *shape) or part.dtype != mx.float32:
                raise _unusable(path, f"it lacks {site}.{positions} of some prompts, or has it of another model")
            vectors[positions][rows] = np.array(part)
        for row, answer in zip(rows, written, strict=True):
            answers[row] = answer
    return answers, {
        positions: vectors.get(positions, vectors[AFTER_THOUGHTS.get(positions, positions)]) for positions in POSITIONS
    }


def _write_part(path: Path, rows: Sequence[int], answers: list[list[int]], vectors: dict[str, np.ndarray]) -> None:
    arrays = {name: mx.array(values) for name, values in vectors.items()}
    write_safetensors(path, {**arrays, "rows": mx.array(list(rows))}, {"answers": json.dumps(answers)})


def _answer(
    loaded: LoadedModel, token_ids: list[list[int]], kinds: list[Site], folder: Path, show_progress: bool
) -> None:
    """Run the model and keep every batch when it is done; batches kept earlier are not run again."""
    sites = [site for kind in kinds for site in layer_sites(loaded.model, kind)]
    batches = loaded.batches(token_ids, BATCH_SIZE)
    total = len(token_ids) * COLLECTED_TOKENS
    with stage("measuring", total, "token", quiet=not show_progress) as advance:
        for number, batch in enumerate(batches, 1):
            path = folder / f"{'_'.join(kinds)}_{number}.safetensors"
            if path.exists():
                advance(len(batch) * COLLECTED_TOKENS, kept=True)
                continue
            rows = [token_ids[i] for i in batch]
            steps = generate(
                loaded.model, rows, COLLECTED_TOKENS, end_tokens=loaded.end_tokens, sites=sites, row_ids=batch
            )
            answers, means = collect_means(
                steps, sites, advance, loaded.thought_tokens if loaded.thought_marks else None
            )
            vectors = {
                f"{kind}.{positions}": part
                for positions, values in means.items()
                for kind, part in zip(kinds, np.split(values, len(kinds), axis=1), strict=True)
            }
            _leave_out_sinks(loaded, rows, answers, vectors)
            _write_part(path, batch, answers, vectors)


def _leave_out_sinks(
    loaded: LoadedModel, prompts: list[list[int]], answers: list[list[int]], vectors: dict[str, np.ndarray]
) -> None:
    """Take the means of answers that have attention sinks again, without these. (A sink at the prompt's end stays:
    there is no other token to measure.)

    Args:
        vectors: "<site>.<positions>" -> [prompts, layers, hidden], changed in place.
    """
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    ends = [len(prompt) - 1 for prompt in prompts]
    kept = [np.setdiff1d(np.arange(end + 1, len(text)), sinks)
            for end, text, sinks in zip(ends, texts, loaded.sinks(texts), strict=True)]  # fmt: skip
    rows = [i for i, answer in enumerate(answers) if 0 < len(kept[i]) < len(answer)]
    for kind in {name.split(".")[0] for name in vectors} if rows else ():
        for number, states in read(loaded.model, [texts[i] for i in rows], layer_sites(loaded.model, kind)):
            i = rows[number]
            vectors[f"{kind}.generated"][i] = states[kept[i]].mean(axis=0, dtype=np.float64)
            vectors[f"{kind}.all"][i] = states[[ends[i], *kept[i]]].mean(axis=0, dtype=np.float64)
            thought = loaded.thought_tokens(answers[i])
            if f"{kind}.answer" in vectors and thought is not None:
                after = kept[i][kept[i] > ends[i] + thought]
                if len(after):
                    vectors[f"{kind}.answer"][i] = states[after].mean(axis=0, dtype=np.float64)


def _matches(collection: Path, loaded: LoadedModel, token_ids: list[list[int]], site: str) -> bool:
    """Does a collection hold what measuring this site of the model would give?"""
    path = collection / MANIFEST
    if not path.exists():
        return False
    manifest = read_json(path, "manifest")
    expected = {
        **{name: value for name, value in loaded.facts().items() if name != "model"},
        **GREEDY,
        "token_ids_hash": token_ids_hash(token_ids),
    }
    return (
        all(manifest.get(name) == value for name, value in expected.items())
        and not manifest.get("logit_bias")
        and len(manifest.get("complete", ())) == len(token_ids)
        and set(layer_sites(loaded.model, site)) <= set(manifest.get("sites", ()))
    )


def _take_over(
    collection: Path,
    loaded: LoadedModel,
    pairs: list[Pair],
    token_ids: list[list[int]],
    site: str,
    folder: Path,
    kept_positions: Sequence[str],
) -> None:
    """Sum up a collection on disk, unless it lacks a pair that has answers on both sides."""
    markers = [collection / prompt.folder / PROMPT_MARKER for prompt in _prompts(pairs)]
    answers = [read_json(marker, "prompt marker")["token_ids"] for marker in markers]
    data = load_activation_set(collection, pairs, key_pattern=pattern_of(layer_sites(loaded.model, site)[0]))
    rows = [i for i in range(len(pairs)) if answers[i] and answers[i + len(pairs)]]
    if data.pairs != [pairs[i] for i in rows]:
        return
    vectors = {}
    for positions in kept_positions:
        by_pair = data.prompt_vectors(positions)
        vectors[f"{site}.{positions}"] = np.full((2, len(pairs), *by_pair.shape[2:]), np.nan, np.float32)
        vectors[f"{site}.{positions}"][:, rows] = by_pair.swapaxes(0, 1)
    flat = {name: values.reshape(-1, *values.shape[2:]) for name, values in vectors.items()}
    _leave_out_sinks(loaded, token_ids, answers, flat)
    _write_part(folder / f"{site}_1.safetensors", range(2 * len(pairs)), answers, flat)


def activation_set(
    loaded: LoadedModel, measured: Measurements, site: str, progress: Callable[[int], object] = lambda tokens: None
) -> ActivationSet:
    """Every step of the measured pairs at one site, as for a collection; runs the model again."""
    names = layer_sites(loaded.model, site)
    token_ids = [prompts[side] for prompts in measured.prompts for side in range(2)]
    shape = (len(measured.pairs), 2, COLLECTED_TOKENS + 1, len(names), loaded.hidden_size)
    values, valid = layers_first(shape, measured.folder), np.zeros(shape[:3], bool)
    for batch in loaded.batches(token_ids, BATCH_SIZE):
        pair, side = np.divmod(batch, 2)

        def kept(steps: Iterator, pair: np.ndarray = pair, side: np.ndarray = side) -> Iterator:
            for step in steps:
                states = np.concatenate([np.asarray(step.activations[name]) for name in names], axis=1)
                values[pair[step.active], side[step.active], step.index + 1] = states[step.active]
                valid[pair, side, step.index + 1] = step.active
                yield step

        rows = [token_ids[i] for i in batch]
        steps = generate(loaded.model, rows, COLLECTED_TOKENS, end_tokens=loaded.end_tokens, sites=names, row_ids=batch)
        collect_answers(kept(steps), progress)
    texts = [getattr(pair, side) for pair in measured.pairs for side in SIDES]
    embeddings = mean_prompt_embeddings(loaded, texts).reshape(len(measured.pairs), 2, -1)
    thoughts = thought_lengths([[loaded.thought_tokens(answer) for answer in both] for both in measured.answers])
    return ActivationSet(
        pairs=measured.pairs,
        values=values,
        valid=valid,
        prompt_embeddings=embeddings,
        excluded=[],
        manifest=measured.facts,
        folder=measured.folder,
        site=pattern_of(names[0]),
        thoughts=thoughts,
    )
