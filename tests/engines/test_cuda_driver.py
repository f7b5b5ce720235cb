"""Error paths of the CUDA driver wrapper; what works is checked on a GPU (benchmarks/gpu_check.py)."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as bindings

from qavp_export.engines.cuda.driver import Device
from qavp_export.errors import InputError, QavpError, UnavailableError

SUCCESS = bindings.CUresult.CUDA_SUCCESS
VALUES: dict[str, tuple[Any, ...]] = {
    "cuDeviceGetCount": (2,),
    "cuDeviceGet": (0,),
    "cuDevicePrimaryCtxRetain": ("context",),
    "cuDeviceGetName": (b"Fake GPU\0\0\0",),
    "cuDeviceGetAttribute": (9,),
    "cuDriverGetVersion": (13000,),
    "cuDeviceTotalMem": (1 << 30,),
    "cuMemGetInfo": (300, 1000),
    "cuMemAlloc": (0xABC0,),
    "cuStreamCreate": (7,),
    "cuStreamEndCapture": ("recorded",),
    "cuGraphInstantiate": ("executable",),
    "cuEventCreate": ("event",),
    "cuEventElapsedTime": (1.5,),
    "cuModuleLoadData": ("module",),
    "cuModuleGetFunction": ("function",),
}


class FakeDriver:
    """The bindings without a driver: calls are recorded; they succeed unless `failures` has their name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failures: dict[str, bindings.CUresult] = {}
        self.launched: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(bindings, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, arguments))
            code = self.failures.get(name, SUCCESS)
            values = VALUES.get(name, ())
            return code, *((None,) * len(values) if code != SUCCESS else values)

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def cuLaunchKernel(self, *arguments: Any) -> tuple[Any, ...]:
        self.calls.append(("cuLaunchKernel", arguments))
        pointers = ctypes.cast(arguments[9], ctypes.POINTER(ctypes.c_void_p))
        self.launched = [ctypes.string_at(pointers[index] or 0, 4) for index in range(4)]
        return (self.failures.get("cuLaunchKernel", SUCCESS),)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    return driver


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(_has_driver(), reason="this machine has a CUDA driver")
def test_without_a_driver_one_line_says_so() -> None:
    with pytest.raises(UnavailableError, match=r"^there is no CUDA driver \(.*libcuda\.so\.1\)") as caught:
        Device.open()
    assert "\n" not in str(caught.value)


def test_without_the_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(UnavailableError, match="pip install cuda-bindings"):
        Device.open()


def test_no_gpu(fake: FakeDriver) -> None:
    fake.failures["cuInit"] = bindings.CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(UnavailableError, match="cuInit failed with CUDA_ERROR_NO_DEVICE"):
        Device.open()


@pytest.mark.parametrize("ordinal", [-1, 2])
def test_no_such_gpu(fake: FakeDriver, ordinal: int) -> None:
    with pytest.raises(UnavailableError, match=f"no GPU {ordinal}: the CUDA driver shows 2"):
        Device.open(ordinal)
    assert "cuDevicePrimaryCtxRetain" not in fake.names()


def test_an_open_device_says_what_it_is(fake: FakeDriver) -> None:
    device = Device.open(1)
    assert (device.name, device.capability, device.driver_version) == ("Fake GPU", (9, 9), 13000)
    assert (device.total_memory, device.sm_count, device.memory_used()) == (1 << 30, 9, 700)
    assert ("cuDeviceGet", (1,)) in fake.calls
    assert ("cuCtxSetCurrent", ("context",)) in fake.calls


USES: dict[str, Callable[[Device], object]] = {
    "cuCtxSetCurrent": lambda device: device.make_current(),
    "cuMemGetInfo": lambda device: device.memory_used(),
    "cuMemAlloc": lambda device: device.alloc(16),
    "cuMemcpyHtoDAsync": lambda device: device.alloc(16).upload(np.zeros(4, np.float32), device.stream()),
    "cuMemcpyDtoHAsync": lambda device: device.alloc(16).download(np.zeros(4, np.float32), device.stream()),
    "cuMemsetD8Async": lambda device: device.alloc(16).zero(device.stream()),
    "cuStreamCreate": lambda device: device.stream(),
    "cuStreamSynchronize": lambda device: device.stream().synchronize(),
    "cuStreamBeginCapture": lambda device: _captured(device),
    "cuStreamEndCapture": lambda device: _captured(device),
    "cuGraphInstantiate": lambda device: _captured(device),
    "cuGraphLaunch": lambda device: _captured(device).launch(device.stream()),
    "cuEventCreate": lambda device: device.event(),
    "cuEventRecord": lambda device: device.event().record(device.stream()),
    "cuEventSynchronize": lambda device: device.event().elapsed_ms(device.event()),
    "cuEventElapsedTime": lambda device: device.event().elapsed_ms(device.event()),
    "cuModuleLoadData": lambda device: device.load("ptx", "kernel"),
    "cuModuleGetFunction": lambda device: device.load("ptx", "kernel"),
    "cuFuncSetAttribute": lambda device: _launch(device, 50_000),
    "cuLaunchKernel": lambda device: _launch(device, 0),
}


