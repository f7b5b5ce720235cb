"""`qavp-export`: a LLaVA-family checkpoint becomes a deployable bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import typer
from rich.console import Console
from rich.table import Table

import qavp_export
from qavp_export.cli.common import run_command, with_options
from qavp_export.cli.options import ExportOptions
from qavp_export.cli.request import ExportRequest, read_request
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
@with_options(ExportOptions)
def export_command(options: ExportOptions) -> None:
    """Export a LLaVA-family checkpoint: prune vision tokens in the graph, quantize the decoder to W4A4."""
    if options.version:
        typer.echo(qavp_export.__version__)
    elif options.list_models:
        _list_models(options.as_json)
    elif options.list_recipes:
        _list_recipes(options.as_json)
    elif options.verify is not None:
        _verify(options.verify, options.as_json)
    elif options.dry_run:
        _dry_run(read_request(options), options.as_json)
    else:
        _export(read_request(options), options.as_json)


def _export(request: ExportRequest, as_json: bool) -> None:
    from qavp_export.bundle import check_target
    from qavp_export.cli.report import ProgressBars, print_summary, summary

    target = request.target()
    check_target(target, force=request.force)
    folder = request.origin.resolve(config_only=False, progress=not as_json)
    clip = None
    if request.clip is not None:
        clip = (request.clip.resolve(config_only=False, progress=not as_json), request.clip.name)

    from qavp_export.pipeline import export

    try:
        with ProgressBars(enabled=not as_json) as bars:
            manifest = export(
                folder,
                request.recipe,
                target,
                name=request.origin.name,
                force=request.force,
                progress=bars.update,
                calibration_data=request.calibration,
                targets=request.targets,
                resume=request.resume,
                clip=clip,
            )
    except KeyboardInterrupt:
        if request.resume:
            typer.echo("what is finished is kept; run the same command again to go on", err=True)
        raise
    if as_json:
        typer.echo(json.dumps(summary(manifest, target)))
    else:
        print_summary(manifest, target, f"exported {request.origin.name}")
        typer.echo(f"try it: qavp-run {target} --image FILE --prompt TEXT")


def _dry_run(request: ExportRequest, as_json: bool) -> None:
    from qavp_export.checkpoint import read_config
    from qavp_export.cli.report import print_estimate
    from qavp_export.estimate import estimate
    from qavp_export.job import check_engines
    from qavp_export.settings import settle
    from qavp_export.source import read_plan
    from qavp_export.text_tower import read_clip

    folder = request.origin.resolve(config_only=True, progress=not as_json)
    config, family, plan = read_plan(folder, read_config(folder))
    settings = settle(request.recipe, family, plan)
    clip = None
    if request.clip is not None and settings.reads_question:
        clip = read_clip(request.clip.resolve(config_only=True, progress=not as_json), request.clip.name, config)
    engines = check_engines(request.targets, settings, plan).describe()
    result = estimate(config, family, plan, settings, clip)
    if as_json:
        typer.echo(json.dumps({"model": request.origin.name, **result.to_dict(), "engines": engines}))
    else:
        print_estimate(result, request.origin.name, engines)


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
