"""A setting (mode, scale, layers, ..) and what it does to a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from alignment_artifacts.directions.estimate import Directions, transferred
from alignment_artifacts.edits.modes import MODES, SiteDirection, edit_function
from alignment_artifacts.edits.options import EVERYWHERE, WHERE, Mode, ModeOptions, Setting
from gemma_refactored.activation_capture import Edit, layer_sites
from gemma_refactored.errors import UserError
from gemma_refactored.generation import Step, generate, predict
from gemma_refactored.model_loading import LoadedModel

AUTO = "auto"


@dataclass(frozen=True)
class Intervention:
    """A setting made ready for one model: site -> edit, and the tokens they are for."""

    edits: dict[str, Edit] = field(default_factory=dict)
    where: str = EVERYWHERE
    edit_sinks: bool = False

    def spared(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The positions of each prompt that are left alone: its attention sinks.

        A generated token is never spared: whether it is a sink could only be told without the edits.
        """
        return [()] * len(prompts) if self.edit_sinks or not self.edits else loaded.sinks(prompts)

    def in_one_pass(
        self, loaded: LoadedModel, texts: Sequence[Sequence[int]], prompt_lengths: Sequence[int]
    ) -> dict[str, Edit]:
        """The edits for one pass over prompts with their answers, one per row (see `activation_capture.forward`)."""
        prompts = [text[:length] for text, length in zip(texts, prompt_lengths, strict=True)]
        edited = np.full((len(texts), max(map(len, texts)), 1), self.where == EVERYWHERE)
        for row, (prompt, sinks) in enumerate(zip(prompts, self.spared(loaded, prompts), strict=True)):
            edited[row, len(prompt) - 1] = True
            edited[row, list(sinks)] = False
        if edited.all():
            return self.edits
        chosen = mx.array(edited)

        def there(function: Edit) -> Edit:
            return lambda x: mx.where(chosen, function(x), x)

        return {site: there(function) for site, function in self.edits.items()}

    def generate(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], *arguments, **settings) -> Iterator[Step]:
        """`generation.generate` under these edits."""
        return generate(loaded.model, prompts, *arguments, **{**self._named(loaded, prompts), **settings})

    def predict(
        self, loaded: LoadedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> mx.array:
        """`generation.predict` under these edits."""
        return predict(loaded.model, prompts, answers, **self._named(loaded, prompts))

    def _named(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> dict:
        name = "edits" if self.where == EVERYWHERE else "prompt_end_edits"
        return {name: self.edits, "spared": self.spared(loaded, prompts)}


NOTHING = Intervention()


def auto_mode(num_parameters: int) -> Mode:
    """The mode for a model of this size, unless something better is known (from a sweep)."""
    limits: dict[Mode, float] = {"proximity": 2e9, "adaptive": 10e9, "sphere": 50e9}
    for mode, limit in limits.items():
        if num_parameters < limit:
            return mode
    return "subspace"


def where_it_leads(directions: Directions, setting: Setting) -> str:
    """What directions from a file point from and to, and which way a setting moves along them, in some sentences."""
    facts, ends = directions.facts, directions.facts.get("ends")
    positions: str = facts.get("positions") or "tokens it does not name"
    measured = {
        "prompt_end": "the prompt's last token",
        "generated": "generated tokens",
        "all": "all tokens",
        "answer": "tokens of the answer, after the thought",
        "answer_start": "the token before the answer",
    }
    where = f"the {facts['site']} site, measured at {measured.get(positions, positions)}"
    if setting.scale == 0:
        moves = "Scale 0 moves nothing."
    else:
        is_ahead = (setting.mode == "add") == (setting.scale > 0)
        there, back = ends or ("where they come from", "where they point")
        there, back = (back, there) if is_ahead else (there, back)
        other = (
            "a positive scale" if setting.scale < 0 else "--mode add" if setting.mode != "add" else "a negative scale"
        )
        moves = f"This setting moves away from {back}, towards {there}; {other} does the opposite."
    points = f"point from {ends[0]} to {ends[1]}" if ends else "do not say what they point from and to"
    return " ".join(filter(None, (f"The directions {points} ({where}).", transferred(facts), moves)))


def intervene(loaded: LoadedModel, directions: Directions, setting: Setting) -> Intervention:
    """What a setting does to a model.

    Raises:
        UserError: an unknown mode, a layer the model or the direction does not have, or a mode that needs
            statistics which these directions do not have.
    """
    if setting.mode not in MODES:
        raise UserError(f"The mode must be one of {AUTO}, {', '.join(MODES)}, not {setting.mode!r}.")
    if setting.where not in WHERE:
        raise UserError(f"Edits can be {' or '.join(WHERE)}, not {setting.where!r}.")
    if directions.facts["site"] != setting.site:
        raise UserError(f"These directions belong to the site {directions.facts['site']}, not to {setting.site}.")
    sites = layer_sites(loaded.model, setting.site)
    edits = {}
    for layer in setting.layers:
        if not 0 <= layer < len(sites):
            raise UserError(f"There is no layer {layer}: {loaded.name} has 0 to {len(sites) - 1}.")
        source = layer if setting.direction_layer is None else setting.direction_layer
        if source not in directions.available:
            raise UserError(f"There is no direction for layer {source}; there is one for {directions.available}.")
        if source != layer and setting.mode == "cap":
            raise UserError("The mode cap compares each layer with its own direction; omit the direction layer.")
        at = site_direction(directions, layer, setting.options, source)
        needed = {"cap": at.cap, "sphere": at.spread, "subspace": at.components.sum().item()}
        if np.isnan(needed.get(setting.mode, 0.0)):
            raise UserError(f"The mode {setting.mode} needs statistics that these directions do not have.")
        edits[sites[layer]] = edit_function(setting.mode, at, setting.scale, setting.options)
    return Intervention(edits, setting.where, setting.edit_sinks)


def site_direction(
    directions: Directions, layer: int, options: ModeOptions, source: int | None = None
) -> SiteDirection:
    """What the modes need at one layer, as MLX arrays; NaN for what an imported vector lacks.

    Args:
        source: the layer whose direction and components are used; default: the same.
    """
    source = layer if source is None else source
    unknown = np.full(directions.direction.shape[-1], np.nan, np.float32)
    natural, artifact = (
        unknown if mean is None else mean[layer] for mean in (directions.natural_mean, directions.artifact_mean)
    )
    components = directions.components[source] if directions.components is not None else unknown[None]
    tokens = directions.natural_tokens
    return SiteDirection(
        direction=mx.array(directions.direction[source]),
        natural_mean=mx.array(natural),
        artifact_mean=mx.array(artifact),
        components=mx.array(components),
        spread=float(directions.spread[layer]) if directions.spread is not None else float("nan"),
        cap=float(np.quantile(tokens[layer], options.cap_quantile)) if tokens is not None else float("nan"),
    )
