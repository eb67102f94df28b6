"""What a run will take, before it starts: files, bytes, minutes."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .activation_capture import ATTENTION_WEIGHTS, layer_of, site_shapes
from .configuration import Saving
from .distributed import Team
from .errors import UserError
from .generation import Step, collect_answers, generate
from .job import Job, plan_batches
from .model_loading import LoadedModel
from .npz_files import compressed_npz, npz
from .progress import duration
from .prompt_cache import make_batch_cache

log = logging.getLogger(__name__)

LARGE = 1e9  # bytes; so much is announced
PROBES = 32  # number of prompts to try
ZIP_AND_MARKER = 1000  # bytes per prompt in addition to its steps and its answer
FILES_BESIDE_STEPS = 2  # the embedding of the prompt, and the marker


@dataclass
class Estimate:
    """Of the prompts that are not complete yet; `steps` are forward passes of single prompts, prefill included."""

    prompts: int
    steps: float
    files: float
    bytes: float
    seconds: float

    def describe(self) -> str:
        return (
            f"{self.prompts} prompts, about {self.steps:.0f} steps in {self.files:.0f} files, "
            f"{self.bytes / 1e6:.1f} MB, {duration(self.seconds)}."
        )


def step_bytes(job: Job, loaded: LoadedModel, dtype: str) -> int:
    """Size of one prompt's file for one step, uncompressed."""
    shapes, windows = site_shapes(loaded.model), make_batch_cache(loaded.model, [0])
    longest = max(map(len, job.token_ids)) + job.max_tokens

    def shape(site: str) -> tuple[int, ...]:
        if site.endswith(ATTENTION_WEIGHTS):  # at most
            return (1, shapes[site][1], 1, min(longest, getattr(windows[layer_of(site)], "max_size", longest)))
        return (1, 1, *shapes[site][2:])

    return len(npz({site: np.zeros(shape(site), dtype) for site in job.sites}))


def announce_size(job: Job, loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Say what is large, before anything is written, should every answer use all its tokens.

    Raises:
        UserError: the run would not fit on the disk.
    """
    pending = sum(map(job.is_pending, range(len(job.prompts))))
    needed = pending * ((job.max_tokens + 1) * step_bytes(job, loaded, dtype) + ZIP_AND_MARKER)
    free = shutil.disk_usage(folder).free
    if LARGE < needed <= free:
        log.info(
            "This run may write %.1f GB: %d sites of up to %d steps of %d prompts. A narrower --activation-filter, "
            "fewer --max-tokens or --activation-dtype float16 write less.",
            needed / 1e9, len(job.sites), job.max_tokens + 1, pending,
        )  # fmt: skip
    if needed > free:
        raise UserError(
            f"The run may write {needed / 1e6:,.0f} MB, but {folder} has room for {free / 1e6:,.0f} MB. Free some "
            "space, or choose another --activations-dir, fewer --max-tokens, a narrower --activation-filter or "
            "--activation-dtype float16."
        )


def estimate(job: Job, loaded: LoadedModel, saving: Saving) -> Estimate:
    """Answer some of the prompts, of all lengths, and extrapolate."""
    batches = [batch for _, batch in plan_batches(job, loaded, Team(), saving.process_by_group)]
    pending = sorted(filter(job.is_pending, range(len(job.prompts))), key=lambda i: len(job.token_ids[i]))
    if not pending:
        return Estimate(0, 0, 0, 0, 0)
    tried = [pending[i] for i in np.unique(np.linspace(0, len(pending) - 1, PROBES).astype(int))]
    start = time.perf_counter()
    answers, bytes_per_step = try_out(job, loaded, tried, saving)
    seconds = time.perf_counter() - start

    steps = {i: 1 + len(answer) for i, answer in zip(tried, answers, strict=True)}  # prefill, and one per token
    if saving.process_by_group:
        all_steps = len(pending) * float(np.mean(list(steps.values())))
        files = all_steps + len(pending) * FILES_BESIDE_STEPS
    else:  # the rows of a batch are all written until the last of them has ended
        longest = max(steps.values())
        steps_of_batches = [max(steps.get(i, longest) for i in batch) for batch in batches]
        all_steps = sum(n * len(batch) for n, batch in zip(steps_of_batches, batches, strict=True))
        files = sum(n + FILES_BESIDE_STEPS for n in steps_of_batches)
    texts = [json.dumps([answer, loaded.tokenizer.decode(answer)], indent=1) for answer in answers]
    marker = np.mean([len(text) + len(job.prompts[i].text) for i, text in zip(tried, texts, strict=True)]) + 200
    embedding = len(npz({"prompt_embedding": np.zeros((1, 1, loaded.hidden_size), np.float32)}))
    return Estimate(
        prompts=len(pending),
        steps=all_steps,
        files=files,
        bytes=float(all_steps * bytes_per_step + len(pending) * (marker + embedding)),
        seconds=seconds * len(pending) / len(tried),
    )


def try_out(job: Job, loaded: LoadedModel, rows: list[int], saving: Saving) -> tuple[list[list[int]], float]:
    """Answers of some prompts, and the mean size of one prompt's file of one step."""
    to_bytes = compressed_npz if saving.compress_activations else npz
    sizes = []

    def weigh(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            first = {site: np.asarray(x)[:1].astype(saving.activation_dtype) for site, x in step.activations.items()}
            sizes.append(len(to_bytes(first)))
            yield step

    token_ids = [job.token_ids[i] for i in rows]
    passes = generate(loaded.model, token_ids, job.max_tokens, job.sampling, job.end_tokens, job.sites, row_ids=rows)
    return collect_answers(weigh(passes)), float(np.mean(sizes))
