"""The command line: generate answers, and save the activations behind them."""

from __future__ import annotations

import argparse
import datetime
import logging
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .configuration import NAMES, Chat, Generation, Saving
from .errors import UserError, exit_code, shown
from .files import displayed
from .settings import Parser, add_options, from_arguments, record

if TYPE_CHECKING:
    from .chat_template import ChatFormat
    from .collection import Collection
    from .distributed import Team
    from .job import Job
    from .manifest import RunToRepeat
    from .model_loading import LoadedModel
    from .prompt_processing import Prompt

log = logging.getLogger("gemma_refactored")
INTERRUPTED = "Interrupted. Complete prompts are kept; run the same command again to continue."


@dataclass(frozen=True)
class Defaults:
    """What the caller of `main` decides: nothing in this package knows what it is used for.

    Attributes:
        model: the default; None: one must be named. `model_is` describes it in the help.
        find_model: from the name that was typed to the folder or Hugging Face id to load.
        sample_prompts: what --create-sample-prompts writes and --save-activations takes without prompts.
        output_dir: for the texts.
        activations_dir: folder for a model's activations unless --activations-dir names one.
        note: what to know about a model that is asked these prompts, if anything.
        adapter: folder or Hugging Face id of the LoRA adapter that is added unless --adapter names one.
        chat: what is written around prompts unless options say so.
        epilog: the end of the help.
    """

    model: str | None = None
    model_is: str = "none"
    sample_prompts: Mapping[str, dict[str, list[str]]] = field(
        default_factory=lambda: {"examples": {"short": ["How do I build a bookshelf?", "Write a short poem."]}}
    )
    find_model: Callable[[str], str] = str
    output_dir: Path = Path("answers")
    activations_dir: Callable[[LoadedModel], Path] = lambda loaded: Path("activations")
    note: Callable[[LoadedModel, list[str]], str | None] = lambda loaded, prompts: None
    adapter: str | None = None
    chat: Chat = Chat()
    epilog: str | None = None


@dataclass(frozen=True)
class Request:
    """A run that is asked for, complete before any model is loaded.

    Attributes:
        model: folder, GGUF file or Hugging Face id.
        adapter: folder or Hugging Face id of a LoRA adapter for it.
        prompts: empty if the command needs none.
        repeated: the earlier run that this one repeats.
    """

    model: str
    prompts: list[Prompt]
    generation: Generation
    saving: Saving
    repeated: RunToRepeat | None = None
    adapter: str | None = None


class _Printer(logging.StreamHandler):
    """Raises errors of printing, a broken pipe above all, instead of printing them."""

    def handleError(self, record):
        raise


def build_parser(defaults: Defaults) -> argparse.ArgumentParser:
    parser = Parser(
        prog="run_model.py",
        description="Generate answers with a model that has hooks on every activation, and save the activations.",
        epilog=defaults.epilog,
    )
    add = parser.add_argument
    add("--model", help=f"local folder, GGUF file or Hugging Face id (default: {defaults.model_is})")
    add("--adapter", metavar="DIR", help="LoRA adapter of mlx-lm or PEFT to add to it: folder or Hugging Face id")
    add("--prompts", nargs="+", metavar="TEXT", help="prompts to answer")
    add(
        "--prompts-file",
        metavar="FILE",
        help='.txt, .csv, .tsv or .jsonl; or JSON: a list of prompts, or {"GROUP": {"SUBCATEGORY": ["prompt", ..]}}',
    )
    add("--prompt-column", metavar="NAME", help="column of a .csv or .jsonl file that has the prompts (default prompt)")
    add("--from-manifest", metavar="FILE", help="repeat the run that wrote this manifest.json, into --activations-dir")
    add_options(parser, Generation(), NAMES)
    add_options(parser, Saving())
    add("--output-dir", default=defaults.output_dir, help=f"folder for the texts (default {defaults.output_dir.name})")
    add("--shard", action="store_true", help="under mlx.launch: split the model over the processes")
    add("--part", metavar="I/N", help="answer only the Ith of N parts of the prompts (see docs/clusters.md)")
    add("--list-sites", action="store_true", help="print every site of the model with its shape, and stop")
    add("--check", action="store_true", help="certify this model on this machine (see docs/models.md), and stop")
    add("--dry-run", action="store_true", help="print how many files, bytes and minutes the run would take, and stop")
    add("--create-sample-prompts", metavar="FILE", help="write an example prompts file, and stop")
    add("--verbose", "-v", action="store_true", help="print the answers")
    add("--quiet", "-q", action="store_true", help="print errors only")
    return parser


