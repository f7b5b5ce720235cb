"""easy-VQA (Zhou, 2019): 64 x 64 pictures of one shape, in a package of the same name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from qavp_export.errors import InputError, UnavailableError
from qavp_export.evaluate.datasets.base import DataSet, Item, Request, finish

_SHAPES = ("circle", "rectangle", "triangle")
_NEGATIONS = frozenset(("no", "not"))
_SPLITS = ("test", "train")


def load(request: Request) -> DataSet:
    """Reads the package's questions; types: color, shape, yesno, and negated for yes or no to "not".

    Args:
        request: In the place of a path the split: `test` (the default) or `train`.

    Raises:
        InputError: There is no such split.
        UnavailableError: The package is not installed.
    """
    split = "test" if request.path is None else str(request.path)
    if split not in _SPLITS:
        raise InputError(f"easy-vqa has no split {split[:40]!r}; choose from {', '.join(_SPLITS)}")
    try:
        package: Any = importlib.import_module("easy_vqa")
    except ImportError as error:
        raise UnavailableError("data set easy-vqa is a package that is not installed: pip install easy-vqa") from error
    pictures = {number: Path(path) for number, path in getattr(package, f"get_{split}_image_paths")().items()}
    questions = getattr(package, f"get_{split}_questions")()
    items = [
        Item(str(index), pictures[number], question, (answer,), _kind(question, answer))
        for index, (question, answer, number) in enumerate(zip(*questions, strict=True))
    ]
    return finish("easy-vqa" if split == "test" else f"easy-vqa:{split}", items, "exact", request)


def _kind(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "negated" if _NEGATIONS.intersection(question.split()) else "yesno"
    return "shape" if answer in _SHAPES else "color"
