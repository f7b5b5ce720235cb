"""Where vision tokens lie in the picture that the vision tower sees: one image, or a mosaic of its tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qavp_export.engines import FloatArray, IntArray
from qavp_export.errors import BundleError
from qavp_export.runtime.layouts import Unit

Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, width and height, in pixels of the canvas."""

_NONE = -1
# Of a tile's side: the gap between the tiles of a mosaic.
_GAP = 1 / 16
# How much of a dropped patch still shows, and the grey that covers it.
_DIMMED, _COVER = 0.35, 0.9


@dataclass(frozen=True)
class Panel:
    """One picture that the tower sees.

    Attributes:
        picture: Pixels in [0, 1], `[H,W,3]`.
        owners: The token of each cell, of the unit's N; -1 for none, as where a tile shows padding `[rows,columns]`.
        covered: Height and width, pixels, that the cells cover; a tower drops what is left of a patch at the edge.
        unit: Index of the unit that its tokens are selected in.
    """

    picture: FloatArray
    owners: IntArray
    covered: tuple[float, float]
    unit: int

    def cell(self, row: int, column: int) -> Box:
        """Returns where a cell lies in the panel."""
        height, width = self.covered[0] / self.owners.shape[0], self.covered[1] / self.owners.shape[1]
        return column * width, row * height, width, height


