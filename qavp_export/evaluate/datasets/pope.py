"""POPE (Li et al., 2023) as published: coco_pope_{random,popular,adversarial}.json, one question a line."""

from __future__ import annotations

from pathlib import Path

from qavp_export.errors import InputError
from qavp_export.evaluate.datasets.base import SHORT_ANSWER, DataSet, Item, Request, finish, read_lines, text_of

_PREFIX = "coco_pope_"
_PATTERN = f"{_PREFIX}*.json*"


def load(request: Request) -> DataSet:
    """Reads one file or all of a folder; types are the files' categories.

    Raises:
        InputError: A file is missing or malformed.
    """
    path = request.need_path("pope", "a POPE file or the folder of several")
    files = sorted(path.glob(_PATTERN)) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path} has no {_PATTERN}; give a POPE file")
    root = request.images or files[0].parent / "val2014"
    items = [item for file in files for item in _read(file, root)]
    return finish("pope", items, "yesno", request, root)


def _read(file: Path, root: Path) -> list[Item]:
    kind = file.stem.removeprefix(_PREFIX)
    items = []
    for where, record in read_lines(file):
        label = text_of(record, "label", where).lower()
        if label not in ("yes", "no"):
            raise InputError(f"{where}: label must be yes or no")
        image, prompt = root / text_of(record, "image", where), text_of(record, "text", where) + SHORT_ANSWER
        items.append(Item(f"{kind}/{text_of(record, 'question_id', where)}", image, prompt, (label,), kind))
    return items
