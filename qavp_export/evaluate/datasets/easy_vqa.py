"""easy-VQA (Zhou, 2019): 64 x 64 pictures of one shape, in a package of the same name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from qavp_export.errors import UnavailableError
from qavp_export.evaluate.datasets.base import DataSet, Item, Request, finish

_SHAPES = ("circle", "rectangle", "triangle")
_NEGATIONS = frozenset(("no", "not"))


def load(request: Request) -> DataSet:
    """Reads the package's test questions; types: color, shape, yesno, and negated for yes or no to "not".

    Raises:
        UnavailableError: The package is not installed.
    """
    try:
        package: Any = importlib.import_module("easy_vqa")
    except ImportError as error:
        raise UnavailableError("data set easy-vqa is a package that is not installed: pip install easy-vqa") from error
    pictures = {number: Path(path) for number, path in package.get_test_image_paths().items()}
    items = [
        Item(str(index), pictures[number], question, (answer,), _kind(question, answer))
        for index, (question, answer, number) in enumerate(zip(*package.get_test_questions(), strict=True))
    ]
    return finish("easy-vqa", items, "exact", request)


def _kind(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "negated" if _NEGATIONS.intersection(question.split()) else "yesno"
    return "shape" if answer in _SHAPES else "color"
