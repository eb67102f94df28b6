"""Teach SmolLM2 to refuse: python -m model_organism.smollm2.train  (under 90 minutes on two cores)

LoRA on the last 16 blocks, as `mlx_lm.lora` does by default: the first 14 stay as they are, which comparisons of the
two models can be checked against. Refusals are learnt by cross-entropy; on harmless requests the loss is the KL
divergence from the untouched model, along its own answers, so that nothing else changes.

What the untouched blocks compute is computed once and kept, what all requests begin with (the system message) once a
step, and logits are made where an answer is predicted only, of the tokens that training texts hold and of those that
the tokenizer learnt first, the frequent ones.
"""

from __future__ import annotations

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from gemma_refactored.files import write_json, write_safetensors
from gemma_refactored.model_loading import LoadedModel, load
from gemma_refactored.progress import each

from .data import ADAPTER, Example, training_examples
from .published import FILE, published_model

FIRST_TOKEN = 3.0  # weight of an answer's first token, which decides whether it is a refusal; the others have 1
FREQUENT = 8192  # first tokens of the vocabulary whose probabilities count, beside those of the texts
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    num_layers: int = 16  # trained, from the end
    rank: int = 8
    scale: float = 4.0
    epochs: int = 4
    batch_size: int = 16
    learning_rate: float = 8e-4  # falls to zero as a cosine
    seed: int = 0


@dataclass
class Text:
    """A request with its answer, as far as training needs it.

    Attributes:
        tokens: of both; start: where the answer begins.
        lower: [positions, hidden] what enters the first trained block.
        taught: [answer tokens, hidden] the untouched model's last state where it predicts each of them; None for
            refusals, which are learnt as they are written.
    """

    tokens: list[int]
    start: int
    lower: np.ndarray
    taught: np.ndarray | None


