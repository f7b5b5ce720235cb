"""Builds and runs an engine with real TensorRT bindings that have no library behind them, in a process of its own.

Run as a script (`bindings_probe.py BINDINGS`): what only a library makes is a mock that has the attributes of the
bindings' class and no others, so that a name that the worker or the runtime asks for in vain fails. `stub_libraries` of
`plugin_probe` makes the bindings importable.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import NonCallableMagicMock


class _Package:
    """The bindings, with some of their classes replaced."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _like(kind: type) -> Any:
    return NonCallableMagicMock(spec_set=kind)


def _engine(trt: Any) -> Any:
    engine = _like(trt.ICudaEngine)
    engine.create_engine_inspector.return_value = _like(trt.EngineInspector)
    engine.create_engine_inspector.return_value.get_engine_information.return_value = "{}"
    engine.num_io_tensors = 2
    engine.get_tensor_name.side_effect = ["past", "present"].__getitem__
    engine.get_tensor_mode.side_effect = {"past": trt.TensorIOMode.INPUT, "present": trt.TensorIOMode.OUTPUT}.get
    engine.get_tensor_dtype.return_value = trt.DataType.HALF
    engine.get_tensor_shape.return_value = [-1, 4]
    engine.get_tensor_profile_shape.return_value = [[1, 4], [2, 4], [3, 4]]
    engine.get_tensor_location.return_value = trt.TensorLocation.DEVICE
    if hasattr(trt.ICudaEngine, "get_aliased_input_tensor"):
        engine.get_aliased_input_tensor.return_value = "past"
    context = engine.create_execution_context.return_value = _like(trt.IExecutionContext)
    context.get_tensor_shape.return_value = (2, 4)
    return engine


def _package(trt: Any) -> _Package:
    layer = _like(getattr(trt, "IAttentionOutputLayer", trt.ILayer))
    layer.type = getattr(trt.LayerType, "ATTENTION_OUTPUT", trt.LayerType.SCATTER)
    network = _like(trt.INetworkDefinition)
    network.num_layers = 1
    network.get_layer.return_value = layer
    config = _like(trt.IBuilderConfig)
    config.create_timing_cache.return_value = _like(trt.ITimingCache)
    config.get_timing_cache.return_value.serialize.return_value = b"timings"
    builder = _like(trt.Builder)
    builder.create_network.return_value = network
    builder.create_builder_config.return_value = config
    builder.create_optimization_profile.return_value = _like(trt.IOptimizationProfile)
    builder.build_serialized_network.return_value = b"engine"
    runtime = _like(trt.Runtime)
    runtime.deserialize_cuda_engine.side_effect = lambda _: _engine(trt)
    parser = _like(trt.OnnxParser)
    classes = {"Builder": builder, "Runtime": runtime, "OnnxParser": parser}
    return _Package(trt, **{name: lambda *_, made=made: made for name, made in classes.items()})


def _build(trt: Any, folder: Path) -> bool:
    from qavp_export.engines.tensorrt.worker import Report, Request, _Build

    request = Request(
        "tensorrt",
        str(folder / "report.json"),
        str(folder / "model.onnx"),
        str(folder / "network.engine"),
        ({"past": [[1, 4], [2, 4], [3, 4]], "count": [[1], [2], [3]]},),
        ("count",),
        timing_cache=str(folder / "timing.cache"),
        plugins=True,
    )
    report = _Build(trt, request).run(Report(trt.__version__, 80, 13000))
    return report.inspector == "{}" and (folder / "network.engine").read_bytes() == b"engine"


def _run(folder: Path) -> bool:
    """Runs what was built; returns whether the cache is updated in place."""
    import numpy as np

    from qavp_export.engines.tensorrt.execution import Network
    from qavp_export.engines.tensorrt.keys import GraphKeys
    from qavp_export.engines.tensorrt.library import Library
    from tests.engines.fake_cuda import FakeDevice

    path = folder / "network.engine"
    keys = GraphKeys.of(path, ("past",), ("present",), {}, {})
    device: Any = FakeDevice()
    network = Network(Library("tensorrt"), device, "decoder", path, keys)
    network.check({"past": (2, 4)}, 0)
    execution = network.execution(0, graphs=True)
    outputs = execution.run({"past": np.zeros((2, 4), np.float16)}, ["present"], execution.stream)
    if outputs["present"].shape != (2, 4):
        raise ValueError("another shape than the context says")
    return network.updates_in_place("past", "present")


def main(bindings: str) -> None:
    """Prints what was found as JSON."""
    sys.path.insert(0, bindings)
    real = importlib.import_module("tensorrt_bindings")
    trt = _package(real)
    sys.modules["tensorrt"] = trt  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        built = _build(trt, Path(folder))
        in_place = _run(Path(folder))
    layers = [
        name for name in ("ATTENTION_OUTPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING") if hasattr(real.LayerType, name)
    ]
    sys.stdout.write(json.dumps({"version": real.__version__, "built": built, "in_place": in_place, "layers": layers}))


if __name__ == "__main__":
    main(sys.argv[1])
