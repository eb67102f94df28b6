"""What made a collection: enough to tell whether another run is the same, and to repeat it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, shown
from .files import read_json
from .prompt_processing import Prompt, parse_prompts

if TYPE_CHECKING:
    from .model_loading import LoadedModel

# What may differ between a run and its continuation without changing any number (hash and weights_dtype tell).
FREE_SETTINGS = (
    "created", "finished", "versions", "machine", "batch_size", "prompts", "prompt_groups", "complete", "model_path",
    "keep_precision",
)  # fmt: skip
# Options of the command line that a manifest has under the same name, and what they may be.
NUMBER, MAYBE_LIST = (int, float), (list, type(None))
GENERATION_OPTIONS = {
    "max_tokens": int, "temp": NUMBER, "top_p": NUMBER, "repetition_penalty": NUMBER, "logit_bias": MAYBE_LIST,
    "seed": int, "chat_mode": bool, "ignore_end_tokens": bool, "batch_size": int, "keep_precision": bool,
}  # fmt: skip
REPEATED = {**GENERATION_OPTIONS, "activation_filter": str, "activation_dtype": str}
OTHERS = {
    "model_path": (str, type(None)), "model_revision": str, "layout": str, "compressed": bool, "prompt_groups": dict,
}  # fmt: skip


def new_manifest(model_facts: dict, settings: dict, prompts: Sequence[Prompt]) -> dict:
    """The manifest of a run that is about to start."""
    text = json.dumps([[p.group, p.subcategory, p.text] for p in prompts], ensure_ascii=False)
    groups: dict[str, dict[str, list[str]]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, {}).setdefault(prompt.subcategory, []).append(prompt.text)
    packages = ("mlx", "mlx-lm", "numpy", "transformers")
    return {
        **model_facts,
        **settings,
        "prompts_hash": hashlib.sha256(text.encode()).hexdigest(),
        "prompts": len(prompts),
        "prompt_groups": groups,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "machine": platform.platform(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def token_ids_hash(token_ids: Sequence[Sequence[int]]) -> str:
    """Of what the model reads: it covers texts, tokenizer, chat template and everything that was rendered into them."""
    return hashlib.sha256(json.dumps([list(ids) for ids in token_ids]).encode()).hexdigest()


def read_manifest(path: Path) -> dict:
    """A manifest that a run can be repeated from.

    Raises:
        UserError: it is none, or of a version that did not keep the prompts.
    """
    manifest = read_json(path, "manifest")
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not the manifest of a run.")
    for name, kind in {**REPEATED, **OTHERS}.items():
        if name not in manifest:
            raise UserError(f"{path} is not enough to repeat a run: it has no {name}.")
        if not isinstance(manifest[name], kind) or (isinstance(manifest[name], bool) and kind is not bool):
            raise UserError(f"{path}: {name} cannot be {shown(manifest[name])}.")
    if not all(isinstance(item, str) for item in manifest["logit_bias"] or []):
        raise UserError(f"{path}: logit_bias must be a list of texts like '1234=-5.0'.")
    if manifest["activation_dtype"] not in ("float32", "float16"):
        raise UserError(
            f"{path}: activation_dtype must be float32 or float16, not {shown(manifest['activation_dtype'])}."
        )
    return manifest


def options_to_repeat(manifest: dict) -> dict:
    """The command line's options, by their names in argparse; where the files go is not among them."""
    return {
        **{name: manifest[name] for name in REPEATED},
        "model": manifest["model_path"],
        "save_activations": True,
        "process_by_group": manifest["layout"] == "grouped",
        "compress_activations": manifest["compressed"],
    }


def prompts_to_repeat(manifest: dict, path: Path) -> list[Prompt]:
    return parse_prompts(manifest["prompt_groups"], path)


def hub_revision(manifest: dict) -> str | None:
    """The commit of a model from Hugging Face; None for a local folder."""
    revision = manifest["model_revision"]
    return None if revision.startswith("sha256:") else revision


def check_same_weights(loaded: LoadedModel, manifest: dict) -> None:
    if loaded.revision != manifest["model_revision"]:
        raise UserError(
            f"The weights of {loaded.name} ({loaded.revision}) are not those that made this manifest "
            f"({manifest['model_revision']}); give the right ones with --model."
        )
