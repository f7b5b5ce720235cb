"""`qavp-export`: a LLaVA-family checkpoint becomes a deployable bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

import qavp_export
from qavp_export.cli.common import run_command
from qavp_export.cli.options import (
    AlphaOption,
    AsJsonOption,
    CalibrationOption,
    CalibrationSamplesOption,
    CapabilityReportOption,
    ClipOption,
    DebugOption,
    DryRunOption,
    EngineOption,
    ForceOption,
    FormatOption,
    GroupSizeOption,
    KeepOption,
    KeepPrecisionOption,
    ListModelsOption,
    ListRecipesOption,
    MaxBatchOption,
    MaxTokensOption,
    ModelOption,
    OfflineOption,
    OutlierWeightOption,
    OutputOption,
    PositionsOption,
    PrecisionFallbackOption,
    RecipeOption,
    ResumeOption,
    RevisionOption,
    ScoreInputOption,
    SeedOption,
    SelectOption,
    SemanticOption,
    SizeBudgetOption,
    SmOption,
    VerifyOption,
    VersionOption,
)
from qavp_export.engines import ENGINES
from qavp_export.engines.tensorrt.targets import FLAVOURS, EngineTargets
from qavp_export.errors import InputError
from qavp_export.recipe import DEFAULT_PRESET

_EPILOG = (
    "Example: qavp-export --model llava-1.5-7b --keep 0.125 -o llava-w4a4, then "
    "qavp-run llava-w4a4 --image photo.jpg --prompt 'What is this?'"
)

# What one selection is made from, by the family's layout.
_UNITS: Mapping[str, str] = MappingProxyType(
    {"grid": "a tile", "tiles": "an image, all tiles together", "native": "an image"}
)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def main() -> int:
    """Entry point of `qavp-export`; returns the exit code."""
    return run_command(app, "qavp-export")


@app.command(epilog=_EPILOG)
def export_command(
    model: ModelOption = None,
    keep: KeepOption = None,
    output: OutputOption = None,
    recipe: RecipeOption = None,
    format_: FormatOption = None,
    keep_precision: KeepPrecisionOption = None,
    calibration: CalibrationOption = None,
    calibration_samples: CalibrationSamplesOption = None,
    size_budget: SizeBudgetOption = None,
    semantic: SemanticOption = None,
    clip: ClipOption = None,
    alpha: AlphaOption = None,
    outlier_weight: OutlierWeightOption = None,
    score_input: ScoreInputOption = None,
    select: SelectOption = None,
    positions: PositionsOption = None,
    seed: SeedOption = None,
    group_size: GroupSizeOption = None,
    engine: EngineOption = None,
    sm: SmOption = None,
    max_tokens: MaxTokensOption = None,
    max_batch: MaxBatchOption = None,
    allow_precision_fallback: PrecisionFallbackOption = False,
    capability_report: CapabilityReportOption = False,
    force: ForceOption = False,
    resume: ResumeOption = False,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    dry_run: DryRunOption = False,
    verify: VerifyOption = None,
    list_models: ListModelsOption = False,
    list_recipes: ListRecipesOption = False,
    version: VersionOption = False,
    as_json: AsJsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Export a LLaVA-family checkpoint: prune vision tokens in the graph, quantize the decoder to W4A4."""
    del debug  # read by run_command
    if version:
        typer.echo(qavp_export.__version__)
    elif list_models:
        _list_models(as_json)
    elif list_recipes:
        _list_recipes(as_json)
    elif verify is not None:
        _verify(verify, as_json)
    elif model is None:
        raise InputError("--model is missing; see qavp-export --help")
    else:
        overrides = {
            **_parse_keep(keep),
            "semantic": semantic,
            "alpha": alpha,
            "outlier_weight": outlier_weight,
            "score_input": score_input,
            "select": select,
            "positions": positions,
            "seed": seed,
            "group_size": group_size,
            "format": format_,
            "keep_precision": _parse_precisions(keep_precision),
            "calibration_samples": calibration_samples,
            "size_budget": size_budget,
        }
        recipe = recipe or _preset_for(format_)
        origin = _Origin(model, revision, offline)
        targets = _parse_targets(
            engine,
            sm,
            max_tokens,
            max_batch,
            allow_precision_fallback=allow_precision_fallback,
            capability_report=capability_report,
        )
        text_tower = None if clip is None else _Origin(clip, None, offline)
        if dry_run:
            _dry_run(origin, recipe, overrides, text_tower, as_json)
        else:
            _export(
                origin,
                recipe,
                overrides,
                output,
                calibration,
                targets,
                text_tower,
                force=force,
                resume=resume,
                as_json=as_json,
            )


