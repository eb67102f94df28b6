"""A folder of collected activations: its layout, its manifest, and which prompts in it are complete.

Grouped: DIR/GROUP/SUBCATEGORY/batch_N/ holds one prompt's steps and, once they are all on
disk, a `prompt.json` with its answer. Flat: DIR/batch_N/ holds all rows of a forward pass,
and `batch.json` names them. Only folders with their marker count, so an interrupted run
continues where it stopped. `manifest.json` says what made the files.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .activation_capture import ATTENTION_WEIGHTS, weights_of_row
from .conversation import written
from .errors import UserError
from .files import (
    BATCH_MARKER,
    CERTIFICATE,
    LOCK,
    MANIFEST,
    PROMPT_EMBEDDING,
    PROMPT_MARKER,
    TEMPORARY,
    read_json,
    step_file,
    write_json,
)
from .generation import Step
from .manifest import FREE_SETTINGS
from .npz_files import NpzWriter
from .prompt_processing import Prompt

NEUTRAL = (CERTIFICATE, LOCK)  # may be in a folder that is not a collection yet


@dataclass
class Answer:
    """What became of one prompt."""

    prompt: Prompt
    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str  # "stop" (end token) or "length"
    thought_tokens: int | None = 0  # at its beginning, before what answers the prompt; None: the thought has not ended

    def record(self) -> dict:
        return {
            "group": self.prompt.group,
            "subcategory": self.prompt.subcategory,
            "prompt": written(self.prompt.text),
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "thought_tokens": self.thought_tokens,
        }


class Collection:
    """Open (or continue) a collection and write into it.

    Args:
        grouped: one folder per prompt; else one per batch.
        overwrite: start over if the folder holds a collection with other settings.
    Raises:
        UserError: the folder holds a collection made with other settings.
    """

    def __init__(self, folder: Path, manifest: dict, grouped: bool, overwrite: bool = False):
        self.folder, self.manifest, self.grouped = folder, manifest, grouped
        path = folder / MANIFEST
        if path.exists() and overwrite:
            self._remove_old()
        elif path.exists():
            self._check_same_settings(read_json(path, "manifest"))
        elif folder.exists() and any(f.name not in NEUTRAL and f.suffix != TEMPORARY for f in folder.iterdir()):
            raise UserError(
                f"{folder} is not empty and has no {MANIFEST}, so it is not a collection; choose another folder."
            )
        for half_written in folder.rglob(f".*{TEMPORARY}"):
            half_written.unlink()
        self._save_manifest()

    def _remove_old(self) -> None:
        """Delete the files of a collection, and nothing else in the folder."""
        batches = {f.parent for name in (step_file("*"), PROMPT_MARKER, BATCH_MARKER) for f in self.folder.rglob(name)}
        for batch in batches:
            shutil.rmtree(batch)
            for parent in batch.parents:
                if parent == self.folder or any(parent.iterdir()):
                    break
                parent.rmdir()

    def _check_same_settings(self, old: dict) -> None:
        new = json.loads(json.dumps(self.manifest))
        if old.get("model_revision") != new.get("model_revision"):
            models = [f"{m.get('model', 'an unknown model')} ({m.get('model_revision')})" for m in (old, new)]
            raise UserError(
                f"{self.folder} holds activations of {models[0]}, not of {models[1]}. Name another folder "
                "(--activations-dir or ACTIVATIONS_DIR), move this one away, or start over with --overwrite."
            )
        names = [n for n in {**old, **new} if n not in FREE_SETTINGS or (n == "batch_size" and not self.grouped)]
        differences = [text for n in names for text in _differences(n, old.get(n), new.get(n))]
        if differences:
            raise UserError(
                f"{self.folder} holds a collection made with other settings ({'; '.join(differences)}). "
                "Choose another --activations-dir, or start over with --overwrite."
            )
        self.manifest["created"] = old.get("created")

    def _save_manifest(self) -> None:
        write_json(self.folder / MANIFEST, self.manifest)

    def finished_answers(self, prompts: Sequence[Prompt]) -> dict[Prompt, dict]:
        """The records of prompts that are complete on disk, from an earlier run."""
        done = {}
        if self.grouped:
            for prompt in prompts:
                marker = self.folder / prompt.folder / PROMPT_MARKER
                if marker.exists():
                    done[prompt] = read_json(marker, "prompt marker")
            return done
        by_place = {(p.group, p.subcategory, p.number): p for p in prompts}
        for marker in self.folder.glob(f"batch_*/{BATCH_MARKER}"):
            for row in read_json(marker, "batch marker")["rows"]:
                prompt = by_place[row["group"], row["subcategory"], row.pop("number")]
                del row["valid_steps"]
                done[prompt] = row
        return done

    def write_steps(
        self,
        writer: NpzWriter,
        steps: Iterable[Step],
        prompts: Sequence[Prompt],
        pending: np.ndarray,
        batch_number: int,
    ) -> Iterator[Step]:
        """Pass on the steps of a batch, each queued for writing.

        Args:
            pending: [rows] false for prompts that an earlier run has completed.
        """
        for step in steps:
            self._write_step(writer, step, prompts, step.active & pending, batch_number)
            yield step

    def _write_step(
        self, writer: NpzWriter, step: Step, prompts: Sequence[Prompt], wanted: np.ndarray, batch_number: int
    ) -> None:
        """Queue the files of one forward pass, of the rows that are wanted (flat: zeros for the others)."""
        if not wanted.any():
            return
        arrays = {site: np.asarray(array) for site, array in step.activations.items()}
        name = step_file(step.name)
        if self.grouped:
            rows = np.flatnonzero(wanted).tolist()
            folders = [prompts[row].folder for row in rows]
            if any(site.endswith(ATTENTION_WEIGHTS) for site in arrays):  # each row has its own number of keys
                for row, folder in zip(rows, folders, strict=True):
                    single = {site: _of_row(site, array, row, step.lengths[row]) for site, array in arrays.items()}
                    writer.put(single, {self.folder / folder / name: slice(None)})
                return
            if not wanted.all():
                arrays = {site: array[wanted] for site, array in arrays.items()}
            writer.put(arrays, {self.folder / f / name: slice(row, row + 1) for row, f in enumerate(folders)})
            return
        arrays = {
            site: np.where(wanted.reshape(-1, *[1] * (array.ndim - 1)), array, 0) for site, array in arrays.items()
        }
        writer.put(arrays, {self.folder / f"batch_{batch_number}" / name: slice(None)})

    def finish_batch(
        self, writer: NpzWriter, answers: Sequence[Answer], embeddings: np.ndarray, batch_number: int
    ) -> None:
        """Queue what marks the batch's prompts as complete, behind their activations.

        Args:
            embeddings: [rows, hidden] mean token embedding of each prompt's text.
        """
        means = {"prompt_embedding": embeddings[:, None]}
        if self.grouped:
            folders = [self.folder / answer.prompt.folder for answer in answers]
            writer.put(means, {f / PROMPT_EMBEDDING: slice(row, row + 1) for row, f in enumerate(folders)})
            markers = {f / PROMPT_MARKER: answer.record() for f, answer in zip(folders, answers, strict=True)}

            def mark() -> None:
                for path, record in markers.items():
                    write_json(path, record)

            writer.run_after(mark)
            return
        folder = self.folder / f"batch_{batch_number}"
        writer.put(means, {folder / PROMPT_EMBEDDING: slice(None)})
        rows = [{**a.record(), "number": a.prompt.number, "valid_steps": len(a.token_ids)} for a in answers]
        writer.run_after(lambda: write_json(folder / BATCH_MARKER, {"rows": rows}))

    def finish(self, done: Iterable[Prompt]) -> None:
        """Record in the manifest which prompts are complete."""
        self.manifest["complete"] = sorted(f"{p.group}/{p.subcategory}/{p.number}" for p in done)
        self.manifest["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._save_manifest()


def _of_row(site: str, array: np.ndarray, row: int, length: int) -> np.ndarray:
    return weights_of_row(array, row, length) if site.endswith(ATTENTION_WEIGHTS) else array[row : row + 1]


def _differences(name: str, old, new) -> list[str]:
    """What differs, by name; in the model's identity only the parts that do."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [text for key in {**old, **new} for text in _differences(f"{name} {key}", old.get(key), new.get(key))]
    return [] if old == new else [f"{name}: {old!r} -> {new!r}"]
