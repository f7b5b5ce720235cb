"""The demo task: the held-out stream of examples/shapes_vqa, made as it is asked for."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from qavp_export.errors import UnavailableError
from qavp_export.evaluate.datasets.base import DataSet, Item, Request, finish

_FOLDER = Path(__file__).parents[3] / "examples" / "shapes_vqa"
_QUESTIONS = 600


def load(request: Request) -> DataSet:
    """Draws questions, six types in rotation; the seed is that of the stream.

    Raises:
        UnavailableError: qavp-export was installed without its examples.
    """
    stream: Any = _generator().ShapesStream("heldout", request.seed)
    items = [
        Item(
            str(number),
            item.image,
            item.question.text,
            (item.question.answer,),
            item.question.type,
            foreground=item.foreground,
        )
        for number, item in enumerate(stream.items(request.questions or _QUESTIONS))
    ]
    return finish("demo", items, "exact", request)


def _generator() -> Any:
    """Imports the generator, a folder of scripts that import one another by their plain names."""
    if not (_FOLDER / "data.py").is_file():
        raise UnavailableError(
            "the demo task is part of the repository: clone it and install it with pip install -e ., "
            "or choose another --data"
        )
    sys.path.insert(0, str(_FOLDER))
    try:
        module = importlib.import_module("data")
    finally:
        sys.path.remove(str(_FOLDER))
    if Path(str(module.__file__)).parent != _FOLDER:
        raise UnavailableError(f"another module named data, {module.__file__}, is loaded; run qavp-eval by itself")
    return module
