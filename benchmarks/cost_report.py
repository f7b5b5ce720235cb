"""The report of export_cost.py: as JSON, and as a table."""

from __future__ import annotations

import os
import platform
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from process_cost import Cost
from rich.console import Console
from rich.table import Table

# What is set against each other: JSON name -> column.
QUANTITIES: Mapping[str, str] = {
    "wall_s": "wall, s",
    "cpu_s": "CPU, s",
    "peak_rss_bytes": "peak memory, GiB",
    "bytes_read": "read, GB",
    "bytes_written": "written, GB",
    "output_bytes": "output, GB",
}
NO_MEMORY = re.compile(r"MemoryError|bad_alloc|[Cc]annot allocate memory|can't allocate memory")
NOTES = (
    "Peak memory: resident pages of the process and its children, without file-backed pages of the input.",
    "Read, written: by system calls; what is read through a mapping is not in it, Python's own modules are.",
    "Read/input are passes over the input, qavp-export's calibration, parity check and SHA-256 of the bundle included.",
    "qavp-export exports vision tower, projector and decoder, and checks them; the model builder exports the decoder.",
)


class Tool(StrEnum):
    """What is measured."""

    OURS = "ours"
    BUILDER = "builder"


TITLES: Mapping[Tool, str] = {Tool.OURS: "qavp-export", Tool.BUILDER: "GenAI model builder"}


@dataclass(frozen=True)
class Run:
    """One export.

    Attributes:
        tool: What exported.
        model: The shape's name.
        command: The command line.
        parameters: Values in the input's weights.
        input_bytes: Size of the input's weights.
        output_bytes: Size of what was written, all files.
        limit_bytes: The memory it was allowed.
        cost: What it took.
        last_line: The last line it printed as an error, if it failed.
        summary: What it says itself that it did; empty if it says nothing.
    """

    tool: Tool
    model: str
    command: Sequence[str]
    parameters: int
    input_bytes: int
    output_bytes: int
    limit_bytes: int
    cost: Cost
    last_line: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """`done`, `failed`, or `out of memory`: over the limit, refused memory, or ended by the kernel."""
        if self.cost.over_limit or self.cost.exit_code == -signal.SIGKILL or NO_MEMORY.search(self.last_line):
            return "out of memory"
        return "failed" if self.cost.exit_code else "done"

    def facts(self) -> dict[str, Any]:
        """Returns everything that is known of the run, as JSON values."""
        facts: dict[str, Any] = asdict(self)
        cost: dict[str, Any] = facts.pop("cost")
        ratios = {
            "read_per_input": self.cost.bytes_read / self.input_bytes,
            "written_per_output": self.cost.bytes_written / self.output_bytes if self.output_bytes else None,
        }
        return facts | cost | {"outcome": self.outcome} | ratios


def report(runs: Sequence[Run], shape: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures as JSON values.

    Args:
        runs: What was measured.
        shape: The shape that was asked for.
        details: What else to put in: versions, options.

    Returns:
        `wall_s`, `peak_rss_bytes` and so on of our export of `shape`, at the top; all `runs`; `growth` by tool, from
        the small shape to `shape`; and `ours_per_builder` by shape.
    """
    ours = _done(runs, Tool.OURS, shape)
    return {
        "shape": shape,
        **({name: _quantity(ours, name) for name in QUANTITIES} if ours else {}),
        "machine": machine(),
        **details,
        "notes": NOTES,
        "runs": [run.facts() for run in runs],
        "growth": _growth(runs, shape),
        "ours_per_builder": _comparison(runs),
    }


def machine() -> dict[str, Any]:
    """Returns what the figures were taken on."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def print_table(runs: Sequence[Run], shape: str, console: Console) -> None:
    """Prints the notes, then the figures: a row for each run, growth and comparison below."""
    for note in NOTES:
        console.print(note)
    table = Table("", "model", title=_title(), box=None, pad_edge=False)
    for column in ("parameters", *QUANTITIES.values(), "read/input", "written/output"):
        table.add_column(column, justify="right")
    for run in runs:
        table.add_row(TITLES[run.tool], run.model, *_cells(run))
    for tool, ratios in _growth(runs, shape).items():
        cells = [f"x {ratios[name]:.2f}" for name in ("parameters", *QUANTITIES)]
        table.add_row(f"{TITLES[Tool(tool)]}, growth", f"to {shape}", *cells)
    for model, ratios in _comparison(runs).items():
        table.add_row("qavp-export / builder", model, "", *(f"{ratios[name]:.2f}" for name in QUANTITIES))
    console.print(table)


def _title() -> str:
    facts = machine()
    return f"{facts['cores']} cores of {facts['cpu']}, {facts['memory_bytes'] / 2**30:.0f} GiB of memory"


def _cells(run: Run) -> list[str]:
    cells = [f"{run.parameters / 1e9:.2f} B"]
    if run.outcome == "out of memory":
        return [*cells, "out of memory", "", f"limit {run.limit_bytes / 2**30:.1f}"]
    if run.outcome == "failed":
        return [*cells, "failed"]
    facts = run.facts()
    sizes = [f"{_quantity(run, name) / 1e9:.2f}" for name in ("bytes_read", "bytes_written", "output_bytes")]
    passes = [f"{facts['read_per_input']:.2f}", f"{facts['written_per_output']:.2f}"]
    return [
        *cells,
        f"{run.cost.wall_s:.0f}",
        f"{run.cost.cpu_s:.0f}",
        f"{run.cost.peak_rss_bytes / 2**30:.2f}",
        *sizes,
        *passes,
    ]


def _quantity(run: Run, name: str) -> float:
    return run.facts()[name]  # type: ignore[no-any-return]  # QUANTITIES names numbers


def _done(runs: Sequence[Run], tool: Tool, model: str) -> Run | None:
    return next((run for run in runs if (run.tool, run.model, run.outcome) == (tool, model, "done")), None)


def _growth(runs: Sequence[Run], shape: str) -> dict[str, dict[str, float]]:
    """Returns how many times as much of everything `shape` takes as the other shape, by tool."""
    growth: dict[str, dict[str, float]] = {}
    for tool in Tool:
        large = _done(runs, tool, shape)
        small = next((run for run in runs if run.tool is tool and run.model != shape and run.outcome == "done"), None)
        if large and small:
            growth[tool] = {
                name: _quantity(large, name) / _quantity(small, name) for name in ("parameters", *QUANTITIES)
            }
    return growth


def _comparison(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Returns how many times as much of everything ours takes as the model builder, by shape."""
    comparison: dict[str, dict[str, float]] = {}
    for model in dict.fromkeys(run.model for run in runs):
        ours, builder = _done(runs, Tool.OURS, model), _done(runs, Tool.BUILDER, model)
        if ours and builder:
            comparison[model] = {name: _quantity(ours, name) / _quantity(builder, name) for name in QUANTITIES}
    return comparison