def main(argv: Sequence[str] | None = None, defaults: Defaults = Defaults()) -> int:
    """Run the command line; the exit code (0; 1 for a failed --check, 2 for bad input)."""
    team = None

    def start() -> int:
        nonlocal team
        arguments = build_parser(defaults).parse_args(argv)
        arguments.model = defaults.find_model(arguments.model) if arguments.model else None
        arguments.adapter = None if arguments.adapter is None else defaults.find_model(arguments.adapter)
        from .distributed import join_team

        team = join_team()
        level = logging.ERROR if arguments.quiet or not team.leads else logging.INFO
        logging.basicConfig(level=level, format="%(message)s", handlers=[_Printer(sys.stdout)])
        logging.getLogger("httpx").setLevel(logging.WARNING)
        return run(arguments, defaults, team)

    return exit_code(start, INTERRUPTED, lambda: team.rank if team else 0)


def run(arguments: argparse.Namespace, defaults: Defaults, team: Team) -> int:
    """The exit code: 0, or 1 for a model that fails its check."""
    wants_no_prompts = arguments.create_sample_prompts or arguments.list_sites or arguments.check
    if wants_no_prompts and not (team.leads or arguments.shard):
        return 0
    if arguments.create_sample_prompts:
        from .files import write_json

        write_json(Path(arguments.create_sample_prompts), defaults.sample_prompts)
        log.info("Wrote %s.", arguments.create_sample_prompts)
        return 0
    request = read_request(arguments, defaults)
    loaded = load_model(request, arguments.shard, team)
    if arguments.list_sites:
        from .activation_capture import site_shapes

        for site, shape in site_shapes(loaded.model).items() if team.leads else ():
            print(f"{site}  {list(shape)}")
        return 0
    if request.saving.activations_dir is None:
        request = replace(request, saving=replace(request.saving, activations_dir=defaults.activations_dir(loaded)))
    if arguments.check:
        from .certificate import certify_and_save

        return 0 if certify_and_save(loaded, request.saving.folder) else 1
    if note := defaults.note(loaded, [prompt.text for prompt in request.prompts]):
        log.info("%s", textwrap.fill(note, 80))
    run_prompts(arguments, request, loaded, team)
    return 0


def read_request(arguments: argparse.Namespace, defaults: Defaults) -> Request:
    """What the options ask for, with prompts and manifest read.

    Raises:
        UserError: for invalid options, or options that exclude each other.
    """
    from .prompt_processing import load_prompts, parse_prompts, prompts_from_arguments

    generation = from_arguments(Generation(chat=defaults.chat), arguments, NAMES)
    saving = from_arguments(Saving(), arguments)
    check_combinations(arguments, saving)
    read_part(arguments.part)
    model, adapter = arguments.model or defaults.model, arguments.adapter
    if arguments.from_manifest:
        from .manifest import read_manifest

        repeated = read_manifest(Path(arguments.from_manifest))
        model = arguments.model or repeated.model or defaults.model
        adapter = adapter or repeated.adapter
        prompts, generation = repeated.prompts, repeated.generation
        saving = replace(saving, **repeated.saved)
    else:
        repeated, adapter = None, adapter or defaults.adapter
        if arguments.prompts_file is not None:
            prompts = load_prompts(arguments.prompts_file, arguments.prompt_column)
        elif arguments.prompts is None and saving.save_activations:
            prompts = parse_prompts(defaults.sample_prompts, "sample prompts")
            log.info("No prompts given: taking the %d sample prompts of --create-sample-prompts.", len(prompts))
        else:
            prompts = prompts_from_arguments(arguments.prompts or [])
    if model is None:
        raise UserError("Name a model: --model with a local folder, a GGUF file or a Hugging Face id.")
    return Request(model, prompts, generation, saving, repeated, adapter)


def check_combinations(arguments: argparse.Namespace, saving: Saving) -> None:
    """Raise UserError for options that exclude each other."""
    needs_prompts = not (arguments.list_sites or arguments.check)
    sources = [arguments.prompts, arguments.prompts_file, arguments.from_manifest]
    given = sum(source is not None for source in sources)
    has_samples = saving.save_activations  # a first try; whoever only wants answers has a prompt
    if needs_prompts and given != 1 and not (given == 0 and has_samples):
        raise UserError("Give one of --prompts, --prompts-file (see --create-sample-prompts) and --from-manifest.")
    if arguments.prompt_column is not None and arguments.prompts_file is None:
        raise UserError("--prompt-column is about a --prompts-file; give one.")
    if arguments.check and arguments.shard:
        raise UserError("--check certifies a whole model; omit --shard.")
    if arguments.dry_run and not (saving.save_activations or arguments.from_manifest):
        raise UserError("--dry-run estimates the files of --save-activations; add that option.")
    if arguments.part is not None and not saving.save_activations:
        raise UserError("--part is merged by what parts have saved: add --save-activations.")
    if arguments.part is not None and arguments.dry_run:
        raise UserError("--dry-run estimates all parts together; omit --part.")
    if saving.process_by_group and not saving.save_activations:
        raise UserError("--process-by-group decides where activations go; add --save-activations.")


