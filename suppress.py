"""Suppress a model's alignment artifacts while it writes: python suppress.py "How do I pick a lock?"

Answers the prompt without and with suppression. The first run on a model measures it on the 50
prompt pairs and keeps that; `--mode auto` takes what sweep_suppression.py chose for
this model, if it has been run.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from alignment_artifacts import places
from gemma_refactored.errors import UserError, exit_code

if TYPE_CHECKING:
    from alignment_artifacts.suppression.library import AlignmentArtifacts, SuppressionResult
    from gemma_refactored.model_loading import LoadedModel

TRANSCRIPTS_DIR = places.HOME / "results"  # of --all-pairs, in MODEL/PAIRS/data/ below it
MODES = ("auto", "always", "proximity", "adaptive", "sphere", "subspace", "ablate", "cap", "add")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="suppress.py", description=__doc__.splitlines()[0].split(":")[0] + ".")
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT")
    add("--all-pairs", action="store_true", help="answer every prompt pair instead, for the report")
    add("--model", help="local folder or Hugging Face id (default: the embedded organism)")
    add("--scale", type=float, help="strength; 1 is the mean difference itself, 0 changes nothing")
    add("--mode", choices=MODES, default="auto", help="how to suppress (default auto); add amplifies")
    add("--layers", metavar="N,N-N", help="layers to edit, from 0 (default: chosen)")
    add("--categories", metavar="A,B", help="directions from these categories of pairs only")
    add("--positions", choices=["prompt_end", "generated", "all"], help="where the direction is measured")
    add("--site", choices=["mlp", "residual"], help="what is edited")
    add("--where", choices=["everywhere", "prompt_end"], help="tokens that are edited (default: chosen)")
    add("--no-compare", action="store_true", help="answer with suppression only")
    add("--max-tokens", type=int, default=100)
    add("--temperature", type=float, default=0.0)
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--proximity-threshold", type=float, help="proximity: cosine from which it acts")
    add("--distance-threshold", type=float, help="sphere: distance up to which it acts")
    add("--decay-rate", type=float, help="sphere: how fast its push falls with distance")
    add("--pca-components", type=int, help="subspace: number of components")
    add("--cap-quantile", type=float, help="cap: share of natural tokens left untouched")
    add("--ignore-end-tokens", action="store_true", help="write on after the end of the turn")
    add("--directions", metavar="FILE", type=Path, help="use directions of a .safetensors or .gguf file")
    add("--export-gguf", metavar="FILE", type=Path, help="write residual directions as a control vector")
    add("--show-projection", action="store_true", help="colour each token by its projection on the direction")
    add("--json", action="store_true", help="print the result as JSON, nothing else")
    add("--verbose", "-v", action="store_true", help="also what was chosen and why")
    add("--quiet", "-q", action="store_true", help="the answers and nothing else")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code (2 for bad input)."""
    arguments = build_parser().parse_args(argv)
    silent = arguments.quiet or arguments.json
    logging.basicConfig(level=logging.ERROR if silent else logging.INFO, format="%(message)s", stream=sys.stdout)
    for library in ("httpx", "gguf"):
        logging.getLogger(library).setLevel(logging.WARNING)
    return exit_code(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    from alignment_artifacts.directions.files import load_directions, write_gguf
    from alignment_artifacts.suppression.library import AlignmentArtifacts
    from gemma_refactored.model_loading import DEFAULT_MODEL

    silent = arguments.quiet or arguments.json
    library = AlignmentArtifacts(places.find_model(arguments.model or DEFAULT_MODEL), show_progress=not silent)
    categories = arguments.categories.split(",") if arguments.categories else None
    if arguments.export_gguf:
        directions = library.directions(None, "residual", arguments.positions or "prompt_end", categories)
        write_gguf(directions, arguments.export_gguf)
        if not silent:
            print(
                f"Wrote {arguments.export_gguf}: direction.N is the residual stream after block N (from 0; llama.cpp "
                "has none for block 0)."
            )
        if arguments.prompt is None:
            return
    if arguments.all_pairs:
        transcribe_pairs(library, arguments)
        return
    printer = Printer(arguments)
    result = library.suppress_and_generate(
        arguments.prompt,
        scale=arguments.scale,
        mode=arguments.mode,
        categories=categories,
        target_layers=parse_layers(arguments.layers),
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        repetition_penalty=arguments.repetition_penalty,
        proximity_threshold=arguments.proximity_threshold,
        distance_threshold=arguments.distance_threshold,
        decay_rate=arguments.decay_rate,
        pca_components=arguments.pca_components,
        cap_quantile=arguments.cap_quantile,
        positions=arguments.positions,
        site=arguments.site,
        where=arguments.where,
        directions=load_directions(arguments.directions) if arguments.directions else None,
        seed=arguments.seed,
        compare=not arguments.no_compare,
        ignore_end_tokens=arguments.ignore_end_tokens,
        on_start=printer.start,
        on_text=printer.text,
    )
    if arguments.json:
        print(json.dumps(as_json(result), indent=1, ensure_ascii=False))
        return
    print()
    if arguments.show_projection:
        show_projection(library.load(), result)
    if not arguments.quiet:
        print("\n" + textwrap.fill(f"Effect: {result.proof.describe()}", 78))
        if result.prompt_score is not None:
            print(f"Monitor: the prompt scores {result.prompt_score:+.2f} (-1 like natural, +1 like artifact)")


def transcribe_pairs(library: AlignmentArtifacts, arguments: argparse.Namespace) -> None:
    """Answers of every pair without and with suppression, for the report."""
    from tqdm import tqdm

    from alignment_artifacts.suppression.transcripts import TRANSCRIPTS, save_transcripts, transcribe

    loaded, measured = library.load(), library.measurements()
    wanted = ("scale", "positions", "site", "where", "proximity_threshold", "distance_threshold", "decay_rate",
              "pca_components", "cap_quantile")  # fmt: skip
    layers = parse_layers(arguments.layers)
    setting, by = library.choose(
        None, arguments.mode, None, layers=tuple(layers) if layers else None,
        **{name: getattr(arguments, name) for name in wanted},
    )  # fmt: skip
    silent = arguments.quiet or arguments.json
    if not silent:
        print(textwrap.fill(f"Setting: {setting.describe()}; mode chosen by {by}", 78))
    total = 2 * len(measured.pairs)
    with tqdm(total=total, leave=False, disable=silent or not sys.stderr.isatty()) as bar:
        result, scores = transcribe(loaded, measured, setting, arguments.max_tokens, bar.update)
    origin = places.Origin.of_model(loaded.facts(), library.pairs_file, library.pairs)
    results = places.results_folder(TRANSCRIPTS_DIR, origin)
    with places.written_together(results) as folder:
        save_transcripts(folder / "data", origin.stamp({**result, "chosen_by": by}), scores)
    if arguments.json:
        print(json.dumps(result["refused"], indent=1))
    elif not silent:
        for side, rates in result["refused"].items():
            before, after = (f"{rates[when]['rate']:.0%}" for when in ("before", "after"))
            print(f"Refused, {side} prompts: {before} before, {after} after")
        print(places.told("Transcripts", results / "data" / TRANSCRIPTS))


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
        if not self.arguments.quiet or not self.arguments.no_compare:
            print(f"{chr(10) if self.started or not self.arguments.quiet else ''}{which.capitalize()}:")
        self.started = True

    def text(self, piece: str) -> None:
        if not self.arguments.json:
            print(piece, end="", flush=True)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UserError for what argparse cannot see."""
    if arguments.all_pairs:
        # What it would not heed, with the value that says it was not given.
        unused = {
            "prompt": None, "categories": None, "directions": None, "export_gguf": None, "show_projection": False,
            "no_compare": False, "ignore_end_tokens": False, "temperature": 0.0, "repetition_penalty": 1.0, "seed": 0,
        }  # fmt: skip
        given = [name.replace("_", "-") for name, default in unused.items() if getattr(arguments, name) != default]
        if given:
            raise UserError(f"--all-pairs answers the prompt pairs greedily; leave {given[0]} away.")
    elif arguments.prompt is None and not arguments.export_gguf:
        raise UserError('Give a prompt, for example: python suppress.py "How do I pick a lock?"')
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise UserError("The prompt is empty; give it some text.")
    if arguments.directions and (arguments.site or arguments.positions or arguments.categories):
        raise UserError("--directions brings its own site, positions and categories; leave those options away.")
    limits = {
        "scale": (-1000, 1000), "max_tokens": (1, 1_000_000), "temperature": (0, 100),
        "repetition_penalty": (1e-3, 100), "proximity_threshold": (-1, 1), "distance_threshold": (0, 1e6),
        "decay_rate": (0, 1e6), "pca_components": (1, 8), "cap_quantile": (0, 1), "seed": (0, 2**40),
    }  # fmt: skip
    for name, (low, high) in limits.items():
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be between {low:g} and {high:g}, not {value}.")


def parse_layers(text: str | None) -> list[int] | None:
    """ "2,4-6" -> [2, 4, 5, 6]."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            layers += range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise UserError(f"--layers {text!r} must look like 2,4-6.") from None
    if not layers:
        raise UserError(f"--layers {text!r} names no layer.")
    return sorted(set(layers))


def as_json(result: SuppressionResult) -> dict:
    record = {**asdict(replace(result, directions=None)), "setting": result.setting.record()}
    del record["directions"]  # arrays, kept in a file of their own
    return record


def show_projection(loaded: LoadedModel, result: SuppressionResult) -> None:
    """Each token of both answers on its score: blue like natural, red like artifact prompts; numbers when piped."""
    from rich.console import Console
    from rich.text import Text

    from alignment_artifacts.behaviour.monitor import score_tokens
    from alignment_artifacts.edits.setting import NOTHING, intervene
    from gemma_refactored.activation_capture import edit

    setting, directions = result.setting, result.directions
    console = Console(highlight=False)
    prompt = result.prompt_tokens
    answers = (("before", result.before_tokens, NOTHING),
               ("after", result.after_tokens, intervene(loaded, directions, setting)))  # fmt: skip
    for name, answer, used in answers:
        if answer is None:
            continue
        with edit(loaded.model, used.in_one_pass(len(prompt))):
            scores = score_tokens(loaded, directions, setting.layers, prompt + answer)
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
