"""The overview of a bundle's graphs as text and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from qavp_export import plots
from qavp_export.inspect.graph import Block, Kind, Overview

_STYLES: Mapping[Kind, str] = MappingProxyType(
    {"plain": "default", "prune": "yellow", "quantized": "green", "rotation": "magenta"}
)
# Edge and ground of a box.
_COLORS: Mapping[Kind, tuple[str, str]] = MappingProxyType(
    {
        "plain": (plots.GREY, "#F5F5F5"),
        "prune": (plots.ORANGE, "#FDF1D9"),
        "quantized": (plots.GREEN, "#DDF3EB"),
        "rotation": (plots.PURPLE, "#F8E9F1"),
    }
)
_MEANING: Mapping[Kind, str] = MappingProxyType(
    {"plain": "floating point", "prune": "token pruning", "quantized": "quantized", "rotation": "rotation"}
)
# Inches.
_COLUMN, _GAP, _MARGIN, _LINE, _PAD, _BETWEEN, _INDENT = 3.7, 0.3, 0.15, 0.155, 0.07, 0.17, 0.12
_CHARACTERS = 56


def graph_tree(part: Overview) -> Tree:
    """Returns one component as a tree for the terminal."""
    tree = Tree(f"[bold]{escape(part.name)}[/bold]  {part.nodes} nodes")
    tree.add(f"[dim]in   {escape(', '.join(part.inputs))}[/dim]")
    for block in part.blocks:
        branch = tree.add(_tree_line(block))
        for inner in block.inner:
            branch.add(_tree_line(inner))
    tree.add(f"[dim]out  {escape(', '.join(part.outputs))}[/dim]")
    return tree


def draw_graph(parts: Sequence[Overview], title: str) -> Any:
    """Returns a figure: each component a column of boxes from its inputs to its outputs.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    columns = [list(_column(part)) for part in parts]
    head = 0.75
    height = head + max(_height(boxes) for boxes in columns) + _MARGIN
    width = 2 * _MARGIN + len(parts) * _COLUMN + (len(parts) - 1) * _GAP
    figure = plots.new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    style = {"va": "top", "color": plots.BLACK, "parse_math": False}
    axes.text(_MARGIN, 0.1, title, fontsize=12, fontweight="bold", **style)
    _draw_legend(axes, 0.42)
    for index, boxes in enumerate(columns):
        _draw_column(axes, boxes, _MARGIN + index * (_COLUMN + _GAP), head)
    return figure


@dataclass(frozen=True)
class _Box:
    """A box or, without a kind, lines of text.

    Attributes:
        title: Its first line.
        lines: Its other lines.
        kind: How it is drawn.
        inner: Boxes inside.
    """

    title: str
    lines: tuple[str, ...]
    kind: Kind | None
    inner: tuple[_Box, ...] = ()

    @property
    def height(self) -> float:
        own = 2 * _PAD + _LINE * (1 + len(self.lines))
        return own + sum(box.height + _PAD for box in self.inner)


def _column(part: Overview) -> Iterator[_Box]:
    yield _Box(f"{part.name}  ({part.nodes} nodes)", _lines(part.inputs), None)
    for block in part.blocks:
        inner = tuple(_Box(child.name, _lines(child.details), child.kind) for child in block.inner)
        yield _Box(_name(block), _lines(block.details), block.kind, inner)
    yield _Box("outputs", _lines(part.outputs), None)


def _height(boxes: Sequence[_Box]) -> float:
    return sum(box.height + _BETWEEN for box in boxes) - _BETWEEN


def _draw_column(axes: Any, boxes: Sequence[_Box], left: float, top: float) -> None:
    for index, box in enumerate(boxes):
        if index:
            axes.annotate(
                "",
                xy=(left + _COLUMN / 2, top),
                xytext=(left + _COLUMN / 2, top - _BETWEEN),
                arrowprops={"arrowstyle": "->", "color": plots.GREY, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0},
            )
        _draw_box(axes, box, left, top, _COLUMN)
        top += box.height + _BETWEEN


def _draw_box(axes: Any, box: _Box, left: float, top: float, width: float) -> None:
    patch = plots.require_matplotlib("patches").FancyBboxPatch
    if box.kind is not None:
        edge, ground = _COLORS[box.kind]
        style = "round,pad=0,rounding_size=0.05"
        axes.add_patch(
            patch((left, top), width, box.height, boxstyle=style, edgecolor=edge, facecolor=ground, linewidth=1)
        )
    y = top + _PAD
    axes.text(left + _PAD, y, box.title, va="top", fontsize=8, fontweight="bold", color=plots.BLACK)
    for line in box.lines:
        y += _LINE
        axes.text(left + _PAD, y, line, va="top", fontsize=7, color=plots.BLACK)
    y += _LINE + _PAD
    for inner in box.inner:
        _draw_box(axes, inner, left + _INDENT, y, width - 2 * _INDENT)
        y += inner.height + _PAD


def _draw_legend(axes: Any, top: float) -> None:
    patch = plots.require_matplotlib("patches").Rectangle
    left = _MARGIN
    for kind, (edge, ground) in _COLORS.items():
        axes.add_patch(patch((left, top), 0.16, 0.12, edgecolor=edge, facecolor=ground, linewidth=1))
        axes.text(left + 0.22, top + 0.06, _MEANING[kind], va="center", fontsize=7.5, color=plots.BLACK)
        left += 1.25


def _lines(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(line for text in texts for line in textwrap.wrap(text, _CHARACTERS, subsequent_indent="  "))


def _name(block: Block) -> str:
    times = f"  (x{block.count})" if block.count > 1 else ""
    return f"{block.name} {block.repeated}{times}".rstrip()


def _tree_line(block: Block) -> str:
    style = _STYLES[block.kind]
    details = escape("; ".join(block.details))
    return f"[{style}]{escape(_name(block))}[/{style}]  {details}".rstrip()
