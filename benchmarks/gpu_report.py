"""What gpu_check.py reports: checks that passed or failed, and times beside goals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Check:
    """A kernel's or an engine's results beside a reference's.

    Attributes:
        name: What was checked.
        case: On what.
        passed: Whether it is within the bound.
        detail: What differs, and the bound.
    """

    name: str
    case: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Timing:
    """A measured time.

    Attributes:
        name: What was timed.
        case: At which sizes.
        microseconds: Median of one launch or one step.
        compared: What `ratio` says, in words.
        ratio: The figure that the goal speaks of; None without one.
        goal: What it should reach; None without one.
        at_most: Whether the goal is an upper bound.
    """

    name: str
    case: str
    microseconds: float
    compared: str = ""
    ratio: float | None = None
    goal: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.ratio is None or self.goal is None:
            return None
        return self.ratio <= self.goal if self.at_most else self.ratio >= self.goal


@dataclass(frozen=True)
class Report:
    """Everything that one run found.

    Attributes:
        device: The GPU and the versions of driver and libraries.
        checks: Correctness.
        timings: Times.
        missing: What could not be run here and why, by name.
    """

    device: dict[str, Any]
    checks: Sequence[Check]
    timings: Sequence[Timing]
    missing: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every check passed; goals do not count."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        timings = [{**asdict(timing), "met": timing.met} for timing in self.timings]
        return {
            "device": self.device,
            "checks": [asdict(check) for check in self.checks],
            "timings": timings,
            "missing": self.missing,
        }


def print_report(report: Report, console: Console) -> None:
    """Prints failed checks, how many passed, and one table of times last."""
    failed = [check for check in report.checks if not check.passed]
    for check in failed:
        console.print(f"WRONG  {check.name}, {check.case}: {check.detail}", highlight=False)
    console.print(f"{len(report.checks) - len(failed)} of {len(report.checks)} checks passed", highlight=False)
    for name, reason in report.missing.items():
        console.print(f"not measured: {name}: {reason}", highlight=False)
    device = ", ".join(f"{key} {value}" for key, value in report.device.items())
    table = Table(
        "what", "sizes", "time", "compared with", "ratio", "goal", title=device, box=None, title_justify="left"
    )
    for timing in report.timings:
        ratio = "" if timing.ratio is None else f"{timing.ratio:.3g}"
        table.add_row(timing.name, timing.case, _time(timing.microseconds), timing.compared, ratio, _goal(timing))
    console.print(table)


def _time(microseconds: float) -> str:
    return f"{microseconds:.2f} us" if microseconds < 1000 else f"{microseconds / 1000:.2f} ms"


def _goal(timing: Timing) -> str:
    if timing.goal is None:
        return ""
    return f"{'<=' if timing.at_most else '>='} {timing.goal:g} {'met' if timing.met else 'missed'}"
