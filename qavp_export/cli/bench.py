"""`qavp-bench`: compares bundles and engines on the same inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from qavp_export.cli.bench_options import BenchOptions
from qavp_export.cli.common import run_command, with_options
from qavp_export.errors import InputError, QavpError

if TYPE_CHECKING:
    from qavp_export.bench.comparison import Comparison, Plan
    from qavp_export.bench.inputs import Judges, Outputs
    from qavp_export.cli.report import ProgressBars

_EPILOG = (
    "Examples: qavp-bench dense pruned --engines ort-cpu,tensorrt --report report.html; "
    "qavp-bench --model llava-1.5-7b --sweep keep=0.05,0.125,0.25,0.5,1.0 --work bundles --report report.html"
)
_WIDE = 140  # columns of a table that is not printed on a terminal

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `qavp-bench`; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return run_command(app, "qavp-bench", argv)


@app.command(epilog=_EPILOG)
@with_options(BenchOptions)
def bench_command(options: BenchOptions) -> None:
    """Compare bundles and engines on the same images and questions: time by stage, memory, size.

    Ratios are against the first bundle and engine that run here.
    """
    # Here and not above: they bring torch, and --help should be quick.
    from qavp_export.bench.comparison import Plan
    from qavp_export.bench.inputs import Judges, Outputs, Sweep, make_entries, make_requests, parse_engines
    from qavp_export.cli.report import ProgressBars
    from qavp_export.evaluate.datasets import load_dataset

    names = parse_engines(options.engines)
    outputs = Outputs(options.json_file, options.csv_file, options.report)
    outputs.check()
    if options.accuracy is not None and options.data is not None:
        raise InputError("--accuracy and --data are two sources of one figure; give one")
    asked = None if options.data is None else load_dataset(options.data, None, options.questions, 0)
    judges = Judges(options.accuracy, asked)
    requests = make_requests(options.image, options.prompt, options.tokens, options.keep)
    bundles = [(path.resolve().name, path) for path in options.bundle or []]
    with ProgressBars(enabled=True) as bars:
        if options.sweep is not None and options.model is not None:
            sweep = Sweep(options.sweep, options.model, options.recipe, options.work)
            bundles += sweep.bundles(names, bars.update)
        elif options.sweep is not None or options.model is not None:
            raise InputError("--sweep and --model go together: what is exported, and from which checkpoint")
        plan = Plan(
            make_entries(bundles, names),
            requests,
            options.warmup,
            options.repeats,
            options.load,
            options.duration,
        )
        comparison, summary = _measure(plan, options.threads, judges, bars)
    _show(comparison, summary, outputs)


def _measure(plan: Plan, threads: int | None, judges: Judges, bars: ProgressBars) -> tuple[Comparison, dict[str, Any]]:
    from qavp_export.bench.comparison import compare
    from qavp_export.bench.contestant import WorkerProcess
    from qavp_export.bench.summary import summarize

    comparison = compare(plan, lambda entry: WorkerProcess(entry, threads), bars.update)
    return comparison, summarize(comparison, plan, judges.judge(comparison, bars.update))


def _show(comparison: Comparison, summary: dict[str, Any], outputs: Outputs) -> None:
    from rich.console import Console

    from qavp_export.bench.inputs import check_measured
    from qavp_export.bench.tables import print_summary

    check_measured(comparison)
    console = Console()
    print_summary(summary, console if console.is_terminal else Console(width=_WIDE))
    for path in outputs.write(summary):
        typer.echo(f"written: {path}")
    failed = next((missing for missing in comparison.missing if missing.failed), None)
    if failed is not None:
        raise QavpError(f"{failed.entry.label} failed: {failed.reason}")