@dataclass(frozen=True)
class _Origin:
    """Where the user says the model is."""

    model: str
    revision: str | None
    offline: bool

    @property
    def name(self) -> str:
        """The model's name without the folders that lead to it."""
        return Path(self.model).name if Path(self.model).exists() else self.model

    def resolve(self, *, config_only: bool, progress: bool) -> Path:
        """Returns the checkpoint folder; downloads it if need be."""
        from qavp_export.hub import resolve_model

        return resolve_model(
            self.model, revision=self.revision, offline=self.offline, config_only=config_only, progress=progress
        ).folder


def _preset_for(format_: str | None) -> str:
    # A format that is asked for alone comes with the recipe that was measured to suit it.
    return "nvfp4" if format_ == "nvfp4" else DEFAULT_PRESET


def _parse_keep(option: str | None) -> dict[str, Any]:
    """Returns the recipe fields that `--keep` sets."""
    if option is None:
        return {}
    try:
        bounds = [float(bound) for bound in option.split(":")]
    except ValueError:
        bounds = []
    if len(bounds) == 1:
        return {"keep": bounds[0]}
    if len(bounds) == 2:
        return {"keep_range": (bounds[0], bounds[1])}
    raise InputError(f"--keep {option[:40]!r} is neither a fraction, like 0.125, nor a range, like 0.05:0.5")


def _parse_precisions(options: list[str] | None) -> dict[str, str] | None:
    if not options:
        return None
    parsed: dict[str, str] = {}
    for option in options:
        pattern, equals, precision = option.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"--keep-precision {option!r} is not PATTERN=PRECISION, like layers.0.mlp.down_proj=w8a8")
        parsed[pattern] = precision
    return parsed


def _parse_targets(
    engines: list[str] | None,
    capabilities: list[str] | None,
    max_tokens: int | None,
    max_batch: int | None,
    *,
    allow_precision_fallback: bool,
    capability_report: bool,
) -> EngineTargets:
    """Returns what is built beside the engines of ONNX Runtime.

    Raises:
        InputError: An engine does not exist, or an option goes with none that is built.
        UnavailableError: TensorRT-RTX does not build for a compute capability.
    """
    names = _split(engines)
    # Whoever names the engines of ONNX Runtime gets what is built anyway.
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        raise InputError(f"--engine {unknown[0][:40]!r} does not exist; choose from {', '.join(ENGINES)}")
    numbers = _split(capabilities)
    if not all(number.isdecimal() for number in numbers):
        raise InputError(f"--sm {','.join(numbers)[:40]!r} is no compute capability, like 89 for 8.9")
    flavours = tuple(flavour for flavour in FLAVOURS if flavour in names)
    settings = {"max_tokens": max_tokens, "max_batch": max_batch}
    given = [f"--{name.replace('_', '-')}" for name, value in settings.items() if value is not None]
    if given and not flavours:
        raise InputError(f"{given[0]} goes with --engine tensorrt or tensorrt-rtx")
    targets = EngineTargets(
        flavours,
        tuple(sorted({int(number) for number in numbers})),
        allow_precision_fallback=allow_precision_fallback,
        capability_report=capability_report,
        **{name: value for name, value in settings.items() if value is not None},
    )
    targets.check()
    return targets


def _split(options: list[str] | None) -> list[str]:
    return [part.strip() for option in options or [] for part in option.split(",") if part.strip()]


