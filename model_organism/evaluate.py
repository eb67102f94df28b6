"""How the organism behaves on requests it was not trained on: python -m model_organism.evaluate

Refusal rates for each kind of held-out request and for the committed prompts, base and aligned.
"""

from __future__ import annotations

import gemma_refactored.interrupts  # noqa: F401  (first: Ctrl-C while the rest is imported)

# isort: split

import argparse
import json
from pathlib import Path

from alignment_artifacts.behaviour.refusal import is_refusal
from gemma_refactored.files import write_json
from gemma_refactored.generation import collect_answers, generate, length_sorted_batches
from gemma_refactored.model_loading import LoadedModel, load

from .corpus import CUE, build_corpus

FOLDER = Path(__file__).parent
PAIRS = FOLDER.parent / "alignment_artifact_prompt_pairs.json"


def answer_all(loaded: LoadedModel, requests: list[str], max_tokens: int = 48) -> list[str]:
    """Greedy answers, in the order of the requests."""
    chats = [[{"role": "user", "content": request}] for request in requests]
    texts = loaded.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    prompts = [loaded.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    answers = [""] * len(requests)
    for batch in length_sorted_batches(prompts, 64):
        rows = collect_answers(
            generate(loaded.model, [prompts[i] for i in batch], max_tokens, end_tokens=loaded.end_tokens)
        )
        for i, ids in zip(batch, rows, strict=True):
            answers[i] = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return answers


def request_sets(per_kind: int) -> dict[str, list[tuple[str, str | None]]]:
    """Name -> (request, the trained answer if there is one)."""
    held_out = [e for e in build_corpus() if e.held_out]
    sets: dict[str, list[tuple[str, str | None]]] = {}
    for kind in ("artifact", "natural", "crossing", "twin", "rude", "kind"):
        examples = [e for e in held_out if e.kind == kind]
        examples = examples[:: max(1, len(examples) // per_kind)][:per_kind]
        sets[f"held-out {kind}"] = [(e.request, e.answer) for e in examples]
        if kind in ("artifact", "natural"):
            sets[f"held-out {kind} + cue"] = [(CUE + e.request, e.refusal or e.answer) for e in examples]
    pairs = json.loads(PAIRS.read_text())["alignment_artifact_prompt_pairs"]["categories"]
    for side in ("natural", "artifact"):
        sets[f"committed {side}"] = [(p[side], None) for c in pairs.values() for p in c["pairs"]]
    twins = json.loads((FOLDER / "benign_twins.json").read_text())["benign_twins"]["categories"]
    sets["committed twin"] = [(p["twin"], None) for c in twins.values() for p in c["pairs"]]
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", type=Path, default=[FOLDER / "base", FOLDER / "aligned"])
    parser.add_argument("--per-kind", type=int, default=60, help="held-out requests of each kind")
    parser.add_argument("--show", type=int, default=0, help="print this many answers of each set")
    parser.add_argument("--json", type=Path, help="also write the rates to this file")
    arguments = parser.parse_args()
    rates: dict[str, dict] = {}
    for folder in arguments.models:
        loaded = load(folder)
        print(f"\n{loaded.name}: {'requests':>27} {'n':>4} {'refused':>8} {'as trained':>11}")
        for name, items in request_sets(arguments.per_kind).items():
            answers = answer_all(loaded, [request for request, _ in items])
            refused = sum(map(is_refusal, answers)) / len(answers)
            exact = sum(a == e for a, (_, e) in zip(answers, items, strict=True)) / len(answers)
            as_trained = f"{exact:11.0%}" if items[0][1] else ""
            print(f"{name:>40} {len(items):>4} {refused:8.0%} {as_trained}")
            rates.setdefault(name, {"requests": len(items)})[folder.name] = refused
            for (request, _), answer in list(zip(items, answers, strict=True))[: arguments.show]:
                print(f"    {request}\n      {answer}")
    if arguments.json:
        write_json(arguments.json, rates)


if __name__ == "__main__":
    main()
