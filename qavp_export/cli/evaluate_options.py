"""The options of `qavp-eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from qavp_export.engines import ENGINES


@dataclass(frozen=True)
class EvaluateOptions:
    """A command line of `qavp-eval`; what each option is, its help says."""

    model: Annotated[
        str, typer.Option("--model", help="Checkpoint folder, Hub id, or a name from qavp-export --list-models.")
    ] = ""
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:PATH]",
            help="Questions: demo, easy-vqa[:train], jsonl:FILE, scienceqa:DIR, textvqa:FILE, pope:FILE|DIR "
            "or gqa:FILE.",
        ),
    ] = None
    arms: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[,NAME]", help="Arms, or groups: paper, selectors, scorers, all. [default: paper]"),
    ] = None
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PRESET[,FIELD=VALUE]", help="One more arm: rms=rotate,score_input=rms; repeatable."),
    ] = None
    list_arms: Annotated[bool, typer.Option("--list-arms", help="List arms and groups, and exit.")] = False
    baseline: Annotated[
        str | None, typer.Option(help="The arm that the table compares the others with. [default: the first]")
    ] = None
    keep: Annotated[float, typer.Option(help="Fraction of vision tokens that pruned arms keep.")] = 0.125
    recipe: Annotated[str, typer.Option(metavar="NAME|FILE", help="Recipe of the arms named w4a4.")] = "rotate"
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="For arms whose scorer is text: the CLIP that the vision tower comes from, a folder or Hub id.",
        ),
    ] = None
    questions: Annotated[
        int | None, typer.Option(help="Most questions or pictures, drawn by the seed. [default: all; of the demo 600]")
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of draws, arms and intervals.")] = 0
    fidelity: Annotated[
        bool,
        typer.Option("--fidelity", help="Compare with full precision and all tokens, which needs no right answers."),
    ] = False
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Pictures: those of --data, or without --data those that --fidelity shows."),
    ] = None
    prompt: Annotated[str, typer.Option(help="What --fidelity asks of the pictures of --images.")] = (
        "Describe the image."
    )
    suffix: Annotated[str, typer.Option(help="Text behind every question.")] = ""
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 16
    batch: Annotated[int, typer.Option(help="Questions at once.")] = 20
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME", help=f"What runs the bundles here; TensorRT's are built first: {', '.join(ENGINES)}."
        ),
    ] = "ort-cpu"
    sm: Annotated[
        list[str] | None,
        typer.Option(
            "--sm",
            metavar="NN[,NN]",
            help="Compute capabilities that tensorrt-rtx builds for, the GPU's among them. [default: the GPU's]",
        ),
    ] = None
    allow_precision_fallback: Annotated[
        bool,
        typer.Option("--allow-precision-fallback", help="Keep TensorRT engines that run layers in another precision."),
    ] = False
    threads: Annotated[int | None, typer.Option(help="Threads; all cores if left out.")] = None
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Where bundles are exported to, and found again by the next run.")
    ] = Path("eval_bundles")
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the report here.")] = None
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub repository.")] = None
    offline: Annotated[bool, typer.Option("--offline", help="Use no network.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False
    # Read by run_command.
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False
