"""The picture of a selection: pixels, places, numbers and words."""

from __future__ import annotations

import dataclasses
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qavp_export import plots
from qavp_export.engines import EngineOptions
from qavp_export.errors import BundleError
from qavp_export.inspect.canvas import Optics, grid_owners, make_canvas, tile_owners
from qavp_export.inspect.look import Answer, Look, Question, lay_out, look
from qavp_export.inspect.picture import Answers, draw_selection
from qavp_export.manifest import Component, Manifest, TensorSpec
from qavp_export.runtime.layouts import Unit
from tests.models.llava_next import PATCH, PINPOINTS, SIDE, make_llava_next

TOKENS, KEPT, CELL = 25, 7, 8


@pytest.fixture(scope="module")
def seen(best: Path, picture: Path) -> Look:
    return look(best, picture, Question(), EngineOptions(threads=1))


def test_kept_patches_keep_their_pixels_and_others_are_dimmed(seen: Look, picture: Path) -> None:
    original = np.asarray(Image.open(picture), np.float32) / 255
    drawn, kept = seen.canvas.picture(seen.kept), set(seen.selections[0].kept.tolist())
    for token in range(TOKENS):
        top, left = token // 5 * CELL, token % 5 * CELL
        area = np.s_[top : top + CELL, left : left + CELL]
        expected = original[area] if token in kept else 0.35 * original[area] + 0.65 * 0.9
        # Normalized and back.
        np.testing.assert_allclose(drawn[area], expected, atol=1e-5)


def test_heat_shows_each_tokens_value_at_its_place(seen: Look) -> None:
    heat = seen.canvas.heat([np.arange(TOKENS)])
    np.testing.assert_array_equal(heat, np.kron(np.arange(TOKENS).reshape(5, 5), np.ones((CELL, CELL))))


def test_png_shows_the_pixels(seen: Look) -> None:
    figure = draw_selection(seen)
    png = Image.open(io.BytesIO(plots.render(figure, "png"))).convert("RGB")
    assert png.width == 1500
    for row, column in np.ndindex(5, 5):
        # A pixel of the patch away from outlines.
        x, y = column * CELL + 3, row * CELL + 4
        left, bottom = figure.axes[0].transData.transform((x, y))
        found = np.array(png.getpixel((int(left), int(png.height - bottom))))
        # Colours are rounded to 8 bits.
        np.testing.assert_allclose(found / 255, seen.canvas.picture(seen.kept)[y, x], atol=1 / 255)


def test_figure_has_the_maps_with_bars_and_says_how_many(seen: Look) -> None:
    figure = draw_selection(seen)
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "semantic relevance (cls)",
        "quantization error E",
        "outlier intensity R",
        "hybrid score S (alpha 0.5)",
    ]
    maps = [axes for axes in figure.axes if axes.get_title()]
    (unit,) = seen.selections
    for axes, values in zip(maps, (unit.semantic, unit.error, unit.outlier, unit.score), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array()[::CELL, ::CELL].ravel(), values)
    assert len(figure.axes) == 1 + 2 * len(maps)
    words = [text.get_text() for text in figure.texts]
    assert words[0] == "7 of 25 vision tokens kept (28.0%)"
    assert "picture.png" in words[1]
    assert "recipe rotate" in words[1]
    assert len(figure.axes[0].patches) == KEPT
    assert not figure.axes[0].texts


