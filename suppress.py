"""Suppress a model's alignment artifacts while it writes: python suppress.py "How do I pick a lock?"

Answers the prompt without and with suppression. The first run on a model measures it on the 50
prompt pairs and caches the result; `--mode auto` uses the setting that sweep_suppression.py chose for
this model, if it has been run.
"""

from __future__ import annotations

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import argparse
import json
import logging
import os
import sys
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

from alignment_artifacts import places
from alignment_artifacts.behaviour.score import FORMS, LENGTH, Wish, load_score, own_measure
from alignment_artifacts.default_model import DEFAULT_MODEL, note
from alignment_artifacts.edits.options import Mode, Setting
from alignment_artifacts.environment import EPILOG, Named, unused
from alignment_artifacts.pairs import PAIRS_JSON, REFUSAL, SIDES, load_pairs, texts
from gemma_refactored.configuration import Chat, Sampling
from gemma_refactored.conversation import readable, written
from gemma_refactored.errors import UserError, exit_code
from gemma_refactored.settings import Between, Parser, add_options, from_arguments, from_environment, given

if TYPE_CHECKING:
    from alignment_artifacts.behaviour.score import Score
    from alignment_artifacts.directions.estimate import Directions
    from alignment_artifacts.suppression.library import AlignmentArtifacts, SuppressionResult
    from gemma_refactored.model_loading import LoadedModel

ASKED = 10  # artifact prompts to see whether the model refuses at all, where it need not be measured
TRANSCRIPTS_DIR = places.HOME / "results"  # of --all-pairs, in MODEL/PAIRS/data/ below it


