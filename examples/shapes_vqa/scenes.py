"""Scene descriptions: plain data that both the renderer and the questions read."""

from dataclasses import dataclass
from typing import Literal

from lessons import COLUMNS, ROWS

QuestionType = Literal["color", "shape", "yesno", "position", "count", "digit"]

COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
PLURALS = ("circles", "squares", "triangles", "diamonds", "crosses")
DIGITS = tuple("0123456789")

MIN_SHAPES, MAX_SHAPES = 2, 5
RADIUS = (8.0, 12.0)  # pixels


@dataclass(frozen=True)
class Thing:
    """One coloured shape.

    Attributes:
        color: index into `COLORS`.
        shape: index into `SHAPES`.
        cell: 0 to 8, raster order over the 3 x 3 grid.
        x: centre, pixels from the left.
        y: centre, pixels from the top.
        radius: nominal radius, pixels.
        angle: rotation, radians.
    """

    color: int
    shape: int
    cell: int
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Plate:
    """The digit plate.

    Attributes:
        digit: 0 to 9.
        cell: 0 to 8, raster order over the 3 x 3 grid.
        x: centre, pixels from the left.
        y: centre, pixels from the top.
        dark: light digit on a dark plate instead of dark on light.
    """

    digit: int
    cell: int
    x: float
    y: float
    dark: bool


@dataclass(frozen=True)
class Scene:
    """Two to five shapes and one plate, no two in the same cell."""

    things: tuple[Thing, ...]
    plate: Plate


def cell_words(cell: int) -> str:
    """Name a cell, e.g. `top left` for 0 and `middle center` for 4."""
    row, column = divmod(cell, 3)
    return f"{ROWS[row]} {COLUMNS[column]}"
