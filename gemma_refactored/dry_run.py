"""What a run will take, before it starts: files, bytes, minutes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .activation_capture import site_shapes
from .errors import UserError
from .generation import Step, collect_answers, generate
from .job import Job
from .model_loading import LoadedModel
from .npz_files import compressed_npz, npz

PROBES = 32  # prompts that are tried
ZIP_AND_MARKER = 1000  # bytes a prompt beside its steps and its answer


@dataclass
class Estimate:
    """Of the prompts that are not complete yet; `steps` are forward passes of single prompts, prefill included."""

    prompts: int
    steps: float
    files: float
    bytes: float
    seconds: float

    def describe(self) -> str:
        duration = f"{self.seconds:.0f} seconds" if self.seconds < 90 else f"{self.seconds / 60:.0f} minutes"
        return (
            f"{self.prompts} prompts, about {self.steps:.0f} steps in {self.files:.0f} files, "
            f"{self.bytes / 1e6:.1f} MB, {duration}."
        )


def step_bytes(job: Job, loaded: LoadedModel, dtype: str) -> int:
    """Of one prompt's file of one step, not compressed."""
    widths = site_shapes(loaded.model)
    return len(npz({site: np.zeros((1, 1, widths[site][-1]), dtype) for site in job.sites}))


def refuse_without_room(job: Job, loaded: LoadedModel, folder: Path, dtype: str) -> None:
    """Raise UserError if the run would not fit the disk should every answer take all its tokens."""
    pending = sum(map(job.is_pending, range(len(job.prompts))))
    needed = pending * ((job.max_tokens + 1) * step_bytes(job, loaded, dtype) + ZIP_AND_MARKER)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The run may write {needed / 1e6:,.0f} MB, but {folder} has room for {free / 1e6:,.0f} MB. Free some "
            "space, or take another --activations-dir, fewer --max-tokens, a narrower --activation-filter or "
            "--activation-dtype float16."
        )


def estimate(job: Job, loaded: LoadedModel, dtype: str, compress: bool, grouped: bool) -> Estimate:
    """Answer some of the prompts, of all lengths, and conclude from them."""
    pending = sorted(filter(job.is_pending, range(len(job.prompts))), key=lambda i: len(job.token_ids[i]))
    if not pending:
        return Estimate(0, 0, 0, 0, 0)
    tried = [pending[i] for i in np.unique(np.linspace(0, len(pending) - 1, PROBES).astype(int))]
    token_ids = [job.token_ids[i] for i in tried]
    to_bytes, sizes = compressed_npz if compress else npz, []

    def weighed(steps: Iterator[Step]) -> Iterator[Step]:
        for step in steps:
            first = {site: np.asarray(x)[:1].astype(dtype) for site, x in step.activations.items()}
            sizes.append(len(to_bytes(first)))
            yield step

    start = time.perf_counter()
    passes = generate(loaded.model, token_ids, job.max_tokens, job.sampling, job.end_tokens, job.sites, row_ids=tried)
    answers = collect_answers(weighed(passes))
    seconds = time.perf_counter() - start
    steps = np.array([1 + len(answer) for answer in answers])  # prefill, and one a token
    texts = [json.dumps([answer, loaded.tokenizer.decode(answer)], indent=1) for answer in answers]
    embedding = len(npz({"prompt_embedding": np.zeros((1, 1, loaded.hidden_size), np.float32)}))
    each = embedding + np.mean([len(text) for text in texts]) + np.mean([len(job.prompts[i].text) for i in tried]) + 200
    # A flat collection writes a batch's rows until the last of them has ended.
    steps_each, share = (steps.mean() if grouped else steps.max()), len(pending) / len(tried)
    prompts_a_file = 1 if grouped else job.batch_size
    return Estimate(
        prompts=len(pending),
        steps=steps_each * len(pending),
        files=(steps_each + 2) * len(pending) / prompts_a_file,
        bytes=(steps_each * float(np.mean(sizes)) + each) * len(pending),
        seconds=seconds * share,
    )