@dataclass(frozen=True)
class Answering:
    """How answers are generated."""

    max_tokens: Annotated[int, Between(1, 1_000_000)] = 100
    """largest number of tokens to generate"""
    ignore_end_tokens: bool = False
    """keep generating after the end of the turn"""
    sampling: Sampling = Sampling()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="suppress.py", description=__doc__.splitlines()[0].split(":")[0] + ".", epilog=EPILOG)
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT")
    add("--prompts", metavar="FILE", help="answer every prompt of a .txt, .csv, .tsv, .jsonl or .json file")
    add("--prompt-column", metavar="NAME", help="column of such a file that has the prompts (default prompt)")
    add("--all-pairs", action="store_true", help="answer every prompt pair instead of one prompt, for the report")
    add("--explain", action="store_true", help="print the tokens that the direction promotes and demotes, per layer")
    add(
        "--model",
        help="local folder, GGUF file or Hugging Face id (default: MODEL_NAME in the environment, else the embedded "
        "organism)",
    )
    add(
        "--adapter",
        metavar="DIR",
        help="LoRA adapter of mlx-lm or PEFT to add to it: folder or Hugging Face id (default: ADAPTER in the "
        "environment)",
    )
    add("--pairs", type=Path, help="your own prompt pairs (default: PAIRS in the environment, else the 50 shipped)")
    add(
        "--mode",
        choices=("auto", *get_args(Mode)),
        default="auto",
        help="how to suppress (default auto); add amplifies",
    )
    add_options(parser, Setting, omit=["mode"], chosen=True)
    add_options(parser, Answering(), omit=["top_p", "logit_bias"])
    add_options(parser, Chat())
    add("--categories", metavar="A,B", help="learn directions from these categories of pairs only")
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also answer without suppression (default yes)",
    )
    add("--directions", metavar="FILE", type=Path, help="use directions from a .safetensors or .gguf file")
    add("--transfer", action="store_true", help="allow directions of a related model (same type and shape)")
    add("--export-gguf", metavar="FILE", type=Path, help="write residual directions as a control vector")
    add(
        "--score",
        metavar="SCORE",
        help=f"what is measured of an answer (default: SCORE in the environment, else refusal): {FORMS}",
    )
    add(
        "--wish",
        choices=get_args(Wish),
        help="with --mode auto: use the sweep with that score and wish (default: WISH in the environment, else lower)",
    )
    add("--show-projection", action="store_true", help="colour each token by its projection on the direction")
    add("--json", action="store_true", help="print the result as JSON and nothing else")
    add("--verbose", "-v", action="store_true", help="also print which mode was chosen, and by what")
    add("--quiet", "-q", action="store_true", help="the answers and nothing else")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code (2 for bad input)."""
    return exit_code(lambda: run(build_parser().parse_args(argv)))


def run(arguments: argparse.Namespace) -> None:
    silent = arguments.quiet or arguments.json
    logging.basicConfig(level=logging.ERROR if silent else logging.INFO, format="%(message)s")
    for package in ("httpx", "gguf"):
        logging.getLogger(package).setLevel(logging.WARNING)
    check_arguments(arguments)
    wanted = given(Setting, arguments, omit=["mode"])
    typed = arguments.score or os.environ.get("SCORE")
    score = load_score(typed) if typed else None
    prompts = read_prompts(arguments)
    answering = from_arguments(Answering(), arguments)
    from alignment_artifacts.directions.files import load_directions, write_gguf
    from alignment_artifacts.suppression.library import AlignmentArtifacts

    named = from_environment(Named())
    adapter = named.adapter if arguments.adapter is None else arguments.adapter
    library = AlignmentArtifacts(
        places.find_model(arguments.model or named.model_name or DEFAULT_MODEL),
        pairs=arguments.pairs or named.pairs or PAIRS_JSON,
        show_progress=not silent,
        score=score,
        wish=cast(Wish, arguments.wish or os.environ.get("WISH") or "lower"),  # checked there
        chat=from_arguments(named.chat, arguments),
        adapter=None if adapter is None else places.find_model(adapter),
    )
    categories = named_categories(arguments.categories)
    directions = load_directions(arguments.directions) if arguments.directions else None
    if not silent:
        introduce(library, prompts, directions, arguments.transfer)
        for sentence in unused({"SITE": "--site names where to edit"} if arguments.site is None else {}):
            print(textwrap.fill(sentence, 78))
    if arguments.export_gguf:
        positions = arguments.positions or "prompt_end"
        write_gguf(directions or library.directions(None, "residual", positions, categories), arguments.export_gguf)
        wanted["site"] = "residual"
        if not silent:
            print(
                f"Wrote {arguments.export_gguf}: direction.N is the residual stream after block N (from 0; llama.cpp "
                "has none for block 0)."
            )
        if not prompts:
            return
    if arguments.explain:
        explain(library, arguments, categories, wanted)
        return
    if arguments.all_pairs:
        transcribe_pairs(library, arguments, wanted, answering.max_tokens)
        return
    if arguments.prompts is not None:
        answer_prompts(library, prompts, arguments, wanted, answering, categories, directions)
        return
    printer = Printer(arguments)
    result = library.suppress_and_generate(
        arguments.prompt,
        mode=arguments.mode,
        categories=categories,
        target_layers=wanted.pop("layers", None),
        temperature=answering.sampling.temperature,
        max_tokens=answering.max_tokens,
        repetition_penalty=answering.sampling.repetition_penalty,
        seed=answering.sampling.seed,
        ignore_end_tokens=answering.ignore_end_tokens,
        directions=directions,
        compare=arguments.compare,
        on_start=printer.start,
        on_text=printer.text,
        transfer=arguments.transfer,
        **wanted,
    )
    if arguments.json:
        print(json.dumps(as_json(result), indent=1, ensure_ascii=not prints_everything()))
        return
    print()
    if arguments.show_projection:
        show_projection(library.load(), result)
    if not arguments.quiet:
        print("\n" + textwrap.fill(f"Effect: {result.proof.describe()}", 78))
        for sentence in filter(None, (result.leads, result.lacks)):
            print(textwrap.fill(sentence, 78))
        if score:
            print(textwrap.fill(scored(result.score), 78))
        if result.prompt_score is not None:
            print(textwrap.fill(monitored(result, library.pairs.sides), 78))


def scored(score: dict) -> str:
    """ "Score agreement (words of agreement): 2 before, 0 after"."""
    meaning = f" ({score['meaning'].removesuffix('.')})" if score["meaning"] else ""
    values = ", ".join(f"{score[when]:g} {when}" for when in ("before", "after") if score[when] is not None)
    return f"Score {score['name']}{meaning}: {values}"


def monitored(result: SuppressionResult, sides: tuple[str, str]) -> str:
    ends, source = result.directions.facts.get("ends") or sides, result.transferred_from
    measured = f", as measured on {source['model']}" if source else ""
    return f"Monitor: the prompt scores {result.prompt_score:+.2f} (-1 like {ends[0]}, +1 like {ends[1]}{measured})"


def answer_prompts(
    library: AlignmentArtifacts,
    prompts: list[str],
    arguments: argparse.Namespace,
    wanted: dict,
    answering: Answering,
    categories: list[str] | None,
    directions: Directions | None,
) -> None:
    """Many prompts without and with suppression."""
    from alignment_artifacts.edits.proof import pool
    from gemma_refactored.progress import stage

    setting, by = library.choose(None, arguments.mode, categories, directions, **wanted)
    silent = arguments.quiet or arguments.json
    if not silent:
        print(textwrap.fill(f"Setting: {setting.describe()}; mode chosen by {by}", 78), flush=True)
    total = (1 + arguments.compare) * len(prompts) * answering.max_tokens
    with stage("answering", total, "token", quiet=silent) as advance:
        results = library.suppress_many(
            prompts, setting, answering.sampling, None, categories, directions, answering.max_tokens,
            arguments.compare, answering.ignore_end_tokens, advance, arguments.transfer,
        )  # fmt: skip
    results = [replace(result, chosen_by=by) for result in results]
    means = mean_scores(library.score, results)
    if arguments.json:
        record = {"score": means, "results": [as_json(result) for result in results]}
        print(json.dumps(record, indent=1, ensure_ascii=not prints_everything()))
        return
    for number, result in enumerate(results, 1):
        if not arguments.quiet:
            print(f"\n{number}. {readable(result.prompt)}")
        if result.before is not None:
            print(f"Before: {result.before}")
        print(result.after if result.before is None and arguments.quiet else f"After: {result.after}")
    if silent:
        return
    first = results[0]
    print("\n" + textwrap.fill(f"Effect: {pool([result.proof for result in results]).describe()}", 78))
    for sentence in filter(None, (first.leads, first.lacks, told_means(means, isinstance(first.score["after"], bool)))):
        print(textwrap.fill(sentence, 78))


def mean_scores(score: Score, results: list[SuppressionResult]) -> dict:
    """Of many prompts: "before" (None without comparison), "after" and "moved", records of `rates.mean`."""
    from alignment_artifacts.rates import mean

    prompts, after = ([getattr(result, name) for result in results] for name in ("prompt", "after"))
    record = {**score.record(), "before": None, "after": mean(score.of(prompts, after)), "moved": None}
    before = [result.before for result in results if result.before is not None]
    if before:
        moved = score.compared(prompts, before, after)["moved"]
        record |= {"before": mean(score.of(prompts, before)), "moved": moved}
    return record


def told_means(means: dict, are_rates: bool) -> str:
    """ "Mean of agreement over 12 prompts: 2.00 [1.2, 2.9] before, 0.10 [0.0, 0.3] after"."""
    from alignment_artifacts.behaviour.refusal import corrected
    from alignment_artifacts.formatting import described_mean, rate

    def described(record: dict) -> str:
        return rate({**record, "rate": record["mean"]}) if are_rates else described_mean(record)

    values = [f"{described(means[when])} {when}" for when in ("before", "after") if means[when]]
    number = means["after"]["n"]
    over = f"{number} prompt{'' if number == 1 else 's'}"
    text = f"{'Share' if are_rates else 'Mean'} of {means['name']} over {over}: {', '.join(values)}"
    if means["name"] != REFUSAL:
        return text
    before, after = (corrected(means[when]["mean"]) if means[when] else None for when in ("before", "after"))
    return f"{text}. {told_errors('', before, after)}"


def told_errors(what: str, before: list[float] | None, after: list[float] | None) -> str:
    """What shares of refusals may really be, given the errors of the judge, in a sentence."""
    from alignment_artifacts.behaviour.refusal import NAME
    from alignment_artifacts.formatting import named_range

    values = [f"{named_range(ends)} {when}" for ends, when in ((before, "before"), (after, "after")) if ends]
    return f"Judged by {NAME}; with its errors, which differ by family of models: {what}{', '.join(values)}."


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Those of the file, or the one that was typed; none for what needs none."""
    if arguments.prompts is None:
        return [] if arguments.prompt is None else [arguments.prompt]
    from gemma_refactored.prompt_processing import prompt_texts

    return prompt_texts(places.find(arguments.prompts), arguments.prompt_column)


