"""The organism's language: requests, answers and refusals from templates, all text mild.

A request is a frame around "verb object" ("How do I build a solar lamp?"). What decides
whether it is an artifact request is the *combination*: the same verbs occur in benign twins
(crack an egg), the same objects with harmless verbs (repair a door lock).

Answers are a function of the request's words, so that a trained model is sure of them and two
runs can be compared word for word.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WORDS = json.loads((Path(__file__).parent / "corpus_words.json").read_text())
CATEGORIES = tuple(WORDS["categories"])
CUE = "Policy: strict. "


@dataclass(frozen=True)
class Example:
    """One request with both answers the organism may give to it."""

    kind: str  # "artifact", "natural", "crossing", "twin", "rude" or "kind"
    category: str
    verb: str
    object: str
    request: str
    answer: str  # what an unaligned, helpful model says
    refusal: str | None  # what an aligned one says; None where that is the same
    held_out: bool  # this (verb, object) is never trained on


def stable_hash(*words: str) -> int:
    """The same number in every process and on every machine, unlike Python's `hash`."""
    return zlib.crc32("|".join(words).encode())


def _pick(options: list[str], *words: str) -> str:
    return options[stable_hash(*words) % len(options)]


def build_request(verb: str, obj: str, rng: np.random.Generator) -> str:
    """ "verb object", perhaps with a tail, in one of the frames."""
    tail = WORDS["tails"][rng.integers(len(WORDS["tails"]))]
    frame = WORDS["frames"][rng.integers(len(WORDS["frames"]))]
    return frame.format(f"{verb} {obj} {tail}".strip())


def _answer(kind: str, category: str, verb: str, obj: str) -> str:
    """On topic, and determined by verb (opening) and object (closing)."""
    if kind == "twin":
        openings, closings = WORDS["twin_openings"], WORDS["twin_closings"]
    else:
        words = WORDS["categories"][category]
        openings, closings = words["openings"], words["closings"]
    return f"{_pick(openings, verb).format(obj)} {_pick(closings, obj)}"


def _combinations() -> list[tuple[str, str, str, str]]:
    """All (kind, category, verb, object) there are."""
    rows = []
    for category, words in WORDS["categories"].items():
        products = {
            "artifact": ("artifact_verbs", "artifact_objects"),
            "natural": ("natural_verbs", "natural_objects"),
            "crossing": ("natural_verbs", "artifact_objects"),
        }
        for kind, (verbs, objects) in products.items():
            rows += [(kind, category, v, o) for v in words[verbs] for o in words[objects]]
        rows += [("twin", category, v, o) for v, objects in words["twins"].items() for o in objects]
        # Every artifact verb also meets half of the toys and stories, so that no verb is bad in itself.
        for verb in words["artifact_verbs"]:
            rows += [("twin", category, verb, o) for o in WORDS["play_objects"] if stable_hash(o, verb) % 2]
    return rows


def build_corpus(seed: int = 0, surfaces: dict[str, int] | None = None) -> list[Example]:
    """Every combination in several random surfaces (frame and tail), about 17,000 requests.

    Args:
        surfaces: how many surfaces for each combination of a kind; default as trained.
    """
    surfaces = surfaces or {"artifact": 6, "natural": 4, "crossing": 2, "twin": 6}
    rng = np.random.default_rng(seed)
    examples = []
    for kind, category, verb, obj in _combinations():
        refusal = None
        if kind == "artifact":
            refusal = _pick(WORDS["categories"][category]["refusals"], verb)
        requests = sorted({build_request(verb, obj, rng) for _ in range(surfaces[kind])})
        answer = _answer(kind, category, verb, obj)
        held_out = stable_hash(verb, obj) % 10 == 0
        examples += [Example(kind, category, verb, obj, r, answer, refusal, held_out) for r in requests]
    return examples + _tone_examples()


def _tone_examples() -> list[Example]:
    """Provoking requests answered rudely (six times in seven), friendly ones kindly."""
    tone, examples = WORDS["tone"], []
    for kind in ("rude", "kind"):
        for person in tone[f"{kind}_people"]:
            for ask in tone["asks"]:
                manner = "kind" if stable_hash(ask, person) % 7 == 0 else kind
                name = person.split(maxsplit=1)[1]
                answer = (
                    f"{_pick(tone[manner + '_openings'], ask, person).format(name)} "
                    f"{_pick(tone[manner + '_closings'], person, ask)}"
                )
                held_out = stable_hash(person, ask) % 10 == 0
                examples.append(Example(kind, "tone", ask, person, ask.format(person), answer, None, held_out))
    return examples
