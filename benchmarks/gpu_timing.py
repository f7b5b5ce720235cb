"""Runs compiled kernels on PyTorch's tensors, and times them beside PyTorch's own.

Launches are captured into one CUDA graph, which takes the launches' own cost out, and each reads inputs of its own, so
that none finds them in the cache.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from gpu_compile import Binary, compile_all, spec_key
from rich.console import Console
from rich.progress import track

from qavp_export.engines.cuda.driver import Device, Function
from qavp_export.engines.kernels.compile import CompiledKernel, KernelSpec

Grid = tuple[int, int, int]

_SAID = Console(stderr=True)
_REPEATS = 25
_WARM_UP = 3
# Bytes that inputs of successive launches have together, as a multiple of the cache's.
_BEYOND_CACHE = 3
_MOST_SETS = 64


@dataclass(frozen=True)
class Launch:
    """Something to run on PyTorch's current stream.

    Attributes:
        run: Runs it.
        holds: What must stay in memory for that.
    """

    run: Callable[[], object]
    holds: object = None

    def __call__(self) -> None:
        """Runs it."""
        self.run()


class Kernels:
    """Compiled kernels, loaded on the GPU that is there.

    Args:
        device: The GPU.

    Attributes:
        capability: What they are compiled for, such as 90.
        reports: Registers and spilled bytes of each thread, by kernel.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        major, minor = device.capability
        self.capability = 10 * major + minor
        self.reports: dict[str, dict[str, int]] = {}
        self._loaded: dict[str, tuple[CompiledKernel, Function]] = {}

    def compile(self, specs: Iterable[KernelSpec], ready: Mapping[str, Binary]) -> None:
        """Loads kernels, and compiles those that are not `ready`, several at a time."""
        wanted = {spec_key(spec): spec for spec in specs}
        missing = [spec for key, spec in wanted.items() if key not in ready]
        for key in wanted.keys() & ready.keys():
            self._load(wanted[key], ready[key])
        binaries = compile_all(missing, self.capability)
        for spec, binary in track(zip(missing, binaries, strict=True), "compile", len(missing), console=_SAID):
            self._load(spec, binary)

    def _load(self, spec: KernelSpec, binary: Binary) -> None:
        function = self._device.load(binary.cubin, binary.compiled.name)
        self._loaded[spec_key(spec)] = binary.compiled, function
        report = {"registers": binary.registers, "spilled_bytes": binary.spilled_bytes}
        self.reports[f"{spec.function} {dict(spec.constants)} {spec.num_warps} warps"] = report

    def bind(self, spec: KernelSpec, grid: Grid, arguments: Sequence[torch.Tensor | int]) -> Launch:
        """Returns what launches a compiled kernel on PyTorch's current stream.

        Args:
            spec: The kernel; `compile` had it.
            grid: Its programs.
            arguments: Tensors on the GPU and integers, in the specification's order; the launch keeps them alive.
        """
        compiled, function = self._loaded[spec_key(spec)]
        passed = [value if isinstance(value, int) else ctypes.c_uint64(value.data_ptr()) for value in arguments]
        block = (32 * compiled.num_warps, 1, 1)
        # The tensors are held: a CUDA graph has nothing but their addresses.
        return Launch(lambda: function.launch(grid, block, passed, compiled.shared_bytes, _CurrentStream()), arguments)


@dataclass(frozen=True)
class _CurrentStream:
    """PyTorch's current stream, as far as a launch looks at it."""

    @property
    def handle(self) -> int:
        return torch.cuda.current_stream().cuda_stream


def sets_beyond_cache(nbytes: int) -> int:
    """Returns how many copies of `nbytes` of inputs exceed the cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(_MOST_SETS, -(-_BEYOND_CACHE * cache // nbytes)))


def time_launches(launches: Sequence[Launch]) -> float:
    """Returns the microseconds of one launch: the median over replays of a CUDA graph that holds them all."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for launch in launches:
                launch()
        times = []
        for repeat in range(_WARM_UP + _REPEATS):
            started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            started.record(stream)
            graph.replay()
            ended.record(stream)
            ended.synchronize()
            if repeat >= _WARM_UP:
                times.append(1e3 * started.elapsed_time(ended) / len(launches))
    return statistics.median(times)


def copy_bandwidth(nbytes: int = 1 << 32) -> float:
    """Returns the bytes a second that a copy on the GPU reads and writes; the faster of two ways."""
    source = torch.randint(0, 1 << 30, (nbytes // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return max(2 * nbytes / (1e-6 * time_launches([Launch(way)])) for way in ways)
