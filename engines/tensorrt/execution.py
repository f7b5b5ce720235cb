"""Deserialized engines and their execution contexts, on device memory."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qavp_export.engines.cuda.driver import Buffer, Device, Stream
from qavp_export.engines.tensorrt.keys import TENSORRT_RTX, GraphKeys
from qavp_export.engines.tensorrt.library import Library
from qavp_export.errors import BundleError, InputError, QavpError

Array = NDArray[Any]

_TYPES: Mapping[str, type[np.generic]] = MappingProxyType(
    {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "INT64": np.int64,
        "INT32": np.int32,
        "INT8": np.int8,
        "BOOL": np.bool_,
    }
)


class Network:
    """One deserialized engine. Its contexts may run at the same time.

    Attributes:
        name: What messages call it.
        inputs: Names of its inputs; the builder may leave out what the graph does not read.
        outputs: Names of its outputs.
    """

    def __init__(self, library: Library, device: Device, name: str, path: Path, keys: GraphKeys) -> None:
        """Deserializes an engine and checks what it takes and returns.

        Raises:
            BundleError: The file holds no engine, or one with other inputs or outputs.
        """
        self.name = name
        self.outputs = keys.outputs
        self._library = library
        self._device = device
        self._path = path
        self._engine = library.deserialize(path)
        self._dtypes = self._check_tensors(keys)
        self.inputs = frozenset(self._dtypes) - frozenset(keys.outputs)
        # Kernels that TensorRT-RTX compiles on the first run are shared by all contexts.
        self._kernels = self._runtime_cache() if library.flavour == TENSORRT_RTX else None

    def limits(self, tensor: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the least and the largest shape of an input."""
        shape = tuple(self._engine.get_tensor_shape(tensor))
        if min(shape, default=0) >= 0:
            return shape, shape
        least, _, most = self._engine.get_tensor_profile_shape(tensor, profile)
        return tuple(least), tuple(most)

    def dtype(self, tensor: str) -> np.dtype[Any]:
        """Returns the type of an input or output."""
        return self._dtypes[tensor]

    def on_host(self, tensor: str) -> bool:
        """Tells whether an input is read by the processor, as values are that make shapes."""
        location = self._engine.get_tensor_location(tensor)
        return bool(location == self._library.trt.TensorLocation.HOST)

    def updates_in_place(self, past: str, present: str) -> bool:
        """Tells whether an output is the memory of an input."""
        # Releases without a cache update do not have the method.
        aliased = getattr(self._engine, "get_aliased_input_tensor", None)
        return aliased is not None and aliased(present) == past

    def check(self, shapes: Mapping[str, Sequence[int]], profile: int) -> None:
        """Checks shapes of inputs.

        Raises:
            InputError: The engine was not built for one.
        """
        for tensor, shape in shapes.items():
            least, most = self.limits(tensor, profile)
            fits = len(shape) == len(most) and all(
                low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
            )
            if not fits:
                raise InputError(
                    f"{tensor} of the {self.name} has shape {list(shape)}, and {self._path} was built for "
                    f"{list(least)} to {list(most)}; give less at once, or export the bundle for more"
                )

    def execution(self, profile: int, *, graphs: bool) -> Execution:
        """Creates a context.

        Args:
            profile: The optimization profile that it runs.
            graphs: Whether its launches are repeated with the same shapes, so that a CUDA graph of them pays; only
                TensorRT-RTX makes one by itself.

        Raises:
            QavpError: There is no memory for it.
        """
        # Memory for this profile alone: single tokens need far less than prompts.
        strategy = self._library.trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if self._kernels is None:
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.set_runtime_cache(self._kernels)
            strategies = self._library.trt.CudaGraphStrategy
            config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
            context = self._engine.create_execution_context(config)
        stream = self._device.stream()
        if context is None or not context.set_optimization_profile_async(profile, stream.handle):
            raise self._library.failed(self.name)
        stream.synchronize()
        return Execution(self, context, self._device, stream)

    def failed(self) -> QavpError:
        """Returns the error for a run that failed."""
        return self._library.failed(self.name)

    def _check_tensors(self, keys: GraphKeys) -> Mapping[str, np.dtype[Any]]:
        engine, modes = self._engine, self._library.trt.TensorIOMode
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = {name for name in names if engine.get_tensor_mode(name) == modes.INPUT}
        differing = sorted((inputs - set(keys.inputs)) | (set(names) - inputs ^ set(keys.outputs)))
        types = {name: engine.get_tensor_dtype(name).name for name in names}
        differing += [name for name, kind in types.items() if kind not in _TYPES]
        if differing:
            raise BundleError(
                f"{self._path} does not have the inputs and outputs of a {self.name} "
                f"({', '.join(differing[:4])} differ); export the bundle again"
            )
        return {name: np.dtype(_TYPES[kind]) for name, kind in types.items()}

    def _runtime_cache(self) -> Any:
        return self._engine.create_runtime_config().create_runtime_cache()


