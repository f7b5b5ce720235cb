"""What was measured, on the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from qavp_export.bench.summary import METRICS, PERCENTILES, SCORING, STAGES
from qavp_export.units import megabytes

_COLUMNS = 3  # contestants beside one another

CSV_FIELDS = (
    *("bundle", "engine", "kind", "name", "unit"),
    *("p50", "p90", "p99", "samples", "ratio", "low", "high", "note"),
)


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Prints everything for people."""
    contestants = summary["contestants"]
    for start in range(0, len(contestants), _COLUMNS):
        console.print(_table(contestants[start : start + _COLUMNS]))
    if contestants:
        said = f"\nRatios [95% intervals] are against {summary['baseline']}; below 1 is faster."
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    for labels, reason in reasons(summary):
        console.print(f"{labels}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if contestants:
        console.print("\nWhat is inside:", highlight=False)
    for line in summary["inside"] if contestants else ():
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)


def _table(contestants: Sequence[Mapping[str, Any]]) -> Table:
    title = "\nmilliseconds: p50 / p90 / p99"
    table = Table("", title=title, title_justify="left", box=None, pad_edge=False)
    for contestant in contestants:
        table.add_column(f"{contestant['name']}\n{contestant['engine']}", justify="right")
    for label, texts in rows(contestants):
        table.add_row(label, *texts)
    return table


def reasons(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns which contestants have no figures, together where the reason is the same, and the reason."""
    found: dict[str, list[str]] = {}
    for missing in summary["unavailable"]:
        reason = f"failed: {missing['reason']}" if missing["failed"] else missing["reason"]
        found.setdefault(reason, []).append(missing["label"])
    return [("; ".join(labels), reason) for reason, labels in found.items()]


def rows(contestants: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Returns the rows of a table: a label, and a text for each contestant."""
    found: list[tuple[str, list[str]]] = []
    for name, label in STAGES.items():
        of = scoring if name == SCORING else points
        found.append((label, [of(contestant["stages"][name]) for contestant in contestants]))
    for name, label in METRICS.items():
        found.append((label, [points(contestant["metrics"].get(name)) for contestant in contestants]))
    found.append(("tokens/s", [f"{contestant['tokens_per_second']:.1f}" for contestant in contestants]))
    for name in METRICS:
        label = f"{METRICS[name]}, ratio"
        found.append((label, [ratio(contestant["ratios"].get(name)) for contestant in contestants]))
    plain: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("vision tokens", lambda c: f"{c['vision_tokens']['before']} -> {c['vision_tokens']['after']}"),
        ("accuracy", lambda c: accuracy(c.get("accuracy"))),
        ("load time", lambda c: f"{c['load_seconds']:.2f} s"),
        ("host memory, peak", lambda c: megabytes(c["host_peak_bytes"])),
        ("GPU memory, peak", lambda c: _bytes(c["device_peak_bytes"])),
        ("bundle", lambda c: megabytes(c["bundle_bytes"])),
        ("under load, clients", lambda c: _of_load(c, lambda test: str(test["clients"]))),
        ("under load, requests/s", lambda c: _of_load(c, lambda test: f"{test['requests_per_second']:.2f}")),
        ("under load, tokens/s", lambda c: _of_load(c, lambda test: f"{test['tokens_per_second']:.1f}")),
        ("under load, time to first token", lambda c: _of_load(c, lambda test: points(test["ttft"]))),
        ("under load, end to end", lambda c: _of_load(c, lambda test: points(test["end_to_end"]))),
    )
    for label, read in plain:
        texts = [read(contestant) for contestant in contestants]
        if any(text != "-" for text in texts):
            found.append((label, texts))
    return found


def points(figures: Mapping[str, Any] | None) -> str:
    """Returns percentiles as text."""
    if figures is None or figures["p50"] is None:
        return "-"
    return " / ".join(number(figures[f"p{q}"]) for q in PERCENTILES)


def scoring(figures: Mapping[str, Any]) -> str:
    """Returns the time of scoring and gather with its interval as text."""
    if figures["p50"] is None:
        return "-"
    low, high = figures["interval_95"]
    return f"{number(figures['p50'])} [{number(low)}, {number(high)}]"


def number(milliseconds: float) -> str:
    """Returns milliseconds with about three digits."""
    digits = 2 if abs(milliseconds) < 10 else 1 if abs(milliseconds) < 100 else 0
    return f"{milliseconds:.{digits}f}"


def ratio(interval: Mapping[str, float] | None) -> str:
    """Returns a ratio with its interval as text."""
    if interval is None:
        return "-"
    return f"{interval['estimate']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def accuracy(found: Mapping[str, Any] | None) -> str:
    """Returns an accuracy with its interval as text."""
    if found is None:
        return "-"
    low, high = found["interval_95"]
    return f"{100 * found['accuracy']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _of_load(contestant: Mapping[str, Any], read: Callable[[Mapping[str, Any]], str]) -> str:
    return "-" if contestant["load_test"] is None else read(contestant["load_test"])


def _bytes(count: int | None) -> str:
    return "-" if count is None else megabytes(count)


def to_csv(summary: Mapping[str, Any]) -> str:
    """Returns the figures, a line for each contestant and name; `CSV_FIELDS` are the columns."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, CSV_FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    for contestant in summary["contestants"]:
        for fields in _lines(contestant):
            writer.writerow({"bundle": contestant["name"], "engine": contestant["engine"], **fields})
    for missing in summary["unavailable"]:
        said = {"kind": "unavailable", "note": missing["reason"]}
        writer.writerow({"bundle": missing["bundle"], "engine": missing["engine"], **said})
    return buffer.getvalue()


def _lines(contestant: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    timed = [("stage", name, figures) for name, figures in contestant["stages"].items()]
    timed += [("metric", name, figures) for name, figures in contestant["metrics"].items()]
    test = contestant["load_test"]
    if test is not None:
        timed += [("load test", name, test[name]) for name in ("ttft", "end_to_end")]
    for kind, name, figures in timed:
        line: dict[str, Any] = {"kind": kind, "name": name, "unit": "ms"}
        if figures is not None:
            line |= {key: figures[key] for key in ("p50", "p90", "p99", "samples")}
        interval = contestant["ratios"].get(name)
        if interval is not None and kind != "load test":
            line |= {"ratio": interval["estimate"], "low": interval["low"], "high": interval["high"]}
        found.append(line)
    plain = [(name, unit, contestant[name]) for name, unit in _PLAIN]
    if test is not None:
        plain += [(f"load_test_{name}", "1/s", test[name]) for name in ("requests_per_second", "tokens_per_second")]
    found += [
        {"kind": "figure", "name": name, "unit": unit, "p50": value} for name, unit, value in plain if value is not None
    ]
    return found


_PLAIN = (
    ("tokens_per_second", "1/s"),
    ("load_seconds", "s"),
    ("host_peak_bytes", "bytes"),
    ("device_peak_bytes", "bytes"),
    ("bundle_bytes", "bytes"),
)