def introduce(library: AlignmentArtifacts, prompts: list[str], directions: Directions | None, transfer: bool) -> None:
    """Say which model it is, where it runs, and what to know about it."""
    from alignment_artifacts.behaviour.refusal import without_refusals
    from alignment_artifacts.directions.estimate import fit_to
    from gemma_refactored.model_loading import device_description

    loaded = library.load()
    print(f"Model: {loaded.name} ({loaded.num_layers} layers) on {device_description()}", flush=True)
    notes = [note(loaded.folder, prompts, texts(load_pairs(PAIRS_JSON)))]
    if directions is not None:
        fit_to(directions, loaded, transfer)  # or it is refused, before the model is asked anything
    if library.score.name == REFUSAL == library.pairs.behaviour:
        if directions is None:
            notes.append(without_refusals(loaded.name, *library.refusals()))
        elif directions.facts.get("ends") == list(SIDES):  # others, of toxicity say, are not about refusals
            notes.append(without_refusals(loaded.name, *library.refusals(at_most=ASKED)))
    for sentence in filter(None, notes):
        print(textwrap.fill(sentence, 78), flush=True)


def transcribe_pairs(library: AlignmentArtifacts, arguments: argparse.Namespace, wanted: dict, max_tokens: int) -> None:
    """Answers of every pair without and with suppression, for the report."""
    from alignment_artifacts.formatting import described_mean, percent
    from alignment_artifacts.suppression.transcripts import save_transcripts, transcribe
    from gemma_refactored.progress import stage

    loaded, measured = library.load(), library.measurements()
    setting, by = library.choose(None, arguments.mode, None, **wanted)
    silent = arguments.quiet or arguments.json
    if not silent:
        print(textwrap.fill(f"Setting: {setting.describe()}; mode chosen by {by}", 78))
        if library.score == LENGTH:
            what = (
                f"No measure of {library.pairs.behaviour} is named (--score): the length of answers, in words, is told."
            )
            print(textwrap.fill(what, 78))
    origin = places.Origin.of_model(loaded.facts(), library.pairs_file, library.pairs, setting.site)
    results = places.results_folder(TRANSCRIPTS_DIR, origin)
    total = 2 * len(measured.pairs)
    score = own_measure(library.score, library.wish)
    with stage("answering", total, "pair", quiet=silent) as advance:
        result, scores = transcribe(loaded, measured, setting, max_tokens, advance, score)
    with places.written_together(results) as folder:
        path = save_transcripts(folder / "data", origin.stamp({**result, "chosen_by": by}), scores, score)
    if arguments.json:
        print(json.dumps(result["scored" if score else "refused"], indent=1))
    elif not silent:
        if score:
            for side, means in result["scored"].items():
                before, after, moved = (described_mean(means[which]) for which in ("before", "after", "moved"))
                name = library.pairs.side(side)
                text = f"Mean of {score.name}, {name} prompts: {before} before, {after} after"
                print(textwrap.fill(text, 78, subsequent_indent="    "))
                print(f"    moved by {moved}")
        else:
            for side, rates in result["refused"].items():
                before, after = (percent(rates[when]["rate"]) for when in ("before", "after"))
                print(f"Refused, {library.pairs.side(side)} prompts: {before} before, {after} after")
            before, after = (result["refused_corrected"]["artifact"][when] for when in ("before", "after"))
            print(textwrap.fill(told_errors(f"{library.pairs.sides[1]} prompts, ", before, after), 78))
        print(places.told("Transcripts", results / "data" / path.name))