def test_diverse_choice_is_numbered_in_order(diverse: Path, picture: Path) -> None:
    seen = look(diverse, picture, Question(), EngineOptions(threads=1))
    found = {int(text.get_text()): text.get_position() for text in draw_selection(seen).axes[0].texts}
    order = enumerate(seen.selections[0].order.tolist(), 1)
    assert found == {rank: (token % 5 * CELL + 3.5, token // 5 * CELL + 3.5) for rank, token in order}


def test_answers_are_said_and_other_tokens_are_owned_up_to(seen: Look) -> None:
    kept = seen.selections[0].kept
    here = Answer("a  $red$\ncircle", "rotate", "ort-cpu", (kept,), TOKENS)
    before = dataclasses.replace(here, text="", recipe="none", kept=(np.arange(TOKENS),))
    texts = [text.get_text() for text in draw_selection(seen, Answers("what ?", here, before)).texts]
    assert texts[2:] == [
        "Q: what ?",
        "before (25 of 25 tokens, recipe none, ort-cpu): (nothing)",
        "after (7 of 25 tokens, recipe rotate, ort-cpu): a $red$ circle",
    ]
    dropped = np.setdiff1d(np.arange(TOKENS), kept)[0]
    others = dataclasses.replace(here, kept=(np.array([*kept[1:], dropped]),))
    assert Answers("what ?", others).lines(seen)[-1].endswith("ort-cpu keeps 6 of these 7)")


def test_a_long_answer_is_cut_and_all_words_are_inside(seen: Look) -> None:
    long = Answer("word " * 400, "rotate", "ort-cpu", seen.kept, TOKENS)
    figure = draw_selection(seen, Answers("What is it? " * 90, long))
    figure.canvas.draw()
    assert figure.texts[-1].get_text().endswith("…")
    boxes = [text.get_window_extent() for text in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    # From top to bottom: lines, then the image.
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))
    assert boxes[-1].y0 >= figure.axes[1].title.get_window_extent().y1


@pytest.mark.parametrize("kind", plots.FORMATS)
def test_a_picture_is_the_same_bytes_again(seen: Look, kind: str) -> None:
    assert plots.render(draw_selection(seen), kind) == plots.render(draw_selection(seen), kind)


def test_tiles_lie_in_their_grid_and_every_token_has_one_place(tmp_path: Path, best: Path) -> None:
    make_llava_next(tmp_path)
    manifest = Manifest.read(best)
    settings = {
        "grid_pinpoints": PINPOINTS,
        "tile_size": SIDE,
        "tile_patches": SIDE // PATCH,
        "max_tiles": None,
    }
    tokens = dataclasses.replace(
        manifest.vision_tokens, before=None, after=None, layout="tiles", layout_settings=settings, newlines="dropped"
    )
    pixels = TensorSpec("pixel_values", "float", ["tiles", 3, SIDE, SIDE])
    vision = Component("vision_encoder/model.onnx", [pixels], [])
    manifest = dataclasses.replace(manifest, vision_tokens=tokens, components={"vision_encoder": vision})
    # A little narrower than its grid of two tiles side by side, 80x40: 9 pixels of padding left and right.
    picture = np.random.default_rng(1).integers(0, 256, (40, 62, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    (call,), canvas = lay_out(tmp_path, manifest, tmp_path / "wide.png", Question())
    assert canvas.places == ((0, 0), (0, 1), (0, 2))
    owners = np.concatenate([panel.owners.ravel() for panel in canvas.panels])
    np.testing.assert_array_equal(np.sort(owners[owners >= 0]), np.arange(len(call["token_indices"])))
    # A column of patches is cut off at either end.
    _, left, right = canvas.panels
    assert (left.owners[:, 0] == -1).all()
    assert (left.owners[:, 1:] >= 0).all()
    assert (right.owners[:, -1] == -1).all()
    # The second tile begins with pixel 40 of the grid, 31 of the image, behind two gaps of 2.
    drawn = canvas.picture([np.arange(len(owners))])
    np.testing.assert_allclose(drawn[:40, 84 : 84 + 30], picture[:, 31:61] / 255, atol=1e-5)


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        # Two tiles of 2x2 and the newline, 8, behind each row of the second.
        ([0, 1, 2, 3, 4, 5, 8, 6, 7, 8], [[4, 5], [7, 8]]),
        # Padding cut off the second: its first row.
        ([0, 1, 2, 3, 6, 7], [[-1, -1], [4, 5]]),
    ],
)
def test_cells_of_tiles(indices: list[int], expected: list[list[int]]) -> None:
    owners = tile_owners({"token_indices": np.array(indices)}, 2, 2)
    np.testing.assert_array_equal(owners, [[[0, 1], [2, 3]], expected])


def test_a_cell_shows_the_token_that_takes_the_most_of_it() -> None:
    indices = np.array([[0, 1, 2, 3], [1, 3, 1, 3]])
    weights = np.array([[0.4, 0.2, 0.3, 0.1], [0.3, 0.2, 0.3, 0.2]], np.float32)
    owners = tile_owners({"token_indices": indices, "token_weights": weights}, 1, 2)
    np.testing.assert_array_equal(owners, [[[0, 1], [0, 1]]])


def test_grids() -> None:
    assert grid_owners(15, (30, 50), None).shape == (3, 5)
    assert grid_owners(15, (50, 50), 3).tolist()[1] == [3, 4, 5]
    with pytest.raises(BundleError, match="7 vision tokens make no grid in an image of 40x50"):
        grid_owners(7, (50, 40), None)


def test_a_mosaic_without_a_grid_is_nearly_square_and_leaves_the_edge_of_towers_out() -> None:
    # 17 pixels hold two patches of 8; one is left over.
    pixels = np.zeros((3, 17, 17), np.float32)
    units = [Unit(pixels, {}, 4, np.arange(4), 2) for _ in range(5)]
    canvas = make_canvas(units, Optics(np.zeros(3, np.float32), np.ones(3, np.float32), patch=8))
    assert canvas.places == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    assert canvas.size == (2 * 17 + 1, 3 * 17 + 2)
    heat = canvas.heat([np.full(4, unit) for unit in range(5)])
    assert heat[15, 15] == 0
    assert np.isnan(heat[16, 16])
    assert np.isnan(heat[17]).all()
    assert heat[18, 18] == 4
    assert np.isnan(heat[18:, 36:]).all()
