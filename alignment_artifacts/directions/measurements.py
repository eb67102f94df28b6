"""What a model does on the matched pairs, measured once and kept: the cache behind the library.

A folder <model>_<hash> of the cache (`places.cache_folder`) holds what every direction, of any category and
position, can be computed from: one vector a prompt, layer, site and kind of position. That is a
fiftieth of the activations themselves, which are deleted once they are summed up. The hash covers
the weights, their precision, the tokenised prompts and the settings, so that anything that
changes is measured anew. An interrupted collection is continued; a second process waits.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from alignment_artifacts import separation as st
from alignment_artifacts.activation_set import POSITIONS, load_activation_set
from alignment_artifacts.analysis import Settings, analyse
from alignment_artifacts.behaviour.refusal import is_refusal
from alignment_artifacts.directions.estimate import Directions, estimate
from alignment_artifacts.pairs import SIDES, SUBCATEGORY, Pair
from gemma_refactored.activation_capture import SITE_KINDS, layer_sites
from gemma_refactored.distributed import Team
from gemma_refactored.errors import UserError
from gemma_refactored.files import read_json, write_json, write_safetensors
from gemma_refactored.generation import Sampling
from gemma_refactored.job import Job, answer_prompts, check_context, open_collection, plan_batches
from gemma_refactored.manifest import new_manifest
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.npz_writer import NpzWriter
from gemma_refactored.prompt_processing import Prompt, encode_prompts

COLLECTED_TOKENS = 20  # of each answer, as in collect_activations.sh
BATCH_SIZE = 100
MODEL_FACTS = ("model", "model_revision", "model_type", "num_layers", "hidden_size")


@dataclass
class Measurements:
    """One model on the matched pairs.

    Attributes:
        folder: of the cache.
        facts: the model's.
        pairs: that could be used, in order.
        vectors: (site, positions) -> [pairs, 2 (natural, artifact), layers, hidden] float32.
        prompts, answers: token ids, [pair][side].
        refused: bool [pairs, 2].
        analysis: site -> what `analysis.analyse` says.
    """

    folder: Path
    facts: dict
    pairs: list[Pair]
    vectors: dict[tuple[str, str], np.ndarray]
    prompts: list[list[list[int]]]
    answers: list[list[list[int]]]
    refused: np.ndarray
    analysis: dict[str, dict]

    def rows(self, categories: list[str] | None = None) -> np.ndarray:
        """Indices of the pairs in these categories (None: all).

        Raises:
            UserError: a category that no pair has.
        """
        known = list(dict.fromkeys(pair.category for pair in self.pairs))
        for category in categories or []:
            if category not in known:
                raise UserError(f"There is no category {category!r}; there are {', '.join(known)}.")
        return np.array([i for i, pair in enumerate(self.pairs) if not categories or pair.category in categories])

    def vectors_at(self, site: str, positions: str) -> np.ndarray:
        if (site, positions) not in self.vectors:
            there = sorted({kind for kind, _ in self.vectors})
            raise UserError(f"site must be one of {', '.join(there)} and positions of {', '.join(POSITIONS)}.")
        return self.vectors[site, positions]

    def estimate(self, site: str, positions: str, rows: np.ndarray) -> Directions:
        """Directions from some of the pairs."""
        facts = {
            **{name: self.facts[name] for name in MODEL_FACTS},
            "site": site,
            "positions": positions,
            "pairs": [f"{self.pairs[i].category}/{self.pairs[i].id}" for i in rows],
        }
        return estimate(self.vectors_at(site, positions)[rows], facts)

    def natural_sequences(self, rows: np.ndarray) -> list[list[int]]:
        """Natural prompts followed by the model's own answers."""
        return [self.prompts[i][0] + self.answers[i][0] for i in rows]

    def best_layers(self, site: str, positions: str, rows: np.ndarray) -> list[int]:
        """Layers that separate held-out pairs (among `rows`) nearly as well as the best one."""
        if len(rows) < st.MIN_PAIRS:
            raise UserError(f"Choosing layers needs at least {st.MIN_PAIRS} pairs, not {len(rows)}; name the layers.")
        return st.separating_layers(self.vectors_at(site, positions)[rows], [self.pairs[i].category for i in rows])


