"""`qavp-bench`: compares bundles and engines on the same inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qavp_export.cli.bench_options import (
    AccuracyOption,
    BundlesArgument,
    CsvOption,
    DataOption,
    DebugOption,
    DurationOption,
    EnginesOption,
    ImageOption,
    JsonOption,
    KeepOption,
    LoadOption,
    ModelOption,
    PromptOption,
    QuestionsOption,
    RecipeOption,
    RepeatsOption,
    ReportOption,
    SweepOption,
    ThreadsOption,
    TokensOption,
    WarmupOption,
    WorkOption,
)
from qavp_export.cli.common import run_command
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
def bench_command(
    bundle: BundlesArgument = None,
    engines: EnginesOption = "ort-cpu,ort-cuda,tensorrt,tensorrt-rtx",
    image: ImageOption = None,
    prompt: PromptOption = None,
    tokens: TokensOption = 32,
    keep: KeepOption = None,
    warmup: WarmupOption = 2,
    repeats: RepeatsOption = 20,
    threads: ThreadsOption = None,
    load: LoadOption = 0,
    duration: DurationOption = 30.0,
    sweep: SweepOption = None,
    model: ModelOption = None,
    recipe: RecipeOption = "rotate",
    work: WorkOption = Path("qavp-bench-work"),
    accuracy: AccuracyOption = None,
    data: DataOption = None,
    questions: QuestionsOption = 200,
    json_file: JsonOption = None,
    csv_file: CsvOption = None,
    report: ReportOption = None,
    debug: DebugOption = False,
) -> None:
    """Compare bundles and engines on the same images and questions: time by stage, memory, size.

    Ratios are against the first bundle and engine that run here.
    """
    del debug  # read by run_command
    # Here and not above: they bring torch, and --help should be quick.
    from qavp_export.bench.comparison import Plan
    from qavp_export.bench.inputs import Judges, Outputs, Sweep, make_entries, make_requests, parse_engines
    from qavp_export.cli.report import ProgressBars
    from qavp_export.evaluate.datasets import load_dataset

    names = parse_engines(engines)
    outputs = Outputs(json_file, csv_file, report)
    outputs.check()
    if accuracy is not None and data is not None:
        raise InputError("--accuracy and --data are two sources of one figure; give one")
    judges = Judges(accuracy, None if data is None else load_dataset(data, None, questions, 0))
    requests = make_requests(image, prompt, tokens, keep)
    bundles = [(path.resolve().name, path) for path in bundle or []]
    with ProgressBars(enabled=True) as bars:
        if sweep is not None and model is not None:
            bundles += Sweep(sweep, model, recipe, work).bundles(names, bars.update)
        elif sweep is not None or model is not None:
            raise InputError("--sweep and --model go together: what is exported, and from which checkpoint")
        plan = Plan(make_entries(bundles, names), requests, warmup, repeats, load, duration)
        comparison, summary = _measure(plan, threads, judges, bars)
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
