"""Exports of one checkpoint at several keep ratios."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qavp_export.bench.comparison import Progress
from qavp_export.engines import available_engines
from qavp_export.engines.cuda.driver import Device
from qavp_export.engines.tensorrt.keys import RTX_CAPABILITIES, TENSORRT_RTX
from qavp_export.engines.tensorrt.targets import FLAVOURS, EngineTargets
from qavp_export.errors import InputError, UnavailableError
from qavp_export.evaluate.bundles import Bundles
from qavp_export.recipe import make_recipe


def parse_sweep(text: str) -> list[float]:
    """Reads `keep=0.05,0.125,1.0`.

    Returns:
        The ratios, the largest first: ratios of times are against it.

    Raises:
        InputError: The text is not of that form, or a ratio is out of range or there twice.
    """
    field, equals, values = text.partition("=")
    try:
        ratios = [float(value) for value in values.split(",")]
    except ValueError:
        ratios = []
    if field != "keep" or not equals or not ratios:
        raise InputError(f"--sweep {text[:60]!r} is not keep=RATIO,RATIO,..., like keep=0.05,0.125,1.0")
    if not all(0 < ratio <= 1 for ratio in ratios) or len(set(ratios)) < len(ratios):
        raise InputError(f"--sweep {text[:60]!r} has a ratio that is not in (0, 1], or one twice")
    return sorted(ratios, reverse=True)


def export_sweep(
    checkpoint: Path,
    name: str,
    preset: str,
    ratios: list[float],
    work: Path,
    targets: EngineTargets,
    progress: Progress,
) -> list[tuple[str, Path]]:
    """Exports what is missing.

    Args:
        checkpoint: The checkpoint folder.
        name: The model as the user named it.
        preset: A preset or a recipe file.
        ratios: Keep ratios.
        work: Where the bundles are.
        targets: What is built beside the engines of ONNX Runtime.
        progress: Called as the work goes on.

    Returns:
        A name for reports and the folder of each bundle.

    Raises:
        QavpError: As `pipeline.export`.
    """
    recipes = [make_recipe(preset, {"keep": ratio}) for ratio in ratios]
    bundles = Bundles(checkpoint, name, work, targets if targets.flavours else None)
    labels = [f"{recipe.name}, keep {recipe.keep:g}" for recipe in recipes]
    return [
        (label, bundles.get(recipe, partial(_export_progress, progress, label)))
        for label, recipe in zip(labels, recipes, strict=True)
    ]


def _export_progress(progress: Progress, label: str, stage: str, done: int, total: int) -> None:
    progress(f"{label}: {stage}", done, total)


def sweep_targets(engines: Sequence[str]) -> EngineTargets:
    """Returns what a sweep builds for the engines that it compares: for the GPU here, if it can be."""
    wanted = [name for name in FLAVOURS if name in engines and name in available_engines()]
    if not wanted:
        return EngineTargets()
    try:
        major, minor = Device.open().capability
    except UnavailableError:
        return EngineTargets()
    rtx = (10 * major + minor,) if TENSORRT_RTX in wanted and 10 * major + minor in RTX_CAPABILITIES else ()
    return EngineTargets(tuple(name for name in wanted if name != TENSORRT_RTX or rtx), rtx)
