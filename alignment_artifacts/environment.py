"""What the environment names for every script, and what one script says about a variable that it does not use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_refactored.configuration import Chat

EPILOG = (
    "MODEL_NAME, ADAPTER, PAIRS, SYSTEM_PROMPT, CHAT_TEMPLATE and CHAT_TEMPLATE_ARGS in the environment are the "
    "defaults, as for every script."
)


@dataclass(frozen=True)
class Named:
    """Fill it with `settings.from_environment`; None: not set."""

    model_name: str | None = None
    adapter: str | None = None
    pairs: Path | None = None
    site: str | None = None
    chat: Chat = Chat()


def unused(reasons: Mapping[str, str]) -> list[str]:
    """A sentence about each of these variables that is set.

    Args:
        reasons: variable -> what is used instead.
    """
    return [
        f"{name} in the environment is not used here: {reason}."
        for name, reason in reasons.items()
        if os.environ.get(name)
    ]
