"""How VQA answers are normalised before they are compared.

Source: the VQA evaluation (Antol et al., 2015) as the TextVQA challenge's answer processor has it
(facebookresearch/mmf, `EvalAIAnswerProcessor`), quirks included: scores are only comparable if these are kept.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType

_NUMBERS: Mapping[str, str] = MappingProxyType(
    {
        "none": "0",
        "zero": "0",
        "one": "1",
        "two": "2",
        "three": "3",
        "four": "4",
        "five": "5",
        "six": "6",
        "seven": "7",
        "eight": "8",
        "nine": "9",
        "ten": "10",
    }
)
_ARTICLES = frozenset({"a", "an", "the"})
# Of the published list without commas and question marks, which are gone before.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
# The look-behind is meant to be `(?<!\d)`; as published, it keeps a period only before a digit.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")


def normalize(answer: str) -> str:
    """Returns an answer in lower case, without articles and punctuation, numbers as digits, contractions spelled."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    table = _contractions()
    return " ".join(table.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    result = text
    for mark in _PUNCTUATION:
        at_an_edge = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_an_edge else " ")
    return _PERIOD.sub("", result)


@functools.cache
def _contractions() -> Mapping[str, str]:
    text = files("qavp_export.evaluate").joinpath("contractions.json").read_text(encoding="utf-8")
    return MappingProxyType(json.loads(text))
