"""The command line: generate answers, and save the activations behind them."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, stop_printing

if TYPE_CHECKING:
    from .distributed import Team
    from .job import Job
    from .model_loading import LoadedModel
    from .prompt_processing import Prompt

log = logging.getLogger("gemma_refactored")


class _Printer(logging.StreamHandler):
    """Raises what goes wrong in printing, a broken pipe above all, instead of printing about it."""

    def handleError(self, record):
        raise


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_model.py", description="Generate answers with a model one can see into, and save its activations."
    )
    add = parser.add_argument
    add("--model", help="local folder or Hugging Face id (default: the embedded organism)")
    add("--prompts", nargs="+", metavar="TEXT", help="prompts given here")
    add("--prompts-file", metavar="FILE", help='JSON: {"GROUP": {"SUBCATEGORY": ["prompt", ..]}}')
    add("--from-manifest", metavar="FILE", help="repeat the run that wrote this manifest.json, into --activations-dir")
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
    add("--shard", action="store_true", help="under mlx.launch: split the model over the processes")
    add("--list-sites", action="store_true", help="print every site of the model with its shape, and stop")
    add("--check", action="store_true", help="certify this model on this machine (see README), and stop")
    add("--dry-run", action="store_true", help="say how many files, bytes and minutes it would take, and stop")
    add("--create-sample-prompts", metavar="FILE", help="write an example prompts file, and stop")
    add("--verbose", "-v", action="store_true", help="print the answers")
    add("--quiet", "-q", action="store_true", help="print errors only")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code (0; 1 for a failed --check, 2 for bad input)."""
    arguments = build_parser().parse_args(argv)
    from .distributed import Team, join_team

    team = Team()
    try:
        team = join_team()
        level = logging.ERROR if arguments.quiet or not team.leads else logging.INFO
        logging.basicConfig(level=level, format="%(message)s", handlers=[_Printer(sys.stdout)])
        logging.getLogger("httpx").setLevel(logging.WARNING)
        code = run(arguments, team)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return stop_printing()
    except UserError as error:
        print(f"Error{'' if team.leads else f' in process {team.rank}'}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if team.leads:
            print("\nInterrupted. Complete prompts are kept; run the same command again to continue.", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace, team: Team) -> int:
    """The exit code: 0, or 1 for a model that fails its check."""
    wants_no_prompts = arguments.create_sample_prompts or arguments.list_sites or arguments.check
    if wants_no_prompts and not (team.leads or arguments.shard):
        return 0
    if arguments.create_sample_prompts:
        from .files import write_json
        from .prompt_processing import SAMPLE_PROMPTS

        write_json(Path(arguments.create_sample_prompts), SAMPLE_PROMPTS)
        log.info("Wrote %s.", arguments.create_sample_prompts)
        return 0
    check_arguments(arguments)
    prompts, repeated = gather_prompts(arguments)
    # Heavy imports only now, so that mistakes are answered at once.
    from .activation_capture import site_shapes
    from .manifest import check_same_weights, hub_revision
    from .model_loading import DEFAULT_MODEL, device_description, load

    revision = hub_revision(repeated) if repeated and arguments.model == repeated["model_path"] else None
    loaded = load(arguments.model or DEFAULT_MODEL, arguments.keep_precision, arguments.shard, revision)
    if repeated:
        check_same_weights(loaded, repeated)
    processes = f", {team.size} processes share the {'model' if arguments.shard else 'prompts'}"
    log.info(
        "Model: %s (%d layers, %s parameters, %s) on %s%s",
        loaded.name, loaded.num_layers, _readable(loaded.num_parameters), loaded.dtype, device_description(),
        processes if team.size > 1 else "",
    )  # fmt: skip
    if arguments.list_sites:
        for site, shape in site_shapes(loaded.model).items() if team.leads else ():
            print(f"{site}  {list(shape)}")
        return 0
    if arguments.check:
        from .certificate import certify_and_save

        return 0 if certify_and_save(loaded, Path(arguments.activations_dir)) else 1
    run_prompts(arguments, loaded, prompts, team, repeated)
    return 0


def gather_prompts(arguments: argparse.Namespace) -> tuple[list[Prompt], dict | None]:
    """The prompts, none for commands that need none; and the manifest to repeat, whose options are taken over."""
    from .prompt_processing import load_prompts, prompts_from_arguments

    if arguments.from_manifest:
        from .manifest import options_to_repeat, prompts_to_repeat, read_manifest

        path = Path(arguments.from_manifest)
        manifest, model = read_manifest(path), arguments.model
        vars(arguments).update(options_to_repeat(manifest))
        arguments.model = model or manifest["model_path"]
        check_arguments(arguments)
        return prompts_to_repeat(manifest, path), manifest
    if arguments.prompts_file is not None:
        return load_prompts(arguments.prompts_file), None
    return prompts_from_arguments(arguments.prompts or []), None


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for what argparse cannot see."""
    needs_prompts = not (arguments.list_sites or arguments.check)
    sources = [arguments.prompts, arguments.prompts_file, arguments.from_manifest]
    if needs_prompts and sum(source is not None for source in sources) != 1:
        raise UserError("Give one of --prompts, --prompts-file (see --create-sample-prompts) and --from-manifest.")
    limits = {
        "batch_size": (1, 100_000), "max_tokens": (0, 1_000_000), "temp": (0, 100), "top_p": (1e-9, 1),
        "repetition_penalty": (1e-3, 100), "seed": (0, 2**40),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        if not low <= getattr(arguments, name) <= high:
            raise UserError(
                f"--{name.replace('_', '-')} must be between {low:g} and {high:g}, not {getattr(arguments, name)}."
            )
    if arguments.check and arguments.shard:
        raise UserError("--check certifies a whole model; leave --shard away.")
    if arguments.dry_run and not (arguments.save_activations or arguments.from_manifest):
        raise UserError("--dry-run is about the files of --save-activations; add that.")
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
        if math.isnan(float(bias)):
            raise UserError(f"--logit-bias {item!r}: the bias must be a number.")
        if not 0 <= int(token) < vocabulary:
            raise UserError(f"--logit-bias {item!r}: token ids of this model are 0 to {vocabulary - 1}.")
    return biases


def earlier_manifest(arguments: argparse.Namespace) -> dict | None:
    """The manifest of the collection that this run would continue."""
    from .files import MANIFEST, read_json

    path = Path(arguments.activations_dir) / MANIFEST
    if not arguments.save_activations or arguments.overwrite or not path.exists():
        return None
    return read_json(path, "manifest")


def run_prompts(
    arguments: argparse.Namespace, loaded: LoadedModel, prompts: list[Prompt], team: Team, repeated: dict | None
) -> None:
    """Generate for all prompts that are not complete yet, and save what was asked for."""
    from .activation_capture import select_sites
    from .chat_template import ChatFormat, facts_of_prompts, rendering_date
    from .dry_run import estimate
    from .files import locked
    from .generation import Sampling
    from .job import Job, check_context
    from .manifest import GENERATION_OPTIONS, new_manifest
    from .model_loading import DEFAULT_MODEL
    from .prompt_processing import encode_prompts

    # Templates may write today's date: a run that continues or repeats another takes that one's.
    chat_format = ChatFormat(date=rendering_date(repeated or earlier_manifest(arguments)))
    texts = [prompt.text for prompt in prompts]
    token_ids = encode_prompts(loaded.tokenizer, texts, arguments.chat_mode, chat_format)
    check_context(prompts, token_ids, arguments.max_tokens, loaded.context_length)
    bias = parse_logit_bias(arguments.logit_bias, len(loaded.tokenizer))
    sampling = Sampling(arguments.temp, arguments.top_p, arguments.repetition_penalty, bias, arguments.seed)
    end_tokens = () if arguments.ignore_end_tokens else loaded.end_tokens
    job = Job(prompts, token_ids, arguments.max_tokens, arguments.batch_size, sampling, end_tokens)
    job.shares_model = arguments.shard
    settings = {name: getattr(arguments, name) for name in GENERATION_OPTIONS}
    if not arguments.save_activations:
        execute(arguments, loaded, job, settings, None, team)
        return
    job.sites = select_sites(loaded.model, arguments.activation_filter)
    storage = {
        "activation_filter": arguments.activation_filter,
        "sites": job.sites,
        "activation_dtype": arguments.activation_dtype,
        "compressed": arguments.compress_activations,
        "layout": "grouped" if arguments.process_by_group else "flat",
    }
    model = Path(arguments.model or DEFAULT_MODEL)
    storage["model_path"] = str(model.resolve()) if model.is_dir() else arguments.model
    if arguments.dry_run:
        grouped, dtype, compress = (
            arguments.process_by_group,
            arguments.activation_dtype,
            arguments.compress_activations,
        )
        print(estimate(job, loaded, dtype, compress, grouped).describe())
        return
    storage |= facts_of_prompts(loaded.tokenizer, token_ids, chat_format)
    manifest = new_manifest(loaded.facts(), {**settings, **storage}, prompts)
    with locked(Path(arguments.activations_dir)) if team.leads else nullcontext():
        execute(arguments, loaded, job, settings, manifest, team)


def execute(
    arguments: argparse.Namespace, loaded: LoadedModel, job: Job, settings: dict, manifest: dict | None, team: Team
) -> None:
    """Run a job and write down what became of it; without a manifest, the texts only."""
    from .dry_run import refuse_without_room
    from .job import answer_prompts, open_collection, plan_batches
    from .npz_writer import NpzWriter
    from .prompt_processing import save_results

    collection = writer = None
    grouped = arguments.process_by_group
    if manifest:
        folder = Path(arguments.activations_dir)
        collection = open_collection(job, folder, manifest, grouped, arguments.overwrite, team)
        refuse_without_room(job, loaded, folder, arguments.activation_dtype)
        if job.finished:
            log.info("%d of %d prompts are complete already.", len(job.finished), len(job.prompts))
        if job.shares_model and not team.leads:
            collection = None  # all processes compute the same numbers; one writes them
        else:
            writer = NpzWriter(arguments.activation_dtype, arguments.compress_activations)

    start = time.perf_counter()
    batches = plan_batches(job, loaded, team, grouped)
    own = answer_prompts(job, loaded, batches, collection, writer, team.leads and not arguments.quiet)
    shares = team.exchange(list(own.items()))
    if not team.leads:
        return
    new = {job.prompts[i]: record for share in shares for i, record in share}
    records = {**job.finished, **new}
    if collection:
        collection.finish(records)
    results = [records[prompt] for prompt in job.prompts]
    save_results(Path(arguments.output_dir), results, {**loaded.facts(), **settings})
    if new:
        seconds, written = time.perf_counter() - start, sum(len(record["token_ids"]) for record in new.values())
        log.info("%d prompts, %d tokens in %.1f s (%.0f tokens/s).", len(new), written, seconds, written / seconds)
    if arguments.verbose:
        for record in results:
            print(f"\n> {record['prompt']}\n{record['text']}")
    log.info("Answers: %s", Path(arguments.output_dir) / "results.json")
    if collection:
        log.info("Activations of %d sites: %s", len(job.sites), arguments.activations_dir)


def _readable(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
