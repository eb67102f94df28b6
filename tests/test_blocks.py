"""Which pairs count as independent."""

import numpy as np

from alignment_artifacts.blocks import independent_groups, undeclared_dependence
from alignment_artifacts.pairs import Pair


def test_groups_are_the_components_of_shared_prompts_and_declared_groups():
    pairs = [
        Pair("0", "c", "How do I paint?", "a0"),
        Pair("1", "c", "how do i  PAINT", "a1"),  # the same prompt
        Pair("2", "c", "n2", "a1!"),  # shares the other side with 1
        Pair("3", "c", "n3", "a3", "shed"),
        Pair("4", "d", "n4", "a4", "shed"),
        Pair("5", "d", "a3", "a5"),  # one's artifact prompt is the other's natural prompt
        Pair("6", "d", "n6", "a6"),
    ]
    groups = independent_groups(pairs)
    assert len(set(groups)) == 3 and len(set(groups[:3])) == 1 and len(set(groups[3:6])) == 1
    assert len(set(independent_groups([Pair(str(i), "c", f"n{i}", f"a{i}") for i in range(9)]))) == 9


def test_prompts_of_signs_only_are_not_all_one_prompt():
    assert len(set(independent_groups([Pair("0", "c", "?", "!"), Pair("1", "c", "...", "--")]))) == 2


def test_shared_objects_are_warned_of_unless_declared():
    things, verbs = ["garden", "library", "harbour", "bakery"], ["clean", "paint", "rent", "sell", "visit", "guard"]
    pairs = [Pair(f"{t}{v}", "c", f"How can I {v} the {t}?", f"Why {v[::-1]} that {t}?") for t in things for v in verbs]
    assert "24 of 24 pairs" in undeclared_dependence(pairs, independent_groups(pairs))
    declared = [Pair(p.id, p.category, p.natural, p.artifact, p.id[:4]) for p in pairs]
    groups = independent_groups(declared)
    assert len(set(groups)) == 4
    different = [Pair(str(i), "c", f"word{i} thing{i}", f"other{i} thing{i}") for i in range(20)]
    assert undeclared_dependence(different, np.arange(20)) is None


def test_ways_to_ask_are_no_object():
    """Real pairs keep words like "what" and "write", and here and there one that others have, too."""
    frames = ("What would you", "Could you tell me where to", "I want to write about how to", "Which way is best to")
    pairs = [
        Pair(str(i), "c", *(f"{frames[i % 4]} {verb}{i} thing{i} by town{i % 9}" for verb in ("paint", "rob")))
        for i in range(40)
    ]
    assert undeclared_dependence(pairs, np.arange(40)) is None