def _captured(device: Device) -> Any:
    with device.stream().capture() as capture:
        pass
    return capture.graph


def _launch(device: Device, shared_bytes: int) -> None:
    arguments = [device.alloc(64), -2, 0.5, ctypes.c_uint8(3)]
    device.load("ptx", "kernel").launch((1, 2, 3), (64, 1, 1), arguments, shared_bytes, device.stream())


@pytest.mark.parametrize("name", USES)
def test_every_failure_has_the_drivers_name(fake: FakeDriver, name: str) -> None:
    device = Device.open()
    USES[name](device)
    fake.failures[name] = bindings.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(QavpError, match=f"^{name} failed with CUDA_ERROR_ILLEGAL_ADDRESS$"):
        USES[name](device)


def test_a_launch_passes_addresses_of_the_values(fake: FakeDriver) -> None:
    _launch(Device.open(), 0)
    launch = next(arguments for name, arguments in fake.calls if name == "cuLaunchKernel")
    assert launch[:9] == ("function", 1, 2, 3, 64, 1, 1, 0, 7)
    assert fake.launched[0] == (0xABC0).to_bytes(4, "little")
    assert fake.launched[1] == (-2).to_bytes(4, "little", signed=True)
    assert fake.launched[2] == np.float32(0.5).tobytes()
    assert fake.launched[3][:1] == b"\3"


def test_a_function_opts_in_to_more_shared_memory_once(fake: FakeDriver) -> None:
    device = Device.open()
    function, stream = device.load("ptx", "kernel"), device.stream()
    arguments = [device.alloc(4)] * 4
    for shared_bytes in (48 * 1024, 100_000, 60_000):
        function.launch((1, 1, 1), (32, 1, 1), arguments, shared_bytes, stream)
    attribute = bindings.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    opted = [arguments for name, arguments in fake.calls if name == "cuFuncSetAttribute"]
    assert opted == [("function", attribute, 100_000)]


def test_arguments_that_do_not_fit_32_bits_are_refused(fake: FakeDriver) -> None:
    device = Device.open()
    with pytest.raises(InputError, match="2147483648 does not fit 32 bits"):
        device.load("ptx", "kernel").launch((1, 1, 1), (32, 1, 1), [2**31], 0, device.stream())
    assert "cuLaunchKernel" not in fake.names()


def test_memory_is_freed_when_the_buffer_is_collected(fake: FakeDriver) -> None:
    buffer = Device.open().alloc(16)
    assert "cuMemFree" not in fake.names()
    del buffer
    gc.collect()
    assert fake.calls[-1] == ("cuMemFree", (0xABC0,))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(5, np.float32), "20 bytes does not fit a buffer of 16"),
        (np.zeros((2, 4), np.float32)[:, ::2], "C-contiguous"),
    ],
)
def test_arrays_that_cannot_be_copied(fake: FakeDriver, array: Any, message: str) -> None:
    device = Device.open()
    buffer, stream = device.alloc(16), device.stream()
    with pytest.raises(InputError, match=message):
        buffer.upload(array, stream)
    with pytest.raises(InputError, match=message):
        buffer.download(array, stream)
    assert not {"cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"} & set(fake.names())


def test_no_memory_at_all_is_refused(fake: FakeDriver) -> None:
    with pytest.raises(InputError, match="0 bytes"):
        Device.open().alloc(0)
    assert "cuMemAlloc" not in fake.names()


def test_an_error_inside_a_capture_ends_it(fake: FakeDriver) -> None:
    stream = Device.open().stream()
    with pytest.raises(KeyError), stream.capture():
        raise KeyError
    assert fake.names()[-1] == "cuStreamEndCapture"


def test_ptx_ends_in_a_zero_byte(fake: FakeDriver) -> None:
    function = Device.open().load("ptx", "kernel")
    assert ("cuModuleLoadData", (b"ptx\0",)) in fake.calls
    assert ("cuModuleGetFunction", ("module", b"kernel")) in fake.calls
    assert function.name == "kernel"
