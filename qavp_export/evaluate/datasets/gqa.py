"""GQA (Hudson and Manning, 2019) as published: a question file by id, and images/ID.jpg."""

from __future__ import annotations

from qavp_export.errors import InputError
from qavp_export.evaluate.datasets.base import ONLY_KIND, SHORT_ANSWER, DataSet, Item, Request, finish, read_json


def load(request: Request) -> DataSet:
    """Reads the questions; types are the structural ones (verify, query, choose, logical, compare).

    Raises:
        InputError: The file is missing or malformed.
    """
    path = request.need_path("gqa", "a question file")
    root = request.images or path.parent / "images"
    data = read_json(path)
    try:
        items = [
            Item(
                str(name),
                root / f"{record['imageId']}.jpg",
                str(record["question"]) + SHORT_ANSWER,
                (str(record["answer"]),),
                str(record.get("types", {}).get("structural", ONLY_KIND)),
            )
            for name, record in data.items()
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not in GQA's layout ({error!r}); download it again") from error
    return finish("gqa", items, "exact", request, root)
