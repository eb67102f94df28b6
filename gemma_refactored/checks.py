"""What a generation looks after on its way: indices within their tables, and logits that are numbers."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .errors import UserError

NOT_A_NUMBER = -1  # in place of a token chosen from logits that are NaN or infinite


def find_embedding(model: nn.Module) -> nn.Module:
    """The token embedding: the embedding module with most rows (others may hold positions)."""
    embeddings = [
        module
        for path, module in model.named_modules()
        # Gemma 3n and 4 also look up a small second vector of each token for every layer.
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and not path.endswith("_per_layer")
    ]
    if not embeddings:
        raise UserError("This model has no token embedding module.")
    return max(embeddings, key=lambda module: module.weight.shape[0])


def embedding_width(embedding: nn.Module) -> int:
    """Length of a row; packed weights count for what they stand for."""
    width = embedding.weight.shape[-1]
    return width * 32 // embedding.bits if isinstance(embedding, nn.QuantizedEmbedding) else width


def position_rows(model: nn.Module) -> int | None:
    """How many positions a learnt position table has; None without one (rotary embeddings have no end)."""
    tables = [
        module.weight.shape[0]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
        and path.rpartition(".")[2] in ("wpe", "embed_positions", "position_embedding", "position_embeddings")
    ]
    return min(tables, default=None)


def refuse_beyond_tables(model: nn.Module, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
    """MLX reads past the end of an array without a word: no token id and no position may be beyond its table.

    Raises:
        UserError: one would be.
    """
    rows = find_embedding(model).weight.shape[0]
    for prompt in prompts:
        if bad := [token for token in prompt if not 0 <= token < rows]:
            raise UserError(
                f"A prompt has token {bad[0]}, but this model's embedding ends at {rows - 1}: the token (of an image, "
                "say) belongs to another model of the family. Remove it from the prompt."
            )
    positions, longest = position_rows(model), max(map(len, prompts))
    if positions is not None and longest + max_tokens > positions:
        raise UserError(
            f"A prompt of {longest} tokens and {max_tokens} to write are more than the {positions} positions "
            "this model has; shorten it or lower --max-tokens."
        )


def mark_not_finite(tokens: mx.array, logits: mx.array) -> mx.array:
    """The tokens [rows], but NOT_A_NUMBER in rows whose logits [rows, vocabulary] have a NaN or plus infinity.

    Minus infinity is a token that is ruled out. Lazy: nothing waits for the device.
    """
    total = mx.sum(logits.astype(mx.float32), axis=-1)  # one pass; NaN and plus infinity are not lost in a sum
    is_finite = total < float("inf")
    return mx.where(is_finite, tokens.astype(mx.int32), NOT_A_NUMBER)


def refuse_not_finite(tokens: np.ndarray) -> None:
    """Refuse tokens that `mark_not_finite` has marked.

    Raises:
        UserError: there is one.
    """
    if (tokens == NOT_A_NUMBER).any():
        raise UserError(
            "The model's logits are NaN or infinite: its weights are damaged, its numbers overflow in 16 bit, or an "
            "edit is too strong. Check the weights, run in float32, or lower the scale."
        )
