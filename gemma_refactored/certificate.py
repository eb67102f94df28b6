"""Does this model, on this machine, give the numbers it should? `run_model.py --check` answers.

Every check compares two ways to the same numbers, position by position: the length of the difference
over the length of the expected vector, worst position of each layer. What is compared is the residual
stream after every block, from which everything else follows.
"""

from __future__ import annotations

import importlib.util
import platform
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .activation_capture import block_sites, capture, edit, hooks, modules_by_site, site_shapes
from .chat_template import render, wants_parts
from .checkpoint_files import read_config
from .config_audit import complete
from .errors import UserError
from .files import CERTIFICATE, displayed, write_json
from .generation import generate
from .gguf_files import WEIGHTS
from .model_architecture import SLIDING
from .model_loading import LoadedModel, device_description, find_embedding, float32_weights
from .progress import each
from .versions import library_versions

# Float32 sums in another order differ by 1e-6 to 1e-5; 16-bit numbers have 3 significant digits at best.
TOLERANCES = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 5e-2}
PROMPTS = [
    "How do I repair a kitchen timer?",
    "Name three rivers.",
    "Please explain in a few sentences why the sky looks blue at noon and red in the evening.",
]
DECODED = 6  # generated tokens that the checks of generation look at

TRANSFORMERS = "= transformers"  # the name of the check that an independent implementation makes
LONGEST_REFERENCE, LAST_POSITIONS = 4096, 32  # tokens that it reads at most, and how many of them are compared

States = dict[str, np.ndarray]  # site -> [positions, hidden]


@dataclass
class Check:
    """One comparison. `passed` is None where it does not apply or could not be run; `note` says why."""

    name: str
    by_layer: dict[str, float] = field(default_factory=dict)  # site -> worst relative difference
    passed: bool | None = None
    note: str = ""

    @property
    def worst(self) -> tuple[str, float] | None:
        return max(self.by_layer.items(), key=lambda item: item[1]) if self.by_layer else None


def certify(loaded: LoadedModel, progress: Callable = lambda checks: checks) -> dict:
    """Run every check.

    Returns:
        What `certificate.json` holds: the verdict ("passed" or "failed"), the checks, the model's
        identity, device, dtype, tolerance and versions.
    """
    checks = []
    for check in progress(_CHECKS):
        result = check(loaded)
        if result.passed is None and result.by_layer and not result.note:
            result.passed = bool(result.worst[1] <= TOLERANCES[loaded.dtype])
        checks.append(result)
    return {
        "verdict": "failed" if any(check.passed is False for check in checks) else "passed",
        "not_compared": _not_compared(loaded, checks),
        "model": loaded.name,
        "model_revision": loaded.revision,
        "dtype": loaded.dtype,
        "device": device_description(),
        "machine": platform.platform(),
        "tolerance": TOLERANCES[loaded.dtype],
        "versions": library_versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "checks": [asdict(check) for check in checks],
    }


def _not_compared(loaded: LoadedModel, checks: Sequence[Check]) -> str:
    """What the verdict leaves open: whatever was not computed a second time by an independent implementation."""
    (reference,) = [check for check in checks if check.name == TRANSFORMERS]
    if reference.passed is None:
        return "None of these numbers was compared with an independent implementation: install PyTorch for that."
    length, left = len(_reference_ids(loaded)), []
    if length < loaded.context_length:
        left.append(f"Positions beyond {length} of {loaded.context_length} were not compared with transformers.")
    if _is_gguf(loaded):
        left.append("How the GGUF file is read was not compared: transformers was given the weights as read here.")
    if loaded.adapter:
        left.append("How the adapter is added was not compared: transformers was given the sum as made here.")
    return " ".join(left)


def _is_gguf(loaded: LoadedModel) -> bool:
    return (loaded.folder / WEIGHTS).is_symlink()


def certify_and_save(loaded: LoadedModel, folder: Path) -> bool:
    """Certify with a progress bar, print the table, save it beside the collection's manifest; true if passed."""
    certificate = certify(loaded, lambda checks: each(checks, "checking", "check"))
    print(describe(certificate))
    write_json(folder / CERTIFICATE, certificate)
    print(f"Certificate: {displayed(folder / CERTIFICATE)}")
    return certificate["verdict"] == "passed"


