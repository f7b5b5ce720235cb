"""The TensorRT library: found, logged and asked to deserialize."""

from __future__ import annotations

import importlib
import mmap
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qavp_export.engines.tensorrt.keys import TENSORRT, TENSORRT_RTX, TITLES
from qavp_export.errors import BundleError, QavpError, UnavailableError

# The package, and our extra that installs it.
_MODULES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {TENSORRT: ("tensorrt", "tensorrt"), TENSORRT_RTX: ("tensorrt_rtx", "rtx")}
)
_KEPT_ERRORS = 4


class Library:
    """One flavour of TensorRT.

    Its libraries must not share a process with those of ONNX Runtime's TensorRT provider: nothing here imports it.

    Attributes:
        flavour: `tensorrt` or `tensorrt-rtx`.
        trt: The imported package.
        version: Its version, in full.
    """

    def __init__(self, flavour: str) -> None:
        """Imports the package.

        Raises:
            UnavailableError: It is not installed, or does not load.
        """
        self.flavour = flavour
        self.trt = import_library(flavour)
        self.version = str(self.trt.__version__)
        self._errors: deque[str] = deque(maxlen=_KEPT_ERRORS)
        # The runtime refers to its log, and engines to their runtime, without keeping them.
        self._log = self._make_log()
        self._runtime = self.trt.Runtime(self._log)

    def deserialize(self, path: Path) -> Any:
        """Returns the engine that a file holds. The file is mapped, not read into memory of its own.

        Raises:
            BundleError: It holds none.
        """
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            engine = self._runtime.deserialize_cuda_engine(image)
        if engine is None:
            raise BundleError(
                f"{path} cannot be deserialized by {TITLES[self.flavour]} {self.version} ({self.reason()}); "
                "export the bundle again"
            )
        return engine

    def failed(self, what: str) -> QavpError:
        """Returns the error for something that TensorRT did not do."""
        return QavpError(f"{TITLES[self.flavour]} failed in the {what} ({self.reason()})")

    def reason(self) -> str:
        """Returns what the log said last."""
        return self._errors[-1] if self._errors else "its log says nothing"

    def _make_log(self) -> Any:
        severity, errors = self.trt.ILogger.ERROR, self._errors

        class Log(self.trt.ILogger):  # type: ignore[misc,name-defined]
            """Keeps the last errors; failures are raised with them."""

            def log(self, level: Any, message: str) -> None:
                if level <= severity:
                    errors.append(" ".join(message.split()))

        return Log()


def import_library(flavour: str) -> Any:
    """Imports a flavour's package.

    Raises:
        UnavailableError: It is not installed, or does not load.
    """
    module, extra = _MODULES[flavour]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(
            f"engine {flavour!r} is not available here: {module} cannot be imported ({reason}); "
            f"pip install 'qavp-export[{extra}]'"
        ) from error
