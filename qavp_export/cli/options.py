"""The options of `qavp-export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Checkpoint folder, Hub id, or a name from --list-models.")
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEEP|LOW:HIGH",
        help="Fraction of vision tokens to keep, in (0, 1]; 1.0 keeps all. LOW:HIGH leaves the choice to each call, "
        "between the two. [default: 0.125]",
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Bundle folder. [default: MODEL-keepKEEP-RECIPE]")
]
RecipeOption = Annotated[
    str | None,
    typer.Option(metavar="NAME|FILE", help="A name from --list-recipes, or a YAML file like those. [default: rotate]"),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", help="int (any CPU and GPU) or nvfp4 (NVIDIA compute capability 10+; recipe nvfp4). [default: int]"
    ),
]
KeepPrecisionOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=PRECISION",
        help="Precision of layers whose name ends with a pattern: layers.0.mlp.down_proj=w8a8; repeatable.",
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Image prompts for recipes gptq and auto, and --alpha auto: a .jsonl file or a folder of images. "
        "[default: the demo's]",
    ),
]
CalibrationSamplesOption = Annotated[
    int | None, typer.Option(help="Most calibration prompts to draw. [default: 128; --alpha auto reads 32 at most]")
]
SizeBudgetOption = Annotated[
    float | None,
    typer.Option(help="Raise the most sensitive layers to 8 bit while the decoder grows by at most this fraction."),
]
SemanticOption = Annotated[
    str | None, typer.Option(help="Semantic scorer: cls, received, norm, random or text. [default: the family's]")
]
ClipOption = Annotated[
    str | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="With --semantic text: the CLIP that the vision tower comes from, a folder or Hub id.",
    ),
]
AlphaOption = Annotated[
    str | None,
    typer.Option(
        metavar="FLOAT|auto",
        help="Weight of semantic relevance against quantization sensitivity; auto chooses it and --outlier-weight on "
        "calibration images. [default: 0.5]",
    ),
]
OutlierWeightOption = Annotated[
    float | None,
    typer.Option(help="Weight of outlier intensity against quantization error in that sensitivity. [default: 0.5]"),
]
ScoreInputOption = Annotated[
    str | None,
    typer.Option(help="Score raw features, or rms: each token divided by its root mean square. [default: raw]"),
]
SelectOption = Annotated[
    str | None, typer.Option(help="Selection rule: the diverse ones dpp and maxmin, or topk. [default: dpp]")
]
PositionsOption = Annotated[
    str | None, typer.Option(help="Position ids of the shortened prompt: contiguous or original. [default: contiguous]")
]
SeedOption = Annotated[
    int | None, typer.Option(help="Seed of random scorer, rotations, calibration draw. [default: 0]")
]
GroupSizeOption = Annotated[
    int | None, typer.Option(help="Channels that share a scale. [default: largest of 128..16 that fits]")
]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help="Also build tensorrt (for the GPU here) or tensorrt-rtx (for --sm, with no GPU); repeatable. The engines "
        "of ONNX Runtime are always there.",
    ),
]
SmOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sm",
        metavar="NN[,NN]",
        help="Compute capabilities that tensorrt-rtx builds for: 80, 86, 89, 120 or 121; repeatable.",
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        help="Tokens of prompt and answer that TensorRT engines have room for. [default: the context, or 2048]"
    ),
]
MaxBatchOption = Annotated[int | None, typer.Option(help="Prompts at once in TensorRT engines. [default: 4]")]
PrecisionFallbackOption = Annotated[
    bool,
    typer.Option("--allow-precision-fallback", help="Keep TensorRT engines that run layers in another precision."),
]
CapabilityReportOption = Annotated[
    bool,
    typer.Option("--capability-report", help="Put Polygraphy's report on what TensorRT supports into the bundle."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on where an interrupted export stopped; if this one is, keep what is finished."),
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Use the Hub cache only, no network.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan from config.json; read no weight, write nothing.")
]
VerifyOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Check every hash and graph of a bundle, and exit.")
]
ListModelsOption = Annotated[bool, typer.Option("--list-models", help="List families and short names, and exit.")]
ListRecipesOption = Annotated[
    bool, typer.Option("--list-recipes", help="List recipes and what each field means, and exit.")
]
VersionOption = Annotated[bool, typer.Option("--version", help="Print the version, and exit.")]
AsJsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