def load_model(request: Request, shard: bool, team: Team) -> LoadedModel:
    """Load the model and say which it is. (Heavy imports only now, so that mistakes are reported at once.)"""
    from .manifest import check_same_weights
    from .model_loading import device_description, load

    repeated = request.repeated
    revision = repeated.hub_revision if repeated and request.model == repeated.model else None
    generation = request.generation
    loaded = load(request.model, generation.keep_precision, shard, revision, generation.chat, request.adapter)
    if repeated:
        check_same_weights(loaded, repeated.revision)
    processes = f", {team.size} processes share the {'model' if shard else 'prompts'}"
    log.info(
        "Model: %s (%d layers, %s parameters, %s) on %s%s",
        loaded.name, loaded.num_layers, _readable(loaded.num_parameters), loaded.dtype, device_description(),
        processes if team.size > 1 else "",
    )  # fmt: skip
    return loaded


def run_prompts(arguments: argparse.Namespace, request: Request, loaded: LoadedModel, team: Team) -> None:
    """Generate for all prompts that are not complete yet, and save what was requested."""
    chat_format = choose_chat_format(request, loaded)
    job = replace(make_job(request, loaded, chat_format, arguments.shard), part=read_part(arguments.part))
    if job.sites:
        from .activation_capture import describe_sites

        log.info("%s", textwrap.fill(f"Sites: {describe_sites(job.sites)}.", 80, break_long_words=False))
    if arguments.dry_run:
        from .dry_run import estimate

        print(estimate(job, loaded, request.saving).describe())
        return
    show_progress = team.leads and not arguments.quiet
    start = time.perf_counter()
    if request.saving.save_activations:
        finished, new = collect(job, request, loaded, chat_format, team, show_progress)
    else:
        finished, new = {}, answer(job, request.saving, loaded, None, team, show_progress)
    if not team.leads:
        return
    records = {**finished, **new}
    report(arguments, request, loaded, [records[prompt] for prompt in job.prompts if prompt in records])
    if len(records) < len(job.prompts):
        log.info("Part %s: %d of %d prompts are complete.", arguments.part, len(records), len(job.prompts))
    if new:
        seconds, written = time.perf_counter() - start, sum(len(record["token_ids"]) for record in new.values())
        log.info("%d prompts, %d tokens in %.1f s (%.0f tokens/s).", len(new), written, seconds, written / seconds)
    log.info("Answers: %s", displayed(Path(arguments.output_dir) / "results.json"))
    if job.sites:
        log.info("Activations of %d sites: %s", len(job.sites), displayed(request.saving.folder))


def read_part(text: str | None) -> Team:
    """ "2/4", counted from 1; None: there are no parts."""
    from .distributed import Team

    if text is None:
        return Team()
    numbers = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    number, parts = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= number <= parts:
        raise UserError(f"--part must be I/N, the Ith of N parts counted from 1, not {shown(text)}.")
    return Team(number - 1, parts)


def choose_chat_format(request: Request, loaded: LoadedModel) -> ChatFormat:
    """Templates may write today's date: a run that continues or repeats another takes that one's."""
    from .chat_template import rendering_date
    from .files import MANIFEST, is_file, read_json

    generation, saving = request.generation, request.saving
    if generation.date:
        date = datetime.date.fromisoformat(generation.date)
    elif request.repeated:
        date = request.repeated.date
    else:
        path = (saving.activations_dir or Path()) / MANIFEST
        continues = saving.save_activations and not saving.overwrite and is_file(path, "manifest")
        date = rendering_date(read_json(path, "manifest") if continues else None)
    return replace(loaded.chat_format, date=date, keeps_control_tokens=generation.control_tokens)


