"""`qavp-export`: a LLaVA-family checkpoint becomes a deployable bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import qavp_export
from qavp_export.cli.common import run_command
from qavp_export.errors import InputError

_EPILOG = (
    "Example: qavp-export --model llava-1.5-7b --keep 0.125 -o llava-w4a4, then "
    "qavp-run llava-w4a4 --image photo.jpg --prompt 'What is this?'"
)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def main() -> int:
    """Entry point of `qavp-export`; returns the exit code."""
    return run_command(app, "qavp-export")


@app.command(epilog=_EPILOG)
def export_command(
    model: Annotated[
        str | None, typer.Option("--model", help="Checkpoint folder, Hub id, or a name from --list-models.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Fraction of vision tokens to keep, in (0, 1]. 1.0 keeps all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Bundle folder. [default: MODEL-keepKEEP-RECIPE]")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Preset: rtn (W4A4, rounding to nearest) or none (no quantization).")
    ] = "rtn",
    semantic: Annotated[
        str | None,
        typer.Option(help="Semantic scorer: cls, received, norm or random. [default: the family's]"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Weight of semantic relevance against quantization sensitivity. [default: 0.5]"),
    ] = None,
    score_input: Annotated[
        str | None,
        typer.Option(help="Score raw features, or rms: each token divided by its root mean square. [default: raw]"),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(help="Position ids of the shortened prompt: contiguous or original. [default: contiguous]"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the random scorer. [default: 0]")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Channels that share a scale. [default: largest of 128..16 that fits]")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use the Hub cache only, no network.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan from config.json; read no weight, write nothing."),
    ] = False,
    verify: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Check every hash and graph of a bundle, and exit.")
    ] = None,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="List families and short names, and exit.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version, and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Export a LLaVA-family checkpoint: prune vision tokens in the graph, quantize the decoder to W4A4."""
    del debug  # read by run_command
    if version:
        typer.echo(qavp_export.__version__)
    elif list_models:
        _list_models(as_json)
    elif verify is not None:
        _verify(verify, as_json)
    elif model is None:
        raise InputError("--model is missing; see qavp-export --help")
    else:
        overrides = {
            "keep": keep,
            "semantic": semantic,
            "alpha": alpha,
            "score_input": score_input,
            "positions": positions,
            "seed": seed,
            "group_size": group_size,
        }
        hub = {"revision": revision, "offline": offline}
        if dry_run:
            _dry_run(model, recipe, overrides, hub, as_json)
        else:
            _export(model, recipe, overrides, hub, output, force=force, as_json=as_json)


def _export(
    model: str,
    preset: str,
    overrides: dict[str, Any],
    hub: dict[str, Any],
    output: Path | None,
    *,
    force: bool,
    as_json: bool,
) -> None:
    from qavp_export.bundle import check_target
    from qavp_export.cli.report import ProgressBars, print_summary, summary
    from qavp_export.hub import resolve_model
    from qavp_export.recipe import make_recipe

    recipe = make_recipe(preset, overrides)
    name = Path(model).name if Path(model).exists() else model
    target = output or Path(f"{name.split('/')[-1]}-keep{recipe.keep:g}-{recipe.name}")
    check_target(target, force=force)
    resolved = resolve_model(model, progress=not as_json, **hub)

    from qavp_export.pipeline import export

    with ProgressBars(enabled=not as_json) as bars:
        manifest = export(resolved.folder, recipe, target, name=name, force=force, progress=bars.update)
    if as_json:
        typer.echo(json.dumps(summary(manifest, target)))
    else:
        print_summary(manifest, target, f"exported {name}")
        typer.echo(f"try it: qavp-run {target} --image FILE --prompt TEXT")


def _dry_run(model: str, preset: str, overrides: dict[str, Any], hub: dict[str, Any], as_json: bool) -> None:
    from qavp_export.checkpoint import read_config
    from qavp_export.cli.report import print_estimate
    from qavp_export.estimate import estimate
    from qavp_export.hub import resolve_model
    from qavp_export.pipeline import read_plan
    from qavp_export.recipe import make_recipe
    from qavp_export.settings import settle

    recipe = make_recipe(preset, overrides)
    folder = resolve_model(model, config_only=True, progress=not as_json, **hub).folder
    config, family, plan = read_plan(folder, read_config(folder))
    result = estimate(config, family, plan, settle(recipe, family, plan))
    if as_json:
        typer.echo(json.dumps({"model": model, **result.to_dict()}))
    else:
        print_estimate(result, model)


def _verify(bundle: Path, as_json: bool) -> None:
    from qavp_export.verify import verify

    manifest = verify(bundle)
    if as_json:
        typer.echo(json.dumps({"bundle": str(bundle), "files": len(manifest.files), "valid": True}))
    else:
        typer.echo(f"{bundle} is valid: {len(manifest.files)} files unchanged, {len(manifest.components)} graphs load")


def _list_models(as_json: bool) -> None:
    from qavp_export.families import FAMILIES
    from qavp_export.hub import SHORT_NAMES

    if as_json:
        families = {
            name: {"description": family.description, "scorers": family.scorers} for name, family in FAMILIES.items()
        }
        typer.echo(json.dumps({"families": families, "short_names": dict(SHORT_NAMES)}))
        return
    console = Console()
    table = Table("model_type", "description", "scorers", title="Families", title_justify="left", box=None)
    for name, family in FAMILIES.items():
        table.add_row(name, family.description, ", ".join(family.scorers))
    console.print(table)
    names = Table("short name", "Hub id", title="\nShort names", title_justify="left", box=None)
    for short, repo in SHORT_NAMES.items():
        names.add_row(short, repo)
    console.print(names)
