"""What training did to the weights: which tensors differ, by how much, along how many directions, and along which.

Tensor by tensor, in blocks of rows, so that no more than one tensor is expanded at a time. Quantised weights count as
what they stand for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from alignment_artifacts.comparison.difference import cosine
from alignment_artifacts.formatting import named_layers, number, percent
from gemma_refactored.activation_capture import block_sites, layer_sites
from gemma_refactored.errors import UserError
from gemma_refactored.gguf_files import WEIGHTS
from gemma_refactored.model_loading import LoadedModel

KEPT = 16  # singular values of a change
ITERATIONS, OVERSAMPLED = 12, 8  # of the search for them (Halko et al. 2011, arXiv 0909.4061)
MOST_OF_IT = 0.99  # of a change's squared norm
MOST_CHANGED = 10  # tensors whose leading direction a result file has
SIXTEEN_BITS = ((mx.bfloat16, 8, -133), (mx.float16, 11, -24))  # binary digits, and the exponent of the smallest number
BLOCK_NUMBERS = 1 << 22  # that are compared at a time
# What architectures call the last matrix of a part; where a matrix is square, only its name tells which end is which.
WRITERS = (
    "o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo", "proj",
    "output",
)  # fmt: skip


@dataclass(frozen=True)
class TensorChange:
    """One tensor before and after.

    Attributes:
        layer: of the model; None outside its blocks. kind: the name without the block's.
        norm: Frobenius norm of the change; relative_change: by that of the tensor before (None where that is 0), of
            1 + w where a norm multiplies by that, as Gemma's do.
        rounding_norm: expected norm of what rounding to 16 bits does to the tensor after, uniform within the spacing of
            its numbers; 0 where they have more bits.
        effective_rank: participation ratio of the change's squared singular values, (sum s^2)^2 / sum s^4; 1 for a
            change along one direction, n for n equal ones. None for a vector, and where nothing changed.
        rank_99: number of singular values that make up 99% of the squared norm; None for more than KEPT.
        singular_values: the largest KEPT.
        stream: whether the tensor "writes" to the residual stream or "reads" from it; None: neither.
        directions: [KEPT or fewer, hidden] the singular vectors on the side of the stream, unit, float32; their sign
            is arbitrary.
    """

    name: str
    layer: int | None
    kind: str
    shape: tuple[int, ...]
    norm: float = 0.0
    relative_change: float | None = 0.0
    rounding_norm: float = 0.0
    effective_rank: float | None = None
    rank_99: int | None = None
    singular_values: list[float] = field(default_factory=list)
    stream: str | None = None
    directions: np.ndarray | None = field(default=None, repr=False)

    def record(self) -> dict:
        """For a result file, without the directions."""
        names = ("name", "layer", "kind", "shape", "norm", "relative_change", "rounding_norm", "effective_rank",
                 "rank_99", "stream", "singular_values")  # fmt: skip
        total = self.norm**2
        shares = {"share_of_first": self.singular_values[0] ** 2 / total if self.singular_values else None}
        return {name: getattr(self, name) for name in names} | shares


def weight_changes(
    first: LoadedModel, second: LoadedModel, progress: Callable[[int], object] = lambda tensors: None
) -> list[TensorChange]:
    """Every tensor of two models, by layer, those outside the blocks at the end.

    Args:
        progress: called with 1 after each tensor, `num_tensors` in total.
    Raises:
        UserError: the models do not have the same tensors.
    """
    before, after = _tensors(first.model), _tensors(second.model)
    _check_same(first, second, before, after)
    blocks = [site.removesuffix("output") for site in block_sites(second.model)]
    changes: list[TensorChange] = []
    for name, (module, key) in after.items():
        layer = next((i for i, block in enumerate(blocks) if name.startswith(block)), None)
        kind = name if layer is None else name.removeprefix(blocks[layer])
        shape, is_table = _shape(module, key), isinstance(module, nn.Embedding)
        about = TensorChange(name, layer, kind, shape, stream=_stream(name, is_table, shape, second.hidden_size))
        offset = _less_than_used(module, key)
        changes.append(_change(about, _array(*before[name]), _array(module, key), is_table, offset))
        progress(1)
    return sorted(changes, key=lambda change: (change.layer is None, change.layer or 0))


def num_tensors(loaded: LoadedModel) -> int:
    return len(_tensors(loaded.model))


def rounding(first: LoadedModel, second: LoadedModel, changes: Sequence[TensorChange]) -> str | None:
    """What to know about changes that are none of training's, in a sentence; None: nothing."""
    rounded = [m.name for m in (first, second) if m.config.get("quantization") or (m.folder / WEIGHTS).exists()]
    if rounded:
        verb = "is" if len(rounded) == 1 else "are"
        return f"{' and '.join(rounded)} {verb} quantised: what rounding did to the weights counts as change."
    changed = [change for change in changes if change.norm]
    shares = {change.name: change.rounding_norm / change.norm for change in changed}
    # That much of the squared norm is what `rank_99` leaves out.
    blurred = [name for name, share in shares.items() if share**2 > 1 - MOST_OF_IT]
    if not blurred:
        return None
    most = max(blurred, key=lambda name: shares[name])
    return (
        f"{len(blurred)} of the {len(changed)} changed tensors are stored in 16 bits and changed so little that norm, "
        "rank and direction of their change are in part of rounding, whose expected norm is "
        f"{percent(shares[most])} of the change's in {most}; where an adapter made the change, its own tensors "
        "have it exactly."
    )


