"""Proof that an intervention did something: tokens touched, and the dose that arrived in the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import mlx.core as mx
import numpy as np

from alignment_artifacts.edits.setting import Intervention
from gemma_refactored.activation_capture import TEXTS_AT_ONCE, Edit, block_sites, forward
from gemma_refactored.generation import length_sorted_batches
from gemma_refactored.model_loading import LoadedModel
from gemma_refactored.progress import counted

KEPT_BYTES = 1 << 29  # of the unedited model's numbers, per set of prompts; beyond that they are computed again


@dataclass
class Sequences:
    """Prompts with their answers, and what the unedited model does along them: computed once for all settings.

    Attributes:
        prompts, answers: token ids.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    _kept: dict[tuple, mx.array] = field(default_factory=dict, repr=False)

    def batches(self) -> Iterator[Batch]:
        """The sequences, grouped by similar length."""
        texts = [[*prompt, *answer] for prompt, answer in zip(self.prompts, self.answers, strict=True)]
        for batch in length_sorted_batches(texts, TEXTS_AT_ONCE):
            yield Batch(tuple(batch), [texts[i] for i in batch], [len(self.prompts[i]) for i in batch])

    def keep(self, key: tuple, compute: Callable[[], mx.array]) -> mx.array:
        """`compute()`, or its earlier value for this key; values are kept as long as all of them fit in KEPT_BYTES."""
        if key not in self._kept:
            value = compute()
            mx.eval(value)
            if sum(array.nbytes for array in self._kept.values()) + value.nbytes > KEPT_BYTES:
                return value
            self._kept[key] = value
        return self._kept[key]


@dataclass(frozen=True)
class Batch:
    """Some of the sequences: their numbers, prompts with answers as token ids, and the prompts' lengths."""

    rows: tuple[int, ...]
    texts: list[list[int]]
    prompt_lengths: list[int]


@dataclass
class Proof:
    """What a setting did to some sequences, measured in one pass over each.

    Attributes:
        tokens: that passed the edited layers, sinks aside; touched: of these, changed in at least one layer.
        activations: that were changed, over all edited sites.
        change: mean ||edited - x|| of these, in activation units.
        dose: layer -> mean ||change|| / ||x|| of the residual stream after it: what arrived there,
            changes of earlier layers included.
        sinks: the attention sinks that were left alone: text of the token -> how many.
    """

    tokens: int
    touched: int
    activations: int
    change: float
    dose: dict[int, float]
    sinks: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        dose = ", ".join(f"{100 * value:.2g}% after layer {layer}" for layer, value in self.dose.items())
        number = sum(self.sinks.values())
        named = ", ".join(f"{token!r}" + (f" x{count}" if count > 1 else "") for token, count in self.sinks.items())
        sinks = f"; {counted(number, 'attention sink')} left alone: {named}" if number else ""
        return (
            f"{self.touched} of {self.tokens} tokens touched, mean change {self.change:.2f}; "
            f"residual stream moved by {dose or '0%'}{sinks}"
        )


def pool(proofs: Sequence[Proof]) -> Proof:
    """What one setting did to several sets of sequences, with the edits of each set."""
    tokens, activations = (np.array([getattr(p, name) for p in proofs]) for name in ("tokens", "activations"))
    doses = np.array([list(p.dose.values()) for p in proofs])
    return Proof(
        tokens=int(tokens.sum()),
        touched=sum(p.touched for p in proofs),
        activations=int(activations.sum()),
        change=float(activations @ [p.change for p in proofs] / max(1, activations.sum())),
        dose=dict(zip(proofs[0].dose, (tokens @ doses / max(1, tokens.sum())).tolist(), strict=True)),
        sinks=dict(sum((Counter(p.sinks) for p in proofs), Counter()).most_common()),
    )


def prove(loaded: LoadedModel, intervention: Intervention, sequences: Sequences) -> Proof:
    """Measure what an intervention does along prompts and their answers, all together."""
    return pool(prove_each(loaded, intervention, sequences))


def prove_each(loaded: LoadedModel, intervention: Intervention, sequences: Sequences) -> list[Proof]:
    """The same for every prompt with its answer, in their order."""
    blocks = block_sites(loaded.model)
    edited_layers = [
        i for i, block in enumerate(blocks) if any(_same_block(site, block) for site in intervention.edits)
    ]
    proofs: dict[int, Proof] = {}
    for batch in sequences.batches():
        clean = sequences.keep(("states", batch.rows), partial(_states, loaded, batch, blocks))
        change: dict[str, mx.array] = {}

        def measured(site: str, function: Edit, change: dict = change) -> Edit:
            def apply(x: mx.array) -> mx.array:
                y = function(x)
                change[site] = mx.linalg.norm((y - x).astype(mx.float32), axis=-1)
                return y

            return apply

        edits = intervention.in_one_pass(loaded, batch.texts, batch.prompt_lengths)
        prompts = [text[:length] for text, length in zip(batch.texts, batch.prompt_lengths, strict=True)]
        spared = intervention.spared(loaded, prompts)
        moved = _states(loaded, batch, blocks, {site: measured(site, f) for site, f in edits.items()})
        moved_by = mx.linalg.norm(moved - clean, axis=-1) / mx.maximum(mx.linalg.norm(clean, axis=-1), 1e-12)
        changes = np.array(mx.stack([change[site] for site in edits]))  # [sites, rows, positions]
        doses = np.array(moved_by[mx.array(edited_layers)])
        for place, (row, text) in enumerate(zip(batch.rows, batch.texts, strict=True)):
            others = np.setdiff1d(np.arange(len(text)), spared[place])
            proof = _proof(changes[:, place, others], dict(zip(edited_layers, doses[:, place, others], strict=True)))
            sinks = Counter(loaded.tokenizer.decode([text[position]]) for position in spared[place])
            proofs[row] = replace(proof, sinks=dict(sinks))
    return [proofs[row] for row in sorted(proofs)]


def _proof(change: np.ndarray, dose: dict[int, np.ndarray]) -> Proof:
    """Args: change: [sites, tokens]; dose: layer -> [tokens]."""
    touched = change > 0
    return Proof(
        tokens=change.shape[1],
        touched=int(touched.any(axis=0).sum()),
        activations=int(touched.sum()),
        change=float(change[touched].mean()) if touched.any() else 0.0,
        dose={layer: float(of_tokens.mean()) if of_tokens.size else 0.0 for layer, of_tokens in dose.items()},
    )


def _states(loaded: LoadedModel, batch: Batch, blocks: list[str], edits: dict[str, Edit] | None = None) -> mx.array:
    """[layers, rows, positions, hidden] float32 residual stream after every block."""
    _, activations = forward(loaded.model, batch.texts, blocks, edits)
    return mx.stack([activations[block].astype(mx.float32) for block in blocks])


def _same_block(site: str, block: str) -> bool:
    return site == block or site.startswith(block.removesuffix("output"))
