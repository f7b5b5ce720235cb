"""The options of `qavp-bench`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from qavp_export.engines import ENGINES


@dataclass(frozen=True)
class BenchOptions:
    """A command line of `qavp-bench`; what each option is, its help says."""

    bundle: Annotated[
        list[Path] | None, typer.Argument(metavar="[BUNDLE...]", help="Folders that qavp-export wrote.")
    ] = None
    engines: Annotated[str, typer.Option(metavar="NAME[,NAME]", help=f"Engines to compare: {', '.join(ENGINES)}.")] = (
        "ort-cpu,ort-cuda,tensorrt,tensorrt-rtx"
    )
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="An image to ask about; repeat for several. [default: four of the demo's]"),
    ] = None
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The question. [default: 'Describe the image.', or the demo's]")
    ] = None
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 32
    keep: Annotated[
        float | None, typer.Option(help="Share of vision tokens kept, for bundles that leave it to each call.")
    ] = None
    warmup: Annotated[
        int, typer.Option(help="Requests that do not count; each image is asked about once at least.")
    ] = 2
    repeats: Annotated[int, typer.Option(help="Requests that count, for each contestant.")] = 20
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None
    load: Annotated[int, typer.Option(metavar="CLIENTS", help="Then serve so many clients at once; 0: do not.")] = 0
    duration: Annotated[float, typer.Option(help="Seconds of --load, for each contestant.")] = 30.0
    sweep: Annotated[
        str | None, typer.Option(metavar="keep=RATIO,...", help="Export --model at these keep ratios and compare them.")
    ] = None
    model: Annotated[
        str | None, typer.Option(help="Checkpoint of --sweep: a folder, a Hub id, or a name from --list-models.")
    ] = None
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="Recipe of --sweep.")] = "rotate"
    work: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where --sweep keeps its bundles; those that are there are not made again."),
    ] = Path("qavp-bench-work")
    accuracy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What qavp-eval --json wrote about the same bundles or recipes.")
    ] = None
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME[:PATH]", help="Measure accuracy here, on a data set as qavp-eval --data takes it."),
    ] = None
    questions: Annotated[int, typer.Option(help="Most questions of --data.")] = 200
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every figure and sample here.")
    ] = None
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the figures here.")] = None
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write one page with charts here, and the charts as PNG beside it."),
    ] = None
    # Read by run_command.
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False