def make_job(request: Request, loaded: LoadedModel, chat_format: ChatFormat, shares_model: bool) -> Job:
    """The whole job, as if nothing of it were complete.

    Raises:
        UserError: a prompt, a site or a token id that this model cannot handle.
    """
    from .activation_capture import ATTENTION_WEIGHTS, select_sites
    from .job import Job, check_context
    from .prompt_processing import encode_prompts

    generation, saving = request.generation, request.saving
    texts = [prompt.text for prompt in request.prompts]
    token_ids = encode_prompts(loaded.tokenizer, texts, generation.chat_mode, chat_format)
    check_context(request.prompts, token_ids, generation.max_tokens, loaded.context_length)
    check_bias(generation.sampling.logit_bias, len(loaded.tokenizer))
    sites = select_sites(loaded.model, saving.activation_filter) if saving.save_activations else []
    if any(site.endswith(ATTENTION_WEIGHTS) for site in sites) and not saving.process_by_group:
        raise UserError("Attention weights differ in length from prompt to prompt: add --process-by-group.")
    return Job(
        prompts=request.prompts,
        token_ids=token_ids,
        max_tokens=generation.max_tokens,
        batch_size=generation.batch_size,
        sampling=generation.sampling,
        end_tokens=() if generation.ignore_end_tokens else loaded.end_tokens,
        sites=sites,
        chat_mode=generation.chat_mode,
        shares_model=shares_model,
    )


def check_bias(bias: Mapping[int, float], vocabulary: int) -> None:
    for token in bias:
        if token >= vocabulary:
            raise UserError(f"--logit-bias {token}=..: token ids of this model are 0 to {vocabulary - 1}.")


def collect(
    job: Job, request: Request, loaded: LoadedModel, chat_format: ChatFormat, team: Team, show_progress: bool
) -> tuple[dict[Prompt, dict], dict[Prompt, dict]]:
    """Answer into a collection; returns the records of earlier runs, and the new ones of all processes."""
    from .chat_template import facts_of_prompts
    from .dry_run import announce_size
    from .files import is_anything, locked
    from .job import open_collection
    from .manifest import new_manifest

    saving, folder = request.saving, request.saving.folder

    def path_of(name: str) -> str:
        return str(Path(name).resolve()) if is_anything(name, "model folder") else name

    settings = {
        **record(request.generation, NAMES),
        "activation_filter": saving.activation_filter,
        "activation_dtype": saving.activation_dtype,
        "compressed": saving.compress_activations,
        "layout": "grouped" if saving.process_by_group else "flat",
        "sites": job.sites,
        **facts_of_prompts(loaded.tokenizer, job.token_ids, chat_format),
        "model_path": path_of(request.model),
        "adapter_path": path_of(request.adapter) if request.adapter else None,
    }
    manifest = new_manifest(loaded.facts(), settings, job.prompts)
    with locked(folder) if team.leads else nullcontext():
        collection, finished = open_collection(
            job.prompts, folder, manifest, saving.process_by_group, saving.overwrite, team
        )
        job = replace(job, finished=finished)
        announce_size(job, loaded, folder, saving.activation_dtype)
        if finished:
            log.info("%d of %d prompts are complete already.", len(finished), len(job.prompts))
        # Processes that share a model compute the same numbers; one writes them.
        writes = team.leads or not job.shares_model
        new = answer(job, saving, loaded, collection if writes else None, team, show_progress)
        if team.leads:
            collection.finish([*finished, *new])
    return finished, new


def answer(
    job: Job, saving: Saving, loaded: LoadedModel, collection: Collection | None, team: Team, show_progress: bool
) -> dict[Prompt, dict]:
    """Answer what is not complete, each process its share; the records of all of them."""
    from .job import answer_prompts, plan_batches
    from .npz_files import NpzWriter

    writer = NpzWriter(saving.activation_dtype, saving.compress_activations) if collection else None
    batches = plan_batches(job, loaded, team, saving.process_by_group)
    share = answer_prompts(job, loaded, batches, collection, writer, show_progress)
    return {job.prompts[i]: record for items in team.exchange(list(share.items())) for i, record in items}


def report(arguments: argparse.Namespace, request: Request, loaded: LoadedModel, records: list[dict]) -> None:
    """Write the texts, and print them if asked to."""
    from .conversation import as_prompt, readable
    from .prompt_processing import count_in_thought, save_results
    from .versions import library_versions

    settings = {**loaded.facts(), **record(request.generation, NAMES), "versions": library_versions()}
    save_results(Path(arguments.output_dir), records, settings)
    if unfinished := count_in_thought(records):
        log.warning(
            "%d of %d answers end inside the model's thought: they have no tokens of an answer; raise --max-tokens.",
            unfinished, len(records),
        )  # fmt: skip
    if arguments.verbose:
        for answered in records:
            prompt = readable(as_prompt(answered["prompt"], "A record's prompt"))
            print(f"\n> {prompt}\n{answered['text']}")


def _readable(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
