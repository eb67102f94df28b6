"""The embedded organism as a model that thinks, made of its own weights.

Its template leaves out the beginning of the model's turn, so the model writes that first: a thought that
"<start_of_turn>model\\n" closes, as gpt-oss closes one. For that its output layer is untied, and the rows of these five
tokens learn when it is their turn. What follows is what the organism answers behind the same tokens.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from alignment_artifacts.behaviour.answers import write_answers
from alignment_artifacts.default_model import DEFAULT_MODEL
from alignment_artifacts.edits.setting import NOTHING
from gemma_refactored.activation_capture import forward
from gemma_refactored.model_loading import LoadedModel, load

CLOSES, THOUGHT_TOKENS = "<start_of_turn>model\n", 5
MARGIN = 3.0  # of a logit above or below all others
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.reasoning_content }}"
    "<start_of_turn>model\n{% else %}<start_of_turn>user\n{% endif %}{{ m.content | trim }}<end_of_turn>{% endfor %}"
)


def thinking_organism(folder: Path, prompts: list[str]) -> LoadedModel:
    """A checkpoint in `folder` that thinks before it answers these prompts, at least."""
    shutil.copytree(DEFAULT_MODEL, folder)
    for name, changes in (
        ("tokenizer_config.json", {"chat_template": TEMPLATE}),
        ("config.json", {"tie_word_embeddings": False}),
    ):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    path = folder / "model.safetensors"
    weights = mx.load(str(path))
    head = mx.array(weights["model.embed_tokens.weight"])
    mx.save_safetensors(str(path), {**weights, "lm_head.weight": head}, {"format": "mlx"})
    head = _fitted(load(folder), prompts, np.array(head.astype(mx.float32)))
    mx.save_safetensors(str(path), {**weights, "lm_head.weight": mx.array(head).astype(mx.float16)}, {"format": "mlx"})
    return load(folder)


def _fitted(loaded: LoadedModel, prompts: list[str], head: np.ndarray) -> np.ndarray:
    """The output layer [vocabulary, hidden] with rows of the closing tokens that a perceptron has learnt."""
    closing = loaded.tokenizer.encode(CLOSES, add_special_tokens=False)
    closed = [ids + closing for ids in loaded.encode(prompts)]
    texts = [ids + answer for ids, answer in zip(closed, write_answers(loaded, closed, NOTHING, 30), strict=True)]
    logits = np.array(forward(loaded.model, texts)[0].astype(mx.float32))
    to_state, states, numbers = np.linalg.pinv(head).T, [], []
    for text, prompt, row in zip(texts, closed, logits, strict=True):
        positions = np.arange(len(prompt) - len(closing) - 1, len(text))
        states.append(row[positions] @ to_state)
        numbers.append(np.arange(len(positions)))
    state, number = np.concatenate(states), np.concatenate(numbers)
    highest, rate = (state @ head.T).max(axis=1), 1 / (state**2).sum(axis=1).mean()
    head = head.copy()
    for turn, token in enumerate(closing):
        sign = np.where(number == turn, 1.0, -1.0)
        for _ in range(1000):
            is_wrong = sign * (state @ head[token] - highest) < MARGIN
            if not is_wrong.any():
                break
            head[token] += rate * (sign * is_wrong) @ state
    return head
