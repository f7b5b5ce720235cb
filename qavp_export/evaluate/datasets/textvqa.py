"""TextVQA (Singh et al., 2019) as published: TextVQA_0.5.1_val.json and train_images/ID.jpg."""

from __future__ import annotations

from qavp_export.errors import InputError
from qavp_export.evaluate.datasets.base import SHORT_ANSWER, DataSet, Item, Request, finish, read_json

_FILE = "TextVQA_0.5.1_val.json"


def load(request: Request) -> DataSet:
    """Reads the questions with their ten answers.

    Raises:
        InputError: The file is missing or malformed.
    """
    path = request.need_path("textvqa", _FILE)
    path = path / _FILE if path.is_dir() else path
    root = request.images or path.parent / "train_images"
    data = read_json(path)
    try:
        items = [
            Item(
                str(record["question_id"]),
                root / f"{record['image_id']}.jpg",
                str(record["question"]).capitalize() + SHORT_ANSWER,
                tuple(str(answer) for answer in record["answers"]),
            )
            for record in data["data"]
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not in TextVQA's layout ({error!r}); download it again") from error
    return finish("textvqa", items, "vqa", request, root)
