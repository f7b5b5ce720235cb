"""The options of `qavp-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qavp_export.engines import ENGINES

ModelOption = Annotated[
    str, typer.Option("--model", help="Checkpoint folder, Hub id, or a name from qavp-export --list-models.")
]
DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:PATH]",
        help="Questions: demo, easy-vqa[:train], jsonl:FILE, scienceqa:DIR, textvqa:FILE, pope:FILE|DIR or gqa:FILE.",
    ),
]
ArmsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[,NAME]", help="Arms, or groups: paper, selectors, scorers, all. [default: paper]"),
]
ArmOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=PRESET[,FIELD=VALUE]", help="One more arm: rms=rotate,score_input=rms; repeatable."),
]
ListArmsOption = Annotated[bool, typer.Option("--list-arms", help="List arms and groups, and exit.")]
BaselineOption = Annotated[
    str | None, typer.Option(help="The arm that the table compares the others with. [default: the first]")
]
KeepOption = Annotated[float, typer.Option(help="Fraction of vision tokens that pruned arms keep.")]
RecipeOption = Annotated[str, typer.Option(metavar="NAME|FILE", help="Recipe of the arms named w4a4.")]
ClipOption = Annotated[
    str | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="For arms whose scorer is text: the CLIP that the vision tower comes from, a folder or Hub id.",
    ),
]
QuestionsOption = Annotated[
    int | None, typer.Option(help="Most questions or pictures, drawn by the seed. [default: all; of the demo 600]")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of draws, arms and intervals.")]
FidelityOption = Annotated[
    bool, typer.Option("--fidelity", help="Compare with full precision and all tokens, which needs no right answers.")
]
ImagesOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Pictures: those of --data, or without --data those that --fidelity shows."),
]
PromptOption = Annotated[str, typer.Option(help="What --fidelity asks of the pictures of --images.")]
SuffixOption = Annotated[str, typer.Option(help="Text behind every question.")]
MaxNewTokensOption = Annotated[int, typer.Option(help="Most tokens of an answer.")]
BatchOption = Annotated[int, typer.Option(help="Questions at once.")]
EngineOption = Annotated[
    str,
    typer.Option(metavar="NAME", help=f"What runs the bundles here; TensorRT's are built first: {', '.join(ENGINES)}."),
]
SmOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sm",
        metavar="NN[,NN]",
        help="Compute capabilities that tensorrt-rtx builds for, the GPU's among them. [default: the GPU's]",
    ),
]
PrecisionFallbackOption = Annotated[
    bool,
    typer.Option("--allow-precision-fallback", help="Keep TensorRT engines that run layers in another precision."),
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads; all cores if left out.")]
WorkOption = Annotated[
    Path, typer.Option(metavar="DIR", help="Where bundles are exported to, and found again by the next run.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report here.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use no network.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
