"""Whether an engine can run here, and what exports must build for it: told before the first export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qavp_export.engines import ENGINES, available_engines
from qavp_export.engines.cuda.driver import Device
from qavp_export.engines.tensorrt.keys import TENSORRT_RTX, dotted
from qavp_export.engines.tensorrt.library import import_library
from qavp_export.engines.tensorrt.targets import FLAVOURS, EngineTargets
from qavp_export.errors import InputError, UnavailableError


def parse_capabilities(texts: Sequence[str]) -> tuple[int, ...]:
    """Reads `--sm`.

    Raises:
        InputError: One is no compute capability.
    """
    if not all(text.isdecimal() for text in texts):
        raise InputError(f"--sm {','.join(texts)[:40]!r} is no compute capability, like 89 for 8.9")
    return tuple(sorted({int(text) for text in texts}))


def engine_targets(
    engine: str, capabilities: tuple[int, ...], max_batch: int, *, allow_precision_fallback: bool
) -> EngineTargets | None:
    """Returns what exports must build for the engine; None where every bundle has what it needs.

    Args:
        engine: What is to run the bundles, on this machine.
        capabilities: What TensorRT-RTX builds for; empty: the GPU that is here.
        max_batch: Prompts at once.
        allow_precision_fallback: Whether a layer may run in another precision than the network asks for.

    Raises:
        InputError: The engine does not exist, or an option goes with another one.
        UnavailableError: The engine does not run here.
    """
    if engine not in ENGINES:
        raise InputError(f"--engine {engine[:40]!r} does not exist; choose from {', '.join(ENGINES)}")
    if engine not in FLAVOURS:
        if capabilities or allow_precision_fallback:
            option = "--sm" if capabilities else "--allow-precision-fallback"
            raise InputError(f"{option} goes with --engine tensorrt-rtx" + ("" if capabilities else " or tensorrt"))
        _check_here(engine)
        return None
    targets = EngineTargets(
        (engine,), capabilities, max_batch=max_batch, allow_precision_fallback=allow_precision_fallback
    )
    # What is wrong on any machine comes before what this one lacks.
    if capabilities or engine != TENSORRT_RTX:
        targets.check()
    here = _capability(engine)
    if engine == TENSORRT_RTX:
        targets = replace(targets, capabilities=capabilities or (here,))
        targets.check()
        if here not in targets.capabilities:
            built = ", ".join(map(dotted, targets.capabilities))
            raise UnavailableError(
                f"the GPU here has compute capability {dotted(here)}, and engines for {built} do not run on it; "
                f"give --sm {here}"
            )
    return targets


def _check_here(engine: str) -> None:
    """Checks an engine of ONNX Runtime."""
    if engine not in available_engines():
        raise UnavailableError(f"engine {engine!r} is not available here; install {ENGINES[engine].install}")
    if engine == "ort-cuda":
        from qavp_export.engines.ort.cuda import check_driver

        check_driver()


def _capability(engine: str) -> int:
    """Returns the compute capability of the GPU that would run a flavour of TensorRT here."""
    import_library(engine)
    try:
        major, minor = Device.open().capability
    except UnavailableError as error:
        raise UnavailableError(f"engine {engine!r} is not available here: {error}") from error
    return 10 * major + minor
