"""Proof that an intervention did something: tokens touched, and the dose that arrived in the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from alignment_artifacts.edits.setting import Intervention
from gemma_refactored.activation_capture import Edit, block_sites, capture, hooks
from gemma_refactored.model_loading import LoadedModel


@dataclass
class Proof:
    """What a setting did to some sequences, measured in one pass over each.

    Attributes:
        tokens: that passed the edited layers; touched: of these, changed in at least one layer.
        change: mean ||edited - x|| of the touched activations, in activation units.
        dose: layer -> mean ||change|| / ||x|| of the residual stream after it: what arrived there,
            changes of earlier layers included.
    """

    tokens: int
    touched: int
    change: float
    dose: dict[int, float]

    def describe(self) -> str:
        dose = ", ".join(f"{layer}: {value:.0%}" for layer, value in self.dose.items())
        return (
            f"{self.touched} of {self.tokens} tokens touched, mean change {self.change:.2f}; "
            f"residual stream moved by {dose or '0 %'}"
        )


def prove(
    loaded: LoadedModel, intervention: Intervention, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> Proof:
    """Measure what an intervention does along prompts and their answers (token ids)."""
    blocks = block_sites(loaded.model)
    edited_layers = [
        i for i, block in enumerate(blocks) if any(_same_block(site, block) for site in intervention.edits)
    ]
    watched = [blocks[i] for i in edited_layers]
    changes, doses = [], []  # [layers, tokens] of each sequence
    for prompt, answer in zip(prompts, answers, strict=True):
        batch, edits = mx.array([prompt + answer]), intervention.in_one_pass(len(prompt))
        with capture(loaded.model, watched) as clean:
            loaded.model(batch)
        change: dict[str, mx.array] = {}

        def measured(site: str, function: Edit, change: dict = change) -> Callable[[mx.array], mx.array]:
            def apply(x: mx.array) -> mx.array:
                y = function(x)
                change[site] = mx.linalg.norm((y - x)[0].astype(mx.float32), axis=-1)
                return y

            return apply

        with ExitStack() as stack:
            # Inner hooks see the residual stream as the edits leave it, also when that is the edited site.
            stack.enter_context(hooks(loaded.model, {site: measured(site, f) for site, f in edits.items()}))
            moved = stack.enter_context(capture(loaded.model, watched))
            loaded.model(batch)
        changes.append(np.array(mx.stack([change[site] for site in edits])))
        doses.append(np.array(mx.stack([_relative(moved[b], clean[b]) for b in watched])))
    moved_by, dose = np.concatenate(changes, axis=1), np.concatenate(doses, axis=1).mean(axis=1)
    touched = moved_by > 0
    return Proof(
        tokens=moved_by.shape[1],
        touched=int(touched.any(axis=0).sum()),
        change=float(moved_by[touched].mean()) if touched.any() else 0.0,
        dose={layer: float(value) for layer, value in zip(edited_layers, dose, strict=True)},
    )


def _same_block(site: str, block: str) -> bool:
    return site == block or site.startswith(block.removesuffix("output"))


def _relative(moved: mx.array, clean: mx.array) -> mx.array:
    moved, clean = moved[0].astype(mx.float32), clean[0].astype(mx.float32)
    return mx.linalg.norm(moved - clean, axis=-1) / mx.maximum(mx.linalg.norm(clean, axis=-1), 1e-12)
