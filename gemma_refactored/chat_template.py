"""A prompt in the model's chat format.

Templates come with checkpoints and are programs: they may fail, leave the prompt out, or write today's date. What
they make of a prompt is looked at before it is believed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .configuration import Chat
from .conversation import Conversation
from .errors import UserError, shown
from .files import decoded, is_file, read_bytes

log = logging.getLogger(__name__)

PROBE, SYSTEM_PROBE = "zqx7 probe zqx7", "qzx9 probe qzx9"  # texts that no template writes by itself
PLAIN_TEXT = "--no-chat-mode sends plain text"
GENERATION_MARKS = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # a block of transformers, not of jinja
OWN_VARIABLES = {
    "messages", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token", "raise_exception",
    "strftime_now", "range", "namespace", "dict", "loop", "cycler", "joiner", "lipsum",
}  # fmt: skip


@dataclass(frozen=True)
class ChatFormat:
    """How prompts are put into a model's chat format.

    Attributes:
        template: the name of one of several templates of a checkpoint; None takes its default.
        date: what templates that write the date take for today.
        keeps_control_tokens: a control token typed into a prompt (`<end_of_turn>`) acts as one, instead of being text.
        system_prompt: the system message before each prompt; None: no such message.
        arguments: variables of the template, for example {"enable_thinking": False}.
    """

    template: str | None = None
    date: datetime.date = field(default_factory=datetime.date.today)
    keeps_control_tokens: bool = False
    system_prompt: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def messages(self, prompt: str) -> list[tuple[str, str]]:
        """(role, content) of the conversation that a prompt is, or is the end of.

        Raises:
            UserError: there are two system messages, one of these settings and one of the prompt.
        """
        system = [] if self.system_prompt is None else [("system", self.system_prompt)]
        if not isinstance(prompt, Conversation):
            return [*system, ("user", prompt)]
        if system and prompt.system is not None:
            raise UserError(
                f"A conversation has a system message of its own ({shown(prompt.system)}), and the system prompt of "
                "the run is another; omit one of the two."
            )
        return [*system, *prompt.messages]


def take_chat(tokenizer, chat: Chat) -> ChatFormat:
    """The format that settings ask for; a template from a file becomes the tokenizer's own.

    Raises:
        UserError: no such file, name or variable, or a template that does not write the system prompt.
    """
    template = chat.chat_template
    names = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if template is not None and template not in names and (is_file(template, "chat template") or "." in template):
        content = decoded(read_bytes(template, "chat template"), template, "chat template")
        tokenizer.chat_template, template = content, None
    arguments = json.loads(chat.chat_template_args) if chat.chat_template_args else {}
    chat_format = ChatFormat(template, system_prompt=chat.system_prompt, arguments=arguments)
    if not chat.is_default:
        check(tokenizer, chat_format)
    return chat_format


def check(tokenizer, chat_format: ChatFormat) -> None:
    """Does the template use everything that it is given?

    Raises:
        UserError: it does not.
    """
    if not tokenizer.chat_template:
        raise UserError("This model's tokenizer has no chat template; give one with --chat-template FILE.")
    variables = variables_of(_chosen_template(tokenizer, chat_format.template))
    if unused := sorted(set(chat_format.arguments) - variables):
        has = f"it has {', '.join(sorted(variables))}" if variables else "it has none"
        raise UserError(f"The model's chat template has no variable {shown(unused[0])}; {has}.")
    in_parts = wants_parts(tokenizer, chat_format)
    if chat_format.system_prompt is not None:
        check_system_role(tokenizer, chat_format, in_parts)


def check_system_role(tokenizer, chat_format: ChatFormat, in_parts: bool) -> None:
    """Does the template write a system message? One in the user's turn is told.

    Raises:
        UserError: it does not.
    """
    both = [("system", SYSTEM_PROBE), ("user", PROBE)]
    try:
        rendered = render(tokenizer, both, chat_format, in_parts)
    except UserError as error:
        raise UserError(f"This model's chat template takes no system prompt: {error}") from None
    before, found, after = rendered.partition(SYSTEM_PROBE)
    if not found:
        raise UserError("This model's chat template has no system role and leaves the system prompt out.")
    between = after.partition(PROBE)[0]
    if not any(token in between for token in tokenizer.get_added_vocab() if token.strip()):
        log.warning(
            "This model's chat template has no turn for the system: it writes the system prompt before the prompt."
        )


def variables_of(template: str) -> set[str]:
    """Names that a template takes from outside, apart from those that the tokenizer sets itself."""
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes

    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION_MARKS.sub("", template))
    except TemplateSyntaxError as error:
        raise UserError(f"The model's chat template cannot be read ({error}).") from None
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    return meta.find_undeclared_variables(tree) - assigned - OWN_VARIABLES


def encode_chat(tokenizer, texts: Sequence[str], chat_format: ChatFormat) -> list[list[int]]:
    """Token ids of each prompt, a text as the user's one message, up to where the model's answer begins.

    Raises:
        UserError: the template fails, or does not contain the prompt, or a message of a conversation.
    """
    in_parts = wants_parts(tokenizer, chat_format)
    if any(isinstance(prompt, Conversation) and prompt.system is not None for prompt in texts):
        check_system_role(tokenizer, chat_format, in_parts)
    encoded, quoted = [], []
    for prompt in texts:
        messages = chat_format.messages(prompt)
        rendered = render(tokenizer, messages, chat_format, in_parts)
        if (missing := _left_out(messages, rendered)) is not None:
            what, remedy = ("prompt", PLAIN_TEXT) if missing is prompt else ("message", "give it other messages")
            raise UserError(f"The model's chat template changes or leaves out the {what} {shown(missing)}; {remedy}.")
        typed = next((token for token in tokenizer.get_added_vocab() if token.strip() and token in prompt), None)
        if typed is None or chat_format.keeps_control_tokens:
            encoded.append(tokenizer.encode(rendered, add_special_tokens=False))
        else:
            quoted.append(typed)
            options = {"tokenize": True, "return_dict": False, "sanitize_control_tokens": True}
            encoded.append(list(render(tokenizer, messages, chat_format, in_parts, **options)))
    if quoted:
        log.warning(
            "Control tokens of the model in %d of the prompts (%s ..) are read as text.", len(quoted), quoted[0]
        )
    return encoded


def _left_out(messages: Sequence[tuple[str, str]], rendered: str) -> str | None:
    """The first message that is not in what a template wrote, or not where it belongs."""
    position = 0
    for role, content in messages:
        # Some templates put the system's message into the user's last turn.
        position = rendered.find(content.strip(), 0 if role == "system" else position)
        if position < 0:
            return content
        position = 0 if role == "system" else position + len(content.strip())
    return None


def facts_of_prompts(tokenizer, token_ids: Sequence[Sequence[int]], chat_format: ChatFormat) -> dict:
    """What a manifest keeps of the prompts as the model reads them: a hash of their token ids, and the date in them.

    `rendering_date` is null where the template writes none.
    """
    date = chat_format.date.isoformat() if uses_date(tokenizer) else None
    return {"token_ids_hash": token_ids_hash(token_ids), "rendering_date": date}


def token_ids_hash(token_ids: Sequence[Sequence[int]]) -> str:
    """Of what the model reads: it covers texts, tokenizer, chat template and everything that was rendered into them."""
    return hashlib.sha256(json.dumps([list(map(int, ids)) for ids in token_ids]).encode()).hexdigest()[:12]


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


def render(tokenizer, messages: Sequence[tuple[str, str]], chat_format: ChatFormat, in_parts: bool = False, **options):
    """What the template makes of (role, content) messages: a text, where `options` do not ask for token ids.

    Args:
        in_parts: content as a list of typed parts, as templates of multimodal models expect it.
        options: of `apply_chat_template`.
    Raises:
        UserError: no such template, or it fails.
    """
    conversation = [
        {"role": role, "content": [{"type": "text", "text": content}] if in_parts else content}
        for role, content in messages
    ]
    return render_messages(tokenizer, conversation, chat_format, **options)


def render_messages(tokenizer, conversation: list[dict], chat_format: ChatFormat, **options):
    """The same for messages as templates get them, with whatever fields."""
    options = {"tokenize": False, "add_generation_prompt": True, **chat_format.arguments, **options}
    template = _dated(_chosen_template(tokenizer, chat_format.template), chat_format.date)
    try:
        return tokenizer.apply_chat_template(conversation, chat_template=template, **options)
    # A template is somebody else's program: any exception may come out of it.
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = PLAIN_TEXT if len(conversation) == 1 else "give it other messages"
        raise UserError(f"The model's chat template cannot be used ({reason}); {remedy}.") from None


def _dated(template: str, date: datetime.date) -> str:
    """The template with the given date in place of its calls for today's."""

    def written(call: re.Match) -> str:
        return json.dumps(date.strftime(call[2]))

    dated = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", written, template)
    if re.search(r"strftime_now\s*\(", dated):
        raise UserError(f"The model's chat template writes the time in a way that cannot be held fixed; {PLAIN_TEXT}.")
    return dated


def _chosen_template(tokenizer, name: str | None) -> str:
    """The template of that name; None stands for the tokenizer's only or default one."""
    templates = tokenizer.chat_template
    if not isinstance(templates, dict):
        if name is not None:
            raise UserError(f"This model has one chat template, without a name; leave {shown(name)} out.")
        return templates
    name, templates = name or "default", {key: value for key, value in templates.items() if value}
    if name not in templates:
        raise UserError(
            f"This model has several chat templates ({', '.join(sorted(templates))}) and none is called {name!r}; "
            "choose one with --chat-template, or send plain text with --no-chat-mode."
        )
    return templates[name]


def wants_parts(tokenizer, chat_format: ChatFormat) -> bool:
    """Whether the template finds the prompt only in a list of parts.

    Raises:
        UserError: it does not write the prompt at all.
    """
    failure = None
    for in_parts in (False, True):
        try:
            if PROBE in render(tokenizer, [("user", PROBE)], chat_format, in_parts):
                return in_parts
        except UserError as error:
            failure = failure or error
    raise failure or UserError(f"The model's chat template leaves the prompt out, as text and in parts; {PLAIN_TEXT}.")