@dataclass(frozen=True)
class Canvas:
    """Panels side by side.

    Attributes:
        panels: The panels, all of one size.
        places: Row and column of each in the mosaic.
    """

    panels: tuple[Panel, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        height, width, gap = self._panel_size()
        rows = 1 + max(row for row, _ in self.places)
        columns = 1 + max(column for _, column in self.places)
        return rows * (height + gap) - gap, columns * (width + gap) - gap

    def picture(self, kept: Sequence[IntArray]) -> FloatArray:
        """Returns the canvas with dropped patches dimmed, `[H,W,3]` in [0, 1]; gaps are white.

        Args:
            kept: The tokens that are kept of each unit.
        """
        canvas = np.ones((*self.size, 3), np.float32)
        for panel, (top, left) in self._placed():
            shown = panel.picture * _DIMMED + _COVER * (1 - _DIMMED)
            for row, column in np.argwhere(np.isin(panel.owners, kept[panel.unit])):
                area = _pixels(panel.cell(row, column))
                shown[area] = panel.picture[area]
            canvas[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
        return canvas

    def heat(self, values: Sequence[npt.NDArray[Any]]) -> FloatArray:
        """Returns values of tokens as a map `[H,W]`; NaN where there is no token.

        Args:
            values: One value for each token of each unit `[N]`.
        """
        canvas: FloatArray = np.full(self.size, np.nan, np.float32)
        for panel, (top, left) in self._placed():
            shown: FloatArray = np.full(panel.picture.shape[:2], np.nan, np.float32)
            for row, column in np.argwhere(panel.owners != _NONE):
                shown[_pixels(panel.cell(row, column))] = values[panel.unit][panel.owners[row, column]]
            canvas[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
        return canvas

    def cells(self) -> Iterator[tuple[int, int, Box]]:
        """Yields unit, token and place of each cell that shows a token."""
        for panel, (top, left) in self._placed():
            for row, column in np.argwhere(panel.owners != _NONE):
                x, y, width, height = panel.cell(row, column)
                yield panel.unit, int(panel.owners[row, column]), (left + x, top + y, width, height)

    def _placed(self) -> Iterator[tuple[Panel, tuple[int, int]]]:
        height, width, gap = self._panel_size()
        for panel, (row, column) in zip(self.panels, self.places, strict=True):
            yield panel, (row * (height + gap), column * (width + gap))

    def _panel_size(self) -> tuple[int, int, int]:
        height, width = self.panels[0].picture.shape[:2]
        return height, width, max(1, round(max(height, width) * _GAP))


@dataclass(frozen=True)
class Optics:
    """What is known of the pictures that a vision tower takes.

    Attributes:
        mean: What the image processor subtracts of each channel, `[3]`.
        deviation: What it then divides by, `[3]`.
        patch: Side of a patch, pixels; 1 if not known.
        tile_patches: Patches along the side of a tile, for layout `tiles`.
    """

    mean: FloatArray
    deviation: FloatArray
    patch: int = 1
    tile_patches: int = 0


def make_canvas(units: Sequence[Unit], optics: Optics, grid: tuple[int, int] | None = None) -> Canvas:
    """Lays out what the tower sees of one image.

    Args:
        units: The image's units.
        optics: What is known of the tower's pictures.
        grid: Rows and columns of tiles behind the first one, which shows the whole image; None if not known.

    Raises:
        BundleError: Tokens have no places in the image.
    """
    panels = tuple(panel for index, unit in enumerate(units) for panel in _panels(unit, index, optics))
    return Canvas(panels, tuple(_places(len(panels), grid)))


def _panels(unit: Unit, index: int, optics: Optics) -> Iterator[Panel]:
    pictures = unit.pixel_values if unit.pixel_values.ndim == 4 else unit.pixel_values[np.newaxis]
    height, width = (size // optics.patch * optics.patch or size for size in pictures.shape[-2:])
    if "token_indices" in unit.inputs:
        owners = tile_owners(unit.inputs, len(pictures), optics.tile_patches)
    else:
        owners = grid_owners(len(unit.candidates), (height, width), unit.columns)[np.newaxis]
    for pixels, owner in zip(pictures, owners, strict=True):
        picture = np.clip(pixels.transpose(1, 2, 0) * optics.deviation + optics.mean, 0, 1).astype(np.float32)
        yield Panel(picture, owner, (float(height), float(width)), index)


def grid_owners(count: int, size: tuple[int, int], columns: int | None) -> IntArray:
    """Returns the token of each cell of a full grid, in raster order `[rows,columns]`.

    Args:
        count: Tokens.
        size: Height and width of the picture.
        columns: Columns of the grid if they are known; else they are found from the picture's shape.

    Raises:
        BundleError: They make no grid.
    """
    if columns is None:
        columns = round(math.sqrt(count * size[1] / size[0]))
    if columns < 1 or count % columns:
        raise BundleError(
            f"{count} vision tokens make no grid in an image of {size[1]}x{size[0]} pixels, so there is no picture of "
            "them; use --json for their scores"
        )
    return np.arange(count, dtype=np.int64).reshape(-1, columns)


def tile_owners(inputs: Mapping[str, npt.NDArray[Any]], tiles: int, side: int) -> IntArray:
    """Returns the token of each cell of an image's tiles `[tiles,side,side]`.

    Where a token is interpolated from several cells, a cell shows the token that takes the most of it.

    Args:
        inputs: How tokens are packed of cells, as `pack_tiles` says; a learned newline shows nowhere.
        tiles: How many tiles there are.
        side: Cells along the side of a tile.
    """
    indices = inputs["token_indices"].reshape(len(inputs["token_indices"]), -1)
    weights = inputs.get("token_weights", np.ones(indices.shape, np.float32))
    cells = tiles * side**2
    owners = np.full(cells, _NONE, np.int64)
    best = np.zeros(cells, np.float32)
    for corner in range(indices.shape[1]):
        for token, (cell, weight) in enumerate(zip(indices[:, corner], weights[:, corner], strict=True)):
            if cell < cells and weight > best[cell]:
                owners[cell], best[cell] = token, weight
    return owners.reshape(tiles, side, side)


def _places(count: int, grid: tuple[int, int] | None) -> Iterator[tuple[int, int]]:
    if grid is not None and grid[0] * grid[1] == count - 1:
        yield 0, 0
        yield from ((row, column + 1) for row in range(grid[0]) for column in range(grid[1]))
    else:
        columns = math.ceil(math.sqrt(count))
        yield from ((index // columns, index % columns) for index in range(count))


def _pixels(box: Box) -> tuple[slice, slice]:
    left, top, width, height = box
    return slice(round(top), round(top + height)), slice(round(left), round(left + width))
