"""What every task gives to training and measurement: pictures, questions, and labels for the vision side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

GRID = 16  # patches along one side of a picture
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
CELLS = len(ROWS) * len(COLUMNS)
BACKGROUND = "background"  # never asked for: the dense loss's word for patches without an object
UNKNOWN = -100  # a label that nobody told; what cross-entropy passes over by default

_THIRD = (np.arange(GRID) * 2 + 1) * 3 // (2 * GRID)  # the third that a patch's centre lies in
# [256]: the cell, 0 to 8 in raster order over a 3 x 3 grid, that each patch's centre lies in.
PATCH_CELL: NDArray[np.int64] = (_THIRD[:, None] * 3 + _THIRD).reshape(-1)


@dataclass(frozen=True)
class Question:
    """A question and its only right answer, both in the tokenizer's words."""

    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class Item:
    """One question about one picture.

    Attributes:
        image: [128, 128, 3], uint8.
        question: type, text and answer.
        foreground: [256], true for patches that show an object.
    """

    image: NDArray[np.uint8]
    question: Question
    foreground: NDArray[np.bool_]


@dataclass(frozen=True)
class Attribute:
    """One thing that a patch's token must name.

    Attributes:
        words: the words to choose from.
        truth: [B, 256], int64, index into `words`; patches with any other number take no part.
        importance: weight in the dense loss.
    """

    words: tuple[str, ...]
    truth: NDArray[np.int64]
    importance: float = 1.0


@dataclass(frozen=True)
class Labels:
    """What B pictures show.

    Attributes:
        color: colour of the object in each patch.
        shape: its shape; every patch has one, `BACKGROUND` where there is no object.
        others: further attributes, where each patch lies among them.
        scene: for each attribute that [CLS] must know, its class in each of n cells, [B, n] int64; `UNKNOWN`
            takes no part.
        foreground: [B, 256], true where a patch shows an object.
    """

    color: Attribute
    shape: Attribute
    others: tuple[Attribute, ...]
    scene: tuple[NDArray[np.int64], ...]
    foreground: NDArray[np.bool_]

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """Everything that tokens must name."""
        return (self.color, self.shape, *self.others)


@dataclass(frozen=True)
class Lesson:
    """One batch: B pictures [B, 128, 128, 3] uint8, the questions about each, and what they show."""

    images: NDArray[np.uint8]
    questions: Sequence[Sequence[Question]]
    labels: Labels


class Stream(Protocol):
    """An endless seeded stream of lessons."""

    def lesson(self, pictures: int, questions: int) -> Lesson:
        """Draw `pictures` pictures and up to `questions` questions about each."""


def places(cell: NDArray[np.int64]) -> tuple[Attribute, Attribute]:
    """Row and column of each patch as attributes; cell [B, 256], 0 to 8."""
    return Attribute(ROWS, cell // len(COLUMNS)), Attribute(COLUMNS, cell % len(COLUMNS))
