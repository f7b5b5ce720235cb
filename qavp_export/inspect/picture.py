"""The picture of a selection: what is kept of an image, and the scores that it was chosen by."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np

from qavp_export import plots
from qavp_export.engines import FloatArray
from qavp_export.inspect.look import Answer, Look

# Inches: the figure's width, its margins, a line of text, the title above a map, and what a map's colour bar takes.
_WIDTH, _MARGIN, _LINE, _TITLE, _BAR = 10.0, 0.12, 0.23, 0.3, 0.75
_HIGHEST_IMAGE, _LEAST_MAP = 6.5, 0.6
_WRAP = 125
# A number in a cell that is smaller than this cannot be read, points.
_LEAST_CELL = 8.0


@dataclass(frozen=True)
class Answers:
    """What was asked, and what is answered.

    Attributes:
        question: The prompt.
        here: The answer of the bundle that the picture is of.
        before: That of the bundle that it is compared with; None for none.
    """

    question: str
    here: Answer
    before: Answer | None = None

    def lines(self, seen: Look) -> list[str]:
        """Returns what is said of them.

        Args:
            seen: What the canonical graph keeps: an engine of lower precision may keep other tokens.
        """
        lines = [f"Q: {self.question}"]
        if self.before is not None:
            lines.append(_answer_line("before", self.before))
        lines.append(_answer_line("after" if self.before is not None else "A", self.here))
        pairs = list(zip(self.here.kept, seen.kept, strict=True))
        same = sum(len(np.intersect1d(ours, theirs)) for ours, theirs in pairs)
        total = sum(len(theirs) for _, theirs in pairs)
        if same < total:
            lines.append(f"(shown is what the canonical graph keeps; {self.here.engine} keeps {same} of these {total})")
        return lines


def draw_selection(seen: Look, answers: Answers | None = None) -> Any:
    """Returns a figure: the image with dropped patches dimmed and kept ones outlined, beside it four heat maps.

    The maps show semantic relevance, quantization error E, outlier intensity R and hybrid score S, before any scaling.
    For a diverse selection, kept patches carry the order in which they were chosen, from 1.

    Args:
        seen: The image as a bundle sees it.
        answers: What is asked and answered; None for nothing.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    title, facts = _title(seen)
    lines = [facts, *([] if answers is None else _wrapped(answers.lines(seen)))]
    sizes = _Sizes.of(seen.canvas.size)
    head = _MARGIN + _LINE * (1 + len(lines)) + 0.1
    total = head + _TITLE + sizes.body + _MARGIN
    figure = plots.new_figure(_WIDTH, total)
    figure.text(
        _MARGIN / _WIDTH, 1 - _MARGIN / total, title, va="top", fontsize=12, fontweight="bold", color=plots.BLACK
    )
    for line, text in enumerate(lines, 1):
        top = 1 - (_MARGIN + _LINE * line + 0.05) / total
        # Dollar signs are money, not mathematics.
        figure.text(_MARGIN / _WIDTH, top, text, va="top", fontsize=9, color=plots.BLACK, parse_math=False)

    def place(left: float, top: float, size: tuple[float, float]) -> Any:
        """Adds axes; all in inches, `top` from where the image begins."""
        bottom = total - head - _TITLE - top - size[0]
        return figure.add_axes((left / _WIDTH, bottom / total, size[1] / _WIDTH, size[0] / total))

    _draw_image(place(_MARGIN, 0, sizes.image), seen)
    for index, (name, values) in enumerate(_maps(seen).items()):
        left = sizes.first_map + index % 2 * (sizes.map[1] + _BAR)
        top = index // 2 * (sizes.map[0] + _TITLE)
        axes = place(left, top, sizes.map)
        bar = place(left + sizes.map[1] + 0.06, top, (sizes.map[0], 0.1))
        _draw_map(figure, axes, bar, name, seen.canvas.heat(values))
    return figure


@dataclass(frozen=True)
class _Sizes:
    """Heights and widths, inches."""

    image: tuple[float, float]
    map: tuple[float, float]
    first_map: float

    @property
    def body(self) -> float:
        return max(self.image[0], 2 * self.map[0] + _TITLE)

    @classmethod
    def of(cls, canvas: tuple[int, int]) -> _Sizes:
        """Makes two maps and the title between them as high as the image, and all of it as wide as the figure."""
        ratio = canvas[0] / canvas[1]
        # The image's width w solves w + 2 * map + bars = room, where map = (w * ratio - title) / 2 / ratio.
        room = _WIDTH - 2 * _MARGIN - 0.2 - 2 * _BAR
        width = min((room + _TITLE / ratio) / 2, _HIGHEST_IMAGE / ratio)
        height = max((width * ratio - _TITLE) / 2, _LEAST_MAP)
        map_width = min(height / ratio, (room - width) / 2)
        return cls((width * ratio, width), (map_width * ratio, map_width), _MARGIN + width + 0.2)


