"""Questions with answers, as every loader yields them, and what loaders share."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qavp_export.errors import InputError
from qavp_export.runtime.images import ImageSource
from qavp_export.safetensors_index import shown

# The published files are below 200 MB; all of one is held in memory.
_MAX_BYTES = 1_000_000_000

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA's evaluation scripts put behind a question with a short answer."""

ONLY_KIND = "all"
"""The type of questions that have none."""

_CHOOSE = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: What the data call it.
        image: Its picture; None without one.
        prompt: What the model is asked.
        answers: What is right: any of them, or ten people's answers. Of a multiple choice, the letter.
        kind: Its type, for figures by type.
        choices: The options of a multiple choice, A first; empty for others.
        foreground: Which of the picture's N vision tokens show an object `[N]`; None: not known.
    """

    id: str
    image: ImageSource | None
    prompt: str
    answers: tuple[str, ...]
    kind: str = ONLY_KIND
    choices: tuple[str, ...] = ()
    foreground: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class DataSet:
    """Questions and how their answers are judged.

    Attributes:
        name: What reports call it.
        items: The questions; at least one.
        metric: A name in `metrics.METRICS`.
    """

    name: str
    items: tuple[Item, ...]
    metric: str


@dataclass(frozen=True)
class Request:
    """What a loader is asked for.

    Attributes:
        path: The file or folder that the user named; None if none was.
        images: The folder of the pictures, where it is not beside the questions.
        questions: Most questions; None: all.
        seed: Seed of the draw.
    """

    path: Path | None
    images: Path | None
    questions: int | None
    seed: int

    def need_path(self, name: str, what: str) -> Path:
        """Returns the path.

        Raises:
            InputError: None was given, or nothing is there.
        """
        if self.path is None:
            raise InputError(f"data set {name} needs {what}: --data {name}:PATH")
        if not self.path.exists():
            raise InputError(f"{self.path} does not exist; {name} needs {what}")
        return self.path


def finish(name: str, items: Sequence[Item], metric: str, request: Request, root: Path | None = None) -> DataSet:
    """Draws as many questions as are asked for, in their order, and checks that their pictures are there.

    Args:
        name: What reports call the data.
        items: All questions; a picture is a path below `root`.
        metric: How answers are judged.
        request: How many are drawn, by which seed.
        root: The folder of the pictures; None: they are in memory.

    Raises:
        InputError: There is no question; a picture is missing or outside the folder.
    """
    if not items:
        raise InputError(f"{name} holds no question that can be asked; check the file")
    drawn = list(items)
    if request.questions is not None and request.questions < len(items):
        rng = np.random.default_rng(request.seed)
        drawn = [items[index] for index in sorted(rng.choice(len(items), request.questions, replace=False))]
    if root is not None:
        inside = root.resolve()
        for item in drawn:
            if isinstance(item.image, Path):
                _check_picture(item.image, inside, item.id)
    return DataSet(name, tuple(drawn), metric)


def _check_picture(path: Path, root: Path, where: str) -> None:
    try:
        resolved = path.resolve()
        inside, exists = resolved.is_relative_to(root), resolved.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL byte, a loop of links
        raise InputError(f"question {shown(where)}: {shown(str(path))} is no usable file name") from error
    if not inside:
        raise InputError(f"question {shown(where)}: {shown(str(path))} leads out of {root}; copy the file into it")
    if not exists:
        raise InputError(f"question {shown(where)}: {shown(str(path))} does not exist; name its folder with --images")


def ask_choice(question: str, choices: Sequence[str], hint: str = "") -> str:
    """Returns the prompt of a multiple choice, as lmms-eval words ScienceQA's for LLaVA."""
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters(choices), choices, strict=True))
    return f"{hint}\n{question}\n{options}{_CHOOSE}".strip()


def letters(choices: Sequence[str]) -> str:
    """Returns the letters of the options.

    Raises:
        InputError: There are more options than letters.
    """
    if len(choices) > len(string.ascii_uppercase):
        raise InputError(f"a question has {len(choices)} choices; at most {len(string.ascii_uppercase)} are possible")
    return string.ascii_uppercase[: len(choices)]


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: It cannot be read, is too large, or is not valid.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than {_MAX_BYTES} bytes; give a part of it")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({' '.join(str(error).split())}); download it again") from error


def read_lines(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Reads a file of one JSON object a line.

    Returns:
        Each object with the line that it comes from, as messages name it.

    Raises:
        InputError: The file cannot be read, is too large, or a line is no JSON object.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{path} is larger than {_MAX_BYTES} bytes; give a part of it")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            records.append((where, _as_object(line, where)))
    return records


def _as_object(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not valid JSON; each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise InputError(f"{where} is not a JSON object; write one a line")
    return record


def text_of(record: Mapping[str, Any], key: str, where: str) -> str:
    """Returns a field that is text; a number counts.

    Raises:
        InputError: The field is missing, empty or no text.
    """
    value = record.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key} must be text; add it")
    return value
