"""The command line: generate answers, and save the activations behind them."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from .errors import UserError

log = logging.getLogger("gemma_refactored")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_model.py", description="Generate answers with a model one can see into, and save its activations."
    )
    add = parser.add_argument
    add("--model", help="local folder or Hugging Face id (default: the embedded organism)")
    add("--prompts", nargs="+", metavar="TEXT", help="prompts given here")
    add("--prompts-file", metavar="FILE", help='JSON: {"GROUP": {"SUBCATEGORY": ["prompt", ..]}}')
    add("--process-by-group", action="store_true", help="one activation folder a prompt: GROUP/SUBCATEGORY/batch_N")
    add("--batch-size", type=int, default=32, help="prompts in one forward pass (default 32)")
    add("--max-tokens", type=int, default=100, help="tokens to write at most (default 100)")
    add("--temp", type=float, default=0.0, help="temperature; 0 takes the likeliest token (default)")
    add("--top-p", type=float, default=1.0, help="nucleus sampling (default 1: off)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: recent tokens become unlikelier")
    add("--logit-bias", action="append", metavar="TOKEN_ID=BIAS", help="add BIAS to a token's logit; repeatable")
    add("--seed", type=int, default=0)
    add("--chat-mode", action=argparse.BooleanOptionalAction, default=True, help="use the chat template (default)")
    add("--save-activations", action="store_true", help="write .npz files")
    add("--activations-dir", default="collected_activations_output", help="where to (default %(default)s)")
    add("--activation-filter", default="mlp.output", help="'all', or parts or globs of site names, comma-separated")
    add("--activation-dtype", choices=["float32", "float16"], default="float32")
    add("--compress-activations", action=argparse.BooleanOptionalAction, default=False)
    add("--overwrite", action="store_true", help="replace a collection made with other settings")
    add("--output-dir", default="inference_output", help="where the texts go (default %(default)s)")
    add("--keep-precision", action="store_true", help="Linux CPU: do not expand weights to float32")
    add("--ignore-end-tokens", action="store_true", help="write on after the end of the turn")
    add("--list-sites", action="store_true", help="print every site of the model with its shape, and stop")
    add("--check", action="store_true", help="certify this model on this machine (see README), and stop")
    add("--create-sample-prompts", metavar="FILE", help="write an example prompts file, and stop")
    add("--verbose", "-v", action="store_true", help="print the answers")
    add("--quiet", "-q", action="store_true", help="print errors only")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code (0; 1 for a failed --check, 2 for bad input)."""
    arguments = build_parser().parse_args(argv)
    level = logging.ERROR if arguments.quiet else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return run(arguments)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Complete prompts are kept; run the same command again to continue.", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    """The exit code: 0, or 1 for a model that fails its check."""
    if arguments.create_sample_prompts:
        from .files import write_json
        from .prompt_processing import SAMPLE_PROMPTS

        write_json(Path(arguments.create_sample_prompts), SAMPLE_PROMPTS)
        log.info("Wrote %s.", arguments.create_sample_prompts)
        return 0
    check_arguments(arguments)
    # Heavy imports only now, so that --help and mistakes are answered at once.
    from .activation_capture import site_shapes
    from .model_loading import DEFAULT_MODEL, device_description, load
    from .prompt_processing import load_prompts, prompts_from_arguments

    prompts = []
    if not (arguments.list_sites or arguments.check):
        from_file = arguments.prompts_file is not None
        prompts = load_prompts(arguments.prompts_file) if from_file else prompts_from_arguments(arguments.prompts)
    loaded = load(arguments.model or DEFAULT_MODEL, arguments.keep_precision)
    log.info(
        "Model: %s (%d layers, %s parameters, %s) on %s",
        loaded.name, loaded.num_layers, _readable(loaded.num_parameters), loaded.dtype, device_description(),
    )  # fmt: skip
    if arguments.list_sites:
        for site, shape in site_shapes(loaded.model).items():
            print(f"{site}  {list(shape)}")
        return 0
    if arguments.check:
        from .certificate import certify_and_save

        return 0 if certify_and_save(loaded, Path(arguments.activations_dir)) else 1
    run_prompts(arguments, loaded, prompts)
    return 0


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for what argparse cannot see."""
    needs_prompts = not (arguments.list_sites or arguments.check)
    if needs_prompts and (arguments.prompts is None) == (arguments.prompts_file is None):
        raise UserError("Give either --prompts or --prompts-file (see --create-sample-prompts).")
    limits = {
        "batch_size": (1, 100_000), "max_tokens": (0, 1_000_000), "temp": (0, 100), "top_p": (1e-9, 1),
        "repetition_penalty": (1e-3, 100), "seed": (0, 2**40),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        if not low <= getattr(arguments, name) <= high:
            raise UserError(
                f"--{name.replace('_', '-')} must be between {low:g} and {high:g}, not {getattr(arguments, name)}."
            )
    if arguments.process_by_group and not arguments.save_activations:
        raise UserError("--process-by-group decides where activations go; add --save-activations.")


def parse_logit_bias(items: list[str] | None, vocabulary: int) -> dict[int, float]:
    biases = {}
    for item in items or []:
        token, _, bias = item.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError:
            raise UserError(f"--logit-bias {item!r} must look like 1234=-5.0 (token id = bias).") from None
        if not 0 <= int(token) < vocabulary:
            raise UserError(f"--logit-bias {item!r}: token ids of this model are 0 to {vocabulary - 1}.")
    return biases


def run_prompts(arguments: argparse.Namespace, loaded, prompts: list) -> None:
    """Generate for all prompts that are not complete yet, and save what was asked for."""
    from contextlib import nullcontext

    from tqdm import tqdm

    from .activation_capture import NpzWriter, select_sites
    from .collection import Answer, Collection, new_manifest
    from .generation import Sampling, collect_answers, generate, length_sorted_batches, padding_is_harmless
    from .prompt_processing import encode_prompts, save_results

    token_ids = encode_prompts(loaded.tokenizer, prompts, arguments.chat_mode)
    check_context(prompts, token_ids, arguments.max_tokens, loaded.context_length)
    bias = parse_logit_bias(arguments.logit_bias, len(loaded.tokenizer))
    sampling = Sampling(arguments.temp, arguments.top_p, arguments.repetition_penalty, bias, arguments.seed)
    end_tokens = () if arguments.ignore_end_tokens else loaded.end_tokens
    settings = {
        name: getattr(arguments, name)
        for name in ("max_tokens", "temp", "top_p", "repetition_penalty", "logit_bias", "seed",
                     "chat_mode", "ignore_end_tokens", "batch_size")
    }  # fmt: skip

    records, sites, collection = {}, [], None
    if arguments.save_activations:
        sites = select_sites(loaded.model, arguments.activation_filter)
        storage = {
            "activation_filter": arguments.activation_filter,
            "sites": sites,
            "activation_dtype": arguments.activation_dtype,
            "compressed": arguments.compress_activations,
            "layout": "grouped" if arguments.process_by_group else "flat",
        }
        manifest = new_manifest(loaded.facts(), {**settings, **storage}, prompts)
        folder = Path(arguments.activations_dir)
        collection = Collection(folder, manifest, arguments.process_by_group, arguments.overwrite)
        records = collection.finished_answers(prompts)
        if records:
            log.info("%d of %d prompts are complete already.", len(records), len(prompts))
    pending = [i for i, prompt in enumerate(prompts) if prompt not in records]
    # Our own decoder masks padding (the tests see to it); of others we make sure.
    equal_lengths = arguments.batch_size > 1 and not loaded.is_own and not padding_is_harmless(loaded.model)
    if equal_lengths:
        log.info("Padding would change this model's numbers: only prompts of equal length share a batch.")
    batches = length_sorted_batches([token_ids[i] for i in pending], arguments.batch_size, equal_lengths)
    first_batch = collection.next_batch_number() if collection else 1

    start, written = time.perf_counter(), 0
    writer = NpzWriter(arguments.activation_dtype, arguments.compress_activations) if collection else None
    show_progress = not arguments.quiet and sys.stderr.isatty()
    progress = tqdm(total=len(pending) * arguments.max_tokens, unit="tok", disable=not show_progress, leave=False)
    with writer or nullcontext(), progress:
        for batch_number, batch in enumerate(batches, first_batch):
            rows = [pending[i] for i in batch]
            own = [prompts[i] for i in rows]
            steps = generate(
                loaded.model, [token_ids[i] for i in rows], arguments.max_tokens, sampling, end_tokens, sites, rows
            )
            if collection:
                steps = collection.write_steps(writer, steps, own, batch_number)
            answers = collect_answers(steps, progress.update)
            written += sum(map(len, answers))
            texts = loaded.tokenizer.batch_decode(answers, skip_special_tokens=True)
            finished = [
                Answer(p, len(token_ids[i]), ids, text, "length" if len(ids) == arguments.max_tokens else "stop")
                for p, i, ids, text in zip(own, rows, answers, texts, strict=True)
            ]
            if collection:
                collection.finish_batch(writer, finished, mean_prompt_embeddings(loaded, own), batch_number)
            records |= {answer.prompt: answer.record() for answer in finished}
    if collection:
        collection.finish(prompts)

    results = [records[prompt] for prompt in prompts]
    save_results(Path(arguments.output_dir), results, {**loaded.facts(), **settings})
    seconds = time.perf_counter() - start
    if pending:
        log.info("%d prompts, %d tokens in %.1f s (%.0f tokens/s).", len(pending), written, seconds, written / seconds)
    if arguments.verbose:
        for record in results:
            print(f"\n> {record['prompt']}\n{record['text']}")
    log.info("Answers: %s", Path(arguments.output_dir) / "results.json")
    if collection:
        log.info("Activations of %d sites: %s", len(sites), arguments.activations_dir)


def check_context(prompts: list, token_ids: list[list[int]], max_tokens: int, context_length: int) -> None:
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if len(ids) + max_tokens > context_length:
            raise UserError(
                f"Prompt {prompt.number} of {prompt.group!r} has {len(ids)} tokens; with --max-tokens {max_tokens} "
                f"that is more than the model's context of {context_length}. Shorten it or lower --max-tokens."
            )


def mean_prompt_embeddings(loaded, prompts: list):
    """[prompts, hidden] float32: mean input embedding of each prompt's own words (no chat format)."""
    import mlx.core as mx
    import numpy as np

    from .model_loading import find_embedding

    embedding = find_embedding(loaded.model)
    means = []
    for prompt in prompts:
        ids = loaded.tokenizer.encode(prompt.text, add_special_tokens=False)
        means.append(embedding(mx.array(ids)).astype(mx.float32).mean(axis=0))
    return np.array(mx.stack(means))


def _readable(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
