"""Read and edit activations of any `mlx.nn.Module` tree by name.

A *site* is a module path plus `.output` ("model.layers.3.mlp.output"), or the bare path of a
`HookPoint` ("model.layers.3.mlp.neurons"). `capture` reads sites, `edit` changes them; both
are context managers that leave the model as they found it, also after an exception. Neither
touches parameters, and a site nobody asked for costs nothing.

    with capture(model, ["model.layers.3.output"]) as activations:
        model(tokens)
    activations["model.layers.3.output"]     # [batch, positions, hidden]
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from .errors import UserError
from .model_architecture import HookPoint

DEFAULT_FILTER = "mlp.output"
SITE_KINDS = ("mlp", "residual")  # that every layer has one of

log = logging.getLogger(__name__)

Edit = Callable[[mx.array], mx.array]


def modules_by_site(model: nn.Module) -> dict[str, nn.Module]:
    """Every site the model has, in order of depth, with the module behind it."""
    found = {}
    for path, module in model.named_modules():
        if path and isinstance(module, nn.Module):
            found[path if isinstance(module, HookPoint) else f"{path}.output"] = module
    return dict(sorted(found.items(), key=lambda item: _natural_order(item[0])))


def _natural_order(site: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in site.split(".")]


def block_sites(model: nn.Module) -> list[str]:
    """The residual stream after each block, whatever the architecture calls its blocks."""
    names = {id(module): site for site, module in modules_by_site(model).items()}
    return [names[id(block)] for block in model.layers]


def layer_sites(model: nn.Module, kind: str) -> list[str]:
    """The site of each layer: "residual" is the stream after the block, "mlp" the MLP's output.

    Raises:
        UserError: another kind, or this architecture's blocks have no MLP of that name.
    """
    blocks = block_sites(model)
    if kind == "residual":
        return blocks
    if kind != "mlp":
        raise UserError(f"The site must be one of {', '.join(SITE_KINDS)}, not {kind!r}.")
    names = [block.removesuffix(".output") + ".mlp.output" for block in blocks]
    if not set(names) <= modules_by_site(model).keys():
        raise UserError(f"This model has no {names[0]}; use the residual stream (site residual).")
    return names


def site_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape each site has for one row of three tokens, found by a forward pass.

    Modules that the pass does not call (or whose output is no array) are left out.
    """
    sites = [s for s, m in modules_by_site(model).items()]
    with capture(model, sites) as activations:
        model(mx.array([[0, 1, 2]]))
        return {site: activations[site].shape for site in sites if site in activations}


def select_sites(model: nn.Module, site_filter: str = DEFAULT_FILTER) -> list[str]:
    """The sites that a filter names, of those with one vector a position.

    Where a model's blocks have no `mlp` (Mamba, Mixtral), the default filter stands for the residual
    stream after each block, and says so.

    Args:
        site_filter: "all", or comma-separated substrings or globs ("mlp.output",
            "layers.[0-3].output").
    Raises:
        UserError: a part of the filter matches nothing.
    """
    shapes = site_shapes(model)
    # Attention weights, rotary embeddings etc. have other axes than [batch, positions, width].
    sites = [site for site, shape in shapes.items() if len(shape) == 3 and shape[:2] == (1, 3)]
    patterns = [part.strip() for part in site_filter.split(",") if part.strip()]
    if patterns == ["all"]:
        return sites
    if patterns == [DEFAULT_FILTER] and not any(_matches(site, DEFAULT_FILTER) for site in sites):
        log.warning("This model has no %s: taking the residual stream after each block instead.", DEFAULT_FILTER)
        return block_sites(model)
    chosen = set()
    for pattern in patterns:
        matches = {site for site in sites if _matches(site, pattern)}
        if not matches:
            raise UserError(
                f"The activation filter {pattern!r} matches no site of this model. "
                f"Its sites are, for example: {_examples(sites)}. Use --list-sites to see all."
            )
        chosen |= matches
    if not chosen:
        raise UserError("The activation filter is empty. Use 'mlp.output', 'all' or a part of a site's name.")
    return [site for site in sites if site in chosen]


def _matches(site: str, pattern: str) -> bool:
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(site, f"*{pattern}")
    return pattern in site


def _examples(sites: Sequence[str]) -> str:
    """One site of each kind, layer numbers aside."""
    kinds = {}
    for site in sites:
        kinds.setdefault("".join(c for c in site if not c.isdigit()), site)
    return ", ".join(kinds.values())


@contextmanager
def hooks(model: nn.Module, functions: Mapping[str, Callable[[mx.array], mx.array]]) -> Iterator[None]:
    """Pass the output of each named site through a function while the context lasts.

    Python looks `__call__` up on the class, so each module is given a subclass of its own for
    the duration: parameters, their names and the module's identity stay as they are. A module
    that returns a tuple is hooked at its first element.

    Raises:
        UserError: a site the model does not have.
    """
    modules = modules_by_site(model)
    unknown = [site for site in functions if site not in modules]
    if unknown:
        raise UserError(f"This model has no site {unknown[0]!r}; it has, for example: {_examples(list(modules))}.")
    undo = []
    try:
        for site, function in functions.items():
            module = modules[site]
            undo.append((module, module.__class__))
            module.__class__ = _hooked_class(module.__class__, function)
        yield
    finally:
        for module, original in reversed(undo):
            module.__class__ = original


def _hooked_class(base: type, function: Callable[[mx.array], mx.array]) -> type:
    def call(self, *args, **kwargs):
        output = base.__call__(self, *args, **kwargs)
        if isinstance(output, tuple):
            return (function(output[0]), *output[1:])
        return function(output)

    return type(base.__name__, (base,), {"__call__": call, "is_hooked": True, "__module__": base.__module__})


@contextmanager
def capture(model: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, mx.array]]:
    """Collect the outputs of `sites`: a dictionary that each forward pass fills anew.

    Arrays are lazy: what is never evaluated is never computed.
    """
    activations: dict[str, mx.array] = {}

    def reader(site):
        def read(x):
            if isinstance(x, mx.array):
                activations[site] = x
            return x

        return read

    with hooks(model, {site: reader(site) for site in sites}):
        yield activations


@contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace the activation x of each site by `edits[site](x)` during the context.

    Raises:
        ValueError: an edit that changes the shape or dtype of its activation.
    """

    def checked(site, function):
        def apply(x):
            edited = function(x)
            if edited.shape != x.shape or edited.dtype != x.dtype:
                raise ValueError(
                    f"the edit at {site} turned {x.dtype}{list(x.shape)} into {edited.dtype}{list(edited.shape)}"
                )
            return edited

        return apply

    with hooks(model, {site: checked(site, function) for site, function in edits.items()}):
        yield
