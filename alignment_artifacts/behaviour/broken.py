"""Has an answer come apart? It loops, or has nothing to do with its prompt.

Topics are compared by the beginnings of words, in scripts without spaces by pairs of characters. That is crude: about a
tenth of good answers share no word with their prompt. An answer counts as off the topic only if it is long enough to
show one, and a poem or a translation never does.
"""

from __future__ import annotations

import re
import unicodedata

from alignment_artifacts.behaviour.refusal import ASKS_TO_WRITE
from alignment_artifacts.stop_words import STOP_WORDS

PREFIX = 4  # leading letters of a word that must agree: "paint" and "painting" are one topic
SHORT = 5  # an answer of fewer content words ("Paris.", "In 1912.") shows no topic
LONGEST_BLOCK, TIMES, LEAST_WORDS, LEAST_SIGNS = 8, 4, 8, 20  # of a loop

# Thai, Lao, Burmese, Khmer, kana, Chinese characters
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[^\W\d_{UNSPACED}]{{2,}}")
RUN = re.compile(rf"[{UNSPACED}]+")
UNIT = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")  # what a loop repeats
RULE = re.compile(r"(?m)^[\s|:+=_*~.#-]+$")  # lines of a table or below a heading
SIGNS = re.compile(rf"(\S{{1,{LONGEST_BLOCK}}}?)\1{{{LEAST_SIGNS - 1},}}")


def topics(text: str) -> set[str]:
    """What a text is about: beginnings of its content words, pairs of characters where words are not separated."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(character for character in plain if not unicodedata.combining(character))
    words = {word[:PREFIX] for word in WORD.findall(plain) if word not in STOP_WORDS}
    runs = RUN.findall(unicodedata.normalize("NFKC", text))
    return words | {run[i : i + 2] for run in runs for i in range(max(len(run) - 1, 1))}


def is_on_topic(prompt: str, answer: str) -> bool:
    """Does the answer take up anything that the prompt is about? True as well where neither shows a topic."""
    asked, answered = topics(prompt), topics(answer)
    is_free = ASKS_TO_WRITE.search(prompt.lower()) is not None
    return not asked or is_free or len(answered) < SHORT or bool(asked & answered)


def has_loop(answer: str) -> bool:
    """True if a block of up to LONGEST_BLOCK words comes TIMES times in a row and fills LEAST_WORDS words or more.

    Also a run of other characters. Numbers ("10000"), lines of a table and refrains of few words are none.
    """
    text = RULE.sub("", answer)
    if SIGNS.search(text):
        return True
    units = [unit.lower() for unit in UNIT.findall(text)]
    return any(
        units[start : start + size] * times == units[start : start + size * times]
        for size in range(1, LONGEST_BLOCK + 1)
        for times in (max(TIMES, -(-LEAST_WORDS // size)),)
        for start in range(len(units) - size * times + 1)
    )
