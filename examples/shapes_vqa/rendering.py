"""Rendering of scenes to 128 x 128 RGB, vectorised over a batch, and the labels of the 16 x 16 patches."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from lessons import CELLS, GRID, PATCH_CELL
from numpy.typing import NDArray
from scenes import COLORS, SHAPES, Scene

SIZE = 128
PATCH = SIZE // GRID
TILE = 28  # pixels; holds the largest shape, whose reach is 1.1 * 12 on each side
MIN_COVER = 10  # pixels of 64 that an object must cover for its patch to count as foreground
NO_COLOR, NO_DIGIT = len(COLORS), 10
PLATE_SHAPE, NO_SHAPE = len(SHAPES), len(SHAPES) + 1

RGB = np.array(
    [(208, 44, 40), (48, 158, 70), (56, 82, 206), (226, 202, 52), (142, 66, 172), (236, 130, 40)], np.float32
)
COLOR_JITTER = 16.0  # grey levels; the nearest two colours (yellow, orange) stay 40 apart

GLYPHS = (
    ".###. #...# #..## #.#.# ##..# #...# .###.",
    "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    ".###. #...# ....# ...#. ..#.. .#... #####",
    ".###. #...# ....# ..##. ....# #...# .###.",
    "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "##### #.... ####. ....# ....# #...# .###.",
    "..##. .#... #.... ####. #...# #...# .###.",
    "##### ....# ...#. ...#. ..#.. ..#.. ..#..",
    ".###. #...# #...# .###. #...# #...# .###.",
    ".###. #...# #...# .#### ....# ...#. .##..",
)


@dataclass(frozen=True)
class PatchLabels:
    """What each patch shows; B images, 256 patches in raster order.

    Attributes:
        color: [B, 256], index into `COLORS`, `NO_COLOR` for plate and background.
        shape: [B, 256], index into `SHAPES`, `PLATE_SHAPE` or `NO_SHAPE`.
        digit: [B, 256], 0 to 9, `NO_DIGIT` off the plate.
        cell: [B, 256], 0 to 8: the cell of the object shown, or of the patch's centre.
        cell_color: [B, 9], colour of the object in each cell.
        cell_shape: [B, 9], shape of the object in each cell.
        cell_digit: [B, 9], digit in each cell.
    """

    color: NDArray[np.int64]
    shape: NDArray[np.int64]
    digit: NDArray[np.int64]
    cell: NDArray[np.int64]
    cell_color: NDArray[np.int64]
    cell_shape: NDArray[np.int64]
    cell_digit: NDArray[np.int64]

    @property
    def foreground(self) -> NDArray[np.bool_]:
        """[B, 256], true where a patch shows a shape or the plate."""
        return np.not_equal(self.shape, NO_SHAPE)


def _stretch(points: int) -> NDArray[np.float32]:
    """Matrix [SIZE, points] that interpolates `points` samples linearly over the image's width."""
    position = np.linspace(0, points - 1, SIZE)
    weights: NDArray[np.float32] = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(points))).astype("f4")
    return weights


_BITMAPS = np.array([[[c == "#" for c in row] for row in glyph.split()] for glyph in GLYPHS], np.float32)
_PLATE_STAMPS = np.pad(_BITMAPS.repeat(2, 1).repeat(2, 2), ((0, 0), (3, 3), (3, 3)))  # [10, 20, 16]
_WAVES = tuple(_stretch(points) for points in (5, 17, 43))
_WAVE_HEIGHTS = (26.0, 12.0, 9.0)  # grey levels


