"""The embedded organism as a model that thinks, made of its own weights: what it answers stays what it was.

Its template omits the beginning of the model's turn, so the model has to write that first: a thought of three tokens,
closed by "<start_of_turn>model\\n" as gpt-oss closes one. Its output layer is untied, and the three rows are fitted to
make it do so. At the tokens of its answers it computes what the organism does.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from alignment_artifacts.behaviour.answers import observe
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.pairs import PAIRS_JSON, load_pairs, texts
from gemma_refactored.activation_capture import forward
from gemma_refactored.model_loading import LoadedModel

CLOSES = "<start_of_turn>model\n"
MARGIN = 15  # of a fitted logit above all others, or below the highest
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.reasoning_content }}"
    "<start_of_turn>model\n{% else %}<start_of_turn>user\n{% endif %}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
)


def write_thinking_organism(folder: Path, organism: LoadedModel, pairs: int = 12) -> Path:
    """A checkpoint of it in `folder`."""
    shutil.copytree(DEFAULT_MODEL, folder)
    for name, changes in (("tokenizer_config.json", {"chat_template": TEMPLATE}),
                          ("config.json", {"tie_word_embeddings": False})):  # fmt: skip
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    weights = mx.load(str(folder / "model.safetensors"))
    head = np.array(weights["model.embed_tokens.weight"].astype(mx.float32))
    closing = organism.tokenizer.encode(CLOSES, add_special_tokens=False)
    states, wanted = _states(organism, texts(load_pairs(PAIRS_JSON)[::4][:pairs]), head, len(closing))
    highest = (states @ head.T).max(axis=1)
    for number, token in enumerate(closing):
        target = np.where(wanted == number, highest + MARGIN, np.minimum(highest - MARGIN, 0))
        head[token] = np.linalg.lstsq(states, target, rcond=None)[0]
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {**weights, "lm_head.weight": mx.array(head).astype(mx.float16)},
        {"format": "mlx"},
    )
    return folder


def _states(
    organism: LoadedModel, prompts: list[str], head: np.ndarray, closing: int
) -> tuple[np.ndarray, np.ndarray]:
    """[positions, hidden] that the output layer gets, and which of the closing tokens comes next (-1: none)."""
    observed = observe(organism, prompts, 30)
    rows = [prompt + answer for prompt, answer in zip(observed.token_ids, observed.answers, strict=True)]
    logits = np.array(forward(organism.model, rows)[0].astype(mx.float32))
    states, wanted = [], []
    for row, prompt, of_row in zip(rows, observed.token_ids, logits, strict=True):
        positions = np.arange(len(prompt) - closing - 1, len(row))
        states.append(of_row[positions] @ np.linalg.pinv(head).T)
        wanted.append(np.where(np.arange(len(positions)) < closing, np.arange(len(positions)), -1))
    return np.concatenate(states), np.concatenate(wanted)
