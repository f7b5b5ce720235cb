"""The CPU engine: lowered graphs, integers end to end, run by ONNX Runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from qavp_export.engines import EngineOptions
from qavp_export.engines.ort.lowered import Backend, LoweredEngine, LoweredGraphs
from qavp_export.engines.ort.plan import CPU_FOLDER
from qavp_export.engines.ort.reference import check_format
from qavp_export.engines.ort.session import CPU_PROVIDER
from qavp_export.manifest import Manifest

_CPU = Backend(CPU_FOLDER, (CPU_PROVIDER,), "cpu", np.float32, ("float32", "int8"), vision="w8a8")
_UNSIGNED = ".unsigned"


class OrtCpuEngine(LoweredEngine):
    """Runs a bundle with 8-bit integer products for images and prompts, and packed weights for single tokens."""

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Opens the graphs; see `LoweredEngine`.

        Raises:
            UnavailableError: The decoder is in NVFP4.
        """
        check_format(bundle, manifest)
        super().__init__(bundle, manifest, options, cpu_graphs(bundle, options))


def cpu_graphs(bundle: Path, options: EngineOptions) -> LoweredGraphs:
    """Returns the graphs that this processor runs.

    Raises:
        BundleError: They are missing or cannot be read.
    """
    graphs = LoweredGraphs(bundle, options, _CPU)
    if multiplies_exactly(graphs):
        return graphs
    return LoweredGraphs(bundle, options, dataclasses.replace(_CPU, suffix=_UNSIGNED))


def multiplies_exactly(graphs: LoweredGraphs) -> bool:
    """Tells whether this processor multiplies unsigned by signed 8-bit integers without overflow in between.

    x86 without VNNI adds two products in 16 bits, which these do not fit.
    """
    codes = np.full((2, 64), 255, np.uint8)
    product = graphs.open("probe", "probe").run({"codes": ort.OrtValue.ortvalue_from_numpy(codes)})["product"].numpy()
    return bool((product == 64 * 255 * 127).all())
