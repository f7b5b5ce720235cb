"""What an export works from: understood, chosen and checked before anything is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qavp_export.calibration import CalibrationSet, demo_calibration, read_calibration
from qavp_export.calibration.alpha import FIT_PROMPTS
from qavp_export.description import versions
from qavp_export.engines.tensorrt.build import CheckedTargets, check_targets
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import RecipeError
from qavp_export.families import Plan
from qavp_export.passes import NVFP4
from qavp_export.recipe import Recipe, check_clip
from qavp_export.settings import Settings, settle
from qavp_export.source import Source, open_source
from qavp_export.text_tower import open_text_tower


@dataclass(frozen=True)
class Job:
    """What an export works from.

    Attributes:
        source: The checkpoint.
        settings: The recipe, with every choice made.
        targets: What is built beside the engines of ONNX Runtime.
        drawn: The calibration prompts; None if the recipe needs none.
    """

    source: Source
    settings: Settings
    targets: CheckedTargets
    drawn: CalibrationSet | None

    def identity(self) -> dict[str, Any]:
        """Returns what the export can only be resumed with."""
        return identify(self.source, self.settings, self.drawn)


def open_job(
    folder: Path,
    name: str,
    recipe: Recipe,
    targets: EngineTargets,
    clip: tuple[Path, str] | None,
    calibration_data: Path | None,
) -> Job:
    """Opens a checkpoint for a recipe; reads no weight.

    Args:
        folder: The checkpoint folder.
        name: The model as the user named it.
        recipe: What to do.
        targets: What is built beside the engines of ONNX Runtime.
        clip: Folder and name of the CLIP checkpoint that the scorer `text` needs.
        calibration_data: Image prompts, see `read_calibration`; None takes the demo's.

    Raises:
        QavpError: Bad input, or an unavailable target; see the subclasses.
    """
    check_clip(recipe, given=clip is not None)
    source = open_source(folder, name)
    settings = settle(recipe, source.family, source.plan)
    if clip is not None and settings.reads_question:
        source = dataclasses.replace(source, text_tower=open_text_tower(*clip, source.config))
    checked = check_engines(targets, settings, source.plan)
    return Job(source, settings, checked, draw_prompts(recipe, calibration_data))


def check_engines(targets: EngineTargets, settings: Settings, plan: Plan) -> CheckedTargets:
    """Checks that engines can be built here, and that what a recipe puts into them runs there.

    Raises:
        InputError: A setting is out of range.
        UnavailableError: The library or a GPU is not there, or the GPU does not run a format.
    """
    recipe = settings.recipe
    decoder = NVFP4 if recipe.format == NVFP4 else recipe.decoder
    precisions = {decoder, recipe.lm_head, *recipe.keep_precision.values()}
    return check_targets(targets, precisions, plan.context_length, settings.tokens_kept)


def draw_prompts(recipe: Recipe, data: Path | None) -> CalibrationSet | None:
    """Draws the calibration prompts that a recipe needs; None if it needs none.

    Raises:
        CalibrationError: The data are missing or malformed.
        RecipeError: Data were given to a recipe that does not read them.
    """
    if not recipe.needs_calibration:
        if data is not None:
            raise RecipeError(
                f"recipe {recipe.name} reads no calibration data; leave --calibration out, or use gptq or --alpha auto"
            )
        return None
    samples = recipe.calibration_samples if recipe.calibrates_decoder else min(recipe.calibration_samples, FIT_PROMPTS)
    if data is None:
        return demo_calibration(samples, recipe.seed)
    return read_calibration(data, samples, recipe.seed)


def identify(source: Source, settings: Settings, drawn: CalibrationSet | None) -> dict[str, Any]:
    """Returns what an export can only be resumed with: checkpoint, recipe, calibration data and versions."""
    tower = source.text_tower
    return {
        "checkpoint": source.checkpoint.fingerprint(),
        "clip": None if tower is None else tower.checkpoint.fingerprint(),
        # What is still to be chosen is not what a number says.
        "recipe": settings.resolved() | {"alpha": settings.recipe.alpha},
        "calibration": None if drawn is None else drawn.describe(),
        "version": versions(),
    }
