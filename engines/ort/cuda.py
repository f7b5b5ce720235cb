"""The CUDA engine: the CPU engine's lowering with the operands and types that ONNX Runtime's CUDA provider takes."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped]

from qavp_export.engines import EngineOptions
from qavp_export.engines.ort.lowered import Backend, LoweredEngine, LoweredGraphs
from qavp_export.engines.ort.plan import CUDA_FOLDER
from qavp_export.engines.ort.reference import check_format
from qavp_export.engines.ort.session import CPU_PROVIDER, CUDA_PROVIDER
from qavp_export.errors import UnavailableError
from qavp_export.manifest import Manifest

_CUDA = Backend(CUDA_FOLDER, (CUDA_PROVIDER, CPU_PROVIDER), "cuda", np.float16, ("float16",), vision="fp32")


class OrtCudaEngine(LoweredEngine):
    """Runs a bundle with ONNX Runtime's CUDA provider, and nothing if that does not load."""

    def __init__(self, bundle: Path, manifest: Manifest, options: EngineOptions) -> None:
        """Opens the graphs; see `LoweredEngine`.

        Raises:
            UnavailableError: The decoder is in NVFP4, or the CUDA provider does not load here.
        """
        check_format(bundle, manifest)
        super().__init__(bundle, manifest, options, cuda_graphs(bundle, options))


def cuda_graphs(bundle: Path, options: EngineOptions) -> LoweredGraphs:
    """Returns the graphs that ONNX Runtime's CUDA provider runs.

    Raises:
        BundleError: They are missing or cannot be read.
        UnavailableError: The provider does not load here.
    """
    check_driver()
    graphs = LoweredGraphs(bundle, options, _CUDA)
    # ONNX Runtime would go on with the CPU provider alone.
    if CUDA_PROVIDER not in graphs.open("probe", "probe").providers():
        raise _unavailable(
            f"the CUDA provider does not load; install CUDA and cuDNN for ONNX Runtime {ort.__version__}"
        )
    return graphs


def check_driver() -> None:
    """Checks what can be told without a bundle: ONNX Runtime has the provider, and a driver is installed.

    Raises:
        UnavailableError: One is missing.
    """
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise _unavailable(f"ONNX Runtime {ort.__version__} is built without CUDA; install onnxruntime-gpu")
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise _unavailable(
                f"no NVIDIA driver is installed ({error}); run on a machine with an NVIDIA GPU"
            ) from error


def _unavailable(reason: str) -> UnavailableError:
    return UnavailableError(f"engine 'ort-cuda' is not available here: {reason}")