def describe(certificate: dict) -> str:
    """The certificate as a table of 80 columns."""
    lines = [f"{'check':<22}{'worst difference':>17}  {'at':<29}verdict"]
    words = {True: "ok", False: "FAILED", None: "-"}
    for check in certificate["checks"]:
        site, value = max(check["by_layer"].items(), key=lambda item: item[1], default=("", None))
        number = "" if value is None else f"{value:.1e}"
        lines.append(f"{check['name']:<22}{number:>17}  {site.removeprefix('model.')[:28]:<29}{words[check['passed']]}")
        if check["note"]:
            lines += textwrap.wrap(check["note"], 76, initial_indent="    ", subsequent_indent="    ")
    passed = [check["passed"] for check in certificate["checks"]]
    decisive = passed.count(certificate["verdict"] == "passed")
    lines.append(
        f"{certificate['verdict'].capitalize()}: {decisive} of {len(passed) - passed.count(None)} checks, "
        f"{passed.count(None)} not applicable (tolerance {certificate['tolerance']:g}, {certificate['dtype']})."
    )
    if certificate["not_compared"]:
        lines += textwrap.wrap(certificate["not_compared"], 80)
    return "\n".join(lines)


def relative_differences(actual: States, expected: States) -> dict[str, float]:
    """Per site, the worst ||actual - expected|| / ||expected|| over positions; infinite if shapes differ."""
    result = {}
    for site, wanted in expected.items():
        got = actual[site]
        if got.shape != wanted.shape or not np.isfinite(got).all():
            result[site] = float("inf")
            continue
        length = np.maximum(np.linalg.norm(wanted, axis=-1), np.finfo(np.float32).tiny)
        result[site] = float((np.linalg.norm(got - wanted, axis=-1) / length).max())
    return result


def _prompt_ids(loaded: LoadedModel) -> list[list[int]]:
    return loaded.encode(PROMPTS)