def _export(
    origin: _Origin,
    preset: str,
    overrides: dict[str, Any],
    output: Path | None,
    calibration: Path | None,
    targets: EngineTargets,
    text_tower: _Origin | None,
    *,
    force: bool,
    resume: bool,
    as_json: bool,
) -> None:
    from qavp_export.bundle import check_target
    from qavp_export.cli.report import ProgressBars, print_summary, summary
    from qavp_export.recipe import check_clip, make_recipe

    recipe = make_recipe(preset, overrides)
    check_clip(recipe, given=text_tower is not None)
    name = origin.name
    kept = "-".join(f"{fraction:g}" for fraction in recipe.keep_range or [recipe.keep])
    target = output or Path(f"{name.split('/')[-1]}-keep{kept}-{recipe.name}")
    check_target(target, force=force)
    folder = origin.resolve(config_only=False, progress=not as_json)
    clip = None
    if text_tower is not None:
        clip = (text_tower.resolve(config_only=False, progress=not as_json), text_tower.name)

    from qavp_export.pipeline import export

    try:
        with ProgressBars(enabled=not as_json) as bars:
            manifest = export(
                folder,
                recipe,
                target,
                name=name,
                force=force,
                progress=bars.update,
                calibration_data=calibration,
                targets=targets,
                resume=resume,
                clip=clip,
            )
    except KeyboardInterrupt:
        if resume:
            typer.echo("what is finished is kept; run the same command again to go on", err=True)
        raise
    if as_json:
        typer.echo(json.dumps(summary(manifest, target)))
    else:
        print_summary(manifest, target, f"exported {name}")
        typer.echo(f"try it: qavp-run {target} --image FILE --prompt TEXT")


def _dry_run(
    origin: _Origin, preset: str, overrides: dict[str, Any], text_tower: _Origin | None, as_json: bool
) -> None:
    from qavp_export.checkpoint import read_config
    from qavp_export.cli.report import print_estimate
    from qavp_export.estimate import estimate
    from qavp_export.recipe import check_clip, make_recipe
    from qavp_export.settings import settle
    from qavp_export.source import read_plan
    from qavp_export.text_tower import read_clip

    recipe = make_recipe(preset, overrides)
    check_clip(recipe, given=text_tower is not None)
    folder = origin.resolve(config_only=True, progress=not as_json)
    config, family, plan = read_plan(folder, read_config(folder))
    settings = settle(recipe, family, plan)
    clip = None
    if text_tower is not None and settings.reads_question:
        clip = read_clip(text_tower.resolve(config_only=True, progress=not as_json), text_tower.name, config)
    result = estimate(config, family, plan, settings, clip)
    if as_json:
        typer.echo(json.dumps({"model": origin.name, **result.to_dict()}))
    else:
        print_estimate(result, origin.name)


def _verify(bundle: Path, as_json: bool) -> None:
    from qavp_export.verify import verify

    manifest = verify(bundle)
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), "files": len(manifest.files), "valid": True}))
    else:
        typer.echo(f"{bundle} is valid: {len(manifest.files)} files unchanged, {len(manifest.components)} valid graphs")


def _list_recipes(as_json: bool) -> None:
    from qavp_export.cli.report import print_recipes
    from qavp_export.recipe import PRESETS, describe_fields, read_preset

    presets = {name: read_preset(name) for name in PRESETS}
    if as_json:
        typer.echo(json.dumps({"recipes": presets, "fields": describe_fields(), "default": DEFAULT_PRESET}))
    else:
        print_recipes(presets, describe_fields())


def _list_models(as_json: bool) -> None:
    from qavp_export.families import FAMILIES
    from qavp_export.hub import SHORT_NAMES
    from qavp_export.recipe import PRESETS

    # Every recipe goes with every family: what a decoder does not allow, like folding a rotation, is done otherwise.
    families = {
        name: {
            "description": family.description,
            "scorers": family.scorers,
            "layout": family.layout,
            "pruning": f"k of the N tokens of {_UNITS[family.layout]}",
            "recipes": PRESETS,
        }
        for name, family in FAMILIES.items()
    }
    if as_json:
        typer.echo(json.dumps({"families": families, "short_names": dict(SHORT_NAMES)}))
        return
    console = Console()
    columns = ("model_type", "description", "scorers", "keeps k of the N tokens of", "recipes")
    table = Table(*columns, title="Families", title_justify="left", box=None)
    for name, family in FAMILIES.items():
        table.add_row(name, family.description, ", ".join(family.scorers), _UNITS[family.layout], "all")
    console.print(table)
    names = Table("short name", "Hub id", title="\nShort names", title_justify="left", box=None)
    for short, repo in SHORT_NAMES.items():
        names.add_row(short, repo)
    console.print(names)
