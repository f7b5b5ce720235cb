"""How an answer is judged: a number from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from qavp_export.evaluate.datasets.base import Item, letters
from qavp_export.evaluate.vqa_text import normalize

ANNOTATORS = 10
"""So many people answer each question of the VQA data sets."""

# Whoever agrees with three of the others is right.
_AGREEING = 3

Metric: TypeAlias = Callable[[str, Item], float]


def exact_match(answer: str, item: Item) -> float:
    """1 if the answer is one of the item's but for case, spaces and a final period."""
    return float(_plain(answer) in {_plain(right) for right in item.answers})


def vqa_accuracy(answer: str, item: Item) -> float:
    """The VQA soft accuracy (Antol et al., 2015): the mean over annotators of min(1, others who agree / 3).

    With fewer than ten answers they are alternatives: 1 if the normalised answer is one of them.
    """
    given, right = normalize(answer), [normalize(text) for text in item.answers]
    if len(right) < ANNOTATORS:
        return float(given in right)
    matches = right.count(given)
    return sum(min(1.0, (matches - (text == given)) / _AGREEING) for text in right) / len(right)


def multiple_choice(answer: str, item: Item) -> float:
    """1 if the answer names the right option, by its letter or its text."""
    return float(read_choice(answer, item.choices) in item.answers)


def yes_or_no(answer: str, item: Item) -> float:
    """1 if yes or no is right, read as POPE reads answers: no if the first sentence has a no or a not, else yes."""
    words = answer.strip().split(".")[0].replace(",", "").split()
    read = "no" if {"No", "no", "not"} & set(words) else "yes"
    return float(read in item.answers)


def read_choice(answer: str, choices: Sequence[str]) -> str:
    """Returns the letter of the option that an answer names; empty if it names none."""
    text = answer.strip()
    known = letters(choices)
    if len(text) == 1 and text.upper() in known:
        return text.upper()
    # "(B)", "B. a cat", "The answer is B."
    for pattern in (r"\(?([A-Z])(?:[).:,]|$)", r".*\banswer is:? \(?([A-Z])\b"):
        found = re.match(pattern, text, re.DOTALL)
        if found and found[1] in known:
            return found[1]
    plain = [_plain(choice) for choice in choices]
    return known[plain.index(_plain(text))] if _plain(text) in plain else ""


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


METRICS: Mapping[str, Metric] = MappingProxyType(
    {"exact": exact_match, "vqa": vqa_accuracy, "choice": multiple_choice, "yesno": yes_or_no}
)
