"""What is built for an engine, and what is said where it does not run."""

from __future__ import annotations

import sys

import onnxruntime as ort
import pytest

from qavp_export.engines.tensorrt.targets import EngineTargets
from qavp_export.errors import InputError, QavpError, UnavailableError
from qavp_export.evaluate import targets
from qavp_export.evaluate.targets import engine_targets, parse_capabilities


class Gpu:
    def __init__(self, *capability: int) -> None:
        self.capability = capability


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.9, and libraries that import."""
    monkeypatch.setattr(targets, "import_library", lambda _: None)
    monkeypatch.setattr(targets.Device, "open", lambda: Gpu(8, 9))


def ask(engine: str, *capabilities: int, fallback: bool = False) -> EngineTargets | None:
    return engine_targets(engine, capabilities, 20, allow_precision_fallback=fallback)


@pytest.mark.usefixtures("gpu")
def test_engines_are_built_for_the_gpu_that_runs_them() -> None:
    rtx = EngineTargets(("tensorrt-rtx",), (89,), max_batch=20)
    assert ask("tensorrt-rtx") == ask("tensorrt-rtx", 89) == rtx
    assert ask("tensorrt-rtx", 80, 89) == EngineTargets(("tensorrt-rtx",), (80, 89), max_batch=20)
    assert ask("tensorrt", fallback=True) == EngineTargets(("tensorrt",), max_batch=20, allow_precision_fallback=True)
    assert ask("ort-cpu") is None


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("engine", "capabilities", "fallback", "kind", "message"),
    [
        ("tensor", (), False, InputError, "--engine 'tensor' does not exist; choose from ort-cpu, ort-cuda,"),
        ("ort-cpu", (89,), False, InputError, "--sm goes with --engine tensorrt-rtx"),
        ("ort-cpu", (), True, InputError, "--allow-precision-fallback goes with --engine tensorrt-rtx or tensorrt"),
        ("tensorrt", (89,), False, InputError, "--sm goes with --engine tensorrt-rtx"),
        ("tensorrt-rtx", (90,), False, UnavailableError, "does not build this for --sm 90"),
        ("tensorrt-rtx", (80, 120), False, UnavailableError, "8.9, and engines for 8.0, 12.0 do not run on it"),
    ],
)
def test_what_does_not_go_together(
    engine: str, capabilities: tuple[int, ...], fallback: bool, kind: type[QavpError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        ask(engine, *capabilities, fallback=fallback)


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_rtx_does_not_build_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.Device, "open", lambda: Gpu(9, 0))
    with pytest.raises(UnavailableError, match=r"--sm 90; .* use --engine tensorrt on that GPU"):
        ask("tensorrt-rtx")


@pytest.mark.usefixtures("gpu")
def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Gpu:
        raise UnavailableError("there is no CUDA driver")

    monkeypatch.setattr(targets.Device, "open", none)
    for engine in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(UnavailableError, match=f"engine '{engine}' is not available here: there is no CUDA driver"):
            ask(engine)


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match=r"engine 'tensorrt' is not available here: .*pip install 'qavp-export"):
        ask("tensorrt")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match=r"engine 'ort-cuda' is not available here: .* built without CUDA"):
        ask("ort-cuda")
    monkeypatch.setattr(targets, "available_engines", list)
    with pytest.raises(UnavailableError, match="engine 'ort-cpu' is not available here; install onnxruntime-gpu"):
        ask("ort-cpu")


def test_capabilities_are_read() -> None:
    assert parse_capabilities(["120", "89", "89"]) == (89, 120)
    with pytest.raises(InputError, match=r"--sm '8\.9' is no compute capability"):
        parse_capabilities(["8.9"])
