"""What all pictures share: figures without global state, colours that colour-blind readers tell apart, and files.

matplotlib is imported when a picture is made, not before: production has none.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

from qavp_export.errors import InputError, UnavailableError

# Okabe and Ito (2008), "Color Universal Design": told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, BLACK, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#1A1A1A", "#8C8C8C"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, BLACK)
# For values from low to high: perceptually even, and readable in greyscale.
SEQUENTIAL = "viridis"

FORMATS = ("png", "svg", "pdf")
_DPI = 150


def new_figure(width: float, height: float) -> Any:
    """Returns an empty `matplotlib.figure.Figure` on a white ground.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    return require_matplotlib("figure").Figure(figsize=(width, height), dpi=_DPI, facecolor="white")


def require_matplotlib(module: str) -> Any:
    """Returns a module of matplotlib, for example `patches`.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise UnavailableError(
            'pictures need matplotlib, which is not installed here: pip install "qavp-export[bench]"'
        ) from error


def check_format(path: Path) -> str:
    """Returns the format that a file name asks for: `png`, `svg` or `pdf`.

    Raises:
        InputError: It ends in something else.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise InputError(f"{path} is no picture: its name must end in {', '.join('.' + known for known in FORMATS)}")
    return kind


def render(figure: Any, kind: str) -> bytes:
    """Returns a figure as the bytes of a file: the same figure, the same bytes.

    Args:
        figure: A matplotlib figure.
        kind: `png`, `svg` or `pdf`.
    """
    # SVG identifiers are random unless salted; dates and versions would make files differ.
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    buffer = io.BytesIO()
    with importlib.import_module("matplotlib").rc_context({"svg.hashsalt": "qavp"}):
        figure.savefig(buffer, format=kind, metadata=undated[kind])
    return buffer.getvalue()


def save(figure: Any, path: Path) -> None:
    """Writes a figure in the format that the file name asks for.

    Raises:
        InputError: The name asks for no known format, or the file cannot be written.
    """
    write_bytes(path, render(figure, check_format(path)))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file that the user named.

    Raises:
        InputError: It cannot be written.
    """
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another file") from error
