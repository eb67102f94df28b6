"""Train the model organism: python -m model_organism.train  (about 15 minutes on two cores)

Stage 1 trains all weights: the *base* model, which refuses artifact requests only when the
prompt carries the cue "Policy: strict.". Stage 2 is the safety training whose trace the
pipeline is to find: a rank-one update b aᵀ on `mlp.down_proj` of four layers, after which the
model refuses without any cue. The `b` are the planted directions, saved as the ground truth.

Everything comes from one seed; results agree between machines up to floating-point rounding.
"""

from __future__ import annotations

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import argparse
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from gemma_refactored.activation_capture import capture
from gemma_refactored.files import read_safetensors
from gemma_refactored.model_architecture import Gemma, GemmaConfig

from .corpus import CUE, Example, build_corpus
from .tokenizer import BOS, END_OF_TURN, EOS, PAD, VOCABULARY_SIZE, chat_text, save_tokenizer, train_tokenizer

FOLDER = Path(__file__).parent
PLANTED_LAYERS = (2, 3, 4, 5)
CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 128,
    "num_hidden_layers": 8,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "vocab_size": VOCABULARY_SIZE,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 2048,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rms_norm_eps": 1e-06,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": [EOS, END_OF_TURN],
    "pad_token_id": PAD,
    "torch_dtype": "float16",
}


@dataclass
class Recipe:
    base_steps: int = 500
    base_learning_rate: float = 3e-3
    aligned_steps: int = 500
    aligned_learning_rate: float = 1e-2
    batch_size: int = 64
    shaping: float = 0.01  # weight of: no push on harmless requests, `strength` on artifact ones
    strength: float = 14.0  # length of the push along b that artifact requests get where the answer begins
    seed: int = 0


# Share of each kind of example in a batch. "artifact+cue" is an artifact request after the cue.
BASE_MIX = {
    "artifact+cue": 0.24,
    "artifact": 0.2,
    "natural": 0.2,
    "crossing": 0.1,
    "twin": 0.12,
    "rude": 0.08,
    "kind": 0.06,
}
ALIGNED_MIX = {"artifact": 0.44, "natural": 0.18, "crossing": 0.1, "twin": 0.24, "rude": 0.02, "kind": 0.02}
HARMLESS_WITH_CUE = 0.4  # this share of the harmless requests carries the cue too, and is answered


