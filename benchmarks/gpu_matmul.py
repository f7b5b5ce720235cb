"""Checks the W4A4 product against exact integers on fresh random data, and times it beside cuBLAS in float16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType

import torch
from gpu_kernels import GROUP, TOKENS
from gpu_report import Check, Timing
from gpu_timing import Kernels, Launch, sets_beyond_cache, time_launches

from qavp_export.engines.kernels import matmul, packing
from qavp_export.engines.kernels.compile import KernelSpec
from qavp_export.engines.kernels.tilings import Tiling, candidate_tilings, matmul_tiling

# Input and output channels of LLaVA-1.5-7B's linear layers.
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))
# How many times faster than cuBLAS, by tokens.
GOALS = MappingProxyType({1: 2.5, 136: 1.5, 2048: 1.5})
# Sizes that fill no tile, with other group sizes.
_ODD = (
    (3, 1152, 77, 64),
    (17, 4096, 1000, 128),
    (136, 2048, 4104, 512),
    (257, 11008, 130, 128),
    (1, 96, 33, 32),
    (5, 512, 96, 16),
    (40, 1024, 200, 256),
)
# cuBLAS has no int8 products of so few.
_FEW = 16
_SIZES = (*_ODD, *((tokens, inputs, outputs, GROUP) for inputs, outputs in SHAPES for tokens in TOKENS))


@dataclass(frozen=True)
class Layer:
    """A random W4A4 layer and its input, on the GPU.

    Attributes:
        products: `[T, K]` int8: activations' codes times multipliers.
        steps: `[T]` float32.
        weight: `[N, K / 2]` int8, packed.
        multipliers: `[N, K / G]` int8.
        scales: `[N]` float32.
        group_size: G.
    """

    products: torch.Tensor
    steps: torch.Tensor
    weight: torch.Tensor
    multipliers: torch.Tensor
    scales: torch.Tensor
    group_size: int

    @classmethod
    def draw(cls, random: torch.Generator, tokens: int, inputs: int, outputs: int, group_size: int) -> Layer:
        """Draws one; products reach from -120 to 105 as codes times multipliers do."""

        def integers(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=random, device="cuda", dtype=torch.int8)

        return cls(
            integers(-120, 106, (tokens, inputs)),
            torch.rand(tokens, generator=random, device="cuda") * 1e-3,
            integers(-128, 127, (outputs, inputs // 2)),
            integers(1, 16, (outputs, inputs // group_size)),
            torch.rand(outputs, generator=random, device="cuda") * 1e-3,
            group_size,
        )

    def exact(self) -> torch.Tensor:
        """Returns y `[T, N]` float32: exact sums, rounded once and scaled as the kernel does."""
        packed = self.weight.cpu().numpy(), self.multipliers.cpu().numpy()
        codes, multipliers = (torch.from_numpy(part).cuda() for part in packing.unpack_weight(*packed, self.group_size))
        weight = codes.double() * multipliers.double().repeat_interleave(self.group_size, dim=0)
        # Sums stay below 2^53.
        sums = self.products.double() @ weight
        return sums.float() * (self.steps[:, None] * self.scales[None, :])


def matmul_specs(capability: int, *, tune: bool) -> Iterator[KernelSpec]:
    """Yields every kernel that `MatmulBench` checks and times."""
    for tokens, inputs, outputs, group_size in _SIZES:
        for tiling in _tilings(tokens, inputs, outputs, capability, tune=tune):
            yield matmul.w4a4_matmul_spec(inputs, outputs, group_size, tiling)
            if tiling.split_k > 1:
                yield matmul.w4a4_reduce_spec(outputs, tiling.split_k)


def _tilings(tokens: int, inputs: int, outputs: int, capability: int, *, tune: bool) -> list[Tiling]:
    # A TensorRT plugin is one launch.
    both = (matmul_tiling(tokens, inputs, outputs, capability, one_launch=one) for one in (False, True))
    candidates = candidate_tilings(tokens, inputs, outputs, capability) if tune else []
    return list(dict.fromkeys([*both, *candidates]))


class MatmulBench:
    """Checks and times the W4A4 product on one GPU.

    Args:
        kernels: Compiles and loads them.
        seed: Of the random data.
        tune: Whether to time every tiling that a size offers.
    """

    def __init__(self, kernels: Kernels, seed: int, *, tune: bool) -> None:
        self._kernels = kernels
        self._random = torch.Generator("cuda").manual_seed(seed)
        self._tune = tune

    def check(self) -> Iterator[Check]:
        """Compares with exact integers, every tiling that will be timed among them."""
        for tokens, inputs, outputs, group_size in _SIZES:
            layer = Layer.draw(self._random, tokens, inputs, outputs, group_size)
            wanted = layer.exact().half()
            for tiling in self._tilings(tokens, inputs, outputs):
                launches, y = self._launches(layer, tiling)
                for launch in launches:
                    launch()
                wrong = int((y != wanted).sum())
                case = f"{tokens} x {inputs} -> {outputs}, groups of {group_size} {_words(tiling)}"
                yield Check("w4a4_matmul", case, wrong == 0, f"{wrong} of {y.numel()} outputs differ")

    def time(self) -> Iterator[Timing]:
        """Times every layer of LLaVA-1.5-7B beside cuBLAS; activations are quantized already."""
        for inputs, outputs in SHAPES:
            for tokens in TOKENS:
                yield from self._time(tokens, inputs, outputs)

    def _time(self, tokens: int, inputs: int, outputs: int) -> Iterator[Timing]:
        cublas = self._time_cublas(tokens, inputs, outputs)
        case = f"{tokens} x {inputs} -> {outputs}"
        yield Timing("cuBLAS fp16", case, cublas)
        if tokens > _FEW:
            int8 = self._time_int8(tokens, inputs, outputs)
            yield Timing("cuBLAS int8, int32 out", case, int8, "times faster than cuBLAS fp16", cublas / int8)
        layers = [
            Layer.draw(self._random, tokens, inputs, outputs, GROUP)
            for _ in range(sets_beyond_cache(inputs * outputs // 2))
        ]
        tilings = self._tilings(tokens, inputs, outputs)
        for tiling in tilings:
            bound = [self._launches(layer, tiling) for layer in layers]
            each = len(bound[0][0])
            time = each * time_launches([launch for launches, _ in bound for launch in launches])
            name = f"w4a4_matmul {_words(tiling)}" if self._tune else "w4a4_matmul"
            if not self._tune and tiling != tilings[0]:
                name += ", one launch"
            yield Timing(name, case, time, "times faster than cuBLAS fp16", cublas / time, GOALS.get(tokens))

    def _time_cublas(self, tokens: int, inputs: int, outputs: int) -> float:
        def draw(rows: int) -> torch.Tensor:
            return torch.randn((rows, inputs), generator=self._random, device="cuda", dtype=torch.float16)

        sets = [(draw(tokens), draw(outputs)) for _ in range(sets_beyond_cache(2 * inputs * outputs))]
        y = torch.empty((tokens, outputs), device="cuda", dtype=torch.float16)
        return time_launches([Launch(partial(torch.matmul, x, w.T, out=y)) for x, w in sets])

    def _time_int8(self, tokens: int, inputs: int, outputs: int) -> float:
        """Times what a plain product of int8 weights takes: twice the memory, and no scales."""

        def draw(rows: int) -> torch.Tensor:
            return torch.randint(-120, 106, (rows, inputs), generator=self._random, device="cuda", dtype=torch.int8)

        sets = [(draw(tokens), draw(outputs)) for _ in range(sets_beyond_cache(inputs * outputs))]
        y = torch.empty((tokens, outputs), device="cuda", dtype=torch.int32)
        return time_launches([Launch(partial(torch._int_mm, x, w.T, out=y)) for x, w in sets])

    def _tilings(self, tokens: int, inputs: int, outputs: int) -> list[Tiling]:
        return _tilings(tokens, inputs, outputs, self._kernels.capability, tune=self._tune)

    def _launches(self, layer: Layer, tiling: Tiling) -> tuple[list[Launch], torch.Tensor]:
        (tokens, inputs), outputs = layer.products.shape, len(layer.weight)
        y = torch.full((tokens, outputs), math.nan, device="cuda", dtype=torch.float16)
        split = tiling.split_k
        target = y if split == 1 else torch.empty((split, tokens, outputs), device="cuda", dtype=torch.int32)
        spec = matmul.w4a4_matmul_spec(inputs, outputs, layer.group_size, tiling)
        grid = matmul.w4a4_matmul_grid(tokens, outputs, tiling)
        operands = [layer.products, layer.steps, layer.weight, layer.multipliers, layer.scales]
        launches = [self._kernels.bind(spec, grid, [*operands, tokens, target])]
        if split > 1:
            spec = matmul.w4a4_reduce_spec(outputs, split)
            grid = matmul.w4a4_reduce_grid(tokens, outputs)
            launches.append(self._kernels.bind(spec, grid, [target, layer.steps, layer.scales, tokens, y]))
        return launches, y


def _words(tiling: Tiling) -> str:
    """Returns a tiling in one word: its fields' values."""
    return "/".join(str(value) for value in asdict(tiling).values())
