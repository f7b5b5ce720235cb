"""Checks a bundle that is already on disk: every hash, every graph."""

from __future__ import annotations

from pathlib import Path

import onnx

from qavp_export.bundle import verify_files
from qavp_export.engines import EngineOptions, load_engine
from qavp_export.engines.ort.encoders import OrtEncoders
from qavp_export.engines.ort.plan import EnginePlan
from qavp_export.engines.tensorrt.keys import EngineKeys, check_files
from qavp_export.engines.tensorrt.targets import FLAVOURS
from qavp_export.errors import BundleError, UnavailableError
from qavp_export.manifest import Manifest


def verify(bundle: Path) -> Manifest:
    """Re-checks every hash of a bundle, loads every canonical graph, and looks up the weights of lowered ones.

    Returns:
        The bundle's manifest.

    Raises:
        BundleError: A file is missing, changed or not listed, or a graph is not valid; the message names it.
    """
    manifest = Manifest.read(bundle)
    verify_files(bundle, manifest)
    for component in manifest.components.values():
        path = bundle / component.file
        try:
            onnx.checker.check_model(path)
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            raise BundleError(f"{path} is not a valid graph ({error}); export the bundle again") from error
    for name, engine in manifest.engines.items():
        if name in FLAVOURS:
            check_files(EngineKeys.read(bundle, name), bundle)
            continue
        folder = bundle / engine["folder"]
        EnginePlan.read(folder).check(bundle, folder)
    try:
        load_engine("ort-reference", bundle, manifest, EngineOptions())
    except UnavailableError:
        # A decoder in a format that no engine here runs: the checker above has read it.
        OrtEncoders(bundle, manifest, EngineOptions())
    return manifest