def measure(loaded: LoadedModel, pairs: list[Pair], cache: Path, show_progress: bool = False) -> Measurements:
    """The measurements of a model, from the cache or made now."""
    prompts = [Prompt(pair.group(side), SUBCATEGORY, 1, getattr(pair, side)) for side in SIDES for pair in pairs]
    token_ids = encode_prompts(loaded.tokenizer, [prompt.text for prompt in prompts])
    check_context(prompts, token_ids, COLLECTED_TOKENS, loaded.context_length)
    config = {
        **loaded.facts(),
        "model_type": loaded.config["model_type"],
        "max_tokens": COLLECTED_TOKENS,
        "pairs": [[p.category, p.id, p.natural, p.artifact] for p in pairs],
    }
    # Not the model's name: the same weights under another path are the same model.
    covered = [{**config, "model": None}, token_ids, list(loaded.end_tokens)]
    digest = hashlib.sha256(json.dumps(covered).encode()).hexdigest()[:12]
    folder = cache / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', loaded.name)}_{digest}"
    finished = folder / "analysis_results.json"  # written last
    if not finished.exists():
        with _locked(folder):
            if not finished.exists():  # another process may have finished it while we waited
                write_json(folder / "model_config.json", config)
                _collect(loaded, pairs, prompts, token_ids, folder, show_progress)
    return _load(folder, pairs, token_ids, config)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also when the process dies
        yield


def _collect(
    loaded: LoadedModel,
    pairs: list[Pair],
    prompts: list[Prompt],
    token_ids: list[list[int]],
    folder: Path,
    show_progress: bool,
) -> None:
    """Collect the activations as run_model.py would, sum them up, delete them."""
    sites = {}
    for site in SITE_KINDS:
        try:
            sites[site] = layer_sites(loaded.model, site)
        except UserError:
            continue  # blocks without an MLP of that name: the residual stream alone
    names = [name for kind in sites.values() for name in kind]
    job = Job(prompts, token_ids, COLLECTED_TOKENS, BATCH_SIZE, Sampling(), loaded.end_tokens, names)
    settings = {"max_tokens": COLLECTED_TOKENS, "sites": names}
    activations = folder / "activations"
    collection = open_collection(
        job, activations, new_manifest(loaded.facts(), settings, prompts), grouped=True, overwrite=False, team=Team()
    )
    answer_prompts(job, loaded, plan_batches(job, loaded, Team(), grouped=True), collection, NpzWriter(), show_progress)
    arrays, analysis = {}, {}
    for site, kind in sites.items():
        pattern = re.sub(r"\.\d+\.", ".{layer_idx}.", kind[0], count=1)
        data = load_activation_set(activations, pairs, key_pattern=pattern)
        for positions in POSITIONS:
            arrays[f"{site}.{positions}"] = mx.array(data.prompt_vectors(positions))
        analysis[site] = analyse(data, Settings(), {"site": site})
        kept = [[pair.category, pair.id] for pair in data.pairs]
    write_safetensors(folder / "prompt_vectors.safetensors", arrays)
    done = collection.finished_answers(prompts)
    by_side = [[done[prompt] for prompt in prompts[i * len(pairs) : (i + 1) * len(pairs)]] for i in range(2)]
    write_json(folder / "answers.json", [dict(zip(SIDES, two, strict=True)) for two in zip(*by_side, strict=True)])
    write_json(folder / "analysis_results.json", {"pairs": kept, **analysis})
    shutil.rmtree(activations)


def _load(folder: Path, pairs: list[Pair], token_ids: list[list[int]], config: dict) -> Measurements:
    analysis = read_json(folder / "analysis_results.json", "analysis")
    kept = {tuple(name) for name in analysis.pop("pairs")}
    rows = [i for i, pair in enumerate(pairs) if (pair.category, pair.id) in kept]
    records = read_json(folder / "answers.json", "answers")
    try:
        arrays = mx.load(str(folder / "prompt_vectors.safetensors"))
    except RuntimeError as error:
        raise UserError(f"The cache {folder} is damaged ({error}); delete that folder.") from None
    return Measurements(
        folder=folder,
        facts=config,
        pairs=[pairs[i] for i in rows],
        vectors={tuple(name.split(".")): np.array(value) for name, value in arrays.items()},
        prompts=[[token_ids[i + side * len(pairs)] for side in range(2)] for i in rows],
        answers=[[records[i][side]["token_ids"] for side in SIDES] for i in rows],
        refused=np.array([[is_refusal(records[i][side]["text"]) for side in SIDES] for i in rows]),
        analysis=analysis,
    )
