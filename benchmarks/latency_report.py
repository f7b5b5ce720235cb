"""The report of cpu_latency.py: as JSON, and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from cost_report import machine
from rich.console import Console
from rich.table import Table


class Contestant(StrEnum):
    """What is measured."""

    OURS = "ours"
    DENSE = "ours-dense"
    FP32 = "ort-fp32"
    NBITS = "ort-nbits"
    LLAMA = "llamacpp"
    LLAMA_SHORT = "llamacpp-short"


TITLES: Mapping[Contestant, str] = {
    Contestant.OURS: "(a) ours, keep 0.125",
    Contestant.DENSE: "(b) ours, dense",
    Contestant.FP32: "(c) ONNX Runtime fp32, dense",
    Contestant.NBITS: "(d) ONNX Runtime MatMulNBits, dense",
    Contestant.LLAMA: "(e) llama.cpp Q4_0, dense",
    Contestant.LLAMA_SHORT: "(e) llama.cpp Q4_0, as many tokens as (a)",
}
# Times, by their names in JSON -> columns, and how many of the unit are a second.
TIMES: Mapping[str, tuple[str, float]] = {
    "vision_s": ("vision, s", 1),
    "prefill_s": ("prefill, s", 1),
    "ttft_s": ("TTFT, s", 1),
    "tpot_s": ("TPOT, ms", 1000),
}
# How many times faster ours (a) is: name -> time and who it is set against.
RATIOS: Mapping[str, tuple[str, Contestant]] = {
    "prefill_vs_ort_fp32": ("prefill_s", Contestant.FP32),
    "prefill_vs_ort_nbits": ("prefill_s", Contestant.NBITS),
    "prefill_vs_llamacpp": ("prefill_s", Contestant.LLAMA),
    "ttft_vs_ort_fp32": ("ttft_s", Contestant.FP32),
    "tpot_vs_llamacpp": ("tpot_s", Contestant.LLAMA),
}
NOTES = (
    "Each in processes of its own, one after the other; medians over all runs of all of them. Files in the page cache.",
    "vision: pixels in memory to image features. prefill: embeddings to the first token's id (output projection of the "
    "last token alone). TTFT: vision, embedding and prefill. TPOT: median over the tokens after the first.",
    "(e) has no vision tower: its prefill and TTFT are the prompt's tokens alone. (c), (d): float vision tower.",
    "Memory: peak of resident pages, loading included; in brackets without file-backed pages.",
)


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        load_s: Opening the model, its files in the page cache.
        timings: Seconds of each repeat, by the names of `latency_probe.Timings`.
        peak_rss_bytes: Most resident memory, loading included.
        peak_anonymous_bytes: The same without file-backed pages.
        resident_after_load: Bytes in memory once it was loaded, `anonymous` and `file_backed`; the `peak` until then.
        details: What else it says of itself.
    """

    load_s: float
    timings: Mapping[str, Sequence[float]]
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    resident_after_load: Mapping[str, int]
    details: Mapping[str, Any]


@dataclass
class Entry:
    """One contestant at one shape.

    Attributes:
        prompt_tokens: Tokens of the prompt that its decoder gets.
        weight_bytes: Size of the files that it loads.
        runs: Its processes.
        skipped: Why there are no figures; empty if there are.
        failed: Whether that is a failure, not something that this machine lacks.
    """

    prompt_tokens: int
    weight_bytes: int = 0
    runs: list[Run] = field(default_factory=list)
    skipped: str = ""
    failed: bool = False

    @property
    def count(self) -> int:
        """Returns how many runs counted, in all processes."""
        return sum(len(run.timings["ttft"]) for run in self.runs)

    def figures(self) -> dict[str, float | None]:
        """Returns medians of the times, None for what it does not have, and largest memory; empty without runs."""
        if self.skipped or not self.runs:
            return {}
        times: dict[str, float | None] = {}
        for name in TIMES:
            values = [value for run in self.runs for value in run.timings[name.removesuffix("_s")]]
            times[name] = statistics.median(values) if values else None
        return {
            **times,
            "load_s": statistics.median(run.load_s for run in self.runs),
            "peak_rss_bytes": max(run.peak_rss_bytes for run in self.runs),
            "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in self.runs),
        }


Entries = Mapping[Contestant, Entry]