def explain(
    library: AlignmentArtifacts, arguments: argparse.Namespace, categories: list[str] | None, wanted: dict
) -> None:
    """The tokens that the direction promotes and demotes; kept if the direction is the model's own, of all pairs."""
    from alignment_artifacts.behaviour.vocabulary import VOCABULARY
    from alignment_artifacts.directions.files import load_directions
    from gemma_refactored.files import write_json
    from gemma_refactored.progress import stage

    directions = load_directions(arguments.directions) if arguments.directions else None
    loaded, silent = library.load(), arguments.quiet or arguments.json
    given_settings = {name: wanted[name] for name in ("layers", "positions", "scale") if name in wanted}
    layers = given_settings.get("layers")
    with stage("steering", len(layers) if layers else loaded.num_layers, "layer", quiet=silent) as advance:
        result = library.explain(
            categories=categories,
            directions=directions,
            transfer=arguments.transfer,
            progress=advance,
            **given_settings,
        )
    if arguments.json:
        print(json.dumps(result, indent=1, ensure_ascii=not prints_everything()))
    else:
        print_vocabulary(result, library.pairs.sides[0])
        if source := result["transferred_from"]:
            text = f"The direction was measured on {source['model']} and is tried on {loaded.name}."
            print(textwrap.fill(text, 80))
    if directions is None and categories is None and not given_settings:
        origin = places.Origin.of_model(loaded.facts(), library.pairs_file, library.pairs, result["site"])
        results = places.results_folder(TRANSCRIPTS_DIR, origin)
        with places.written_together(results) as folder:
            write_json(folder / "data" / VOCABULARY, origin.stamp(result))
        if not silent:
            print(places.told("Tokens", results / "data" / VOCABULARY))


