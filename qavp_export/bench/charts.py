"""The charts of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qavp_export.bench.summary import SCORING, STAGES
from qavp_export.plots import BLUE, GREEN, GREY, ORANGE, PALETTE, PURPLE, SKY, VERMILION, new_figure

_WIDTH = 4.4  # inches: text stays readable where a phone shows it
_MARKERS = "osD^vP*X"


@dataclass(frozen=True)
class Theme:
    """Colours beside those of the data."""

    ground: str
    ink: str
    grid: str


LIGHT = Theme("#ffffff", "#1a1a1a", "#d9d9d9")
DARK = Theme("#1b1f24", "#e6e6e6", "#444c56")


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        key: Its name in file names.
        title: What it shows.
        note: How to read it.
        draw: Makes a matplotlib figure in a theme.
    """

    key: str
    title: str
    note: str
    draw: Callable[[Theme], Any]


def charts(summary: Mapping[str, Any]) -> list[Chart]:
    """Returns the charts that the figures are enough for."""
    contestants: Sequence[Mapping[str, Any]] = summary["contestants"]
    found = []
    if contestants:
        tokens = contestants[0]["answer_tokens"]
        found.append(
            Chart(
                "stages",
                "Where the time goes",
                f"Medians of each stage, for one image and an answer of {tokens} tokens; shorter is faster.",
                lambda theme: _stages(contestants, theme),
            )
        )
    if _kept_ratios(contestants) > 1:
        found.append(
            Chart(
                "latency-keep",
                "Latency against vision tokens kept",
                "Median and 90th percentile of the whole answer (solid), and median to the first token (dashed).",
                lambda theme: _latency(contestants, theme),
            )
        )
    judged = [contestant for contestant in contestants if contestant.get("accuracy")]
    if judged:
        source = judged[0]["accuracy"]["source"]
        found.append(
            Chart(
                "accuracy-latency",
                "Accuracy against latency",
                f"Up and to the left is better. Bars are 95% intervals. Accuracy: {source}.",
                lambda theme: _accuracy(judged, theme, "latency"),
            )
        )
    # One engine is enough: the accuracy is the bundle's.
    bundles = list({contestant["bundle"]: contestant for contestant in reversed(judged)}.values())
    if _kept_ratios(bundles) > 1:
        found.append(
            Chart(
                "accuracy-keep",
                "Accuracy against vision tokens kept",
                "Bars are 95% intervals.",
                lambda theme: _accuracy(bundles, theme, "kept"),
            )
        )
    return found


def _kept_ratios(contestants: Sequence[Mapping[str, Any]]) -> int:
    return len({_kept(contestant) for contestant in contestants})


def _kept(contestant: Mapping[str, Any]) -> float:
    tokens = contestant["vision_tokens"]
    return 100 * float(tokens["after"]) / max(float(tokens["before"]), 1)


def _axes(theme: Theme, height: float) -> tuple[Any, Any]:
    figure = new_figure(_WIDTH, height)
    figure.set_facecolor(theme.ground)
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(theme.ground)
    axes.tick_params(colors=theme.ink, labelsize=10)
    for name, spine in axes.spines.items():
        spine.set_color(theme.grid)
        spine.set_visible(name in ("left", "bottom"))
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _label(axes: Any, theme: Theme, x: str, y: str) -> None:
    axes.set_xlabel(x, color=theme.ink, fontsize=11)
    axes.set_ylabel(y, color=theme.ink, fontsize=11)


def _legend(figure: Any, theme: Theme, columns: int) -> None:
    # Below the axes: no data are hidden, on a narrow screen either.
    figure.legend(loc="outside lower center", ncols=columns, fontsize=10, frameon=False, labelcolor=theme.ink)


def _parts(contestant: Mapping[str, Any]) -> dict[str, float]:
    """Returns what the bars are made of; scoring and gather are taken out of the vision encoder."""
    stages = contestant["stages"]
    scoring = max(stages[SCORING]["p50"] or 0.0, 0.0)
    parts = {"preprocess": stages["preprocess"]["p50"]}
    parts["vision encoder"] = max(stages["vision_encoder"]["p50"] - scoring, 0.0)
    parts["scoring, gather"] = scoring
    parts |= {STAGES[name]: stages[name]["p50"] for name in ("embedding", "prefill")}
    return parts | {"decode, all tokens": contestant["decode_in_all_ms"]["p50"], "other": stages["other"]["p50"]}


