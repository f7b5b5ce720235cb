"""How the tokens of an image's tiles become one sequence: layout `tiles`.

Source: `pack_image_features` of transformers' `LlavaNextModel` and `LlavaOnevisionModel`, worked out on indices, so
that the graph only gathers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float32]

# Grids are shrunk where their side exceeds the limit by this factor.
_SHRINK_FROM = 1.1


def count_tiles(image_size: tuple[int, int], settings: Mapping[str, Any]) -> int:
    """Returns how many tiles an image makes, the overview included.

    Args:
        image_size: Height and width of the image before preprocessing, pixels (`image_sizes` of the processor).
        settings: `layout_settings` of the manifest.
    """
    rows, columns = _tile_grid(image_size, settings)
    return rows * columns + 1


def pack_tiles(
    image_size: tuple[int, int], settings: Mapping[str, Any], *, newlines: bool, tiles: int | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Returns how the tokens of one image's tiles are packed: overview, then the grid row by row without its padding.

    Args:
        image_size: Height and width of the image before preprocessing, pixels (`image_sizes` of the processor).
        settings: `layout_settings` of the manifest.
        newlines: Whether each row of the grid ends with the learned newline; without it, only tokens of the image are
            packed, in the same order.
        tiles: How many tiles are encoded; None for all, 1 for the overview alone (images that share a prompt).

    Returns:
        The graph's inputs `token_indices [M]` int64, rows of the flattened tile tokens `[tiles*N]`, where `tiles*N` is
        the newline; where the settings limit the grid, `token_indices [M,4]` and `token_weights [M,4]` f32 instead.
    """
    side = int(settings["tile_patches"])
    overview = np.arange(side * side, dtype=np.int64)
    limit = settings["max_tiles"]
    if tiles == 1:
        newline = [side * side] if newlines else []
        indices = np.concatenate([overview, np.asarray(newline, np.int64)])
        return {"token_indices": indices} if limit is None else _unmixed(indices)
    rows, columns = _tile_grid(image_size, settings)
    grid = _unpadded(_grid_rows(rows, columns, side), image_size)
    last = (rows * columns + 1) * side * side
    if limit is None:
        packed = _with_newlines(grid, last) if newlines else grid
        return {"token_indices": np.concatenate([overview, packed.reshape(-1)])}
    corners, weights = _shrunk(grid, int(limit), side)
    if newlines:
        corners = _with_newlines(corners, last)
        weights = np.concatenate([weights, np.broadcast_to(_alone(1), (weights.shape[0], 1, 4))], axis=1)
    first = _unmixed(overview)
    return {
        "token_indices": np.concatenate([first["token_indices"], corners.reshape(-1, 4)]),
        "token_weights": np.concatenate([first["token_weights"], weights.reshape(-1, 4)]),
    }


def _tile_grid(image_size: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of tiles."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(image_size, settings["grid_pinpoints"])
    size = int(settings["tile_size"])
    return height // size, width // size


def _grid_rows(rows: int, columns: int, side: int) -> _Ints:
    """The flattened index of every token of the grid, `[rows*side, columns*side]`; tile 0 is the overview."""
    tiles = np.arange(rows * columns * side * side, dtype=np.int64) + side * side
    return tiles.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)


def _unpadded(grid: _Ints, image_size: tuple[int, int]) -> _Ints:
    """Cuts off the rows or columns that show padding, as transformers' `unpad_image` does."""
    (height, width), (rows, columns) = image_size, grid.shape
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[padding : rows - padding]
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, padding : columns - padding]


def _with_newlines(grid: _Ints, newline: int) -> _Ints:
    """Appends a column of newlines."""
    # A grid may have rows and no columns: an image as thin as a patch.
    return np.concatenate([grid, np.full((len(grid), 1, *grid.shape[2:]), newline, grid.dtype)], axis=1)


def _unmixed(indices: _Ints) -> dict[str, npt.NDArray[Any]]:
    """Tokens that are taken as they are: all of the weight is on the first of four equal indices."""
    return {
        "token_indices": np.repeat(indices[:, np.newaxis], 4, axis=1),
        "token_weights": np.repeat(_alone(1), len(indices), axis=0),
    }


def _alone(count: int) -> _Floats:
    return np.repeat(np.array([[1, 0, 0, 0]], np.float32), count, axis=0)


def _shrunk(grid: _Ints, limit: int, side: int) -> tuple[_Ints, _Floats]:
    """Bilinear interpolation of a grid that exceeds `limit` tiles: indices and weights, `[rows, columns, 4]`."""
    rows, columns = grid.shape
    ratio = math.sqrt(rows * columns / (limit * side**2))
    if ratio <= _SHRINK_FROM:
        same = np.repeat(grid[..., np.newaxis], 4, axis=2)
        return same, np.broadcast_to(_alone(1)[0], same.shape).astype(np.float32)
    top, bottom, low = _neighbours(rows, int(rows // ratio))
    left, right, near = _neighbours(columns, int(columns // ratio))
    corners = [grid[np.ix_(row, column)] for row in (top, bottom) for column in (left, right)]
    weights = [np.outer(row, column) for row in (1 - low, low) for column in (1 - near, near)]
    return np.stack(corners, axis=-1), np.stack(weights, axis=-1).astype(np.float32)


def _neighbours(size: int, target: int) -> tuple[_Ints, _Ints, _Floats]:
    """For each of `target` places along an axis: both neighbours, and the weight of the second.

    Half-pixel centres, as `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` takes them.
    """
    scale = np.float32(size) / np.float32(target)
    # `target` is the smaller number, so that no centre lies outside the outermost ones of the `size` places.
    centres = scale * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    first = centres.astype(np.int64)
    return first, first + 1, (centres - first).astype(np.float32)