def _maps(seen: Look) -> dict[str, list[FloatArray]]:
    recipe, units = seen.manifest.recipe, seen.selections
    return {
        f"semantic relevance ({recipe.get('semantic')})": [unit.semantic for unit in units],
        "quantization error E": [unit.error for unit in units],
        "outlier intensity R": [unit.outlier for unit in units],
        f"hybrid score S (alpha {recipe.get('alpha')})": [unit.score for unit in units],
    }


def _title(seen: Look) -> tuple[str, str]:
    recipe, selections = seen.manifest.recipe, seen.selections
    kept = sum(len(unit.kept) for unit in selections)
    tokens = sum(len(unit.score) for unit in selections)
    several = f", in {len(selections)} selections" if len(selections) > 1 else ""
    first = f"{kept} of {tokens} vision tokens kept ({kept / tokens:.1%}{several})"
    rule = {
        "topk": "top-k by hybrid score",
        "dpp": "diverse choice (dpp) by hybrid score, numbered in order",
        "maxmin": "diverse choice (maxmin), numbered in order",
    }.get(str(recipe.get("select")), str(recipe.get("select")))
    return first, (
        f"{seen.image.name} · {rule} · {recipe.get('score_input')} features · "
        f"{seen.manifest.source}, recipe {recipe.get('name')}"
    )


def _wrapped(lines: list[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, _WRAP, max_lines=3, placeholder=" …")]


def _answer_line(label: str, answer: Answer) -> str:
    vision = sum(len(unit) for unit in answer.kept)
    text = " ".join(answer.text.split()) or "(nothing)"
    return f"{label} ({vision} of {answer.tokens} tokens, recipe {answer.recipe}, {answer.engine}): {text}"


def _draw_image(axes: Any, seen: Look) -> None:
    canvas, kept = seen.canvas, seen.kept
    axes.imshow(canvas.picture(kept), interpolation="nearest")
    rectangle = plots.require_matplotlib("patches").Rectangle
    ranks = [{int(token): rank for rank, token in enumerate(unit.order, 1)} for unit in seen.selections]
    points = axes.get_window_extent().width * 72 / axes.figure.dpi / canvas.size[1]
    numbered = seen.manifest.recipe.get("select") != "topk"
    for unit, token, (left, top, width, height) in canvas.cells():
        if token not in ranks[unit]:
            continue
        corner = (left - 0.5, top - 0.5)
        line = min(1.4, max(0.4, points * width / 12))
        axes.add_patch(rectangle(corner, width, height, fill=False, edgecolor=plots.VERMILION, linewidth=line))
        if numbered and points * width >= _LEAST_CELL:
            centre = (left + (width - 1) / 2, top + (height - 1) / 2)
            _draw_number(axes, centre, ranks[unit][token], min(9.0, points * width * 0.45))
    _bare(axes)


def _draw_number(axes: Any, centre: tuple[float, float], number: int, size: float) -> None:
    # A rim keeps numbers readable on any picture.
    rim = plots.require_matplotlib("patheffects").withStroke(linewidth=1.6, foreground="white")
    style = {"ha": "center", "va": "center_baseline", "fontsize": size, "fontweight": "bold", "color": plots.BLACK}
    axes.text(*centre, str(number), path_effects=[rim], **style)


def _draw_map(figure: Any, axes: Any, bar_axes: Any, name: str, values: FloatArray) -> None:
    drawn = axes.imshow(values, cmap=plots.SEQUENTIAL, interpolation="nearest")
    axes.set_title(name, fontsize=9, color=plots.BLACK, pad=4)
    _bare(axes)
    ticks = plots.require_matplotlib("ticker")
    bar = figure.colorbar(drawn, cax=bar_axes, ticks=ticks.MaxNLocator(nbins=5), format=ticks.FuncFormatter(_short))
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)


def _short(value: float, _position: int) -> str:
    return f"{value:.3g}"


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
