"""Read and edit activations of any `mlx.nn.Module` tree by name.

A *site* is a module path plus `.output` ("model.layers.3.mlp.output"), or the bare path of a
`HookPoint` ("model.layers.3.mlp.neurons"). `capture` reads sites, `edit` changes them; both
are context managers that leave the model as they found it, also after an exception. Neither
touches parameters, and a site nobody asked for costs nothing. Both act in the thread that opened
them; `generation.generate` opens its own around each forward pass, so two generators on one model
never see each other's edits. `read` turns token ids into activations.

    with capture(model, ["model.layers.3.output"]) as activations:
        model(tokens)
    activations["model.layers.3.output"]     # [batch, positions, hidden]
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .checks import refuse_beyond_tables
from .errors import UserError
from .longrope import rope_lengths
from .model_architecture import HookPoint
from .site_names import MODULE_NAMES, SITE_KINDS, matches

DEFAULT_FILTER = "mlp.output"
TEXTS_AT_ONCE = 32  # texts that share a pass in `read`
ATTENTION_WEIGHTS = ".self_attn.weights"  # the ending of sites with one number per key

log = logging.getLogger(__name__)

Function = Callable[[mx.array], mx.array]
Edit = Function


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
    """The site of each layer: "residual" is the stream after the block, "mlp" and "attention" are their outputs.

    Raises:
        UserError: another kind, or this architecture's blocks have no module of that name.
    """
    blocks = block_sites(model)
    if kind == "residual":
        return blocks
    if kind not in MODULE_NAMES:
        raise UserError(f"The site must be one of {', '.join(SITE_KINDS)}, not {kind!r}.")
    sites = modules_by_site(model).keys()
    for name in MODULE_NAMES[kind]:
        names = [f"{block.removesuffix('.output')}.{name}.output" for block in blocks]
        if set(names) <= sites:
            return names
    wanted = f"{blocks[0].removesuffix('.output')}.{MODULE_NAMES[kind][0]}.output"
    raise UserError(f"This model has no {wanted}; use the residual stream (site residual).")


def site_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape each site has for one row of three tokens, found by a forward pass.

    Modules that the pass does not call (or whose output is not an array) are omitted.
    """
    sites = [s for s, m in modules_by_site(model).items()]
    with capture(model, sites) as activations:
        model(mx.array([[0, 1, 2]]))
        return {site: activations[site].shape for site in sites if site in activations}


def select_sites(model: nn.Module, site_filter: str = DEFAULT_FILTER) -> list[str]:
    """The sites that a filter names, among those with one vector per position.

    Our own Gemma also has single heads and attention weights; a part of the filter means these if it matches no other.

    Where a model's blocks have no `mlp` (Mamba, Mixtral), the default filter stands for the residual
    stream after each block, and says so.

    Args:
        site_filter: "all", or comma-separated: "mlp", "attention" or "residual" for those of every layer, substrings
            or globs of names ("mlp.output", "layers.[0-3].output"); * stays between two dots, ** does not.
    Raises:
        UserError: a part of the filter matches nothing.
    """
    shapes = site_shapes(model)
    # Attention weights, rotary embeddings etc. have other axes than [batch, positions, width].
    sites = [site for site, shape in shapes.items() if len(shape) == 3 and shape[:2] == (1, 3)]
    modules = modules_by_site(model)
    others = [site for site in shapes if isinstance(modules[site], HookPoint) and site not in sites]
    patterns = [part.strip() for part in site_filter.split(",") if part.strip()]
    if patterns == ["all"]:
        return sites
    if patterns == [DEFAULT_FILTER] and not any(matches(site, DEFAULT_FILTER) for site in sites):
        log.warning("This model has no %s: taking the residual stream after each block instead.", DEFAULT_FILTER)
        return block_sites(model)
    chosen = set()
    for pattern in patterns:
        # These words mean a site of every layer; as parts of names they would match norms, if anything.
        found = set(layer_sites(model, pattern)) if pattern in SITE_KINDS else _matching(sites, pattern)
        found = found or _matching(others, pattern)
        if found and all("norm" in site for site in found) and "norm" not in pattern:
            log.warning("The activation filter %r matches nothing but norms: %s.", pattern, describe_sites(found))
        if not found:
            only_ours = "" if others else " Attention weights and single heads are sites of Gemma 1, 2 and 3 only."
            raise UserError(
                f"The activation filter {pattern!r} matches no site of this model. "
                f"Its sites are, for example: {_examples(sites)}.{only_ours} Use --list-sites to see all."
            )
        chosen |= found
    if not chosen:
        raise UserError("The activation filter is empty. Use 'mlp.output', 'all' or a part of a site's name.")
    return [site for site in shapes if site in chosen]