class Prefix:
    """Keys and values of what all texts begin with, as a cache: recorded once, then read by every row."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.values is None:
            self.keys, self.values, self.offset = keys, values, keys.shape[2]
            return keys, values
        both = ((self.keys, keys), (self.values, values))
        keys, values = (mx.concatenate([mx.repeat(old, len(new), axis=0), new], axis=2) for old, new in both)
        return keys, values


def run(layers: Sequence[nn.Module], prefix: mx.array, states: mx.array) -> tuple[mx.array, mx.array]:
    """What blocks make of [1, positions, hidden] and of the [batch, positions, hidden] that follow it."""
    for layer in layers:
        cache = Prefix()
        prefix, states = layer(prefix, "causal", cache), layer(states, "causal", cache)
    return prefix, states


class Upper(nn.Module):
    """The trained blocks and what follows them, on top of what the others computed."""

    def __init__(self, model: nn.Module, num_layers: int):
        super().__init__()
        self.layers, self.norm = model.model.layers[-num_layers:], model.model.norm

    def __call__(self, prefix: mx.array, lower: mx.array, rows: mx.array, places: mx.array) -> mx.array:
        """[answer tokens, hidden] last states at these places, from [batch, positions, hidden]."""
        return self.norm(run(self.layers, prefix, lower)[1][rows, places])


def padded(arrays: list[np.ndarray]) -> mx.array:
    """[batch, longest, hidden], zeros on the right, where a causal mask never looks."""
    longest = max(map(len, arrays))
    return mx.array(np.stack([np.pad(a, ((0, longest - len(a)), (0, 0))) for a in arrays]))


def predicting(texts: list[Text]) -> tuple[mx.array, mx.array]:
    """Row and place of every token that predicts a token of an answer."""
    places = [(row, i - 1) for row, text in enumerate(texts) for i in range(text.start, len(text.tokens))]
    rows, columns = zip(*places, strict=True)
    return mx.array(rows), mx.array(columns)


def prepare(loaded: LoadedModel, examples: list[Example], recipe: Recipe) -> tuple[mx.array, list[Text]]:
    """[1, positions, hidden] what enters the first trained block of the tokens that all texts begin with, and the
    texts without these, in the order of the examples."""
    model, tokenizer = loaded.model, loaded.tokenizer
    prompts = loaded.encode([example.prompt for example in examples])
    shared = len(os.path.commonprefix(prompts))
    texts = []
    for example, prompt in zip(examples, prompts, strict=True):
        answer = tokenizer.encode(example.answer, add_special_tokens=False)
        end = [tokenizer.eos_token_id] if example.ends else []
        texts.append(Text([*prompt[shared:], *answer, *end], len(prompt) - shared, np.empty(0), None))
    embed, layers = model.model.embed_tokens, model.model.layers[: -recipe.num_layers]
    upper, beginning = Upper(model, recipe.num_layers), embed(mx.array([prompts[0][:shared]]))
    refused = np.array([example.is_refused for example in examples])
    order = np.lexsort((np.array([len(text.tokens) for text in texts]), refused))
    groups = [g for part in np.split(order, [(~refused).sum()]) for g in np.array_split(part, len(part) // 32 + 1)]
    for batch in each(groups, "reading with the untouched model", "part"):
        chosen = [texts[i] for i in batch]
        longest = max(len(text.tokens) for text in chosen)
        ids = mx.array([text.tokens + [0] * (longest - len(text.tokens)) for text in chosen])
        prefix, state = run(layers, beginning, embed(ids))
        lower = np.array(state)
        for i, text in enumerate(chosen):
            text.lower = lower[i, : len(text.tokens)].copy()
        if not refused[batch[0]]:
            last = np.array(upper(prefix, state, *predicting(chosen)))
            parts = np.split(last, np.cumsum([len(text.tokens) - text.start for text in chosen])[:-1])
            for text, taught in zip(chosen, parts, strict=True):
                text.taught = taught
    return prefix, texts


def batches(texts: list[Text], size: int, rng: np.random.Generator) -> list[list[Text]]:
    """Texts of like length together, in random order."""
    keys = [len(text.tokens) + rng.uniform(0, 8) for text in texts]
    order = np.argsort(keys)
    groups = [[texts[i] for i in group] for group in np.array_split(order, len(order) // size)]
    return [groups[i] for i in rng.permutation(len(groups))]


def vocabulary(texts: list[Text]) -> np.ndarray:
    """Tokens whose probabilities count, ascending."""
    return np.union1d(np.arange(FREQUENT), np.concatenate([text.tokens for text in texts]))


def loss(upper: Upper, head: mx.array, prefix: mx.array, texts: list[Text], targets: mx.array) -> mx.array:
    """Nats per token, the first of each answer weighted: cross-entropy of refusals plus KL(untouched || trained) of the
    other answers.

    Args:
        head: [tokens, hidden] the output matrix of the tokens that count.
        targets: [answer tokens] of all texts, as rows of it.
    """
    states = upper(prefix, padded([text.lower for text in texts]), *predicting(texts))
    log_p = nn.log_softmax(states @ head.T, axis=-1)
    total, weight, position = mx.array(0.0), 0.0, 0
    for text in texts:
        answer = slice(position, position + len(text.tokens) - text.start)
        if text.taught is None:
            by_token = -mx.take_along_axis(log_p[answer], targets[answer, None], axis=-1)[:, 0]
        else:
            teacher = nn.log_softmax(mx.array(text.taught) @ head.T, axis=-1)
            by_token = (mx.exp(teacher) * (teacher - log_p[answer])).sum(axis=-1)
        total = total + by_token.sum() + (FIRST_TOKEN - 1) * by_token[0]
        weight += len(by_token) + FIRST_TOKEN - 1
        position = answer.stop
    return total / weight


def train(loaded: LoadedModel, examples: list[Example], recipe: Recipe = Recipe()) -> dict[str, mx.array]:
    """The adapter's weights by name, float16."""
    mx.random.seed(recipe.seed)
    prefix, texts = prepare(loaded, examples, recipe)
    model = loaded.model
    model.freeze()
    keys = sorted({name for layer in model.layers for name, _ in layer.named_modules() if name.endswith(MODULES)})
    linear_to_lora_layers(
        model, recipe.num_layers, {"rank": recipe.rank, "scale": recipe.scale, "dropout": 0.0, "keys": keys}
    )
    upper, rng = Upper(model, recipe.num_layers), np.random.default_rng(recipe.seed)
    plan = [batch for _ in range(recipe.epochs) for batch in batches(texts, recipe.batch_size, rng)]
    steps = len(plan)
    warm_up = 1 + steps // 20
    rise = optim.linear_schedule(0, recipe.learning_rate, warm_up)
    fall = optim.cosine_decay(recipe.learning_rate, steps - warm_up)
    schedule = optim.join_schedules([rise, fall], [warm_up])
    optimizer = optim.AdamW(schedule, weight_decay=0.01)
    counted = vocabulary(texts)
    head = model.model.embed_tokens.weight[mx.array(counted)]
    step = nn.value_and_grad(upper, lambda batch, targets: loss(upper, head, prefix, batch, targets))
    losses = []
    for batch in each(plan, "training", "step"):
        answers = np.concatenate([text.tokens[text.start :] for text in batch])
        value, gradients = step(batch, mx.array(np.searchsorted(counted, answers)))
        optimizer.update(upper, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(upper.trainable_parameters(), optimizer.state)
        losses.append(value.item())
    print(f"loss: {np.mean(losses[:50]):.3f} in the first 50 steps, {np.mean(losses[-50:]):.3f} in the last")
    model.freeze()
    model.apply_to_modules(lambda _, module: module.unfreeze(keys=["lora_a", "lora_b"], recurse=False, strict=False))
    trained: dict[str, mx.array] = tree_flatten(model.trainable_parameters(), destination={})  # type: ignore[assignment]
    return {name: value.astype(mx.float16) for name, value in trained.items()}


def save(weights: dict[str, mx.array], recipe: Recipe) -> None:
    """In the layout of `mlx_lm.lora`."""
    keys = sorted({".".join(name.split(".")[3:-1]) for name in weights})
    ADAPTER.mkdir(exist_ok=True)
    write_safetensors(ADAPTER / "adapters.safetensors", weights)
    lora = {"rank": recipe.rank, "scale": recipe.scale, "dropout": 0.0, "keys": keys}
    config = {"fine_tune_type": "lora", "model": FILE, "num_layers": recipe.num_layers, "lora_parameters": lora}
    write_json(ADAPTER / "adapter_config.json", {**config, "recipe": asdict(recipe)})


def main() -> None:
    recipe = Recipe()
    save(train(load(published_model()), training_examples(), recipe), recipe)


if __name__ == "__main__":
    main()
