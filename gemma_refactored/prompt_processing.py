"""Prompt files, the chat template, and the text results of a run."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .chat_template import ChatFormat, encode_chat
from .conversation import Conversation, as_prompt
from .errors import UserError, shown
from .files import displayed, read_json, write_json
from .tables import JSON_LINES, LINES, TABLES, ending, read_json_lines, read_lines, read_table

log = logging.getLogger(__name__)
UNGROUPED, ONLY_LIST = "prompts", "prompt_list"  # names in the layout of a collection, for prompts without groups
PROMPT_COLUMNS = ("prompt", "messages", "text", "instruction", "question", "goal", "behavior")  # as data sets call it


@dataclass(frozen=True)
class Prompt:
    """One prompt and its place in the prompts file."""

    group: str
    subcategory: str
    number: int  # position within the subcategory, from 1
    text: str  # or a `Conversation`

    @property
    def folder(self) -> Path:
        """Where its activations go, below the collection's folder (design: GROUP/SUBCATEGORY/batch_1)."""
        return Path(self.group) / self.subcategory / f"batch_{self.number}"


def load_prompts(path: str | Path, column: str | None = None) -> list[Prompt]:
    """The prompts of a file, by its ending; upper or lower case, with or without a byte-order mark.

    - .json: `{GROUP: {SUBCATEGORY: [prompt, ..]}}`; `{GROUP: prompt}` or `{GROUP: [prompt, ..]}`; a list of prompts,
      or of objects that have one each.
    - .txt: one prompt per line.
    - .csv, .tsv: a table, separated by commas, semicolons or tabs.
    - .jsonl: one prompt per line as a string, or as an object that has one.

    What has no groups is the group "prompts". In JSON a prompt may be a list of messages, see `conversation.as_prompt`.

    Args:
        column: of a table or of objects, where the prompts are; by default the first of PROMPT_COLUMNS that there is.
    Raises:
        UserError: wrong structure, no such column, or a name that could not safely become a folder.
    """
    kind, what = ending(path), "prompts file"
    if kind in LINES:
        content: object = read_lines(path, what)
    elif kind in TABLES:
        content = read_table(path, what)
    elif kind in JSON_LINES:
        content = read_json_lines(path, what)
    else:
        content = read_json(Path(path), what)
    return parse_prompts(content, path, column)


def prompt_texts(source: str | Path | Sequence[str | list[dict]], column: str | None = None) -> list[str]:
    """The prompts of a file, or of a list of texts and conversations (lists of messages).

    Raises:
        UserError: those of `load_prompts`; or a list that is empty or has something other than text in it.
    """
    prompts = load_prompts(source, column) if isinstance(source, str | Path) else parse_prompts(list(source), "prompts")
    return [prompt.text for prompt in prompts]


def parse_prompts(content, path: str | Path, column: str | None = None) -> list[Prompt]:
    """The prompts in the content of a prompts file; `path` is for the errors, which are those of `load_prompts`."""
    if isinstance(content, list):
        content = {UNGROUPED: _texts(content, path, column)}
    elif column is not None:
        raise UserError(f"{path} has groups of prompts and no columns; omit the column {shown(column)}.")
    if not isinstance(content, dict) or not content:
        raise UserError(f'{path}: expected {{"GROUP": {{"SUBCATEGORY": ["prompt", ..]}}}}, or a list of prompts.')
    prompts = []
    for group, subcategories in content.items():
        check_name(group, path)
        if isinstance(subcategories, str) or _is_conversation(subcategories):
            subcategories = [subcategories]
        if isinstance(subcategories, list):
            subcategories = {ONLY_LIST: subcategories}
        if not isinstance(subcategories, dict) or not subcategories:
            raise UserError(
                f"{path}: group {shown(group)} must be a prompt, a list of prompts, or an object of subcategories with "
                "lists of prompts."
            )
        for subcategory, texts in subcategories.items():
            check_name(subcategory, path)
            if not isinstance(texts, list) or not texts:
                raise UserError(f"{path}: {shown(group)} / {shown(subcategory)} must be a list of at least one prompt.")
            for number, text in enumerate(texts, 1):
                where = f"{path}: prompt {number} of {shown(group)} / {shown(subcategory)}"
                prompts.append(Prompt(group, subcategory, number, as_prompt(text, where)))
    return prompts


def _texts(rows: list, path: str | Path, column: str | None) -> list:
    """The prompts of rows that are texts, or objects with a prompt in one of their columns."""
    if not rows:
        raise UserError(f"{path} holds no prompts.")
    if _is_conversation(rows):
        raise UserError(f"{path} is one conversation, and a list of prompts is needed: put it in brackets, [[..]].")
    if not all(isinstance(row, dict) for row in rows):
        if column is not None:
            raise UserError(f"{path} is a list of texts without columns; omit the column {shown(column)}.")
        return rows
    columns = list(rows[0])
    names = {name.lower(): name for name in reversed(columns)}
    usual = [names[name] for name in PROMPT_COLUMNS if name in names]
    chosen = column or next(iter(usual), columns[0] if len(columns) == 1 else "")
    if chosen not in columns:
        lacking = f"no column {shown(column)}" if column else f"none of the columns {', '.join(PROMPT_COLUMNS)}"
        raise UserError(f"{path} has {lacking}; its columns are {', '.join(columns)}. Name one with --prompt-column.")
    if chosen != column and chosen.lower() != PROMPT_COLUMNS[0]:
        log.info("Prompts: the column %r of %s (--prompt-column names another).", chosen, displayed(path))
    return [row.get(chosen) for row in rows]


def _is_conversation(value) -> bool:
    return isinstance(value, list) and any(
        isinstance(item, dict) and set(item) == {"role", "content"} for item in value
    )


def prompts_from_arguments(texts: list[str]) -> list[Prompt]:
    return [
        Prompt("prompts", "command_line", number, as_prompt(text, f"prompt {number} of --prompts"))
        for number, text in enumerate(texts, 1)
    ]


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
        UserError: the chat template fails, or leaves a prompt out; a system prompt or a conversation as plain text.
    """
    chat_format = chat_format or ChatFormat()
    if not chat_mode and (chat_format.system_prompt is not None or chat_format.arguments):
        raise UserError("Plain text has no place for a system prompt or variables of a chat template; omit them.")
    if any(isinstance(text, Conversation) for text in texts) and not (chat_mode and tokenizer.chat_template):
        remedy = "give one with --chat-template FILE" if chat_mode else "omit --no-chat-mode"
        raise UserError(f"A prompt of several messages needs a chat template; {remedy}.")
    if chat_mode and not tokenizer.chat_template:
        log.warning("This model's tokenizer has no chat template: prompts are sent as plain text.")
        chat_mode = False
    encoded = encode_chat(tokenizer, texts, chat_format) if chat_mode else list(map(tokenizer.encode, texts))
    return [_single_bos(tokenizer, ids) for ids in encoded]


def _single_bos(tokenizer, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def count_in_thought(records: Sequence[dict]) -> int:
    """How many answers end inside the model's thought."""
    return sum(record.get("thought_tokens", 0) is None for record in records)


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
        "in_thought": count_in_thought(results),
        **settings,
    }
    write_json(folder / "summary.json", summary)