def _stages(contestants: Sequence[Mapping[str, Any]], theme: Theme) -> Any:
    figure, axes = _axes(theme, 1.9 + 0.5 * len(contestants))
    names = [f"{contestant['name']}\n{contestant['engine']}" for contestant in contestants]
    colours = (GREY, BLUE, PURPLE, SKY, ORANGE, GREEN, VERMILION)
    left = [0.0] * len(contestants)
    rows = [_parts(contestant) for contestant in contestants]
    for part, colour in zip(rows[0], colours, strict=True):
        widths = [row[part] for row in rows]
        axes.barh(names, widths, left=left, color=colour, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    _label(axes, theme, "milliseconds", "")
    _legend(figure, theme, 2)
    return figure


def _by_engine(contestants: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Groups what differs only in how many tokens are kept."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for contestant in sorted(contestants, key=_kept):
        recipe = contestant["recipe"]
        name = f"{recipe}, {contestant['engine']}" if recipe else contestant["engine"]
        groups.setdefault(name, []).append(contestant)
    return groups


def _latency(contestants: Sequence[Mapping[str, Any]], theme: Theme) -> Any:
    figure, axes = _axes(theme, 3.6)
    for number, (name, group) in enumerate(_by_engine(contestants).items()):
        colour, marker = PALETTE[number % len(PALETTE)], _MARKERS[number % len(_MARKERS)]
        kept = [_kept(contestant) for contestant in group]
        whole = [contestant["metrics"]["end_to_end"] for contestant in group]
        upper = [max(figures["p90"] - figures["p50"], 0.0) for figures in whole]
        medians = [figures["p50"] for figures in whole]
        axes.errorbar(
            kept, medians, yerr=[[0.0] * len(upper), upper], color=colour, marker=marker, capsize=3, label=name
        )
        first = [contestant["metrics"]["ttft"]["p50"] for contestant in group]
        axes.plot(kept, first, color=colour, marker=marker, linestyle="--", markerfacecolor=theme.ground)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    _label(axes, theme, "vision tokens kept, %", "milliseconds")
    _legend(figure, theme, 2)
    return figure


def _name_points(
    axes: Any, theme: Theme, names: Sequence[str], places: Sequence[float], heights: Sequence[float]
) -> None:
    for number, (name, *point) in enumerate(zip(names, places, heights, strict=True)):
        # Neighbours are close where accuracy is high: one has its name below, the next above.
        offset, side = ((5, -12), "left") if number % 2 else ((-5, 5), "right")
        axes.annotate(
            name, point, offset, textcoords="offset points", fontsize=10, color=theme.ink, horizontalalignment=side
        )


def _accuracy(contestants: Sequence[Mapping[str, Any]], theme: Theme, against: str) -> Any:
    figure, axes = _axes(theme, 3.6)
    for number, (name, group) in enumerate(_by_engine(contestants).items()):
        colour, marker = PALETTE[number % len(PALETTE)], _MARKERS[number % len(_MARKERS)]
        places = [
            contestant["metrics"]["end_to_end"]["p50"] if against == "latency" else _kept(contestant)
            for contestant in group
        ]
        shares = [100 * contestant["accuracy"]["accuracy"] for contestant in group]
        bounds = [contestant["accuracy"]["interval_95"] for contestant in group]
        errors = [
            [max(share - 100 * low, 0.0) for share, (low, _) in zip(shares, bounds, strict=True)],
            [max(100 * high - share, 0.0) for share, (_, high) in zip(shares, bounds, strict=True)],
        ]
        axes.errorbar(places, shares, yerr=errors, color=colour, marker=marker, capsize=3, label=name, linewidth=1.2)
        if against == "latency":
            _name_points(axes, theme, [f"{_kept(contestant):.3g}%" for contestant in group], places, shares)
    axes.set_xlim(left=0)
    axis = "end to end, milliseconds (labels: tokens kept)" if against == "latency" else "vision tokens kept, %"
    _label(axes, theme, axis, "accuracy, %")
    _legend(figure, theme, 2)
    return figure
