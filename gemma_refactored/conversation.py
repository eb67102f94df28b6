"""A prompt may be a conversation: messages before the last one of the user, and a system message of its own."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import UserError, shown

ROLES = ("system", "user", "assistant")
FORM = '[{"role": "user", "content": ".."}, ..]'
LONGEST_SYSTEM = 40  # characters of a system message in front of what people read


class Conversation(str):
    """Messages in place of a prompt; as a text it is what all of them say.

    So whatever reads the words of a prompt (baselines, embeddings, scores) reads all of them, and only the chat format
    (`ChatFormat.messages`), files (`written`) and what people read (`readable`) ask for more.

    Attributes:
        messages: (role, content) in their order.
    """

    messages: tuple[tuple[str, str], ...]

    def __new__(cls, messages: Sequence[tuple[str, str]]):
        self = super().__new__(cls, "\n\n".join(content for _, content in messages))
        self.messages = tuple(messages)
        return self

    def __getnewargs__(self):
        return (self.messages,)

    # The same words as one message are another prompt.
    def __eq__(self, other) -> bool:
        return isinstance(other, Conversation) and self.messages == other.messages

    def __ne__(self, other) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.messages)

    @property
    def system(self) -> str | None:
        """The conversation's own system message."""
        return self.messages[0][1] if self.messages[0][0] == "system" else None


def as_prompt(value, where: str) -> str:
    """A text, or a list of messages, as files hold them.

    Args:
        where: for the errors.
    Raises:
        UserError: an empty text, or messages that no model can answer.
    """
    if isinstance(value, Conversation):
        return value
    if not isinstance(value, list):
        return _checked_text(value, where, f"text that is not empty, or messages {FORM}")
    if not value:
        raise UserError(f"{where} is an empty list; a conversation is {FORM}.")
    messages = []
    for number, message in enumerate(value, 1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise UserError(f'{place} must be an object with "role" and "content" and nothing else.')
        role = message["role"]
        if role not in ROLES:
            raise UserError(f"{place} has the role {shown(role)}; roles are {', '.join(ROLES)}.")
        if role == "system" and number > 1:
            raise UserError(f"{place} is a system message; there is one at most, before all others.")
        messages.append((role, _checked_text(message["content"], place, "text that is not empty")))
    if messages[-1][0] != "user":
        raise UserError(f"{where} ends with the {messages[-1][0]}'s message; it must end with one of the user.")
    return messages[0][1] if len(messages) == 1 else Conversation(messages)


def _checked_text(text, where: str, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} must be {what}, not {shown(text)}.")
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise UserError(f"{where} contains half of a surrogate pair, which is no character; remove it.")
    return text


def written(prompt: str) -> str | list[dict[str, str]]:
    """A prompt as files hold it and hashes cover it: `as_prompt` reads it again."""
    if not isinstance(prompt, Conversation):
        return prompt
    return [{"role": role, "content": content} for role, content in prompt.messages]


def request(prompt: str) -> str:
    """What the user asks at last."""
    return prompt.messages[-1][1] if isinstance(prompt, Conversation) else prompt


def readable(prompt: str) -> str:
    """What people read of a prompt: what is asked at last, and what came before it in a few words."""
    if not isinstance(prompt, Conversation):
        return prompt
    earlier = len(prompt.messages) - 1 - (prompt.system is not None)
    before = [f"{earlier} message{'' if earlier == 1 else 's'} before"] if earlier else []
    if system := prompt.system:
        cut = system if len(system) <= LONGEST_SYSTEM else f"{system[:LONGEST_SYSTEM].rstrip()} .."
        before.insert(0, f"system: {' '.join(cut.split())}")
    return f"[{'; '.join(before)}] {request(prompt)}"
