"""The options of `qavp-export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer


@dataclass(frozen=True)
class ExportOptions:
    """A command line of `qavp-export`; what each option is, its help says."""

    model: Annotated[
        str | None, typer.Option("--model", help="Checkpoint folder, Hub id, or a name from --list-models.")
    ] = None
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="KEEP|LOW:HIGH",
            help="Fraction of vision tokens to keep, in (0, 1]; 1.0 keeps all. LOW:HIGH leaves the choice to each "
            "call, between the two. [default: 0.125]",
        ),
    ] = None
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle folder. [default: MODEL-keepKEEP-RECIPE]")
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="A name from --list-recipes, or a YAML file like those. [default: rotate]"
        ),
    ] = None
    format_: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="int (any CPU and GPU) or nvfp4 (NVIDIA compute capability 10+; recipe nvfp4). [default: int]",
        ),
    ] = None
    keep_precision: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=PRECISION",
            help="Precision of layers whose name ends with a pattern: layers.0.mlp.down_proj=w8a8; repeatable.",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Image prompts for recipes gptq and auto, and --alpha auto: a .jsonl file or a folder of images. "
            "[default: the demo's]",
        ),
    ] = None
    calibration_samples: Annotated[
        int | None, typer.Option(help="Most calibration prompts to draw. [default: 128; --alpha auto reads 32 at most]")
    ] = None
    size_budget: Annotated[
        float | None,
        typer.Option(help="Raise the most sensitive layers to 8 bit while the decoder grows by at most this fraction."),
    ] = None
    semantic: Annotated[
        str | None, typer.Option(help="Semantic scorer: cls, received, norm, random or text. [default: the family's]")
    ] = None
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="With --semantic text: the CLIP that the vision tower comes from, a folder or Hub id.",
        ),
    ] = None
    alpha: Annotated[
        str | None,
        typer.Option(
            metavar="FLOAT|auto",
            help="Weight of semantic relevance against quantization sensitivity; auto chooses it and --outlier-weight "
            "on calibration images. [default: 0.5]",
        ),
    ] = None
    outlier_weight: Annotated[
        float | None,
        typer.Option(help="Weight of outlier intensity against quantization error in that sensitivity. [default: 0.5]"),
    ] = None
    score_input: Annotated[
        str | None,
        typer.Option(help="Score raw features, or rms: each token divided by its root mean square. [default: raw]"),
    ] = None
    select: Annotated[
        str | None, typer.Option(help="Selection rule: the diverse ones dpp and maxmin, or topk. [default: dpp]")
    ] = None
    positions: Annotated[
        str | None,
        typer.Option(help="Position ids of the shortened prompt: contiguous or original. [default: contiguous]"),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of random scorer, rotations, calibration draw. [default: 0]")
    ] = None
    group_size: Annotated[
        int | None, typer.Option(help="Channels that share a scale. [default: largest of 128..16 that fits]")
    ] = None
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="Also build tensorrt (for the GPU here) or tensorrt-rtx (for --sm, with no GPU); repeatable. The "
            "engines of ONNX Runtime are always there.",
        ),
    ] = None
    sm: Annotated[
        list[str] | None,
        typer.Option(
            "--sm",
            metavar="NN[,NN]",
            help="Compute capabilities that tensorrt-rtx builds for: 80, 86, 89, 120 or 121; repeatable.",
        ),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and answer that TensorRT engines have room for. [default: the context, or 2048]"
        ),
    ] = None
    max_batch: Annotated[int | None, typer.Option(help="Prompts at once in TensorRT engines. [default: 4]")] = None
    allow_precision_fallback: Annotated[
        bool,
        typer.Option("--allow-precision-fallback", help="Keep TensorRT engines that run layers in another precision."),
    ] = False
    capability_report: Annotated[
        bool,
        typer.Option("--capability-report", help="Put Polygraphy's report on what TensorRT supports into the bundle."),
    ] = False
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on where an interrupted export stopped; if this one is, keep what is finished."
        ),
    ] = False
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None
    offline: Annotated[bool, typer.Option("--offline", help="Use the Hub cache only, no network.")] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan from config.json; read no weight, write nothing.")
    ] = False
    verify: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Check every hash and graph of a bundle, and exit.")
    ] = None
    list_models: Annotated[bool, typer.Option("--list-models", help="List families and short names, and exit.")] = False
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="List recipes and what each field means, and exit.")
    ] = False
    version: Annotated[bool, typer.Option("--version", help="Print the version, and exit.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")] = False
    # Read by run_command.
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False
