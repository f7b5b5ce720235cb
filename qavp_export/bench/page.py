"""The report: one page with everything in it, and the charts as pictures beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from qavp_export.bench.charts import DARK, LIGHT, Chart, charts
from qavp_export.bench.summary import METRICS, STAGES
from qavp_export.bench.tables import accuracy, number, points, reasons, scoring
from qavp_export.plots import render, require_matplotlib, save, write_bytes
from qavp_export.units import megabytes

_TEMPLATE = "report.html.jinja"


def check_report() -> None:
    """Checks that reports can be written here, before anything is measured.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    require_matplotlib("figure")


def write_report(summary: Mapping[str, Any], path: Path) -> list[Path]:
    """Writes the page, and each chart as a PNG beside it.

    Args:
        summary: What `summarize` returned.
        path: The page's file.

    Returns:
        The files.

    Raises:
        InputError: A file cannot be written.
        UnavailableError: matplotlib is not installed.
    """
    drawn = charts(summary)
    pictures = [path.with_name(f"{path.stem}-{chart.key}.png") for chart in drawn]
    write_bytes(path, page(summary, drawn).encode())
    for chart, picture in zip(drawn, pictures, strict=True):
        save(chart.draw(LIGHT), picture)
    return [path, *pictures]


def page(summary: Mapping[str, Any], drawn: list[Chart]) -> str:
    """Returns the page as HTML; what the figures say of themselves (names, answers) is escaped."""
    # Not PackageLoader: it finds no package that two folders share.
    template = files("qavp_export.bench").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        summary=summary,
        charts=[
            {
                "title": chart.title,
                "note": chart.note,
                "light": _data_uri(chart.draw(LIGHT)),
                "dark": _data_uri(chart.draw(DARK)),
            }
            for chart in drawn
        ],
        missing=reasons(summary),
        stages=STAGES,
        metrics=METRICS,
        number=number,
        scoring=scoring,
        accuracy=accuracy,
        points=points,
        megabytes=megabytes,
    )


def _data_uri(figure: Any) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(render(figure, "svg")).decode("ascii")
