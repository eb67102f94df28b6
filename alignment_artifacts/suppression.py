"""A setting (mode, scale, layers, ..) put into a running model, and proof that it did something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import mlx.core as mx
import numpy as np

from gemma_refactored.activation_capture import Edit, block_sites, capture, edit, hooks
from gemma_refactored.errors import UserError
from gemma_refactored.generation import PREFILL, Sampling, Step, generate
from gemma_refactored.model_loading import LoadedModel

from .directions import Directions, site_names
from .interventions import MODES, ModeOptions, edit_function

AUTO = "auto"
EVERYWHERE, PROMPT_END = WHERE = ("everywhere", "prompt_end")


@dataclass(frozen=True)
class Setting:
    """One way to suppress (or, with mode `add`, amplify).

    Attributes:
        site: "mlp" or "residual".
        positions: where the direction was measured: "prompt_end", "generated" or "all".
        layers: blocks that are edited.
        where: "everywhere", or "prompt_end": at the last prompt token only. A direction measured there says
            what the next word is going to be; added to every token, it writes that word for ever.
    """

    mode: str
    scale: float
    layers: tuple[int, ...]
    site: str = "mlp"
    positions: str = PROMPT_END
    options: ModeOptions = field(default_factory=ModeOptions)
    where: str = EVERYWHERE

    def record(self) -> dict:
        """As JSON keeps it."""
        return {**asdict(self), "layers": list(self.layers)}

    @staticmethod
    def from_record(record: dict) -> Setting:
        return Setting(**{**record, "layers": tuple(record["layers"]), "options": ModeOptions(**record["options"])})

    def describe(self) -> str:
        layers = ",".join(map(str, self.layers))
        where = "" if self.where == EVERYWHERE else " (there only)"
        return f"{self.mode} x{self.scale:g}, {self.site}, layers {layers}, direction from {self.positions}{where}"


@dataclass(frozen=True)
class Intervention:
    """A setting made ready for one model: site -> edit, and the tokens they are for."""

    edits: dict[str, Edit] = field(default_factory=dict)
    where: str = EVERYWHERE

    def in_one_pass(self, prompt_length: int) -> dict[str, Edit]:
        """The edits for a single pass over a prompt and its answer."""
        if self.where == EVERYWHERE:
            return self.edits
        end = prompt_length - 1

        def at_end(function: Edit) -> Edit:
            return lambda x: mx.concatenate([x[:, :end], function(x[:, end : end + 1]), x[:, end + 1 :]], axis=1)

        return {site: at_end(function) for site, function in self.edits.items()}

    def generate(self, loaded: LoadedModel, *arguments, **settings) -> Iterator[Step]:
        """`generation.generate` under these edits."""
        if self.where == PROMPT_END:
            yield from generate(loaded.model, *arguments, prompt_end_edits=self.edits, **settings)
            return
        with edit(loaded.model, self.edits):
            yield from generate(loaded.model, *arguments, **settings)


NOTHING = Intervention()


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


def auto_mode(num_parameters: int) -> str:
    """The mode for a model of this size, where nothing better is known (a sweep knows better)."""
    for limit, mode in ((2e9, "proximity"), (10e9, "adaptive"), (50e9, "sphere")):
        if num_parameters < limit:
            return mode
    return "subspace"


def intervene(loaded: LoadedModel, directions: Directions, setting: Setting) -> Intervention:
    """What a setting does to a model.

    Raises:
        UserError: an unknown mode, a layer the model or the direction does not have, or a mode that needs
            statistics which these directions came without.
    """
    if setting.mode not in MODES:
        raise UserError(f"The mode must be one of {AUTO}, {', '.join(MODES)}, not {setting.mode!r}.")
    if setting.where not in WHERE:
        raise UserError(f"Edits can be {' or '.join(WHERE)}, not {setting.where!r}.")
    if directions.facts["site"] != setting.site:
        raise UserError(f"These directions are of the site {directions.facts['site']}, not {setting.site}.")
    sites = site_names(loaded, setting.site)
    edits = {}
    for layer in setting.layers:
        if not 0 <= layer < len(sites):
            raise UserError(f"There is no layer {layer}: {loaded.name} has 0 to {len(sites) - 1}.")
        if layer not in directions.available:
            raise UserError(f"There is no direction for layer {layer}; there is one for {directions.available}.")
        at = directions.at(layer, setting.options)
        needed = {"cap": at.cap, "sphere": at.spread, "subspace": at.components.sum().item()}
        if np.isnan(needed.get(setting.mode, 0.0)):
            raise UserError(f"The mode {setting.mode} needs statistics that these directions came without.")
        edits[sites[layer]] = edit_function(setting.mode, at, setting.scale, setting.options)
    return Intervention(edits, setting.where)


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


def write_answer(
    loaded: LoadedModel,
    prompt: Sequence[int],
    intervention: Intervention,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    end_tokens: Sequence[int] = (),
    on_text: Callable[[str], object] = lambda text: None,
) -> list[int]:
    """Token ids of one answer under an intervention; `on_text` gets the text piece by piece as it is written."""
    tokens, shown = [], ""
    for step in intervention.generate(loaded, [list(prompt)], max_tokens, sampling, end_tokens):
        if step.index == PREFILL:
            continue
        tokens.append(int(step.tokens[0]))
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character so far
            on_text(text[len(shown) :])
            shown = text
    return tokens
