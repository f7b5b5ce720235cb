"""A TensorRT that needs no GPU: its engine files are ONNX models, its device memory is NumPy's.

It is stricter than the real one where that finds errors: a launch keeps the shapes and addresses that were bound when
it was enqueued, as a captured graph does; and what an engine was not built for fails.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Mapping, Sequence
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto

from tests.engines.fake_cuda import FakeDevice, FakeError

Profile = Mapping[str, tuple[Sequence[int], Sequence[int]]]
VERSION = "11.4.0.106"
_ALIGNMENT = 256


def save_engine(
    model: onnx.ModelProto,
    path: Path,
    profiles: Sequence[Profile],
    aliases: Mapping[str, str] | None = None,
    sizes: Mapping[str, str] | None = None,
) -> None:
    """Writes an engine file.

    Args:
        model: What it computes.
        path: The file.
        profiles: Least and largest shape of each input, by profile.
        aliases: Outputs that are the memory of an input.
        sizes: Inputs on the host, whose value is the size of this axis.
    """
    written = onnx.ModelProto()
    written.CopyFrom(model)
    settings = {"profiles": profiles, "aliases": aliases or {}, "sizes": sizes or {}}
    onnx.helper.set_model_props(written, {"fake": json.dumps(settings)})
    path.write_bytes(written.SerializeToString())


class TensorIOMode(Enum):
    """As in TensorRT."""

    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(Enum):
    """As in TensorRT."""

    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(Enum):
    """As in TensorRT."""

    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(Enum):
    """As in TensorRT-RTX."""

    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DataType(Enum):
    """As in TensorRT, as far as it is used."""

    FLOAT, HALF, INT64, BF16 = range(4)


_TYPES = {
    TensorProto.FLOAT: (DataType.FLOAT, np.float32),
    TensorProto.FLOAT16: (DataType.HALF, np.float16),
    TensorProto.INT64: (DataType.INT64, np.int64),
    TensorProto.BFLOAT16: (DataType.BF16, np.uint16),
}


class Severity(IntEnum):
    """As in TensorRT."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    """As in TensorRT."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity
    Severity = Severity


class FakeTensorRt:
    """What `import tensorrt` returns."""

    ILogger = ILogger
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    CudaGraphStrategy = CudaGraphStrategy

    def __init__(
        self, device: FakeDevice, version: str = VERSION, *, aliasing: bool = True, capturable: bool = True
    ) -> None:
        self.__version__ = version
        self.device = device
        self.aliasing = aliasing
        self.capturable = capturable
        self.deserialized = 0
        self.strategies: list[CudaGraphStrategy] = []
        self.contexts = 0

    def Runtime(self, log: Any) -> FakeRuntime:
        return FakeRuntime(self, log)


class FakeRuntime:
    """Deserializes."""

    def __init__(self, module: FakeTensorRt, log: Any) -> None:
        self._module = module
        self._log = log

    def deserialize_cuda_engine(self, image: Any) -> FakeEngine | None:
        self._module.deserialized += 1
        try:
            model = onnx.load_from_string(bytes(image))
            settings = json.loads({prop.key: prop.value for prop in model.metadata_props}["fake"])
        except Exception as error:  # whatever the parser raises
            self._log.log(Severity.ERROR, f"not an\nengine: {type(error).__name__}")
            self._log.log(Severity.INFO, "done")
            return None
        kind = FakeEngineThatAliases if self._module.aliasing else FakeEngine
        return kind(self._module, self._log, model, settings)


class FakeConfig:
    """A runtime configuration."""

    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache: object = None

    def create_runtime_cache(self) -> object:
        return object()

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.allocation = strategy

    def set_runtime_cache(self, cache: object) -> bool:
        self.cache = cache
        return True


