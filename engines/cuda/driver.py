"""The part of the CUDA driver that engines and kernels need: memory, streams, graphs, events and kernel launches.

Needs NVIDIA's package cuda-bindings and a driver; both are looked for when a device is opened. Every return code is
checked. The device's primary context is used, which other libraries of the process share.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qavp_export.errors import InputError, QavpError, UnavailableError

# A plain int is passed as a 32-bit integer and a float as a 32-bit float; ctypes values as they are.
Argument: TypeAlias = "Buffer | int | float | ctypes._SimpleCData[Any]"
Size: TypeAlias = tuple[int, int, int]

# Blocks get more dynamic shared memory only where a function asks for it.
_SHARED_BYTES = 48 * 1024


class Device:
    """A GPU. Its primary context is current in the thread that opened it; see `make_current`.

    Attributes:
        name: As its maker calls it.
        capability: Compute capability, such as (9, 0).
        driver_version: The newest CUDA that the driver runs, such as 13000.
        total_memory: Bytes.
        sm_count: Streaming multiprocessors.
    """

    def __init__(self, cuda: Any, device: Any, context: Any) -> None:
        """Wraps an open device; see `open`."""
        self._cuda = cuda
        self._context = context
        attributes = cuda.CUdevice_attribute
        self.name: str = _call(cuda, "cuDeviceGetName", 256, device).split(b"\0")[0].decode()
        self.capability = (
            int(_call(cuda, "cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)),
            int(_call(cuda, "cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)),
        )
        self.driver_version = int(_call(cuda, "cuDriverGetVersion"))
        self.total_memory = int(_call(cuda, "cuDeviceTotalMem", device))
        self.sm_count = int(
            _call(cuda, "cuDeviceGetAttribute", attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device)
        )

    @classmethod
    def open(cls, ordinal: int = 0) -> Device:
        """Opens a GPU and makes its primary context current in this thread.

        Args:
            ordinal: Which of the GPUs that the driver shows.

        Raises:
            UnavailableError: No cuda-bindings, no driver, or no such GPU.
        """
        cuda = _bindings()
        try:
            _call(cuda, "cuInit", 0)
            count = int(_call(cuda, "cuDeviceGetCount"))
        except UnavailableError:
            raise
        except QavpError as error:
            raise UnavailableError(f"the CUDA driver does not start: {error}") from error
        if not 0 <= ordinal < count:
            raise UnavailableError(f"there is no GPU {ordinal}: the CUDA driver shows {count}")
        device = _call(cuda, "cuDeviceGet", ordinal)
        opened = cls(cuda, device, _call(cuda, "cuDevicePrimaryCtxRetain", device))
        # The context lives as long as what was made in it needs it: the driver counts, and ends it with the process.
        opened.make_current()
        return opened

    def make_current(self) -> None:
        """Makes the device's context current in this thread: every thread that uses the device does so once."""
        _call(self._cuda, "cuCtxSetCurrent", self._context)

    def alloc(self, nbytes: int) -> Buffer:
        """Allocates device memory, uninitialized.

        Raises:
            QavpError: There is not enough.
        """
        return Buffer(self._cuda, nbytes)

    def stream(self) -> Stream:
        """Makes a stream that does not wait for the default stream."""
        return Stream(self._cuda)

    def event(self) -> Event:
        """Makes an event that takes the time."""
        return Event(self._cuda)

    def load(self, image: str | bytes, name: str) -> Function:
        """Loads a kernel.

        Args:
            image: PTX or a cubin.
            name: The entry's name.

        Raises:
            QavpError: The driver cannot load the image, or it has no such entry.
        """
        return Function(self._cuda, image, name)

    def memory_used(self) -> int:
        """Returns the bytes of device memory in use, by all processes."""
        free, total = _call(self._cuda, "cuMemGetInfo")
        return int(total) - int(free)


