"""Each program that the collection benchmark compares, run in a process of its own:

    python -m benchmarks.contenders NAME JOB OUT [--batch N] [--dtype float32] [--text-only]

Prints a JSON line: seconds from the loaded model to the last saved file, and the tokens written.
What each does follows its own documentation; all read the last generated token too, so that
there are prefill and 20 steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .job import MAX_TOKENS, Saved, config, model_folder, prompts_file, token_ids


def ours(job: Path, out: Path, batch: int, dtype: str, text_only: bool) -> tuple[float, list]:
    """What `bash collect_activations.sh` runs."""
    from gemma_refactored.main import main

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.args)
    logging.getLogger("gemma_refactored").addHandler(handler)
    arguments = ["--model", model_folder(job), "--prompts-file", prompts_file(job), "--output-dir", out / "text"]
    arguments += ["--max-tokens", MAX_TOKENS, "--batch-size", batch, "--ignore-end-tokens"]
    if not text_only:
        arguments += ["--save-activations", "--process-by-group", "--activations-dir", out / "activations"]
    if main([str(argument) for argument in arguments]) != 0:
        raise SystemExit(1)
    (seconds,) = [args[2] for args in records if len(args) == 4 and isinstance(args[2], float)]
    results = json.loads((out / "text" / "results.json").read_text())
    return seconds, [record["token_ids"] for record in results]


def torch_model(job: Path, dtype: str):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    return AutoModelForCausalLM.from_pretrained(model_folder(job), dtype=getattr(torch, dtype)).eval()


def padded_batches(ids: list[list[int]], size: int) -> Iterator[tuple[list[int], object, object]]:
    """(row numbers, token ids, attention mask), shortest prompts first, left-padded, as PyTorch expects them."""
    import torch

    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for start in range(0, len(ids), size):
        rows = order[start : start + size]
        longest = max(len(ids[row]) for row in rows)
        padding = [longest - len(ids[row]) for row in rows]
        tokens = torch.tensor([[0] * pad + ids[row] for row, pad in zip(rows, padding, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * len(ids[row]) for row, pad in zip(rows, padding, strict=True)])
        yield rows, tokens, mask


def written(output, rows: list[int], answers: dict[int, list[int]]) -> None:
    for row, tokens in zip(rows, output[:, -(MAX_TOKENS + 1) : -1].tolist(), strict=True):
        answers[row] = tokens


GREEDY = dict(max_new_tokens=MAX_TOKENS + 1, do_sample=False)


def transformers_hooks(job: Path, out: Path, batch: int, dtype: str, text_only: bool) -> tuple[float, list]:
    """transformers' generate, with a forward hook on every MLP that saves when the last layer is through."""
    model, ids = torch_model(job, dtype), token_ids(job)
    model.generation_config.eos_token_id = None
    saved, answers = Saved(job, out, len(ids)), {}
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: saved.add(output[:, -1].float().numpy()))
    start = time.perf_counter()
    for rows, tokens, mask in padded_batches(ids, batch):
        saved.start(rows)
        written(model.generate(tokens, attention_mask=mask, **GREEDY), rows, answers)
    return time.perf_counter() - start, [answers[row] for row in range(len(ids))]


def nnsight(job: Path, out: Path, batch: int, dtype: str, text_only: bool) -> tuple[float, list]:
    from nnsight import LanguageModel
    from transformers import AutoTokenizer

    hf_model = torch_model(job, dtype)
    hf_model.generation_config.eos_token_id = None
    model, ids = LanguageModel(hf_model, tokenizer=AutoTokenizer.from_pretrained(model_folder(job))), token_ids(job)
    saved, answers = Saved(job, out, len(ids)), {}
    start = time.perf_counter()
    for rows, tokens, mask in padded_batches(ids, batch):
        with model.generate({"input_ids": tokens, "attention_mask": mask}, **GREEDY) as tracer:
            steps = list().save()
            for _ in tracer.iter[: MAX_TOKENS + 1]:
                steps.append([layer.mlp.output[:, -1].clone() for layer in model.model.layers])
            output = tracer.result.save()
        saved.start(rows)
        for value in (value for values in steps for value in values):
            saved.add(value.numpy())
        written(output, rows, answers)
    return time.perf_counter() - start, [answers[row] for row in range(len(ids))]


def transformer_lens(job: Path, out: Path, batch: int, dtype: str, text_only: bool) -> tuple[float, list]:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(job))
    model = TransformerBridge.boot_transformers(
        str(model_folder(job)), hf_model=torch_model(job, dtype), tokenizer=tokenizer, dtype=getattr(torch, dtype)
    )
    ids = token_ids(job)
    saved, answers = Saved(job, out, len(ids)), {}
    layers = range(config(job)["num_hidden_layers"])
    hooks = [(f"blocks.{i}.mlp.hook_out", lambda value, hook: saved.add(value[:, -1].float().numpy())) for i in layers]
    start = time.perf_counter()
    for rows, tokens, mask in padded_batches(ids, batch):
        saved.start(rows)
        with model.hooks(fwd_hooks=hooks):
            output = model.generate(
                tokens, attention_mask=mask, max_new_tokens=MAX_TOKENS + 1, do_sample=False, stop_at_eos=False,
                return_type="tokens", verbose=False,
            )  # fmt: skip
        written(output, rows, answers)
    return time.perf_counter() - start, [answers[row] for row in range(len(ids))]


def mlx_lm(job: Path, out: Path, batch: int, dtype: str, text_only: bool) -> tuple[float, list]:
    """mlx-lm's batch_generate: text only, it has no hooks. As installed, so without OpenBLAS."""
    from mlx_lm import batch_generate, load

    model, tokenizer = load(str(model_folder(job)))
    tokenizer.eos_token_ids = set()
    start = time.perf_counter()
    batch_generate(model, tokenizer, token_ids(job), max_tokens=MAX_TOKENS)
    return time.perf_counter() - start, []


def mlx_lm_openblas(job: Path, out: Path, batch: int, dtype: str, text_only: bool) -> tuple[float, list]:
    """The same with OpenBLAS instead of the reference BLAS."""
    import gemma_refactored  # noqa: F401

    return mlx_lm(job, out, batch, dtype, text_only)


def float32_product(job: Path, out: Path, batch: int, dtype: str, text_only: bool) -> tuple[float, list]:
    """Not a contender: seconds of one multiply-add in a 512 x 640 x 2048 product, with OpenBLAS."""
    import gemma_refactored  # noqa: F401  isort: skip
    import mlx.core as mx

    x, weights = mx.random.normal((512, 640)), mx.random.normal((2048, 640))
    times = []
    for _ in range(200):
        start = time.perf_counter()
        mx.eval(x @ weights.T)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / (512 * 640 * 2048), []


CONTENDERS = {
    f.__name__: f
    for f in (ours, transformers_hooks, nnsight, transformer_lens, mlx_lm, mlx_lm_openblas, float32_product)
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("job", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text-only", action="store_true")
    arguments = parser.parse_args()
    run = CONTENDERS[arguments.name]
    seconds, tokens = run(arguments.job, arguments.out, arguments.batch, arguments.dtype, arguments.text_only)
    print(json.dumps({"seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main()