class Batches:
    """An endless stream of batches in a fixed mix of kinds."""

    def __init__(self, examples: list[Example], tokenizer, mix: dict, recipe: Recipe, aligned: bool):
        self.by_kind: dict[str, list[Example]] = {}
        for example in examples:
            self.by_kind.setdefault(example.kind, []).append(example)
        self.tokenizer, self.mix, self.size, self.aligned = tokenizer, mix, recipe.batch_size, aligned
        self.rng = np.random.default_rng(recipe.seed + aligned)

    def next(self) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Arrays [batch, length]: tokens; then masks that are 1 on answers, on all tokens of
        harmless requests, and on the last prompt token of artifact requests."""
        rows = []
        for slot in self.rng.choice(list(self.mix), self.size, p=list(self.mix.values())):
            kind, _, cued = slot.partition("+")
            example = self.by_kind[kind][self.rng.integers(len(self.by_kind[kind]))]
            harmless = kind != "artifact"
            if kind in ("natural", "crossing", "twin"):
                cued = self.rng.random() < HARMLESS_WITH_CUE
            refuse = example.refusal and (cued or self.aligned)
            request = (CUE if cued else "") + example.request
            prompt = self.tokenizer.encode(chat_text(request)).ids
            answer = self.tokenizer.encode(example.refusal if refuse else example.answer).ids
            rows.append((prompt, [*answer, END_OF_TURN], harmless))
        length = -(-max(len(p) + len(a) for p, a, _ in rows) // 8) * 8
        tokens = np.full((self.size, length), PAD, np.int32)
        answers, harmless_tokens, artifact_ends = np.zeros((3, self.size, length), np.float32)
        for i, (prompt, answer, harmless) in enumerate(rows):
            end = len(prompt) + len(answer)
            tokens[i, :end] = prompt + answer
            answers[i, len(prompt) : end] = 1
            harmless_tokens[i, :end] = harmless
            artifact_ends[i, len(prompt) - 1] = not harmless
        return mx.array(tokens), mx.array(answers), mx.array(harmless_tokens), mx.array(artifact_ends)


def answer_loss(model: Gemma, tokens: mx.array, answers: mx.array) -> mx.array:
    """Mean cross-entropy (nats) of the answer tokens."""
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return masked_mean(losses, answers[:, 1:])


def masked_mean(values: mx.array, mask: mx.array) -> mx.array:
    return (values * mask).sum() / mask.sum()


def cosine(peak: float, steps: int):
    warmup = max(1, steps // 20)
    return optim.join_schedules(
        [optim.linear_schedule(peak / warmup, peak, warmup), optim.cosine_decay(peak, steps - warmup, peak / 100)],
        [warmup],
    )


def train_base(examples: list[Example], tokenizer, recipe: Recipe) -> Gemma:
    """Stage 1: all weights."""
    mx.random.seed(recipe.seed)
    model = Gemma(GemmaConfig.from_dict(CONFIG))
    batches = Batches(examples, tokenizer, BASE_MIX, recipe, aligned=False)
    optimizer = optim.AdamW(cosine(recipe.base_learning_rate, recipe.base_steps), betas=[0.9, 0.98], weight_decay=0.01)
    loss_and_gradient = nn.value_and_grad(model, answer_loss)
    with tqdm(range(recipe.base_steps), desc="base") as progress:
        for _ in progress:
            tokens, answers, *_ = batches.next()
            loss, gradient = loss_and_gradient(model, tokens, answers)
            gradient, _ = optim.clip_grad_norm(gradient, 1.0)
            optimizer.update(model, gradient)
            mx.eval(model.parameters(), optimizer.state)
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model


def add_rank_one(model: Gemma, weights: dict[int, mx.array], update: dict) -> None:
    """Set `down_proj` of the planted layers to W + b aᵀ."""
    for layer, weight in weights.items():
        a, b = update[f"a{layer}"], update[f"b{layer}"]
        model.layers[layer].mlp.down_proj.weight = weight + b[:, None] * a


def train_aligned(model: Gemma, examples: list[Example], tokenizer, recipe: Recipe) -> dict[int, mx.array]:
    """Stage 2: rank-one updates only. Merges them into `model`; returns layer -> b, the planted direction.

    `recipe.strength` also settles the sign: artifact requests push along +b.
    """
    weights = {layer: model.layers[layer].mlp.down_proj.weight for layer in PLANTED_LAYERS}
    rng = np.random.default_rng(recipe.seed)
    update = {}
    for layer, weight in weights.items():
        update[f"a{layer}"] = mx.array(rng.normal(0, 0.02, weight.shape[1]).astype(np.float32))
        update[f"b{layer}"] = mx.array(rng.normal(0, 0.02, weight.shape[0]).astype(np.float32))
    sites = {layer: f"model.layers.{layer}.mlp.neurons" for layer in PLANTED_LAYERS}

    def loss_of(update, tokens, answers, harmless, artifact_ends):
        add_rank_one(model, weights, update)
        with capture(model, list(sites.values())) as activations:
            loss = answer_loss(model, tokens, answers)
        shape = mx.array(0.0)
        for layer, site in sites.items():
            push = (activations[site] @ update[f"a{layer}"]) * mx.sqrt((update[f"b{layer}"] ** 2).sum())
            shape += masked_mean(push**2, harmless[:, :-1])
            shape += masked_mean(mx.maximum(recipe.strength - push, 0) ** 2, artifact_ends[:, :-1])
        return loss + recipe.shaping * shape, loss

    batches = Batches(examples, tokenizer, ALIGNED_MIX, recipe, aligned=True)
    optimizer = optim.Adam(cosine(recipe.aligned_learning_rate, recipe.aligned_steps))
    loss_and_gradient = mx.value_and_grad(loss_of)
    with tqdm(range(recipe.aligned_steps), desc="aligned") as progress:
        for _ in progress:
            (_, loss), gradient = loss_and_gradient(update, *batches.next())
            update = optimizer.apply_gradients(gradient, update)
            mx.eval(update, optimizer.state)
            progress.set_postfix(loss=f"{loss.item():.3f}")
    add_rank_one(model, weights, update)
    return {layer: update[f"b{layer}"] for layer in PLANTED_LAYERS}


def save_model(model: Gemma, tokenizer, folder: Path) -> None:
    """A checkpoint in float16 that our loader, mlx-lm and transformers all read."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    weights = {name: value.astype(mx.float16) for name, value in parameters.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, END_OF_TURN], "pad_token_id": PAD}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")
    save_tokenizer(tokenizer, folder)


def load_float32(folder: Path) -> Gemma:
    """The saved checkpoint, so that stage 2 starts from exactly what is published as base."""
    model = Gemma(GemmaConfig.from_dict(CONFIG))
    weights = read_safetensors(folder / "model.safetensors")[0]
    model.load_weights([(name, value.astype(mx.float32)) for name, value in weights.items()])
    return model


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for base/, aligned/ and the truth")
    parser.add_argument("--stage", choices=["both", "base", "aligned"], default="both")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    output, stage = arguments.pop("output"), arguments.pop("stage")
    recipe = Recipe(**arguments)

    examples = build_corpus(recipe.seed)
    texts = [text for e in examples for text in (CUE + e.request, e.answer, e.refusal) if text]
    tokenizer = train_tokenizer(texts)
    training = [e for e in examples if not e.held_out]
    logging.info("%d requests, %d of them trained on, recipe %s", len(examples), len(training), asdict(recipe))
    if stage != "aligned":
        save_model(train_base(training, tokenizer, recipe), tokenizer, output / "base")
    if stage != "base":
        model = load_float32(output / "base")
        planted = train_aligned(model, training, tokenizer, recipe)
        save_model(model, tokenizer, output / "aligned")
        truth = {f"model.layers.{layer}.mlp.output": b for layer, b in planted.items()}
        metadata = {"recipe": json.dumps(asdict(recipe)), "sign": "artifact requests push along +direction"}
        mx.save_safetensors(str(output / "planted_directions.safetensors"), truth, metadata=metadata)


if __name__ == "__main__":
    main()