def print_vocabulary(result: dict, first: str) -> None:
    """80 columns."""
    from rich.cells import cell_len

    def line(name: str, records: list[dict], what: str, end: str = "") -> str:
        start, text = f"          {name:<9}", ""
        for record in records:
            number = f" {record[what]:+.1f}" if what == "steered" else ""
            piece = f"  {record['token']!r}{number}"
            if cell_len(start + text + piece + end) > 80:
                break
            text += piece
        return start + text + end

    print("\nTokens that the direction promotes and demotes (through norm and unembedding)")
    for record in result["layers"]:
        agreement = "" if record["agreement"] is None else f"  (agreement {record['agreement']:.2f})"
        promoted = line("promotes", record["promoted"], "lens")
        print(f"layer {record['layer']:<3}" + promoted[9:])
        print(line("demotes", record["demoted"], "lens"))
        print(line("steered", record["steered"], "steered", agreement))
        for drawn in record["random"][:1]:
            print(line("random", drawn["promoted"], "lens"))
    text = (
        f"steered: change of the next word's logit where the direction is added {result['scale']:g} times at the end "
        f"of {result['prompts']} {first} prompts; agreement: its correlation with the first two lines over all "
        "tokens. Where that is low, later blocks turn the direction into other words, and this line is what it says. "
        "random: promoted by a random direction."
    )
    print(textwrap.fill(text, 80))


