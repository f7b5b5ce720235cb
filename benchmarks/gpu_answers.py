"""Answers questions about pictures with one engine, in a process of its own: `gpu_engines.py` compares the answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qavp_export import QavpModel


def main(task: Mapping[str, Any]) -> None:
    """Prints `answers`, one for each of the task's pairs of `image` and `question`."""
    model = QavpModel.from_bundle(task["bundle"], engine=task["engine"])
    answers = [
        model.generate(Path(item["image"]), item["question"], max_new_tokens=task["tokens"]) for item in task["items"]
    ]
    print(json.dumps({"answers": answers}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