class Execution:
    """An execution context with memory of its own, for one run at a time.

    Attributes:
        stream: What it runs on unless another is given.
    """

    def __init__(self, network: Network, context: Any, device: Device, stream: Stream) -> None:
        """Takes a context; see `Network.execution`."""
        self.stream = stream
        self._network = network
        self._context = context
        self._device = device
        self._buffers: dict[str, Buffer] = {}
        self._on_host: dict[str, Array] = {}

    def feed(self, arrays: Mapping[str, Array], stream: Stream) -> None:
        """Uploads inputs and binds them."""
        for name, array in arrays.items():
            if self._network.on_host(name):
                self._on_host[name] = array.copy()
                self.bind(name, array.shape, self._on_host[name].ctypes.data)
                continue
            # An address is wanted even for what is empty.
            buffer = self._buffer(name, max(array.nbytes, 1))
            if array.nbytes:
                buffer.upload(array, stream)
            self.bind(name, array.shape, buffer.address)

    def refill(self, name: str, array: Array, stream: Stream) -> None:
        """Uploads an input anew that is bound already, shape and address unchanged."""
        self._buffers[name].upload(array, stream)

    def bind(self, name: str, shape: Sequence[int], address: int) -> None:
        """Binds an input to memory that is already there.

        Raises:
            QavpError: The engine was not built for this shape.
        """
        fits = self._context.set_input_shape(name, tuple(shape))
        if not fits or not self._context.set_tensor_address(name, address):
            raise self._network.failed()

    def bind_output(self, name: str, address: int) -> None:
        """Binds an output to memory that is already there."""
        if not self._context.set_tensor_address(name, address):
            raise self._network.failed()

    def make_output(self, name: str) -> tuple[Buffer, tuple[int, ...]]:
        """Binds an output to memory of this context; returns it with its shape, which follows from the inputs'."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise self._network.failed()
        buffer = self._buffer(name, max(self._network.dtype(name).itemsize * int(np.prod(shape)), 1))
        self.bind_output(name, buffer.address)
        return buffer, shape

    def enqueue(self, stream: Stream) -> None:
        """Runs once on what is bound; does not wait."""
        if not self._context.execute_async_v3(stream.handle):
            raise self._network.failed()

    def run(self, inputs: Mapping[str, Array], outputs: Collection[str], stream: Stream) -> dict[str, Array]:
        """Runs once and waits; inputs that are not given are bound already."""
        self.feed(inputs, stream)
        made = {name: self.make_output(name) for name in outputs}
        self.enqueue(stream)
        arrays = {name: np.empty(shape, self._network.dtype(name)) for name, (_, shape) in made.items()}
        for name, (buffer, _) in made.items():
            if arrays[name].nbytes:
                buffer.download(arrays[name], stream)
        stream.synchronize()
        return arrays

    def _buffer(self, name: str, nbytes: int) -> Buffer:
        """Returns memory of at least this size; it is kept for later runs."""
        kept = self._buffers.get(name)
        if kept is None or kept.nbytes < nbytes:
            kept = self._buffers[name] = self._device.alloc(nbytes)
        return kept


class ContextPool:
    """Contexts of one profile that are not in use. As many are created as run at the same time."""

    def __init__(self, create: Callable[[], Execution]) -> None:
        """Starts with none; `create` makes one."""
        self._create = create
        self._idle: list[Execution] = []
        self._lock = threading.Lock()

    def take(self) -> Execution:
        """Returns a context that no one else uses until it is given back."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return self._create()

    def give(self, execution: Execution) -> None:
        """Takes a context back; nothing that it was asked to run may still be running."""
        with self._lock:
            self._idle.append(execution)

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Execution]:
        """Lends a context. One that failed is not lent again."""
        execution = self.take()
        yield execution
        self.give(execution)


class Stage:
    """A network that is run from host memory to host memory. Serves calls from several threads at once."""

    def __init__(self, network: Network) -> None:
        """Runs the network's first profile."""
        self.network = network
        self.contexts = ContextPool(lambda: network.execution(0, graphs=False))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the network once.

        Raises:
            InputError: The engine was not built for a shape.
            QavpError: TensorRT or CUDA failed.
        """
        arrays = {name: np.asarray(inputs[name], self.network.dtype(name), order="C") for name in self.network.inputs}
        self.network.check({name: array.shape for name, array in arrays.items()}, 0)
        with self.contexts.borrow() as execution:
            return execution.run(arrays, self.network.outputs, execution.stream)