def _matching(sites: Iterable[str], pattern: str) -> set[str]:
    return {site for site in sites if matches(site, pattern)}


def layer_of(site: str) -> int:
    """The number of the block that a site is in."""
    return next(int(part) for part in site.split(".") if part.isdigit())


def weights_of_row(weights: np.ndarray, row: int, length: int) -> np.ndarray:
    """Attention weights of one row of a batch, without its padding.

    Args:
        weights: [rows, heads, 1, keys], keys in the order of their positions, padding first.
        length: tokens of this row so far.
    Returns:
        [1, heads, 1, keys]: the row's tokens, or the last ones that fit into a sliding window.
    """
    return weights[row : row + 1, ..., -min(length, weights.shape[-1]) :]


def describe_sites(sites: Iterable[str]) -> str:
    """How many sites of each kind, layer numbers aside, with one example: "8 like model.layers.0.mlp.output"."""
    return ", ".join(f"{len(kind)} like {kind[0]}" for kind in _by_kind(sites))


def _examples(sites: Iterable[str]) -> str:
    return ", ".join(kind[0] for kind in _by_kind(sites))


def _by_kind(sites: Iterable[str]) -> list[list[str]]:
    kinds: dict[str, list[str]] = {}
    for site in sorted(sites, key=_natural_order):
        kinds.setdefault("".join(c for c in site if not c.isdigit()), []).append(site)
    return list(kinds.values())


class hooks:
    """Pass the output of each named site through a function while the context lasts, in this thread only.

    Python looks `__call__` up on the class, so a hooked module is given a subclass of its own for
    the duration: parameters, their names and the module's identity stay as they are. A module
    that returns a tuple is hooked at its first element. Later contexts see what earlier ones made of it.

    The sites are looked up once; entering again is cheap, so a generator can enter for each of its own
    forward passes and leave the model alone between them.

    Raises:
        UserError: a site the model does not have.
    """

    def __init__(self, model: nn.Module, functions: Mapping[str, Function]):
        modules = modules_by_site(model) if functions else {}
        if unknown := [site for site in functions if site not in modules]:
            raise UserError(f"This model has no site {unknown[0]!r}; it has, for example: {_examples(list(modules))}.")
        self._hooked = [(modules[site], _Hook(function)) for site, function in functions.items()]

    def __enter__(self) -> None:
        done = False
        try:
            for module, hook in self._hooked:
                _attach(module, hook)
            done = True
        finally:
            if not done:  # Ctrl-C comes at any moment
                self.__exit__()

    def __exit__(self, *_) -> None:
        for module, hook in reversed(self._hooked):
            _detach(module, hook)


class _Hook:
    """A function with an identity: the same function may be hooked twice."""

    def __init__(self, function: Function):
        self.function = function


class _Hooks(threading.local):
    """This thread's hooks: id of a module -> what its output goes through, in this order."""

    def __init__(self):
        self.of: dict[int, tuple[_Hook, ...]] = {}


_HOOKS, _LOCK = _Hooks(), threading.Lock()


def _attach(module: nn.Module, hook: _Hook) -> None:
    with _LOCK:
        _HOOKS.of[id(module)] = (*_HOOKS.of.get(id(module), ()), hook)
        if not hasattr(type(module), "_hook_users"):
            module.__class__ = _hooked_class(type(module))
        kind: Any = type(module)
        kind._hook_users.append(hook)