class FakeEngine:
    """An ONNX model with profiles."""

    def __init__(self, module: FakeTensorRt, log: Any, model: onnx.ModelProto, settings: Mapping[str, Any]) -> None:
        self.module, self.log, self.profiles = module, log, settings["profiles"]
        self.aliases: dict[str, str] = settings["aliases"]
        self.sizes: dict[str, str] = settings["sizes"]
        self.inputs = {value.name: value.type.tensor_type for value in model.graph.input}
        self.outputs = {value.name: value.type.tensor_type for value in model.graph.output}
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _TYPES[{**self.inputs, **self.outputs}[name].elem_type][0]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.sizes else TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> list[int]:
        dims = {**self.inputs, **self.outputs}[name].shape.dim
        return [-1 if dim.dim_param else dim.dim_value for dim in dims]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        least, most = self.profiles[profile][name]
        return [least, most, most]

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(
        self, config: FakeConfig | ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> FakeContext:
        self.module.contexts += 1
        if isinstance(config, FakeConfig):
            self.module.strategies.append(config.cuda_graph_strategy)
        return FakeContext(self)


class FakeEngineThatAliases(FakeEngine):
    """An engine of a release that has a cache update."""

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)


class FakeContext:
    """Runs the model on device memory."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._busy = threading.Lock()
        self._ran: list[dict[str, tuple[int, ...]]] = []

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._engine.module.device.find(stream)
        self._profile = profile
        return profile < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fixed = self._engine.get_tensor_shape(name)
        least, most = self._engine.profiles[self._profile].get(name, (fixed, fixed))
        if len(shape) != len(least) or not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            return self._fail(f"{name} of shape {shape} is outside of profile {self._profile}")
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % _ALIGNMENT and name not in self._engine.sizes:
            return self._fail(f"{name} is not aligned")
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        sizes: dict[str, int] = {}
        for known, shape in self._shapes.items():
            dims = self._engine.inputs[known].shape.dim
            sizes.update({dim.dim_param: size for dim, size in zip(dims, shape, strict=True) if dim.dim_param})
        sizes.update({axis: self._value(each) for each, axis in self._engine.sizes.items() if each in self._addresses})
        dims = self._engine.outputs[name].shape.dim
        return tuple(sizes.get(dim.dim_param, -1) if dim.dim_param else dim.dim_value for dim in dims)

    def _value(self, name: str) -> int:
        return ctypes.c_int64.from_address(self._addresses[name]).value

    def execute_async_v3(self, stream: int) -> bool:
        engine, shapes, addresses = self._engine, dict(self._shapes), dict(self._addresses)
        unbound = ({*engine.inputs} - {*shapes}) | ({*engine.inputs, *engine.outputs} - {*addresses})
        if unbound:
            return self._fail(f"{sorted(unbound)} not bound")
        for output in engine.outputs:
            past = engine.aliases.get(output) if engine.module.aliasing else None
            shared = [name for name in engine.inputs if addresses[name] == addresses[output]]
            if shared != ([past] if past else []):
                return self._fail(f"{output} shares memory with {shared}, not with {past}")
        queue = engine.module.device.find(stream)
        if queue.capturing and (shapes not in self._ran or not engine.module.capturable):
            return self._fail("kernels are initialized in a capture")
        self._ran.append(shapes)
        made = {name: self.get_tensor_shape(name) for name in engine.outputs}
        queue.submit(lambda: self._compute(shapes, addresses, made))
        return True

    def _compute(
        self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int], made: Mapping[str, tuple[int, ...]]
    ) -> None:
        if not self._busy.acquire(blocking=False):
            raise FakeError("a context runs twice at the same time")
        engine, device = self._engine, self._engine.module.device
        try:
            feeds = {}
            for name, value in engine.inputs.items():
                if name in engine.sizes:
                    feeds[name] = np.array([ctypes.c_int64.from_address(addresses[name]).value])
                    continue
                kind = np.dtype(_TYPES[value.elem_type][1])
                memory = device.at(addresses[name], int(np.prod(shapes[name])) * kind.itemsize)
                feeds[name] = memory.copy().view(kind).reshape(shapes[name])
            results = engine.session.run(list(engine.outputs), feeds)
            for (name, shape), result in zip(made.items(), results, strict=True):
                if result.shape != shape:
                    raise FakeError(f"{name} has shape {result.shape}, not {shape}")
                device.at(addresses[name], result.nbytes)[:] = np.frombuffer(result.tobytes(), np.uint8)
        finally:
            self._busy.release()

    def _fail(self, reason: str) -> bool:
        self._engine.log.log(Severity.ERROR, reason)
        return False
