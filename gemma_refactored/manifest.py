"""What made a collection: enough to tell whether another run is the same, and to repeat it."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .chat_template import rendering_date
from .configuration import NAMES, Chat, Generation, Saving
from .conversation import written
from .errors import UserError, shown
from .files import read_json
from .prompt_processing import Prompt, parse_prompts
from .settings import check, from_record, record
from .versions import library_versions

if TYPE_CHECKING:
    from .model_loading import LoadedModel

# What may differ between a run and its continuation without changing any number (hash and weights_dtype show that).
FREE_SETTINGS = (
    "created", "finished", "versions", "machine", "batch_size", "prompts", "prompt_groups", "complete", "model_path",
    "adapter_path", "keep_precision",
)  # fmt: skip
# In addition to the generation's settings: what repeating a run needs, and its types.
NEEDED: dict[str, type | tuple[type, ...]] = {
    "activation_filter": str, "activation_dtype": str, "compressed": bool, "layout": str,
    "model_path": (str, type(None)), "model_revision": str, "prompt_groups": dict,
}  # fmt: skip


# What runs did whose manifest does not say, because the setting is newer.
EARLIER = {"date": None, "control_tokens": True, "adapter_path": None, **record(Chat())}


@dataclass(frozen=True)
class RunToRepeat:
    """What a manifest says about its run.

    Attributes:
        model: folder or Hugging Face id, None for a default model.
        adapter: folder or Hugging Face id of the LoRA adapter that was added to it; None: none was.
        revision: of the weights, and base_revision of those without the adapter.
        saved: fields of `Saving` that decide what is in the files.
        date: that was written into its prompts, for templates that write one.
    """

    model: str | None
    adapter: str | None
    revision: str
    base_revision: str
    generation: Generation
    saved: dict
    prompts: list[Prompt]
    date: datetime.date

    @property
    def hub_revision(self) -> str | None:
        """The commit of a model from Hugging Face; None for a local folder."""
        return None if self.base_revision.startswith("sha256:") else self.base_revision


def new_manifest(model_facts: dict, settings: dict, prompts: Sequence[Prompt]) -> dict:
    """The manifest of a run that is about to start."""
    text = json.dumps([[p.group, p.subcategory, written(p.text)] for p in prompts], ensure_ascii=False)
    groups: dict[str, dict[str, list]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, {}).setdefault(prompt.subcategory, []).append(written(prompt.text))
    return {
        **model_facts,
        **settings,
        "prompts_hash": hashlib.sha256(text.encode()).hexdigest(),
        "prompts": len(prompts),
        "prompt_groups": groups,
        "versions": library_versions(),
        "machine": platform.platform(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def read_manifest(path: Path) -> RunToRepeat:
    """The run that a manifest is of.

    Raises:
        UserError: it is not a manifest, is from a version that did not keep the prompts, or has an invalid value.
    """
    manifest = read_json(path, "manifest")
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is not the manifest of a run.")
    for name, kind in NEEDED.items():
        if name not in manifest:
            raise UserError(f"{path} is not enough to repeat a run: it has no {name}.")
        if not isinstance(manifest[name], kind):
            raise UserError(f"{path}: {name} cannot be {shown(manifest[name])}.")
    saved = {
        "save_activations": True,
        "process_by_group": manifest["layout"] == "grouped",
        "compress_activations": manifest["compressed"],
        "activation_filter": manifest["activation_filter"],
        "activation_dtype": manifest["activation_dtype"],
    }
    check(Saving(**saved), {name: f"{path}: {name}" for name in saved})
    manifest = {**EARLIER, **manifest}
    adapter, added = manifest["adapter_path"], manifest.get("adapter", {})
    if not isinstance(adapter, str | None) or not isinstance(added, dict) or (added and adapter is None):
        raise UserError(f"{path}: adapter_path cannot be {shown(adapter)}.")
    return RunToRepeat(
        model=manifest["model_path"],
        adapter=adapter,
        revision=manifest["model_revision"],
        base_revision=str(added.get("base_revision", manifest["model_revision"])),
        generation=from_record(Generation, manifest, str(path), NAMES),
        saved=saved,
        prompts=parse_prompts(manifest["prompt_groups"], path),
        date=rendering_date(manifest),
    )


def check_same_weights(loaded: LoadedModel, revision: str) -> None:
    if loaded.revision != revision:
        raise UserError(
            f"The weights of {loaded.name} ({loaded.revision}) are not those that made this manifest "
            f"({revision}); give the right ones with --model and --adapter."
        )
