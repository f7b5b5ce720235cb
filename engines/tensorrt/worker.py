"""Builds one engine, in a process of its own: TensorRT's libraries must not share one with ONNX Runtime's.

Run as `python -m qavp_export.engines.tensorrt.worker REQUEST`, a JSON file (`Request`), it writes the engine and a
`Report` beside the request, and says on stdout how far it is.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qavp_export.engines.tensorrt.keys import TENSORRT
from qavp_export.engines.tensorrt.library import import_library
from qavp_export.errors import QavpError, UnavailableError

PROGRESS = "progress "


@dataclass(frozen=True)
class Request:
    """What is to be built.

    Attributes:
        flavour: `tensorrt` or `tensorrt-rtx`.
        report: Where the report goes.
        model: The ONNX file; None only asks what there is.
        engine: Where the engine goes.
        profiles: Shapes by input (least, usual, greatest), profile by profile; see `profiles.Profile`.
        values: Inputs whose profiles are values, not shapes.
        capabilities: Compute capabilities to build for; none: that of the GPU.
        timing_cache: A file that is read if it exists, and written.
        plugins: Whether plugins are registered.
    """

    flavour: str
    report: str
    model: str | None = None
    engine: str | None = None
    profiles: tuple[dict[str, list[list[int]]], ...] = ()
    values: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = ()
    timing_cache: str | None = None
    plugins: bool = False


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        version: Version of the library.
        capability: Compute capability of the GPU; None where none is needed.
        driver: CUDA version of its driver; None where none is needed.
        layers: Lines of the builder's log that describe layers.
        inspector: What the engine inspector says, as JSON; None without a GPU.
        error: Why nothing was built; None: it was.
        unavailable: Whether that is because something is not there.
    """

    version: str = ""
    capability: int | None = None
    driver: int | None = None
    layers: tuple[str, ...] = ()
    inspector: str | None = None
    error: str | None = None
    unavailable: bool = False


def main(path: str) -> None:
    """Does what a request says."""
    request = Request(**json.loads(Path(path).read_text(encoding="utf-8")))
    try:
        report = _run(request)
    except QavpError as error:
        report = Report(error=str(error), unavailable=isinstance(error, UnavailableError))
    Path(request.report).write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")


def _run(request: Request) -> Report:
    trt = import_library(request.flavour)
    report = Report(version=str(trt.__version__))
    if request.flavour == TENSORRT:
        from qavp_export.engines.cuda.driver import Device

        try:
            device = Device.open()
        except UnavailableError as error:
            raise UnavailableError(f"--engine tensorrt builds on the GPU that will run the engine: {error}") from error
        major, minor = device.capability
        report = dataclasses.replace(report, capability=10 * major + minor, driver=device.driver_version)
    if request.model is None:
        return report
    if request.plugins and report.capability is not None:
        from qavp_export.engines.tensorrt.plugins.register import register_plugins

        register_plugins(trt, report.capability)
    return _Build(trt, request).run(report)


class _Build:
    """Parses and builds one network."""

    def __init__(self, trt: Any, request: Request) -> None:
        self._trt = trt
        self._request = request
        self._log = _make_log(trt)

    def run(self, report: Report) -> Report:
        """Writes the engine and returns what is in it."""
        builder = self._trt.Builder(self._log)
        flags = self._trt.NetworkDefinitionCreationFlag
        # Kernels that are compiled here travel in the engine: who loads it needs no Python.
        wanted = [flags.STRONGLY_TYPED, *([flags.PREFER_AOT_PYTHON_PLUGINS] if self._request.plugins else [])]
        network = builder.create_network(sum(1 << int(flag) for flag in wanted))
        # It holds the weights until the engine is built.
        parser = self._parse(network)
        config = self._configure(builder)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise QavpError(
                f"the builder failed: {self._log.errors[0] if self._log.errors else 'its log says nothing'}"
            )
        del parser
        with Path(str(self._request.engine)).open("wb") as file:
            file.write(engine)
        self._keep_timings(config)
        inspector = None if report.capability is None else self._inspect(engine)
        layers = tuple(line for line in self._log.lines if line.startswith("Name: "))
        return dataclasses.replace(report, layers=layers, inspector=inspector)

    def _parse(self, network: Any) -> Any:
        parser = self._trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(self._request.model)):
            found = [parser.get_error(index) for index in range(parser.num_errors)]
            reasons = [f"{error.node_name() or 'the graph'}: {' '.join(error.desc().split())}" for error in found]
            raise QavpError(f"the parser refused {'; '.join(reasons[:1]) or 'the graph'}")
        # Not in 10.13, for which attention is written out.
        attention = getattr(self._trt.LayerType, "ATTENTION_OUTPUT", None)
        for layer in (network.get_layer(index) for index in range(network.num_layers)):
            if layer.type == attention:
                layer.__class__ = self._trt.IAttentionOutputLayer
                # Where no kernel is fused for its sizes, it runs as single operators of the same types.
                layer.attention.decomposable = True
        return parser

    def _configure(self, builder: Any) -> Any:
        trt, request = self._trt, self._request
        config = builder.create_builder_config()
        if request.capabilities:
            config.num_compute_capabilities = len(request.capabilities)
            for index, capability in enumerate(request.capabilities):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
        # The log, and the inspector, then tell what layers run in.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = _make_monitor(trt)
        for shapes in request.profiles:
            profile = builder.create_optimization_profile()
            for name, bounds in shapes.items():
                (profile.set_shape_input if name in request.values else profile.set_shape)(name, *bounds)
            config.add_optimization_profile(profile)
        if request.timing_cache is not None:
            path = Path(request.timing_cache)
            stored = path.read_bytes() if path.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False)
        return config

    def _keep_timings(self, config: Any) -> None:
        if self._request.timing_cache is not None:
            with Path(self._request.timing_cache).open("wb") as file:
                file.write(config.get_timing_cache().serialize())

    def _inspect(self, serialized: Any) -> str:
        runtime = self._trt.Runtime(self._log)
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise QavpError(f"the engine that was built cannot be loaded: {' '.join(self._log.errors[:1])}")
        text: str = engine.create_engine_inspector().get_engine_information(self._trt.LayerInformationFormat.JSON)
        return text


def _make_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors, and the lines that tell of layers."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(" ".join(message.split()))
            else:
                self.lines.extend(message.splitlines())

    return Log()


def _make_monitor(trt: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Says how far the outermost phase is."""

        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._steps:
                sys.stdout.write(f"{PROGRESS}{step} {self._steps[phase_name]}\n")
                sys.stdout.flush()
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


if __name__ == "__main__":
    main(sys.argv[1])