def _backgrounds(count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Noise textures of three scales plus pixel noise, grey with a slight tint; [count, 128, 128, 3]."""
    level = rng.uniform(80, 190, (count, 1, 1)).astype(np.float32)
    noise = rng.standard_normal((count, SIZE, SIZE), dtype=np.float32)
    grey = noise * rng.uniform(2, 9, (count, 1, 1)).astype(np.float32) + level
    for wave, height in zip(_WAVES, _WAVE_HEIGHTS, strict=True):
        points = wave.shape[1]
        grid = rng.standard_normal((count, points, points), dtype=np.float32)
        grey += wave @ (grid * height) @ wave.T
    tint = rng.uniform(-10, 10, (count, 1, 1, 3)).astype(np.float32)
    result: NDArray[np.float32] = grey[..., None] + tint
    return result


def _distance(
    shape: int, x: NDArray[np.float32], y: NDArray[np.float32], r: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Signed distance to a shape's outline (negative inside, pixels, approximate outside).

    Args:
        shape: index into `SHAPES`.
        x: [n, TILE, TILE], pixels right of the centre, after rotation.
        y: the same, pixels below the centre.
        r: [n, 1, 1], nominal radius.

    Returns:
        [n, TILE, TILE].
    """
    ax, ay = np.abs(x), np.abs(y)
    name = SHAPES[shape]
    outline: NDArray[np.float32]
    if name == "circle":
        outline = np.hypot(x, y) - 0.92 * r
    elif name == "square":
        outline = np.maximum(ax, ay) - 0.8 * r
    elif name == "triangle":
        outline = np.maximum(y, 0.866 * ax - 0.5 * y) - 0.55 * r
    elif name == "diamond":
        outline = 0.82 * ax + 0.57 * ay - 0.61 * r
    else:
        outline = np.minimum(np.maximum(ax - 0.3 * r, ay - r), np.maximum(ax - r, ay - 0.3 * r))
    return outline


def _covers(scenes: Sequence[Scene]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Opacity tiles of all shapes of all scenes, in order.

    Returns:
        Opacity, [n, TILE, TILE], 0 to 1, and the tiles' top left corners (y, x), [n, 2], pixels.
    """
    things = [thing for scene in scenes for thing in scene.things]
    values = np.array([(t.x, t.y, t.radius, t.angle) for t in things], np.float32)
    kinds = np.array([thing.shape for thing in things])
    corner = np.floor(values[:, 1::-1]).astype(np.int64) - TILE // 2
    ramp = np.arange(TILE, dtype=np.float32) + 0.5
    dy = (corner[:, 0, None] + ramp - values[:, 1, None])[:, :, None].astype(np.float32)
    dx = (corner[:, 1, None] + ramp - values[:, 0, None])[:, None, :].astype(np.float32)
    cos, sin = np.cos(values[:, 3])[:, None, None], np.sin(values[:, 3])[:, None, None]
    x, y, r = cos * dx + sin * dy, cos * dy - sin * dx, values[:, 2, None, None]
    cover = np.empty(x.shape, np.float32)
    for shape in range(len(SHAPES)):
        chosen = kinds == shape
        cover[chosen] = np.clip(0.5 - _distance(shape, x[chosen], y[chosen], r[chosen]), 0, 1)
    return cover, corner


def render(scenes: Sequence[Scene], rng: np.random.Generator) -> tuple[NDArray[np.uint8], PatchLabels]:
    """Render scenes.

    Args:
        scenes: B scenes.
        rng: source of texture and colour jitter.

    Returns:
        Images, [B, 128, 128, 3] uint8, and the labels of their patches.
    """
    canvas = _backgrounds(len(scenes), rng)
    owner = np.zeros((len(scenes), SIZE, SIZE), np.uint8)  # 0 is background, k + 1 the scene's k-th object
    covers, corners = _covers(scenes)
    jitter = rng.uniform(-COLOR_JITTER, COLOR_JITTER, (len(covers), 3)).astype(np.float32)
    starts = [0, *np.cumsum([len(scene.things) for scene in scenes]).tolist()]
    for image, (first, last) in enumerate(pairwise(starts)):
        for index in range(first, last):
            top, left = (int(v) for v in corners[index])
            window = (image, slice(max(top, 0), top + TILE), slice(max(left, 0), left + TILE))
            cover = covers[index, max(-top, 0) :, max(-left, 0) :]
            cover = cover[: SIZE - max(top, 0), : SIZE - max(left, 0)]
            color = RGB[scenes[image].things[index - first].color] + jitter[index]
            # A tenth of the texture shows through, so that surfaces are not flat.
            surface = 0.9 * color + 0.1 * canvas[window]
            canvas[window] += cover[..., None] * (surface - canvas[window])
            owner[window][cover > 0.5] = index - first + 1
        _stamp_plate(canvas[image], owner[image], scenes[image])
    return np.clip(canvas, 0, 255).astype(np.uint8), _labels(scenes, owner)


def _stamp_plate(canvas: NDArray[np.float32], owner: NDArray[np.uint8], scene: Scene) -> None:
    """Draw the plate in place; canvas [128, 128, 3], owner [128, 128]."""
    stamp = _PLATE_STAMPS[scene.plate.digit]
    height, width = stamp.shape
    top, left = round(scene.plate.y - height / 2), round(scene.plate.x - width / 2)
    window = (slice(top, top + height), slice(left, left + width))
    ink = 1 - stamp if scene.plate.dark else stamp
    paper = (228 - 190 * ink)[..., None]
    canvas[window] = 0.9 * paper + 0.1 * canvas[window]
    owner[window] = len(scene.things) + 1


def _labels(scenes: Sequence[Scene], owner: NDArray[np.uint8]) -> PatchLabels:
    """Label patches by the object that covers most of them; owner [B, 128, 128]."""
    count = len(scenes)
    slots = max(len(scene.things) for scene in scenes) + 2
    table = np.empty((4, count, slots), np.int64)  # colour, shape, digit, cell of each object
    cells = np.empty((3, count, CELLS), np.int64)
    blank = np.array([NO_COLOR, NO_SHAPE, NO_DIGIT, -1])
    table[:] = blank[:, None, None]
    cells[:] = blank[:3, None, None]
    for image, scene in enumerate(scenes):
        rows = [(t.color, t.shape, NO_DIGIT, t.cell) for t in scene.things]
        rows.append((NO_COLOR, PLATE_SHAPE, scene.plate.digit, scene.plate.cell))
        table[:, image, 1 : len(rows) + 1] = np.array(rows).T
        cells[:, image, table[3, image, 1 : len(rows) + 1]] = table[:3, image, 1 : len(rows) + 1]
    blocks = owner.reshape(count, GRID, PATCH, GRID, PATCH).transpose(0, 1, 3, 2, 4)
    blocks = blocks.reshape(count, GRID**2, PATCH**2)
    area = np.stack([np.count_nonzero(blocks == slot, axis=2) for slot in range(1, slots)], axis=2)
    best = np.where(area.max(2) >= MIN_COVER, area.argmax(2) + 1, 0)
    color, shape, digit, cell = (np.take_along_axis(part, best, 1) for part in table)
    return PatchLabels(color, shape, digit, np.where(cell < 0, PATCH_CELL, cell), cells[0], cells[1], cells[2])
