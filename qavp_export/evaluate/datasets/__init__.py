"""Data sets by name: `demo`, `easy-vqa`, and the layouts in which others are published."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

from qavp_export.errors import InputError
from qavp_export.evaluate.datasets.base import DataSet, Item, Request

__all__ = ["DATASETS", "DataSet", "Item", "Request", "load_dataset"]


class _Loader(Protocol):
    def __call__(self, request: Request) -> DataSet: ...


@dataclass(frozen=True)
class Entry:
    """A loader and what its path is.

    Attributes:
        module: Module with a function `load`.
        needs: What the user names; empty for nothing.
    """

    module: str
    needs: str


DATASETS: Mapping[str, Entry] = MappingProxyType(
    {
        "demo": Entry("demo", ""),
        "easy-vqa": Entry("easy_vqa", ""),
        "jsonl": Entry("jsonl", "a .jsonl file of {image, question, answer | answers, choices?, type?}"),
        "scienceqa": Entry("scienceqa", "the folder with problems.json, pid_splits.json and the images"),
        "textvqa": Entry("textvqa", "TextVQA_0.5.1_val.json"),
        "pope": Entry("pope", "a POPE file (coco_pope_random.json) or the folder of several"),
        "gqa": Entry("gqa", "a GQA question file (testdev_balanced_questions.json)"),
    }
)


def load_dataset(spec: str, images: Path | None, questions: int | None, seed: int) -> DataSet:
    """Loads a data set.

    Args:
        spec: `NAME` or `NAME:PATH`.
        images: The folder of the pictures, where it is not the layout's own.
        questions: Most questions, drawn by the seed; None: all.
        seed: Seed of the draw; of the demo, of the stream.

    Raises:
        InputError: The data set does not exist, or its files are not what they should be.
        UnavailableError: It comes in a package that is not installed.
    """
    name, _, path = spec.partition(":")
    if name not in DATASETS:
        raise InputError(f"data set {name[:40]!r} does not exist; choose from {', '.join(DATASETS)}")
    if questions is not None and questions < 1:
        raise InputError(f"--questions is {questions}; give 1 or more")
    if images is not None and not images.is_dir():
        raise InputError(f"--images {images} is not a folder; check the path")
    module = importlib.import_module(f"{__name__}.{DATASETS[name].module}")
    load = cast(_Loader, module.load)
    return load(Request(Path(path) if path else None, images, questions, seed))
