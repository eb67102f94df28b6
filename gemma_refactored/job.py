"""All prompts of a run: which are pending, in which batches, and what their answers are."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from .collection import Answer, Collection
from .distributed import Team
from .errors import UserError
from .generation import Sampling, collect_answers, generate
from .model_loading import LoadedModel, find_embedding
from .npz_files import NpzWriter
from .progress import stage
from .prompt_processing import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a run does with each prompt.

    Attributes:
        token_ids: of each prompt.
        sites: those whose activations are saved.
        finished: records of the prompts that an earlier run has completed.
        chat_mode: the prompts are in the chat format, in which a model may think before it answers.
        shares_model: the processes hold parts of one model, instead of dividing the prompts.
        part: which of so many runs, which know nothing of each other, this one is (an array of jobs on a cluster).
    """

    prompts: list[Prompt]
    token_ids: list[list[int]]
    max_tokens: int
    batch_size: int
    sampling: Sampling
    end_tokens: tuple[int, ...] = ()
    sites: Sequence[str] = ()
    finished: Mapping[Prompt, dict] = field(default_factory=dict)
    chat_mode: bool = True
    shares_model: bool = False
    part: Team = Team()

    def is_pending(self, index: int) -> bool:
        return self.prompts[index] not in self.finished


def check_context(prompts: list[Prompt], token_ids: list[list[int]], max_tokens: int, context_length: int) -> None:
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if len(ids) + max_tokens > context_length:
            raise UserError(
                f"Prompt {prompt.number} of {prompt.group!r} has {len(ids)} tokens; with --max-tokens {max_tokens} "
                f"that is more than the model's context of {context_length}. Shorten it or lower --max-tokens."
            )


def open_collection(
    prompts: Sequence[Prompt], folder: Path, manifest: dict, grouped: bool, overwrite: bool, team: Team
) -> tuple[Collection, dict[Prompt, dict]]:
    """The collection in a folder, and the records of the prompts that are complete; the same in every process.

    The processes may share one folder, or have one each on different machines.
    """
    collection = None

    def open_first() -> list:
        nonlocal collection
        collection = Collection(folder, manifest, grouped, overwrite)
        finished = collection.finished_answers(prompts)
        numbered = [[i, finished[prompt]] for i, prompt in enumerate(prompts) if prompt in finished]
        return [collection.manifest, numbered]

    settled_manifest, numbered = team.lead(open_first)
    collection = collection or Collection(folder, settled_manifest, grouped, overwrite)
    team.exchange("opened")  # nobody writes while another may still be clearing the folder
    return collection, {prompts[i]: record for i, record in numbered}


def plan_batches(job: Job, loaded: LoadedModel, team: Team, grouped: bool) -> list[tuple[int, list[int]]]:
    """This process's batches that are not complete, each with its number: indices into the job's prompts.

    They are the batches of the whole job, so a run that continues another computes, to the last bit, what
    the other would have.
    """
    size = job.batch_size
    if size > 1 and not loaded.masks_padding:
        log.info("Padding would change this model's numbers: only prompts of equal length share a batch.")
    shares_prompts = team.size > 1 and not job.shares_model
    if grouped:  # a flat collection shows its batches, so it keeps them as in a single run
        shares = job.part.size * (team.size if shares_prompts else 1)
        size = min(size, math.ceil(len(job.prompts) / shares))
    # A part is one of the whole job, complete or not: a run that continues finds the same part.
    batches = job.part.share(list(enumerate(loaded.batches(job.token_ids, size), 1)))
    incomplete = [(number, batch) for number, batch in batches if any(map(job.is_pending, batch))]
    return list(team.share(incomplete)) if shares_prompts else incomplete


def answer_prompts(
    job: Job,
    loaded: LoadedModel,
    batches: list[tuple[int, list[int]]],
    collection: Collection | None,
    writer: NpzWriter | None,
    show_progress: bool,
) -> dict[int, dict]:
    """Generate for every batch and save what is not complete; returns the new records, by the prompts' indices."""
    records: dict[int, dict] = {}
    total = sum(len(batch) for _, batch in batches) * job.max_tokens
    with writer or nullcontext(), stage("answering", total, "token", quiet=not show_progress) as advance:
        for number, batch in batches:
            prompts = [job.prompts[i] for i in batch]
            token_ids = [job.token_ids[i] for i in batch]
            steps = generate(
                loaded.model, token_ids, job.max_tokens, job.sampling, job.end_tokens, job.sites, row_ids=batch
            )
            pending = np.array([job.is_pending(i) for i in batch])
            if collection and writer:
                steps = collection.write_steps(writer, steps, prompts, pending, number)
            written = collect_answers(steps, advance)
            advance(len(batch) * job.max_tokens - sum(map(len, written)))  # of answers that have ended
            texts = loaded.tokenizer.batch_decode(written, skip_special_tokens=True)
            answers = {
                i: Answer(
                    prompt,
                    len(ids),
                    tokens,
                    text,
                    finish_reason="length" if len(tokens) == job.max_tokens else "stop",
                    thought_tokens=loaded.thought_tokens(tokens) if job.chat_mode else 0,
                )
                for i, prompt, ids, tokens, text in zip(batch, prompts, token_ids, written, texts, strict=True)
                if job.is_pending(i)
            }
            if collection and writer:
                embeddings = mean_prompt_embeddings(loaded, [answer.prompt.text for answer in answers.values()])
                collection.finish_batch(writer, list(answers.values()), embeddings, number)
            records |= {i: answer.record() for i, answer in answers.items()}
    return records


def mean_prompt_embeddings(loaded: LoadedModel, texts: Sequence[str]) -> np.ndarray:
    """[prompts, hidden] float32: mean input embedding of each prompt's own words (no chat format)."""
    embedding = find_embedding(loaded.model)
    means = []
    for text in texts:
        ids = loaded.tokenizer.encode(text, add_special_tokens=False)
        means.append(embedding(mx.array(ids)).astype(mx.float32).mean(axis=0))
    return np.array(mx.stack(means))