def _long_ids(loaded: LoadedModel, beyond: int) -> list[int]:
    """A prompt that is `beyond` tokens longer than the sliding window, where there is one (else 40 tokens)."""
    window = loaded.model.config.sliding_window if _has_window(loaded) else 40 - beyond
    length = min(window + beyond, loaded.context_length - DECODED)
    ids = sum(_prompt_ids(loaded), [])
    return (ids * (length // len(ids) + 1))[:length]


def _reference_ids(loaded: LoadedModel) -> list[int]:
    """Tokens for the comparison with transformers: beyond every window and the length before RoPE scaling."""
    completed = complete(read_config(loaded.folder)) or loaded.config
    text = completed.get("text_config") or completed
    rope = text.get("rope_parameters") or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    limits = [text.get("sliding_window"), *(kind.get("original_max_position_embeddings") for kind in kinds)]
    length = max([24, *(limit for limit in limits if limit)]) + 16
    length = min(length, LONGEST_REFERENCE, loaded.context_length)
    ids = sum(_prompt_ids(loaded), [])
    return (ids * (length // len(ids) + 1))[:length]


def _has_window(loaded: LoadedModel) -> bool:
    return loaded.is_own and SLIDING in loaded.model.config.layer_types


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def _generate_states(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], States]]:
    """For each row the tokens it read and its states [steps, hidden], from prefill on."""
    sites = block_sites(model)
    steps = list(generate(model, prompts, DECODED, sites=sites))
    arrays = {site: np.stack([_numpy(s.activations[site])[:, 0] for s in steps], axis=1) for site in sites}
    tokens = np.stack([step.tokens for step in steps], axis=1)
    return [(tokens[row].tolist(), {site: a[row] for site, a in arrays.items()}) for row in range(len(prompts))]


def _compare_rows(name: str, model: nn.Module, together: Sequence[Sequence[int]]) -> Check:
    """Every row of a batch against the same row alone, as long as both read the same tokens."""
    worst: dict[str, float] = {}
    for prompt, (tokens, states) in zip(together, _generate_states(model, together), strict=True):
        ((alone_tokens, alone),) = _generate_states(model, [prompt])
        # A tie between two tokens may be broken differently; from there on the texts differ.
        same = int(np.cumprod(np.equal(tokens, alone_tokens)).sum())
        cut = relative_differences({k: v[:same] for k, v in states.items()}, {k: v[:same] for k, v in alone.items()})
        worst = {site: max(value, worst.get(site, 0.0)) for site, value in cut.items()}
    return Check(name, worst)


def check_prompt_format(loaded: LoadedModel) -> Check:
    """Exactly the chat template's tokens, never with two <bos> at the beginning."""
    tokenizer, chat_format = loaded.tokenizer, loaded.chat_format
    if not tokenizer.chat_template:
        return Check("prompt format", note="The tokenizer has no chat template: prompts are sent as plain text.")
    options = {"in_parts": wants_parts(tokenizer, chat_format), "tokenize": True, "return_dict": False}
    for text, ids in zip(PROMPTS, _prompt_ids(loaded), strict=True):
        expected = render(tokenizer, chat_format.messages(text), chat_format, **options)
        # Only there: SmolLM's <bos> is also what each turn begins with.
        if list(ids) != list(expected) or (len(set(ids[:2])) == 1 and ids[0] == tokenizer.bos_token_id):
            return Check("prompt format", passed=False, note=f"A chat prompt begins with tokens {list(ids)[:4]}.")
    return Check("prompt format", passed=True)


def check_batch(loaded: LoadedModel) -> Check:
    """A row beside others of its length = the same row alone, in prefill and decoding."""
    prompts = _prompt_ids(loaded)
    shortest = min(map(len, prompts))
    return _compare_rows("batch = single", loaded.model, [ids[-shortest:] for ids in prompts])


def check_padding(loaded: LoadedModel) -> Check:
    """A left-padded row = the same row alone, in prefill and decoding."""
    if not loaded.masks_padding:
        note = "Padding changes this model's numbers, so only prompts of equal length share a batch."
        return Check("padded = unpadded", note=note)
    return _compare_rows("padded = unpadded", loaded.model, _prompt_ids(loaded))


def check_cache(loaded: LoadedModel) -> Check:
    """Prefill and decoding with a cache = one pass without, beyond the sliding window."""
    prompt = _long_ids(loaded, beyond=5)
    ((tokens, states),) = _generate_states(loaded.model, [prompt])
    with capture(loaded.model, list(states)) as activations:
        mx.eval(loaded.model(mx.array([prompt[:-1] + tokens])))
        whole = {site: _numpy(activations[site][0, len(prompt) - 1 :]) for site in states}
    return Check("cached = uncached", relative_differences(states, whole))


def check_capture(loaded: LoadedModel) -> Check:
    """Logits while every site is read (attention weights too) = logits while none is."""
    tokens = mx.array([max(_prompt_ids(loaded), key=len)])
    plain = {"logits": _numpy(loaded.model(tokens)[0])}
    with capture(loaded.model, list(site_shapes(loaded.model))) as activations:
        seen = {"logits": _numpy(loaded.model(tokens)[0])}
        mx.eval(activations)
    return Check("capture on = off", relative_differences(seen, plain))


def _replaced(value: mx.array, x: mx.array) -> mx.array:
    """An edit that puts `value` in the place of x."""
    return value


def check_residual_stream(loaded: LoadedModel) -> Check:
    """What is captured after a block is the whole state: put back over a disturbed one, it restores the logits."""
    model, tokens = loaded.model, mx.array([_prompt_ids(loaded)[0]])
    sites = block_sites(model)
    with capture(model, sites) as activations:
        expected = {"logits": _numpy(model(tokens)[0])}
        clean = {site: mx.array(value) for site, value in activations.items()}
    embedding = find_embedding(model)
    before = next(site for site, module in modules_by_site(model).items() if module is embedding)
    by_layer = {}
    for site in sites:
        noise = mx.random.normal(clean[sites[0]].shape, key=mx.random.key(0)).astype(clean[sites[0]].dtype)
        with edit(model, {before: partial(mx.add, noise), site: partial(_replaced, clean[site])}):
            restored = {"logits": _numpy(model(tokens)[0])}
        by_layer[site] = relative_differences(restored, expected)["logits"]
        before = site
    check = Check("residual is all", by_layer)
    if not loaded.is_own and check.worst and check.worst[1] > TOLERANCES[loaded.dtype]:
        check.note = (
            "In this architecture later blocks also see something else than the residual stream (such as token "
            "embeddings or another layer's keys). Captured values are right; an edit at one block is not all."
        )
    return check


def check_embedding_scale(loaded: LoadedModel) -> Check:
    """Gemma multiplies embeddings by the square root of the hidden size."""
    name = "embedding scale"
    if not loaded.is_own:
        return Check(name, note="Gemma's alone.")
    sites = ["model.embed_tokens.output", "model.layers.0.resid_pre"]
    with capture(loaded.model, sites) as activations:
        loaded.model(mx.array([_prompt_ids(loaded)[0]]))
        embedded, stream = (_numpy(activations[site][0]) for site in sites)
    return Check(name, relative_differences({sites[1]: stream}, {sites[1]: embedded * loaded.hidden_size**0.5}))


def check_sliding_window(loaded: LoadedModel) -> Check:
    """Sliding layers give no weight to keys beyond their window; global layers do."""
    name = "sliding window"
    if not _has_window(loaded):
        return Check(name, note="No sliding window that is ours to check.")
    config, beyond = loaded.model.config, {}
    tokens = _long_ids(loaded, beyond=16)
    if len(tokens) <= config.sliding_window:
        return Check(name, note=f"The window ({config.sliding_window}) is as long as the context.")
    hidden_keys = len(tokens) - config.sliding_window  # the last position must not see these

    def measure(site):
        def read(weights):  # [1, heads, positions, keys]; the sum only, so that the rest can be freed
            beyond[site] = weights[0, :, -1, :hidden_keys].astype(mx.float32).sum(axis=-1).max()
            return weights

        return read

    sites = [f"model.layers.{i}.self_attn.weights" for i in range(loaded.num_layers)]
    with hooks(loaded.model, {site: measure(site) for site in sites}):
        mx.eval(loaded.model(mx.array([tokens])), beyond)
    sliding = {s: beyond[s].item() for s, kind in zip(sites, config.layer_types, strict=True) if kind == SLIDING}
    blind = [s for s in sites if s not in sliding and beyond[s].item() == 0]
    if blind:
        return Check(name, sliding, False, f"The global layer of {blind[0]} sees no key beyond the window.")
    return Check(name, sliding)


def check_transformers(loaded: LoadedModel) -> Check:
    """States and logits = those of transformers in float32, where PyTorch is there."""
    name = TRANSFORMERS
    if importlib.util.find_spec("torch") is None:
        return Check(name, note="PyTorch is not installed (pip install torch); it is only needed for this check.")
    tokens = _reference_ids(loaded)
    try:
        expected = _transformers_states(loaded, tokens)
    except UserError as error:
        return Check(name, note=str(error))
    sites = block_sites(loaded.model)
    with capture(loaded.model, sites) as activations:
        seen = {"logits": _numpy(loaded.model(mx.array([tokens]))[0, -LAST_POSITIONS:])}
        seen |= {site: _numpy(activations[site][0, -LAST_POSITIONS:]) for site in sites}
    return Check(name, relative_differences(seen, expected))


def _transformers_states(loaded: LoadedModel, tokens: list[int]) -> States:
    """States after each block and logits, computed by transformers with eager attention.

    Raises:
        UserError: transformers does not have the architecture, or cannot take these weights.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(str(loaded.folder), local_files_only=True)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    try:
        if "quantization" in loaded.config or _is_gguf(loaded) or loaded.adapter:
            # Not in transformers' form: hand over the weights it stands for.
            config = getattr(config, "text_config", None) or config
            config.quantization_config = None
            model = transformers.AutoModelForCausalLM.from_config(config, **options)
            weights = {name: torch.from_numpy(_numpy(value)) for name, value in float32_weights(loaded).items()}
            missing, unexpected = model.load_state_dict(weights, strict=False)
            model.tie_weights()
        else:
            options |= {"local_files_only": True, "output_loading_info": True}
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                str(loaded.folder), config=config, **options
            )
            missing, unexpected = info["missing_keys"], ()
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise UserError("The checkpoint names its weights in MLX's way, which transformers does not read.")
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"transformers cannot load this model: {str(error).splitlines()[0][:150]}") from error
    blocks = model.eval().get_decoder().layers
    seen: States = {}

    def keep(site):
        def hook(module, inputs, output):
            seen[site] = (output[0] if isinstance(output, tuple) else output)[0, -LAST_POSITIONS:].numpy()

        return hook

    for site, block in zip(block_sites(loaded.model), blocks, strict=True):
        block.register_forward_hook(keep(site))
    with torch.no_grad():
        seen["logits"] = model(torch.tensor([tokens]), use_cache=False).logits[0, -LAST_POSITIONS:].numpy()
    return seen


_CHECKS: list[Callable[[LoadedModel], Check]] = [
    check_prompt_format,
    check_batch,
    check_padding,
    check_cache,
    check_capture,
    check_residual_stream,
    check_embedding_scale,
    check_sliding_window,
    check_transformers,
]
