"""Which pairs are independent of each other, judged by their prompts.

Pairs that share a prompt, or that the pairs file puts into one "group", are one exchangeability block: whatever
divides, swaps or resamples pairs takes the block as one (Winkler et al. 2014, NeuroImage 92:381).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from alignment_artifacts.pairs import SIDES, Pair
from alignment_artifacts.stop_words import STOP_WORDS

LETTERS = 4  # shorter words are rarely what a prompt is about
COMMON = 0.25  # a word in more than this share of the pairs is no object that some of them share
SAME_OBJECT = 0.5  # pairs that have this share of what they keep in common are about one object
ALIKE = 0.6  # prompts with this share of their words in common are of one template
MANY = 0.2  # share of the pairs beyond which a warning is due


def independent_groups(pairs: Sequence[Pair]) -> np.ndarray:
    """[pairs] a number from 0 for each pair: connected components of pairs that share a prompt or a declared group."""
    owners: dict[tuple[str, str], int] = {}
    parent = list(range(len(pairs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, pair in enumerate(pairs):
        names = [("prompt", normalised(getattr(pair, side))) for side in SIDES]
        if pair.block is not None:
            names.append(("group", pair.block))
        for name in names:
            parent[root(i)] = root(owners.setdefault(name, i))
    roots = [root(i) for i in range(len(pairs))]
    return np.unique(roots, return_inverse=True)[1]


def normalised(text: str) -> str:
    """Letters and figures only, in lower case: what else differs makes no other prompt."""
    return " ".join(_words(text)) or text.strip()


def undeclared_dependence(pairs: Sequence[Pair], groups: np.ndarray) -> str | None:
    """A sentence if many pairs of different groups share an object or a template, else None."""
    words = [[set(_words(getattr(pair, side))) for side in SIDES] for pair in pairs]
    # What a pair keeps is its object; what it changes is the contrast.
    kept = [
        {word for word in natural & artifact if len(word) >= LETTERS and word not in STOP_WORDS}
        for natural, artifact in words
    ]
    alike: set[int] = set()
    for texts, share in ((kept, SAME_OBJECT), *((list(texts), ALIKE) for texts in zip(*words, strict=True))):
        rare = {word: members for word, members in _owners(texts).items() if len(members) <= COMMON * len(pairs)}
        for i, text in enumerate(texts):
            for j in set().union(*(rare.get(word, set()) for word in text)):
                if groups[i] != groups[j] and len(text & texts[j]) >= share * len(text | texts[j]):
                    alike |= {i, j}
    if len(alike) <= MANY * len(pairs):
        return None
    return (
        f"{len(alike)} of {len(pairs)} pairs share an object or a template with others, by their words; to the extent "
        "that such pairs are dependent, p is too small and intervals are too narrow. Give them the same group in the "
        "pairs file to have it counted."
    )


def _owners(texts: Sequence[set[str]]) -> dict[str, set[int]]:
    """Word -> which texts have it."""
    owners = defaultdict(set)
    for i, text in enumerate(texts):
        for word in text:
            owners[word].add(i)
    return owners


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
