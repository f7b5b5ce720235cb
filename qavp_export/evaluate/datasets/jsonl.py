"""Any file of one question a line: `{"image": FILE, "question": TEXT, "answer": TEXT}`.

`answers` may stand for `answer`: a list of texts, any of which is right, or of ten people's answers. `choices` makes it
a multiple choice, whose `answer` is an option's text, its letter, or its number from 0. `type` groups questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qavp_export.errors import InputError
from qavp_export.evaluate.datasets.base import (
    ONLY_KIND,
    DataSet,
    Item,
    Request,
    ask_choice,
    finish,
    letters,
    read_lines,
    text_of,
)
from qavp_export.evaluate.metrics import ANNOTATORS


def load(request: Request) -> DataSet:
    """Reads a file; file names of pictures are relative to it, or to `--images`.

    Raises:
        InputError: The file is missing or malformed.
    """
    path = request.need_path("jsonl", "a .jsonl file")
    root = request.images or path.parent
    items = [_read(record, where, root, number) for number, (where, record) in enumerate(read_lines(path))]
    return finish(path.name, items, _metric(items), request, root)


def _metric(items: Sequence[Item]) -> str:
    """The metric that suits the answers."""
    if items and all(item.choices for item in items):
        return "choice"
    if any(item.choices for item in items):
        raise InputError("some questions have choices and others none; split the file")
    return "vqa" if any(len(item.answers) >= ANNOTATORS for item in items) else "exact"


def _read(record: Mapping[str, Any], where: str, root: Path, number: int) -> Item:
    image = None if record.get("image") is None else root / text_of(record, "image", where)
    question = text_of(record, "question", where)
    kind = text_of(record, "type", where) if "type" in record else ONLY_KIND
    name = str(record.get("id", number))
    if "choices" not in record:
        return Item(name, image, question, _answers(record, where), kind)
    choices = record["choices"]
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise InputError(f"{where}: choices must be a list of texts, at least one")
    letter = _letter(record.get("answer"), choices, where)
    return Item(name, image, ask_choice(question, choices), (letter,), kind, tuple(choices))


def _answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if ("answer" in record) == ("answers" in record):
        raise InputError(f"{where} must have either answer or answers")
    if "answer" in record:
        return (text_of(record, "answer", where),)
    answers = record["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{where}: answers must be a list of texts, at least one")
    return tuple(answers)


def _letter(answer: object, choices: list[str], where: str) -> str:
    known = letters(choices)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return known[answer]
    if isinstance(answer, str) and answer in choices:
        return known[choices.index(answer)]
    if isinstance(answer, str) and len(answer) == 1 and answer in known:
        return answer
    raise InputError(f"{where}: answer must be one of the choices: its text, its letter, or its number from 0")
