"""What engines an export builds, and whether they can be built here and run there; standard library only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qavp_export.engines.tensorrt.keys import RTX_CAPABILITIES, TENSORRT, TENSORRT_RTX, dotted
from qavp_export.errors import InputError, UnavailableError

FLAVOURS = (TENSORRT, TENSORRT_RTX)
# First compute capability whose GPUs multiply a format, by how precisions begin.
_NEEDS: Mapping[str, int] = MappingProxyType({"nvfp4": 100, "w4": 80, "bfloat16": 80})
_FORMATS: Mapping[str, str] = MappingProxyType(
    {"nvfp4": "nvfp4", "w4": "w4a4, w4a8, w4a16", "w8": "w8a8, w8a16", "float": "none"}
)


@dataclass(frozen=True)
class EngineTargets:
    """What is built beside the engines of ONNX Runtime.

    Attributes:
        flavours: Some of `FLAVOURS`.
        capabilities: Compute capabilities that TensorRT-RTX builds for, such as 89.
        max_tokens: Tokens of prompt and answer together; None: as many as the model's context, 2048 at most.
        max_batch: Sequences at once.
        allow_precision_fallback: Whether a layer may run in another precision than the network asks for.
        capability_report: Whether Polygraphy's capability report goes into the bundle.
    """

    flavours: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = ()
    max_tokens: int | None = None
    max_batch: int = 4
    allow_precision_fallback: bool = False
    capability_report: bool = False

    def check(self) -> None:
        """Checks the values by themselves.

        Raises:
            InputError: One is out of range or goes with none of the engines.
            UnavailableError: TensorRT-RTX does not build for a compute capability.
        """
        if (TENSORRT_RTX in self.flavours) != bool(self.capabilities):
            raise InputError(
                "--sm goes with --engine tensorrt-rtx: the compute capability of the GPU that will run the engine, "
                "like 89 for 8.9"
            )
        unknown = sorted(set(self.capabilities) - set(RTX_CAPABILITIES))
        if unknown:
            known = ", ".join(map(str, RTX_CAPABILITIES))
            raise UnavailableError(
                f"TensorRT-RTX does not build this for --sm {unknown[0]}; it does for {known}; "
                "use --engine tensorrt on that GPU"
            )
        if self.max_batch < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise InputError("--max-batch and --max-tokens are 1 or more")
        if self.capability_report and not self.flavours:
            raise InputError("--capability-report goes with --engine tensorrt or tensorrt-rtx")


def check_formats(precisions: Collection[str], capabilities: Collection[int]) -> None:
    """Checks that GPUs multiply what a decoder's layers hold.

    Args:
        precisions: `w4a4`, `nvfp4`, `float16`, ...
        capabilities: Compute capabilities of the GPUs.

    Raises:
        UnavailableError: One does not; the message says what runs there.
    """
    for capability in sorted(capabilities):
        for precision in sorted(precisions):
            least = next((least for begin, least in _NEEDS.items() if precision.startswith(begin)), 0)
            if capability < least:
                runs = [names for begin, names in _FORMATS.items() if capability >= _NEEDS.get(begin, 0)]
                raise UnavailableError(
                    f"{precision} needs a GPU of compute capability {dotted(least)} or newer, not "
                    f"{dotted(capability)}; choose a recipe that runs there: {', '.join(runs)}"
                )