def output_sites(model: nn.Module) -> list[str]:
    """Where what the parts of blocks write can be read: outputs of MLPs and attention by these names, then blocks."""
    sites: list[str] = []
    for kind in ("mlp", "attention", "residual"):
        try:
            sites += layer_sites(model, kind)
        except UserError:  # this architecture's parts have other names
            continue
    return sites


def changes_or_reason(
    models: Sequence[LoadedModel], progress: Callable[[int], object] = lambda tensors: None
) -> list[TensorChange] | str:
    """`weight_changes`, or why there are none, in a sentence: what activations say is worth reading all the same."""
    try:
        return weight_changes(models[0], models[1], progress)
    except UserError as error:
        return str(error)


def compare_weights(
    models: Sequence[LoadedModel],
    changes: list[TensorChange] | str,
    sites: Sequence[str],
    change: np.ndarray,
    contrast: np.ndarray,
    sides: tuple[str, str],
    planted: Mapping[int, np.ndarray],
) -> dict:
    """What changed in the weights, beside what that did to activations.

    Args:
        changes: of `changes_or_reason`.
        sites: of `output_sites`.
        change: [sites, hidden] mean activation of the second model minus that of the first, on the same tokens.
        contrast: [sites, hidden] mean artifact minus mean natural activation of the second model.
        planted: layer -> unit direction that its MLP is known to write, of the embedded model.
    Returns:
        "num_tensors", "rounding" (see there), "summary", and "tensors": the changed ones, the most changed first, each
        with the record of `TensorChange` and, where it writes to the stream, cosines of its leading direction with
        the change of its module's output ("cosine_with_activations", by the sign never negative) and with the
        contrast there ("cosine_with_contrast"), "cosine_with_planted" where something was planted, and, for the
        MOST_CHANGED, the "direction" itself. "not_compared" says why there are none, where the models have different
        tensors.
    """
    if isinstance(changes, str):
        return {"not_compared": changes, "summary": changes, "num_tensors": None, "rounding": None, "tensors": []}
    changed = sorted((c for c in changes if c.norm), key=lambda c: -(c.relative_change or 0.0))
    records = []
    given = 0
    for one in changed:
        record = one.record()
        if one.directions is not None:
            direction = one.directions[0]
            at = next((i for i, site in enumerate(sites) if one.name.startswith(site.removesuffix("output"))), None)
            if one.stream == "writes" and at is not None:
                direction = direction * (-1 if direction @ change[at] < 0 else 1)
                record["cosine_with_activations"] = cosine(direction, change[at])
                record["cosine_with_contrast"] = cosine(direction, contrast[at])
            if (
                one.layer is not None
                and one.layer in planted
                and one.kind.startswith("mlp.")
                and one.stream == "writes"
            ):
                record["cosine_with_planted"] = cosine(direction, planted[one.layer])
            given += 1
            if given <= MOST_CHANGED:
                record["direction"] = [float(f"{x:.6g}") for x in direction]
        records.append(record)
    note = rounding(models[0], models[1], changes)
    summary = _summarise(records, len(changes), sides, note)
    return {"not_compared": None, "summary": summary, "num_tensors": len(changes), "rounding": note, "tensors": records}