def ratios(entries: Entries) -> dict[str, float | None]:
    """Returns `RATIOS` of one shape; None where one of the two was not measured."""
    return {name: _faster(entries, rival, time) for name, (time, rival) in RATIOS.items()}


def report(shapes: Mapping[str, Entries], first: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the figures as JSON values.

    Args:
        shapes: What was measured, by shape.
        first: The shape whose ratios come at the top.
        details: What else to put in: versions, options.
    """
    return {
        "shape": first,
        "ratios": ratios(shapes[first]),
        "machine": machine(),
        **details,
        "notes": NOTES,
        "shapes": {
            shape: {
                "ratios": ratios(entries),
                "contestants": {
                    name: {"title": TITLES[name], **asdict(entry), **entry.figures()} for name, entry in entries.items()
                },
            }
            for shape, entries in shapes.items()
        },
    }


def print_table(shapes: Mapping[str, Entries], console: Console, heading: Sequence[str] = ()) -> None:
    """Prints the heading and the notes, then the figures: a row for each contestant, what (a) gains below.

    Args:
        shapes: What was measured, by shape.
        console: Where to print.
        heading: Lines about this run: how llama.cpp was built.
    """
    for line in (*heading, *NOTES):
        console.print(line, highlight=False, markup=False)
    facts = machine()
    title = f"{facts['cores']} cores of {facts['cpu']}, {facts['memory_bytes'] / 2**30:.0f} GiB of memory"
    table = Table("", "decoder", title=title, box=None, pad_edge=False)
    for column in ("tokens", "runs", *(column for column, _ in TIMES.values()), "load, s", "memory, GiB", "files, GB"):
        table.add_column(column, justify="right")
    for shape, entries in shapes.items():
        for name, entry in entries.items():
            count = "" if entry.skipped else f"{entry.count}"
            table.add_row(TITLES[name], shape, f"{entry.prompt_tokens}", count, *_cells(entry))
        for rival, entry in entries.items():
            gains = [_faster(entries, rival, time) for time in TIMES]
            if rival is not Contestant.OURS and any(gain is not None for gain in gains):
                cells = ["" if gain is None else f"{gain:.2f} x" for gain in gains]
                table.add_row(f"(a) faster than {TITLES[rival]}", shape, f"{entry.prompt_tokens}", "", *cells)
    console.print(table)
    for shape, entries in shapes.items():
        for name, entry in entries.items():
            for line in context_lines(entry):
                console.print(f"{TITLES[name]}, {shape}: {line}", highlight=False, markup=False)
    for shape, entries in shapes.items():
        for name, entry in entries.items():
            if entry.skipped:
                console.print(f"{TITLES[name]}, {shape}: {entry.skipped}", highlight=False, markup=False)


def context_lines(entry: Entry) -> list[str]:
    """Says what a token costs behind a long context, next to a short one; nothing for those that were not asked."""
    found = [run.details["tpot_s_by_context"] for run in entry.runs if "tpot_s_by_context" in run.details]
    if not found:
        return []
    times = {context: statistics.median(run[context] for run in found) for context in found[0]}
    (short, least), *longer = times.items()
    return [
        f"TPOT behind {context} tokens {value * 1000:.1f} ms, {value / least:.2f} x that behind {short}"
        for context, value in longer
    ]


def _cells(entry: Entry) -> list[str]:
    figures = entry.figures()
    if not figures:
        return ["skipped"]
    times = [(figures[name], scale) for name, (_, scale) in TIMES.items()]
    cells = ["" if value is None else _digits(value * scale) for value, scale in times]
    peak, anonymous = (figures[name] or 0.0 for name in ("peak_rss_bytes", "peak_anonymous_bytes"))
    memory = f"{peak / 2**30:.2f} ({anonymous / 2**30:.2f})"
    return [*cells, _digits(figures["load_s"] or 0.0), memory, f"{entry.weight_bytes / 1e9:.2f}"]


def _digits(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _faster(entries: Entries, rival: Contestant, time: str) -> float | None:
    """Returns how many times as long the rival takes as ours (a); None where either has no such time.

    llama.cpp's TTFT lacks a vision tower and is not compared.
    """
    ours, other = (entries[name].figures().get(time) if name in entries else None for name in (Contestant.OURS, rival))
    if not ours or not other or (time == "ttft_s" and rival in (Contestant.LLAMA, Contestant.LLAMA_SHORT)):
        return None
    return other / ours
