"""A prompt in the model's chat format.

Templates come with checkpoints and are programs: they may fail, leave the prompt out, or write today's date. What
they make of a prompt is looked at before it is believed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import UserError, shown

log = logging.getLogger(__name__)

PROBE = "zqx7 probe zqx7"  # a text that no template writes by itself


@dataclass(frozen=True)
class ChatFormat:
    """How prompts are put into a model's chat format.

    Attributes:
        template: the name of one of several templates of a checkpoint; None takes its default.
        date: what templates that write the date take for today.
        keeps_control_tokens: a control token typed into a prompt (`<end_of_turn>`) acts as one, instead of being text.
    """

    template: str | None = None
    date: datetime.date = field(default_factory=datetime.date.today)
    keeps_control_tokens: bool = False


def encode_chat(tokenizer, texts: Sequence[str], chat_format: ChatFormat) -> list[list[int]]:
    """Token ids of each prompt as the user's one message, up to where the model's answer begins.

    Raises:
        UserError: the template fails, or does not contain the prompt.
    """
    in_parts = _wants_parts(tokenizer, chat_format)
    encoded, quoted = [], 0
    for prompt in texts:
        rendered = render(tokenizer, [("user", prompt)], chat_format, in_parts=in_parts)
        if prompt.strip() not in rendered:
            raise UserError(
                f"The model's chat template changes or leaves out the prompt {shown(prompt)}; "
                "--no-chat-mode sends plain text."
            )
        typed = () if chat_format.keeps_control_tokens else _control_tokens_in(tokenizer, prompt)
        if typed:
            quoted += 1
            encoded.append(_encode_as_text(tokenizer, rendered, prompt.strip(), typed))
        else:
            encoded.append(tokenizer.encode(rendered, add_special_tokens=False))
    if quoted:
        log.warning(
            "%d prompt(s) contain control tokens of the model, such as %s: read as text.",
            quoted,
            typed_example(tokenizer, texts),
        )
    return encoded


def typed_example(tokenizer, texts: Sequence[str]) -> str:
    return next(token for text in texts for token in _control_tokens_in(tokenizer, text))


def facts_of_prompts(tokenizer, token_ids: Sequence[Sequence[int]], chat_format: ChatFormat) -> dict:
    """What a manifest keeps of the prompts as the model reads them: a hash of their token ids, and the date in them.

    `rendering_date` is null where the template writes none.
    """
    digest = hashlib.sha256(json.dumps([list(map(int, ids)) for ids in token_ids]).encode())
    date = chat_format.date.isoformat() if uses_date(tokenizer) else None
    return {"token_ids_hash": digest.hexdigest()[:12], "rendering_date": date}


def rendering_date(manifest: dict | None) -> datetime.date:
    """The date that an earlier run wrote into its prompts, so that its continuation does the same; else today's."""
    date = (manifest or {}).get("rendering_date")
    try:
        return datetime.date.fromisoformat(date) if date else datetime.date.today()
    except (TypeError, ValueError):
        raise UserError(f"The manifest's rendering_date must look like 2025-01-31, not {shown(date)}.") from None


def uses_date(tokenizer) -> bool:
    """Does what the template writes depend on the day?"""
    template = tokenizer.chat_template
    sources = template.values() if isinstance(template, dict) else [template or ""]
    return any("strftime_now" in source for source in sources)


def render(
    tokenizer,
    messages: Sequence[tuple[str, str]],
    chat_format: ChatFormat,
    in_parts: bool = False,
    add_generation_prompt: bool = True,
) -> str:
    """The text that the template makes of (role, content) messages.

    Args:
        in_parts: content as a list of typed parts, as templates of multimodal models expect it.
    Raises:
        UserError: no such template, or it fails.
    """
    conversation = [
        {"role": role, "content": [{"type": "text", "text": content}] if in_parts else content}
        for role, content in messages
    ]
    template = _chosen_template(tokenizer, chat_format.template)
    moment = datetime.datetime.combine(chat_format.date, datetime.time())
    try:
        return tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt,
            strftime_now=moment.strftime,
        )  # fmt: skip
    # A template is somebody else's program: any exception may come out of it.
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"The model's chat template cannot be used ({reason}); --no-chat-mode sends plain text."
        ) from None


def _chosen_template(tokenizer, name: str | None) -> str | None:
    """The template of that name; None stands for the tokenizer's only or default one."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        if name is not None:
            raise UserError(f"This model has one chat template, without a name; leave {shown(name)} out.")
        return None
    name = name or "default"
    if name not in templates:
        raise UserError(
            f"This model has several chat templates ({', '.join(sorted(templates))}) and none is called {name!r}; "
            "choose one with --chat-template, or send plain text with --no-chat-mode."
        )
    return templates[name]


def _wants_parts(tokenizer, chat_format: ChatFormat) -> bool:
    """Whether the template finds the prompt only in a list of parts.

    Raises:
        UserError: it does not write the prompt at all.
    """
    failure = None
    for in_parts in (False, True):
        try:
            if PROBE in render(tokenizer, [("user", PROBE)], chat_format, in_parts=in_parts):
                return in_parts
        except UserError as error:
            failure = failure or error
    raise failure or UserError(
        "The model's chat template leaves the prompt out, as text and in parts; --no-chat-mode sends plain text."
    )


def _control_tokens_in(tokenizer, text: str) -> list[str]:
    return [str(token) for token in _control_tokens(tokenizer) if str(token) in text]


def _control_tokens(tokenizer) -> list[str]:
    return [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content.strip()
    ]


def _encode_as_text(tokenizer, rendered: str, prompt: str, typed: Sequence[str]) -> list[int]:
    """Token ids in which only the template's own control tokens are control tokens.

    The tokenizer encodes the stretches between control tokens one by one, so the stretch with the prompt in it can be
    encoded apart, its control tokens as text.
    """
    before, _, after = rendered.rpartition(prompt) if rendered.count(prompt) == 1 else _refuse_typed(typed)
    controls = _control_tokens(tokenizer)
    start = max((before.rfind(token) + len(token) for token in controls if token in before), default=0)
    end = min((after.find(token) for token in controls if token in after), default=len(after))

    def encode(text: str, as_text: bool = False) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=as_text)

    def joined(stretch: str) -> list[int]:
        around = before[start:], after[:end]
        return encode(before[:start]) + encode(around[0] + stretch + around[1], as_text=True) + encode(after[end:])

    if joined(PROBE) != encode(before + PROBE + after) or set(_ids(tokenizer, typed)) & set(
        encode(prompt, as_text=True)
    ):
        _refuse_typed(typed)  # this tokenizer's stretches depend on each other, or it knows the token otherwise
    return joined(prompt)


def _ids(tokenizer, tokens: Sequence[str]) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def _refuse_typed(typed: Sequence[str]):
    raise UserError(
        f"A prompt contains {typed[0]}, a control token of this model, which its tokenizer cannot encode as text; "
        "remove it from the prompt."
    )