class Buffer:
    """Device memory, freed when the object is collected.

    Attributes:
        address: Where it begins.
        nbytes: Its size.
    """

    def __init__(self, cuda: Any, nbytes: int) -> None:
        """Allocates; see `Device.alloc`."""
        if nbytes < 1:
            raise InputError(f"{nbytes} bytes of device memory cannot be allocated: ask for at least one")
        self._cuda = cuda
        self.nbytes = nbytes
        self.address = int(_call(cuda, "cuMemAlloc", nbytes))
        weakref.finalize(self, cuda.cuMemFree, self.address)

    def upload(self, array: npt.NDArray[Any], stream: Stream) -> None:
        """Copies a C-contiguous array to the buffer's start; the array may change once this returns.

        Raises:
            InputError: The array is larger than the buffer or not contiguous.
        """
        self._check(array)
        if array.nbytes:
            _call(self._cuda, "cuMemcpyHtoDAsync", self.address, array.ctypes.data, array.nbytes, stream.handle)

    def download(self, array: npt.NDArray[Any], stream: Stream) -> None:
        """Fills a C-contiguous array from the buffer's start and waits until it is filled.

        Raises:
            InputError: The array is larger than the buffer or not contiguous.
        """
        self._check(array)
        if array.nbytes:
            _call(self._cuda, "cuMemcpyDtoHAsync", array.ctypes.data, self.address, array.nbytes, stream.handle)
        stream.synchronize()

    def zero(self, stream: Stream) -> None:
        """Fills the buffer with zeros, in the stream's order."""
        _call(self._cuda, "cuMemsetD8Async", self.address, 0, self.nbytes, stream.handle)

    def copy_rows(
        self,
        source: Buffer,
        stream: Stream,
        *,
        width: int,
        height: int,
        pitches: tuple[int, int],
        offsets: tuple[int, int] = (0, 0),
    ) -> None:
        """Copies rows of bytes from a buffer of the same device, in the stream's order.

        Args:
            source: Where they come from.
            stream: Where it is done.
            width: Bytes of a row.
            height: Rows.
            pitches: Bytes from row to row, here and in the source.
            offsets: Bytes before the first row, here and in the source.
        """
        device = self._cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy = self._cuda.CUDA_MEMCPY2D()
        copy.dstMemoryType, copy.srcMemoryType = device, device
        copy.dstDevice, copy.srcDevice = self.address + offsets[0], source.address + offsets[1]
        copy.dstPitch, copy.srcPitch = pitches
        copy.WidthInBytes, copy.Height = width, height
        _call(self._cuda, "cuMemcpy2DAsync", copy, stream.handle)

    def _check(self, array: npt.NDArray[Any]) -> None:
        if array.nbytes > self.nbytes:
            raise InputError(f"an array of {array.nbytes} bytes does not fit a buffer of {self.nbytes}")
        if not array.flags.c_contiguous:
            raise InputError("only C-contiguous arrays are copied: pass numpy.ascontiguousarray(array)")


class Stream:
    """Work in order.

    Attributes:
        handle: The driver's stream, as a number.
    """

    def __init__(self, cuda: Any) -> None:
        """Makes a stream; see `Device.stream`."""
        self._cuda = cuda
        self.handle = int(_call(cuda, "cuStreamCreate", int(cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)))
        weakref.finalize(self, cuda.cuStreamDestroy, self.handle)

    def synchronize(self) -> None:
        """Waits until all work is done; errors of that work surface here."""
        _call(self._cuda, "cuStreamSynchronize", self.handle)

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        """Records what is launched in the block instead of running it; the capture has the graph afterwards.

        Buffers and functions of the launches must outlive the graph. Nothing in the block may wait for the device.
        """
        capture = Capture()
        # Relaxed: a buffer that is collected meanwhile must not spoil the capture.
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        _call(self._cuda, "cuStreamBeginCapture", self.handle, mode)
        try:
            yield capture
        except BaseException:
            # The stream must leave the capture; what went wrong inside is the error to report.
            self._cuda.cuStreamEndCapture(self.handle)
            raise
        capture.graph = Graph(self._cuda, _call(self._cuda, "cuStreamEndCapture", self.handle))


class Capture:
    """What a stream records.

    Attributes:
        graph: The graph, once the block is left; None before.
    """

    def __init__(self) -> None:
        self.graph: Graph | None = None


