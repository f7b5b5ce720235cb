"""ScienceQA (Lu et al., 2022) as published: problems.json, pid_splits.json, and images/SPLIT/ID/image.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qavp_export.errors import InputError
from qavp_export.evaluate.datasets.base import DataSet, Item, Request, ask_choice, finish, letters, read_json

_SPLIT = "test"


def load(request: Request) -> DataSet:
    """Reads the test questions that have a picture; types are subjects.

    Raises:
        InputError: A file is missing or malformed.
    """
    folder = request.need_path("scienceqa", "the folder with problems.json and pid_splits.json")
    problems, splits = read_json(folder / "problems.json"), read_json(folder / "pid_splits.json")
    root = _root(request.images or folder)
    try:
        items = [_item(name, problems[name], root) for name in splits[_SPLIT] if problems[name]["image"]]
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{folder}: problems.json is not in ScienceQA's layout ({error!r}); download it again"
        ) from error
    return finish("scienceqa", items, "choice", request, root)


def _root(folder: Path) -> Path:
    """The archive of pictures unpacks to `test/`, which the repository wants in `images/`."""
    candidates = [folder / "images" / _SPLIT, folder / _SPLIT, folder]
    return next(path for path in candidates if path.is_dir())


def _item(name: str, problem: dict[str, Any], root: Path) -> Item:
    choices = tuple(str(choice) for choice in problem["choices"])
    answer = letters(choices)[int(problem["answer"])]
    hint = f"Context: {problem['hint']}" if problem.get("hint") else ""
    prompt = ask_choice(str(problem["question"]), choices, hint)
    return Item(name, root / name / str(problem["image"]), prompt, (answer,), str(problem["subject"]), choices)
