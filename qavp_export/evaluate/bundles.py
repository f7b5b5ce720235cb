"""Exports of one checkpoint in one folder: what is there, of the same checkpoint and recipe, is not made again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from qavp_export import pipeline
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import BundleError
from qavp_export.job import draw_prompts, identify
from qavp_export.manifest import MANIFEST_NAME, Manifest
from qavp_export.recipe import Recipe, check_clip
from qavp_export.settings import choose_scorer, settle
from qavp_export.source import open_source
from qavp_export.text_tower import open_text_tower

_DIGITS = 12


class Bundles:
    """The bundles of one checkpoint.

    A bundle's folder is named after everything that shapes it (recipe, versions, calibration data, and the checkpoints'
    configurations with sizes and times of their files), so that another recipe or checkpoint never meets an old bundle.

    Args:
        checkpoint: The checkpoint folder.
        name: The model as the user named it.
        work: Where bundles are; made if missing.
        targets: What is built beside the engines of ONNX Runtime; None: nothing.
        clip: Folder and name of the CLIP checkpoint that the scorer `text` needs; None: there is none.

    Raises:
        CheckpointError: A checkpoint is incomplete, corrupt or not supported.
        RecipeError: The CLIP checkpoint is not that of the model's vision tower.
    """

    def __init__(
        self,
        checkpoint: Path,
        name: str,
        work: Path,
        targets: EngineTargets | None = None,
        clip: tuple[Path, str] | None = None,
    ) -> None:
        self._source = open_source(checkpoint, name)
        self._tower = None if clip is None else open_text_tower(*clip, self._source.config)
        self._checkpoint = checkpoint
        self._work = work
        self._targets = targets
        self._clip = clip

    def check_scorer(self, recipe: Recipe) -> None:
        """Checks that the checkpoint can serve a recipe's scorer.

        Raises:
            RecipeError: It cannot, or the scorer needs a CLIP checkpoint and there is none.
        """
        choose_scorer(recipe, self._source.family, self._source.plan)
        check_clip(recipe, given=self._clip_for(recipe) is not None)

    def path(self, recipe: Recipe) -> Path:
        """Returns where the recipe's bundle is or will be.

        Raises:
            RecipeError: The recipe does not fit the checkpoint.
        """
        settings = settle(recipe, self._source.family, self._source.plan)
        source = self._source
        if settings.reads_question:
            source = dataclasses.replace(source, text_tower=self._tower)
        identity = identify(source, settings, draw_prompts(recipe, None))
        engines = None if self._targets is None else repr(self._targets)
        # Paths among the fields of a configuration are text; everything else is JSON already.
        text = json.dumps([identity, engines], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
        return self._work / f"{recipe.name}-keep{recipe.keep:g}-{digest}"

    def get(self, recipe: Recipe, progress: pipeline.Progress) -> Path:
        """Returns the recipe's bundle; exports it unless it is there, whole.

        Raises:
            QavpError: As `pipeline.export`.
        """
        path = self.path(recipe)
        if not _is_whole(path):
            pipeline.export(
                self._checkpoint,
                recipe,
                path,
                name=self._source.name,
                force=True,
                progress=progress,
                targets=self._targets,
                clip=self._clip_for(recipe),
            )
        return path

    def _clip_for(self, recipe: Recipe) -> tuple[Path, str] | None:
        return self._clip if recipe.semantic == "text" else None


def _is_whole(bundle: Path) -> bool:
    """Whether every file is there in its size; what was changed in place shows only by hash (`--verify`)."""
    if not (bundle / MANIFEST_NAME).is_file():
        return False
    try:
        manifest = Manifest.read(bundle)
        return all((bundle / entry.path).stat().st_size == entry.bytes for entry in manifest.files)
    except (BundleError, OSError):
        return False
