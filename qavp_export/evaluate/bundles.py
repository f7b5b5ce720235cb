"""Exports of one checkpoint in one folder: what is there, of the same checkpoint and recipe, is not made again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from qavp_export import pipeline
from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import BundleError
from qavp_export.manifest import MANIFEST_NAME, Manifest
from qavp_export.recipe import Recipe
from qavp_export.settings import settle
from qavp_export.source import open_source

_DIGITS = 12


class Bundles:
    """The bundles of one checkpoint.

    A bundle's folder is named after everything that shapes it (recipe, versions, calibration data, and the checkpoint's
    configuration with sizes and times of its files), so that another recipe or checkpoint never meets an old bundle.

    Args:
        checkpoint: The checkpoint folder.
        name: The model as the user named it.
        work: Where bundles are; made if missing.
        targets: What is built beside the engines of ONNX Runtime; None: nothing.

    Raises:
        CheckpointError: The checkpoint is incomplete, corrupt or not supported.
    """

    def __init__(self, checkpoint: Path, name: str, work: Path, targets: EngineTargets | None = None) -> None:
        self._source = open_source(checkpoint, name)
        self._checkpoint = checkpoint
        self._work = work
        self._targets = targets

    def path(self, recipe: Recipe) -> Path:
        """Returns where the recipe's bundle is or will be.

        Raises:
            RecipeError: The recipe does not fit the checkpoint.
        """
        settings = settle(recipe, self._source.family, self._source.plan)
        identity = pipeline.identify(self._source, settings, pipeline.draw_prompts(recipe, None))
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
            )
        return path


def _is_whole(bundle: Path) -> bool:
    """Whether every file is there in its size; what was changed in place shows only by hash (`--verify`)."""
    if not (bundle / MANIFEST_NAME).is_file():
        return False
    try:
        manifest = Manifest.read(bundle)
        return all((bundle / entry.path).stat().st_size == entry.bytes for entry in manifest.files)
    except (BundleError, OSError):
        return False