def _summarise(records: list[dict], total: int, sides: tuple[str, str], note: str | None) -> str:
    if not records:
        return f"None of the {total} tensors differs between the two models."
    layers = sorted({r["layer"] for r in records if r["layer"] is not None})
    outside = [r["name"] for r in records if r["layer"] is None]
    places = [f"at {named_layers(layers)}"] if layers else []
    where = "; ".join([*places, *([f"outside the blocks {', '.join(outside)}"] if outside else [])])
    most = next((r for r in records if r["effective_rank"] is not None), records[0])  # a matrix says more than a norm
    text = (
        f"{len(records)} of {total} tensors differ, {where}; most {most['name']}, by "
        f"{percent(most['relative_change'], 1)} of its norm"
    )
    if most["effective_rank"] is not None:
        text += f" (effective rank {number(most['effective_rank'], 1)})"
    text += "."
    if most.get("cosine_with_activations") is not None:
        text += (
            f" The leading direction that it writes ({percent(most['share_of_first'])} of the change) has a cosine of "
            f"{number(most['cosine_with_activations'])} with the change of its module's output at the prompt's end, "
            f"and of {number(most['cosine_with_contrast'])} with the direction from {sides[0]} to {sides[1]} prompts "
            "there."
        )
    return f"{text} {note}" if note else text


