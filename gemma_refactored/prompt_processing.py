"""Prompt files, the chat template, and the text results of a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .chat_template import ChatFormat, encode_chat
from .errors import UserError, shown
from .files import read_json, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One prompt and its place in the prompts file."""

    group: str
    subcategory: str
    number: int  # position within the subcategory, from 1
    text: str

    @property
    def folder(self) -> Path:
        """Where its activations go, below the collection's folder (design: GROUP/SUBCATEGORY/batch_1)."""
        return Path(self.group) / self.subcategory / f"batch_{self.number}"


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read `{GROUP: {SUBCATEGORY: [prompt, ..]}}`.

    Raises:
        UserError: wrong structure, or a name that could not safely become a folder.
    """
    return parse_prompts(read_json(Path(path), "prompts file"), path)


def parse_prompts(content, path: str | Path) -> list[Prompt]:
    """The prompts in the content of a prompts file; `path` is for the errors, which are those of `load_prompts`."""
    if not isinstance(content, dict) or not content:
        raise UserError(f'{path}: expected {{"GROUP": {{"SUBCATEGORY": ["prompt", ..]}}}}.')
    prompts = []
    for group, subcategories in content.items():
        check_name(group, path)
        if not isinstance(subcategories, dict) or not subcategories:
            raise UserError(f"{path}: group {shown(group)} must be an object of subcategories with lists of prompts.")
        for subcategory, texts in subcategories.items():
            check_name(subcategory, path)
            if not isinstance(texts, list) or not texts:
                raise UserError(f"{path}: {shown(group)} / {shown(subcategory)} must be a list of at least one prompt.")
            for number, text in enumerate(texts, 1):
                where = f"{path}: prompt {number} of {shown(group)} / {shown(subcategory)}"
                prompts.append(Prompt(group, subcategory, number, _checked_text(text, where)))
    return prompts


def prompts_from_arguments(texts: list[str]) -> list[Prompt]:
    return [
        Prompt("prompts", "command_line", number, _checked_text(text, f"prompt {number} of --prompts"))
        for number, text in enumerate(texts, 1)
    ]


def _checked_text(text, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} must be text that is not empty, not {shown(text)}.")
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise UserError(f"{where} contains half of a surrogate pair, which is no character; remove it.")
    return text


def check_name(name, path) -> None:
    """Group and subcategory become folder names: refuse any that could leave the output folder."""
    bad = not isinstance(name, str) or not name.strip() or name in (".", "..") or name.startswith(".")
    if bad or re.search(r'[/\\:*?"<>|\x00-\x1f\x7f\ud800-\udfff]', name) or len(name.encode()) > 200:
        raise UserError(
            f"{path}: the name {shown(name)} cannot be a folder name; use letters, digits, spaces, '-' and '_' "
            "(no separators, no leading dot, at most 200 bytes)."
        )


def encode_prompts(
    tokenizer, texts: Sequence[str], chat_mode: bool = True, chat_format: ChatFormat | None = None
) -> list[list[int]]:
    """Token ids of each prompt text, in the model's chat format or as plain text; never a doubled <bos>.

    A tokenizer without a chat template gets plain prompts, with a warning. In plain text a control token that is
    typed into a prompt is one; in the chat format it is text (see `ChatFormat`).

    Raises:
        UserError: the chat template fails, or leaves a prompt out.
    """
    if chat_mode and not tokenizer.chat_template:
        log.warning("This model's tokenizer has no chat template: prompts are sent as plain text.")
        chat_mode = False
    if chat_mode:
        encoded = encode_chat(tokenizer, texts, chat_format or ChatFormat())
    else:
        encoded = [tokenizer.encode(text) for text in texts]
    return [_single_bos(tokenizer, ids) for ids in encoded]


def _single_bos(tokenizer, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def save_results(folder: Path, results: list[dict], settings: dict) -> None:
    """Write results.json (input order), prompt_metadata.json and summary.json."""
    write_json(folder / "results.json", results)
    metadata = [{key: r[key] for key in ("group", "subcategory", "prompt", "prompt_tokens")} for r in results]
    write_json(folder / "prompt_metadata.json", metadata)
    tokens = [len(r["token_ids"]) for r in results]
    summary = {
        "prompts": len(results),
        "generated_tokens": sum(tokens),
        "stopped_by_end_token": sum(r["finish_reason"] == "stop" for r in results),
        "mean_answer_tokens": sum(tokens) / len(tokens),
        **settings,
    }
    write_json(folder / "summary.json", summary)