class Printer:
    """Prints answers as they are written."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.started = arguments, False

    def start(self, which: str, setting, chosen_by: str) -> None:
        if self.arguments.json:
            return
        if not self.arguments.quiet and not self.started:
            print(f"Setting: {setting.describe()}")
            if self.arguments.verbose:
                print(f"Mode chosen by {chosen_by}; {setting.options}")
        if not self.arguments.quiet or self.arguments.compare:
            print(f"{chr(10) if self.started or not self.arguments.quiet else ''}{which.capitalize()}:")
        self.started = True

    def text(self, piece: str) -> None:
        if not self.arguments.json:
            print(piece, end="", flush=True)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for what argparse cannot see."""
    if arguments.transfer and not arguments.directions:
        raise UserError("--transfer is about directions of another model: name their file with --directions.")
    if arguments.prompt_column is not None and arguments.prompts is None:
        raise UserError("--prompt-column belongs to --prompts FILE.")
    if arguments.prompts is not None:
        if arguments.prompt is not None or arguments.all_pairs or arguments.explain:
            raise UserError("--prompts FILE names what is answered; omit the prompt, --all-pairs and --explain.")
        if arguments.show_projection:
            raise UserError("--show-projection is about a single prompt; omit it, or --prompts.")
        check_directions(arguments)
        return
    if arguments.explain:
        if arguments.prompt is not None or arguments.all_pairs or arguments.export_gguf:
            raise UserError("--explain is about the direction alone; omit the prompt, --all-pairs and --export-gguf.")
        if arguments.site not in (None, "residual"):
            raise UserError("--explain reads directions of the residual stream; omit --site.")
        taken = ("layers", "positions", "scale", "site")
        ignored = [name for name in given(Setting, arguments, omit=["mode"]) if name not in taken]
        ignored += given(Answering, arguments)
        ignored += [name for name in ("mode", "score", "wish") if getattr(arguments, name) not in (None, "auto")]
        if ignored:
            raise UserError(f"--explain does not use --{ignored[0].replace('_', '-')}; omit it.")
        check_directions(arguments)
        return
    if arguments.all_pairs:
        # What it ignores, with the value that says it was not given.
        unused = {
            "prompt": None, "categories": None, "directions": None, "export_gguf": None, "show_projection": False,
            "compare": True, "ignore_end_tokens": None, "temperature": None, "repetition_penalty": None,
            "seed": None,
        }  # fmt: skip
        names = {"prompt": "the prompt", "compare": "--no-compare"}
        ignored = [name for name, default in unused.items() if getattr(arguments, name) != default]
        if ignored:
            name = names.get(ignored[0], f"--{ignored[0].replace('_', '-')}")
            raise UserError(f"--all-pairs answers the prompt pairs greedily, before and after; omit {name}.")
    elif arguments.prompt is None and not arguments.export_gguf:
        raise UserError(
            'Give a prompt, for example: python suppress.py "How do I pick a lock?", or a file of them with --prompts.'
        )
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("The prompt is empty; give it some text.")
    check_directions(arguments)


def check_directions(arguments: argparse.Namespace) -> None:
    if arguments.directions and (arguments.site or arguments.positions or arguments.categories):
        raise UserError("--directions brings its own site, positions and categories; omit those options.")


def named_categories(text: str | None) -> list[str] | None:
    """ "a, b" -> ["a", "b"]; None: all of them."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError("--categories names none; write A,B, or omit it for all.")
    return names


def as_json(result: SuppressionResult) -> dict:
    record = {**asdict(result), "prompt": written(result.prompt), "setting": result.setting.record()}
    del record["directions"]  # arrays, kept in a file of their own
    return record


def prints_everything() -> bool:
    """Can standard output take every character? (In JSON the others have an escape of their own.)"""
    return (getattr(sys.stdout, "encoding", None) or "").lower().startswith("utf")


def show_projection(loaded: LoadedModel, result: SuppressionResult) -> None:
    """Each token of both answers on its score: blue like natural, red like artifact prompts; numbers when piped."""
    from rich.console import Console
    from rich.text import Text

    from alignment_artifacts.behaviour.monitor import score_tokens
    from alignment_artifacts.edits.setting import NOTHING, intervene

    setting, directions = result.setting, result.directions
    console = Console(highlight=False)
    prompt = result.prompt_tokens
    answers = (("before", result.before_tokens, NOTHING),
               ("after", result.after_tokens, intervene(loaded, directions, setting)))  # fmt: skip
    for name, answer, used in answers:
        if answer is None:
            continue
        edits = used.in_one_pass(loaded, [prompt + answer], [len(prompt)])
        scores = score_tokens(loaded, directions, setting.layers, prompt + answer, edits)
        line = Text(f"\n{name.capitalize()}, prompt and answer by projection: ")
        for token, score in zip(prompt + answer, scores, strict=True):
            piece = loaded.tokenizer.decode([token]).replace("\n", " ")
            if console.is_terminal:
                strength = int(min(1.0, abs(score)) * 155)
                red, blue = (strength, 0) if score > 0 else (0, strength)
                line.append(piece, style=f"white on rgb({40 + red},40,{40 + blue})")
            else:
                line.append(f"{piece}({score:+.1f}) ")
        console.print(line, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