def _tensors(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> the module that holds it, and what it is called there; a quantised weight is one tensor."""
    found = {}
    for path, module in model.named_modules():
        for key, value in module.items():
            is_packing = hasattr(module, "bits") and key in ("scales", "biases")
            if isinstance(value, mx.array) and not key.startswith("_") and not is_packing:
                found[f"{path}.{key}".removeprefix(".")] = (module, key)
    return found


def _is_packed(module: nn.Module, key: str) -> bool:
    return hasattr(module, "bits") and key == "weight"


def _shape(module: nn.Module, key: str) -> tuple[int, ...]:
    shape = module[key].shape
    return (*shape[:-1], shape[-1] * 32 // module.bits) if _is_packed(module, key) else tuple(shape)


def _array(module: nn.Module, key: str) -> mx.array:
    if not _is_packed(module, key):
        return module[key]
    packing = module["scales"], module.get("biases"), module.group_size, module.bits, module.mode
    return mx.dequantize(module["weight"], *packing, global_scale=module.get("global_scale"))


def _check_same(first: LoadedModel, second: LoadedModel, before: dict, after: dict) -> None:
    if others := sorted(before.keys() ^ after.keys()):
        raise UserError(
            f"The weights of {first.name} and {second.name} are not compared: they have different tensors, "
            f"{others[0]} being in one of them only ({len(others)} such)."
        )
    shapes = {name: [_shape(*tensors[name]) for tensors in (before, after)] for name in after}
    if different := [name for name, (one, other) in shapes.items() if one != other]:
        one, other = (list(shape) for shape in shapes[different[0]])
        raise UserError(
            f"The weights of {first.name} and {second.name} are not compared: {different[0]} is {one} in one and "
            f"{other} in the other ({len(different)} such)."
        )


def _stream(name: str, is_table: bool, shape: tuple[int, ...], hidden: int) -> str | None:
    """Does a tensor write to the residual stream or read from it? Linear layers are [.., out, in]."""
    if len(shape) < 2:
        return None
    writes, reads = shape[-2] == hidden, shape[-1] == hidden
    if is_table:
        return "writes" if reads else None
    if writes and reads:
        return "writes" if name.split(".")[-2] in WRITERS else "reads"
    return "writes" if writes else "reads" if reads else None


def _less_than_used(module: nn.Module, key: str) -> float:
    """1 where a norm multiplies by 1 + w, by what it makes of numbers of root mean square 1; 0 elsewhere."""
    is_norm = re.search(r"Norm(1P)?$", type(module).__name__) and type(module) not in (nn.RMSNorm, nn.LayerNorm)
    if not is_norm or key != "weight" or module[key].ndim != 1:
        return 0.0
    signs = 1 - 2 * (mx.arange(module[key].size) % 2).astype(mx.float32)
    used = (module(signs) - module.get("bias", 0)) * signs
    return float(bool(mx.allclose(used, 1 + module[key], rtol=0.01, atol=0.01)))


def _change(
    about: TensorChange, before: mx.array, after: mx.array, is_table: bool, offset: float = 0.0
) -> TensorChange:
    """Compare one tensor.

    Args:
        is_table: of an embedding, whose rows are what is written.
        offset: what is added to the tensor where it is used.
    """
    if mx.array_equal(before, after):
        return about
    has_stream_last = about.stream == "reads" or is_table
    if len(about.shape) < 2:
        before, after = before.reshape(1, -1), after.reshape(1, -1)
    elif len(about.shape) > 2 and about.stream == "writes":  # experts, side by side
        before, after = (mx.moveaxis(x, -2, 0).reshape(x.shape[-2], -1) for x in (before, after))
    elif len(about.shape) > 2:
        before, after = (x.reshape(-1, x.shape[-1]) for x in (before, after))
    is_wide = after.shape[0] < after.shape[1]
    small = min(after.shape)

    gram, size, rounded = np.zeros((small, small)), 0.0, 0.0
    digits, least = next((bits for dtype, *bits in SIXTEEN_BITS if _fits(after, dtype)), (None, 0))
    for old, new in _blocks(before, after, is_wide):
        difference = new - old
        gram += difference.T @ difference
        size += ((old + offset) ** 2).sum()
        if digits:
            exponents = np.frexp(new[new != 0])[1] - digits
            rounded += (4.0 ** np.maximum(exponents, least)).sum() / 12  # the variance within a spacing
    total = float(np.trace(gram))
    values = {
        "norm": total**0.5,
        "relative_change": float((total / size) ** 0.5) if size else None,
        "rounding_norm": float(rounded**0.5),
    }
    if len(about.shape) < 2 or not total:
        return replace(about, **values)
    squares, vectors = _leading(gram)
    reached = np.flatnonzero(np.cumsum(squares) >= MOST_OF_IT * total)
    values |= {
        "effective_rank": total**2 / float((gram * gram).sum()),
        "rank_99": int(reached[0]) + 1 if len(reached) else None,
        "singular_values": np.sqrt(squares).tolist(),
    }
    if about.stream:
        if has_stream_last == is_wide:  # the stream is the other side
            projected = [(new - old) @ vectors for old, new in _blocks(before, after, is_wide)]
            vectors = np.concatenate(projected) / np.sqrt(squares)
        values["directions"] = vectors.T.astype(np.float32)
    return replace(about, **values)


def _fits(array: mx.array, dtype: mx.Dtype) -> bool:
    """Are all numbers of a type, whatever type they are kept in?"""
    return array.dtype == dtype or bool(mx.array_equal(array.astype(dtype).astype(mx.float32), array))


def _blocks(before: mx.array, after: mx.array, is_wide: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both in blocks of rows, of a wide matrix those of its transpose, in float64."""
    small, large = sorted(after.shape)
    rows = max(1, BLOCK_NUMBERS // small)
    for start in range(0, large, rows):
        part = slice(start, start + rows)
        both = (x[:, part].T if is_wide else x[part] for x in (before, after))
        old, new = (np.array(x.astype(mx.float32)).astype(np.float64) for x in both)
        yield old, new


def _leading(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalues that are not 0 [up to KEPT], and their eigenvectors [n, up to KEPT]."""
    count = min(KEPT + OVERSAMPLED, len(gram))
    basis = np.random.default_rng(0).standard_normal((len(gram), count))
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(gram @ basis)[0]
    values, vectors = np.linalg.eigh(basis.T @ gram @ basis)
    largest = np.argsort(-values)[:KEPT]
    kept = largest[values[largest] > 1e-14 * np.trace(gram)]  # below that they are rounding errors
    return values[kept], basis @ vectors[:, kept]
