"""The options of `qavp-bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qavp_export.engines import ENGINES

BundlesArgument = Annotated[
    list[Path] | None, typer.Argument(metavar="[BUNDLE...]", help="Folders that qavp-export wrote.")
]
EnginesOption = Annotated[str, typer.Option(metavar="NAME[,NAME]", help=f"Engines to compare: {', '.join(ENGINES)}.")]
ImageOption = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="An image to ask about; repeat for several. [default: four of the demo's]"),
]
PromptOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The question. [default: 'Describe the image.', or the demo's]")
]
TokensOption = Annotated[int, typer.Option(help="Tokens of each answer.")]
KeepOption = Annotated[
    float | None, typer.Option(help="Share of vision tokens kept, for bundles that leave it to each call.")
]
WarmupOption = Annotated[int, typer.Option(help="Requests that do not count; each image is asked about once at least.")]
RepeatsOption = Annotated[int, typer.Option(help="Requests that count, for each contestant.")]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads; all cores if left out.")]
LoadOption = Annotated[int, typer.Option(metavar="CLIENTS", help="Then serve so many clients at once; 0: do not.")]
DurationOption = Annotated[float, typer.Option(help="Seconds of --load, for each contestant.")]
SweepOption = Annotated[
    str | None, typer.Option(metavar="keep=RATIO,...", help="Export --model at these keep ratios and compare them.")
]
ModelOption = Annotated[
    str | None, typer.Option(help="Checkpoint of --sweep: a folder, a Hub id, or a name from --list-models.")
]
RecipeOption = Annotated[str, typer.Option(metavar="NAME|FILE", help="Recipe of --sweep.")]
WorkOption = Annotated[
    Path, typer.Option(metavar="DIR", help="Where --sweep keeps its bundles; those that are there are not made again.")
]
AccuracyOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="What qavp-eval --json wrote about the same bundles or recipes.")
]
DataOption = Annotated[
    str | None,
    typer.Option(metavar="NAME[:PATH]", help="Measure accuracy here, on a data set as qavp-eval --data takes it."),
]
QuestionsOption = Annotated[int, typer.Option(help="Most questions of --data.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every figure and sample here.")]
CsvOption = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the figures here.")]
ReportOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Write one page with charts here, and the charts as PNG beside it."),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