class Graph:
    """Recorded launches, which one call repeats."""

    def __init__(self, cuda: Any, recorded: Any) -> None:
        """Instantiates a recorded graph; see `Stream.capture`."""
        self._cuda = cuda
        try:
            self._executable = _call(cuda, "cuGraphInstantiate", recorded, 0)
        finally:
            cuda.cuGraphDestroy(recorded)
        weakref.finalize(self, cuda.cuGraphExecDestroy, self._executable)

    def launch(self, stream: Stream) -> None:
        """Repeats the launches, in the stream's order."""
        _call(self._cuda, "cuGraphLaunch", self._executable, stream.handle)


class Event:
    """A moment in a stream."""

    def __init__(self, cuda: Any) -> None:
        """Makes an event; see `Device.event`."""
        self._cuda = cuda
        self._handle = _call(cuda, "cuEventCreate", int(cuda.CUevent_flags.CU_EVENT_DEFAULT))
        weakref.finalize(self, cuda.cuEventDestroy, self._handle)

    def record(self, stream: Stream) -> None:
        """Marks the moment when the stream gets here."""
        _call(self._cuda, "cuEventRecord", self._handle, stream.handle)

    def elapsed_ms(self, start: Event) -> float:
        """Waits for the event and returns the milliseconds since `start`; both must have been recorded."""
        _call(self._cuda, "cuEventSynchronize", self._handle)
        return float(_call(self._cuda, "cuEventElapsedTime", start._handle, self._handle))


class Function:
    """A kernel on the device."""

    def __init__(self, cuda: Any, image: str | bytes, name: str) -> None:
        """Loads a kernel; see `Device.load`."""
        self._cuda = cuda
        self.name = name
        # PTX must end in a zero byte.
        data = image.encode() + b"\0" if isinstance(image, str) else image
        module = _call(cuda, "cuModuleLoadData", data)
        weakref.finalize(self, cuda.cuModuleUnload, module)
        self._handle = _call(cuda, "cuModuleGetFunction", module, name.encode())
        self._shared_bytes = _SHARED_BYTES

    def launch(self, grid: Size, block: Size, arguments: Sequence[Argument], shared_bytes: int, stream: Stream) -> None:
        """Launches the kernel, in the stream's order.

        Args:
            grid: Blocks along each axis.
            block: Threads of a block along each axis.
            arguments: All arguments in order: buffers, ints (32-bit), floats (32-bit) and ctypes values.
            shared_bytes: Dynamic shared memory of each block.
            stream: Where it runs.

        Raises:
            QavpError: The driver refuses the launch.
        """
        if shared_bytes > self._shared_bytes:
            attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call(self._cuda, "cuFuncSetAttribute", self._handle, attribute, shared_bytes)
            self._shared_bytes = shared_bytes
        values = [_value(argument) for argument in arguments]
        # The driver copies the values before it returns.
        pointers = (ctypes.c_void_p * max(1, len(values)))(*[ctypes.addressof(value) for value in values])
        _call(
            self._cuda,
            "cuLaunchKernel",
            self._handle,
            *grid,
            *block,
            shared_bytes,
            stream.handle,
            ctypes.addressof(pointers),
            0,
        )


def _value(argument: Argument) -> ctypes._SimpleCData[Any]:
    if isinstance(argument, Buffer):
        return ctypes.c_uint64(argument.address)
    if isinstance(argument, int | np.integer):
        if not -(2**31) <= argument < 2**31:
            raise InputError(f"the argument {argument} does not fit 32 bits: pass a ctypes value")
        return ctypes.c_int32(int(argument))
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return argument


def _bindings() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise UnavailableError(f"GPUs are used through cuda-bindings ({error}): pip install cuda-bindings") from error


def _call(cuda: Any, name: str, *arguments: Any) -> Any:
    """Calls the driver and returns what it returns: nothing, a value, or a tuple of values.

    Raises:
        UnavailableError: There is no driver.
        QavpError: The call failed; the message has the driver's name of the error.
    """
    try:
        code, *values = getattr(cuda, name)(*arguments)
    except RuntimeError as error:
        # The bindings load the driver's library at the first call, and this is how they say that they cannot.
        raise UnavailableError(f"there is no CUDA driver ({error}): it comes with NVIDIA's GPU driver") from error
    if code != cuda.CUresult.CUDA_SUCCESS:
        raise QavpError(f"{name} failed with {code.name}")
    return values[0] if len(values) == 1 else tuple(values) if values else None
