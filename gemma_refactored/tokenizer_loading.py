"""A checkpoint's tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import logging
from pathlib import Path

from .checkpoint_files import TOKENIZER_FILES, read_checkpoint_json, refuse_lfs_pointer
from .errors import UserError, shown
from .gguf_files import WEIGHTS


def load_tokenizer(folder: Path):
    """The transformers tokenizer of a checkpoint.

    Raises:
        UserError: there is none, or not one that transformers can read.
    """
    # transformers would otherwise tell every user of MLX that PyTorch is missing.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = [path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)]
    for path in files:
        refuse_lfs_pointer(path)
    # From a bare tokenizer_config.json transformers makes a tokenizer of a few special tokens.
    if not {path.name for path in files} - {"added_tokens.json", "special_tokens_map.json"}:
        raise UserError(f"{folder} has no tokenizer: it lacks tokenizer.json (or tokenizer.model, vocab.json).")
    # For some model types AutoTokenizer puts another split in place of the one that a GGUF file names.
    kind = PreTrainedTokenizerFast if (folder / WEIGHTS).is_symlink() else AutoTokenizer
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{folder} has no tokenizer that transformers can read: {reason}") from error


def end_tokens(folder: Path, config: dict, tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer, as the checkpoint says: generation config, config, end-of-text token.

    A checkpoint whose generation config names none also ends with what its chat template closes an answer with.

    Raises:
        UserError: an end token that is no token id.
    """
    path = folder / "generation_config.json"
    generation = read_checkpoint_json(path) if path.exists() else {}
    ends: set[int] = set()
    text_config = config.get("text_config")
    text = text_config if isinstance(text_config, dict) else {}
    for where, value in (
        (path, generation.get("eos_token_id")),
        (folder / "config.json", config.get("eos_token_id", text.get("eos_token_id"))),
        (folder, tokenizer.eos_token_id),
    ):
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if isinstance(token, str) and token in tokenizer.get_vocab():
                token = tokenizer.get_vocab()[token]
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise UserError(f"{where}: eos_token_id must be a token id or a list of them, not {shown(value)}.")
            ends.add(token)
    if generation.get("eos_token_id") is None:
        ends |= closing_token(tokenizer)
    return tuple(sorted(ends))


def closing_token(tokenizer) -> set[int]:
    """The control token right after an answer in the chat template; empty if there is none."""
    from .chat_template import PROBE, ChatFormat, render

    if not tokenizer.chat_template:
        return set()
    try:
        text = render(tokenizer, [("user", "Hello"), ("assistant", PROBE)], ChatFormat(), add_generation_prompt=False)
    except UserError:  # prompts will tell what is wrong with it
        return set()
    after = text.rpartition(PROBE)[2].lstrip()
    control = [
        (token.content, i) for i, token in tokenizer.added_tokens_decoder.items() if after.startswith(token.content)
    ]
    return {max(control, key=lambda item: len(item[0]))[1]} if after and control else set()
