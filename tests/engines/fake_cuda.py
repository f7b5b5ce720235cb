"""A GPU that needs none: device memory is NumPy's; the interface of `engines.cuda.driver`.

Work waits in its stream until someone waits for it, so that what is read or freed too early is noticed.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class FakeError(AssertionError):
    """What would be undefined behaviour."""


class FakeDevice:
    """Device memory, streams and graphs; the interface of `engines.cuda.driver.Device`."""

    name = "fake"
    total_memory = 1 << 30
    sm_count = 1

    def __init__(self, capability: tuple[int, int] = (8, 9), driver_version: int = 13000) -> None:
        self.capability = capability
        self.driver_version = driver_version
        self.captures = 0
        self.launches = 0
        self._memory: dict[int, Array] = {}
        self._addresses = itertools.count(1)
        self._lock = threading.Lock()
        self._streams = weakref.WeakValueDictionary[int, FakeStream]()
        self._threads = threading.local()
        self.make_current()

    def make_current(self) -> None:
        self._threads.current = True

    def check_thread(self) -> None:
        """Fails in a thread in which the device is not current."""
        if not getattr(self._threads, "current", False):
            raise FakeError("the device is not current in this thread")

    @property
    def allocations(self) -> int:
        """Returns how many buffers there are."""
        return len(self._memory)

    def alloc(self, nbytes: int) -> FakeBuffer:
        self.check_thread()
        with self._lock:
            # Far enough apart that no two overlap.
            address = next(self._addresses) << 32
            # What was there before: never zeros.
            self._memory[address] = np.full(nbytes, 0xFF, np.uint8)
        buffer = FakeBuffer(self, address, nbytes)
        weakref.finalize(buffer, self._memory.pop, address)
        return buffer

    def stream(self) -> FakeStream:
        self.check_thread()
        with self._lock:
            stream = FakeStream(self, next(self._addresses))
            self._streams[stream.handle] = stream
        return stream

    def at(self, address: int, nbytes: int) -> Array:
        """Returns memory."""
        base = address >> 32 << 32
        memory = self._memory.get(base)
        offset = address - base
        if memory is None or offset + nbytes > len(memory):
            raise FakeError(f"{nbytes} bytes at {address:#x} are not allocated")
        return memory[offset : offset + nbytes]

    def find(self, handle: int) -> FakeStream:
        """Returns a stream by its handle."""
        return self._streams[handle]


class FakeBuffer:
    """Device memory; freed when it is collected."""

    def __init__(self, device: FakeDevice, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self._device = device

    def upload(self, array: Array, stream: FakeStream) -> None:
        if not array.flags.c_contiguous or array.nbytes > self.nbytes:
            raise FakeError("an upload takes a contiguous array that fits")
        # As for the driver, the array may change from now on.
        device, address, image = self._device, self.address, np.frombuffer(array.tobytes(), np.uint8)
        stream.transfer(lambda: device.at(address, len(image)).__setitem__(..., image))

    def download(self, array: Array, stream: FakeStream) -> None:
        if not array.flags.c_contiguous or array.nbytes > self.nbytes:
            raise FakeError("a download takes a contiguous array that fits")
        device, address = self._device, self.address
        stream.transfer(lambda: array.view(np.uint8).reshape(-1).__setitem__(..., device.at(address, array.nbytes)))

    def zero(self, stream: FakeStream) -> None:
        device, address, nbytes = self._device, self.address, self.nbytes
        stream.submit(lambda: device.at(address, nbytes).fill(0))

    def copy_rows(
        self,
        source: FakeBuffer,
        stream: FakeStream,
        *,
        width: int,
        height: int,
        pitches: tuple[int, int],
        offsets: tuple[int, int] = (0, 0),
    ) -> None:
        device, to, of = self._device, self.address + offsets[0], source.address + offsets[1]
        if width > min(pitches):
            raise FakeError("rows overlap")

        def work() -> None:
            for row in range(height):
                device.at(to + row * pitches[0], width)[:] = device.at(of + row * pitches[1], width)

        stream.submit(work)


class FakeStream:
    """Work in order; nothing is done before someone waits."""

    def __init__(self, device: FakeDevice, handle: int) -> None:
        self.handle = handle
        self._device = device
        self._queue: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] | None = None

    @property
    def capturing(self) -> bool:
        return self._recording is not None

    def submit(self, work: Callable[[], None]) -> None:
        """Takes work that may be captured."""
        (self._queue if self._recording is None else self._recording).append(work)

    def transfer(self, work: Callable[[], None]) -> None:
        """Takes a copy between host and device."""
        if self._recording is not None:
            raise FakeError("a captured copy would read host memory of one step again and again")
        self._queue.append(work)

    def synchronize(self) -> None:
        self._device.check_thread()
        if self._recording is not None:
            raise FakeError("a stream that is captured cannot be waited for")
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    @contextlib.contextmanager
    def capture(self) -> Iterator[FakeCapture]:
        capture = FakeCapture()
        self._recording = []
        try:
            yield capture
            capture.graph = FakeGraph(self._device, self._recording)
            self._device.captures += 1
        finally:
            self._recording = None


class FakeCapture:
    """What was captured."""

    graph: FakeGraph | None = None


class FakeGraph:
    """Launches what was captured."""

    def __init__(self, device: FakeDevice, work: list[Callable[[], None]]) -> None:
        self._device = device
        self._work = work

    def launch(self, stream: FakeStream) -> None:
        self._device.launches += 1
        for work in self._work:
            stream.submit(work)
