"""The settings of a run: how tokens are chosen, how answers are generated, what is saved."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from .settings import Between, Must, Written

NAMES = {"temperature": "temp"}  # what run_model.py and the manifest call a field, if not by its own name

Seed = Annotated[int, Between(0, 2**40)]
Temperature = Annotated[float, Between(0, 100)]
TopP = Annotated[float, Between(1e-9, 1)]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: Temperature = 0.0
    """temperature; 0 always takes the most likely token"""
    top_p: TopP = 1.0
    """nucleus sampling; 1: off"""
    repetition_penalty: Annotated[float, Between(1e-3, 100)] = 1.0
    """above 1: recent tokens become less likely"""
    logit_bias: Annotated[dict[Annotated[int, Between(0)], float], Written("TOKEN_ID=BIAS")] = field(
        default_factory=dict
    )
    """add BIAS to a token's logit; repeatable"""
    seed: Seed = 0
    """seed of all random choices"""


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@dataclass(frozen=True)
class Chat:
    """What is written around a prompt."""

    chat_template: Annotated[str, Written("NAME_OR_FILE")] | None = None
    """name of one of the checkpoint's chat templates, or a file that holds one"""
    system_prompt: str | None = None
    """the system message before each prompt"""
    chat_template_args: (
        Annotated[str, Must(_is_json_object, 'be a JSON object like {"enable_thinking": false}'), Written("JSON")]
        | None
    ) = None
    """variables of the chat template, as a JSON object"""

    @property
    def is_default(self) -> bool:
        return self == Chat()


@dataclass(frozen=True)
class Generation:
    """How answers are generated."""

    max_tokens: Annotated[int, Between(0, 1_000_000)] = 100
    """largest number of tokens to generate"""
    batch_size: Annotated[int, Between(1, 100_000)] = 32
    """prompts in one forward pass"""
    chat_mode: bool = True
    """use the chat template"""
    ignore_end_tokens: bool = False
    """keep generating after the end of the turn"""
    keep_precision: bool = False
    """Linux CPU: do not expand weights to float32"""
    chat: Chat = Chat()
    date: Annotated[str, Must(_is_date, "look like 2025-01-31"), Written("YYYY-MM-DD")] | None = None
    """what chat templates that write the date take for today"""
    control_tokens: bool = False
    """control tokens typed into a prompt act as such, instead of being text"""
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Saving:
    """Which activations are saved, and where."""

    save_activations: bool = False
    """write .npz files"""
    activations_dir: Path | None = None
    """folder for the .npz files; None: one that belongs to the model"""
    activation_filter: str = "mlp.output"
    """'all', or parts or globs of site names, comma-separated"""
    activation_dtype: Literal["float32", "float16"] = "float32"
    """number type in the files"""
    compress_activations: bool = False
    """compress the files"""
    process_by_group: bool = False
    """one activation folder per prompt: GROUP/SUBCATEGORY/batch_N"""
    overwrite: bool = False
    """replace a collection made with other settings"""

    @property
    def folder(self) -> Path:
        """Of the activations, once a model has been chosen."""
        assert self.activations_dir is not None
        return self.activations_dir