def _detach(module: nn.Module, hook: _Hook) -> None:
    with _LOCK:
        remaining = tuple(other for other in _HOOKS.of.get(id(module), ()) if other is not hook)
        if remaining:
            _HOOKS.of[id(module)] = remaining
        else:
            _HOOKS.of.pop(id(module), None)
        kind: Any = type(module)
        if hook in getattr(kind, "_hook_users", ()):
            kind._hook_users.remove(hook)
            if not kind._hook_users:  # of no thread
                module.__class__ = kind.__base__


def _hooked_class(base: type) -> type:
    """A subclass of one module's own, whose output goes through the hooks that the calling thread has on it."""

    def call(self, *args, **kwargs):
        output = base.__call__(self, *args, **kwargs)
        for hook in _HOOKS.of.get(id(self), ()):
            output = through(hook.function, output)
        return output

    def through(function: Function, output):
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    is_hooked = property(lambda self: id(self) in _HOOKS.of)
    members = {"__call__": call, "is_hooked": is_hooked, "_hook_users": [], "__module__": base.__module__}
    return type(base.__name__, (base,), members)


@contextmanager
def capture(model: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, mx.array]]:
    """Collect the outputs of `sites`: a dictionary that each forward pass refills.

    Arrays are lazy: what is never evaluated is never computed.
    """
    activations: dict[str, mx.array] = {}
    with capturing(model, sites, activations):
        yield activations


def capturing(model: nn.Module, sites: Sequence[str], activations: dict[str, mx.array]) -> hooks:
    """`capture` into a dictionary of the caller's, as a context that can be entered for each of several passes."""

    def reader(site: str) -> Function:
        def read(x):
            if isinstance(x, mx.array):
                activations[site] = x
            return x

        return read

    return hooks(model, {site: reader(site) for site in sites})


def edit(model: nn.Module, edits: Mapping[str, Edit]) -> hooks:
    """Replace the activation x of each site by `edits[site](x)` during the context, in this thread.

    Raises:
        ValueError: (in a pass) an edit that changes the shape or dtype of its activation.
    """

    def checked(site: str, function: Edit) -> Edit:
        def apply(x: mx.array) -> mx.array:
            edited = function(x)
            if edited.shape != x.shape or edited.dtype != x.dtype:
                raise ValueError(
                    f"the edit at {site} turned {x.dtype}{list(x.shape)} into {edited.dtype}{list(edited.shape)}"
                )
            return edited

        return apply

    return hooks(model, {site: checked(site, function) for site, function in edits.items()})


def forward(
    model: nn.Module, texts: Sequence[Sequence[int]], sites: Sequence[str] = (), edits: Mapping[str, Edit] | None = None
) -> tuple[mx.array, dict[str, mx.array]]:
    """One pass over some texts, without a cache: logits and activations, lazy.

    Rows are padded on the right, where a causal model does not look.

    Args:
        texts: token ids.
        edits: site -> what becomes of its activation in this pass.
    Raises:
        UserError: a token id or a position that the model's tables do not have.
    Returns:
        [texts, positions, vocabulary], and site -> [texts, positions, width] as the edits leave it.
    """
    refuse_beyond_tables(model, texts, max_tokens=0)
    lengths = [len(text) for text in texts]
    rows = mx.array([[*text, *[0] * (max(lengths) - len(text))] for text in texts])
    with rope_lengths(model, lengths), edit(model, edits or {}), capture(model, sites) as activations:
        return model(rows), activations


def read(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    sites: Sequence[str],
    edits: Callable[[list[int]], Mapping[str, Edit]] = lambda batch: {},
) -> Iterator[tuple[int, np.ndarray]]:
    """Token ids -> activations: the index of each text with its own [positions, sites, width] float32, shortest first.

    Texts of like length share a pass. Models that read the same texts see the same batches, so equal weights give
    equal numbers to the last bit.

    Args:
        sites: all of one width.
        edits: indices of the texts of a pass -> its edits.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), TEXTS_AT_ONCE):
        batch = order[start : start + TEXTS_AT_ONCE]
        _, activations = forward(model, [texts[i] for i in batch], sites, edits(batch))
        states = mx.stack([activations[site].astype(mx.float32) for site in sites], axis=2)
        for i, row in zip(batch, np.array(states), strict=True):
            yield i, row[: len(texts[i])]
