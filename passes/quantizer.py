"""Rounds weights to the grid of a scheme, in blocks of rows, and keeps count of the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.numerics.clip import quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.one_level import OneLevel, quantize_one_level
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from qavp_export.passes._linear import by_output_channel
from qavp_export.passes.scheme import Scheme

Float32 = npt.NDArray[np.float32]
Quantized: TypeAlias = TwoLevel | OneLevel

# Elements of a block: its temporaries stay in a core's cache.
_BLOCK = 1 << 17


class WeightQuantizer(Protocol):
    """Turns a float weight into codes and scales."""

    def __call__(self, weight: ir.Value, scheme: Scheme, group_size: int) -> Quantized:
        """Quantizes a weight.

        Args:
            weight: An initializer `[K,N]`; its tensor may be lazy, and is read at most once.
            scheme: The scheme.
            group_size: Channels that share a scale (G).

        Returns:
            Codes and scales `[N,K]`, by output channel; `TwoLevel` for 4-bit weights with two-level scales.
        """


class RoundWeights:
    """Rounds every weight to the nearest code.

    Args:
        clip_search: Whether 4-bit scales are chosen for the least squared error instead of the largest value.
        threads: Threads that share the blocks of one weight.

    Attributes:
        errors: Relative error `norm2(W - W^) / norm2(W)` of each weight that was quantized so far, by initializer name.
    """

    def __init__(self, *, clip_search: bool = True, threads: int | None = None) -> None:
        self.errors: dict[str, float] = {}
        self._clip_search = clip_search
        self._threads = threads

    def __call__(self, weight: ir.Value, scheme: Scheme, group_size: int) -> Quantized:
        """See `WeightQuantizer`."""
        values = by_output_channel(weight)
        quantize = self._rounding(scheme, scheme.weight_group(values.shape[1], group_size))

        def one(rows: slice) -> tuple[Quantized, float, float]:
            block = values[rows]
            quantized = quantize(block)
            return quantized, *squared_error(block, quantized)

        with ThreadPoolExecutor(self._threads) as pool:
            parts = list(pool.map(one, _row_blocks(values)))
        self.errors[str(weight.name)] = relative_error(sum(part[1] for part in parts), sum(part[2] for part in parts))
        return _joined([part[0] for part in parts])

    def _rounding(self, scheme: Scheme, group_size: int) -> Callable[[Float32], Quantized]:
        if scheme.weights == "int8":
            return lambda block: quantize_one_level(block, group_size, 8)
        if scheme.scales == "two-level":
            two_level = quantize_two_level_clipped if self._clip_search else quantize_two_level
            return lambda block: two_level(block, group_size)
        if self._clip_search:
            return lambda block: quantize_one_level_clipped(block, group_size)
        return lambda block: quantize_one_level(block, group_size, 4)


def quantize_activation(values: Float32, scheme: Scheme, group_size: int) -> Float32:
    """Returns activations `[...,K]` as the graph's quantizers make them, dequantized."""
    if scheme.activations is None:
        return values
    block = scheme.activation_group(values.shape[-1], group_size)
    if scheme.activations == "int8":
        return quantize_one_level(values, block, 8).dequantize()
    if scheme.scales == "two-level":
        return quantize_two_level(values, block).dequantize()
    return quantize_one_level(values, block, 4).dequantize()


def squared_error(values: Float32, quantized: Quantized) -> tuple[float, float]:
    """Returns the squared norms of the error and of the values."""
    difference = values - quantized.dequantize()
    return float(np.vdot(difference, difference)), float(np.vdot(values, values))


def relative_error(error: float, size: float) -> float:
    """Returns the root of a ratio of squared norms; 0 for a weight of zeros."""
    return float(np.sqrt(error / size)) if size > 0 else 0.0


def _row_blocks(values: Float32) -> Iterator[slice]:
    step = max(1, _BLOCK // values.shape[1])
    for start in range(0, values.shape[0], step):
        yield slice(start, start + step)


def _joined(parts: list[Quantized]) -> Quantized:
    codes = np.concatenate([part.codes for part in parts])
    two_level = [part for part in parts if isinstance(part, TwoLevel)]
    if two_level:
        multipliers = np.concatenate([part.multipliers for part in two_level])
        return TwoLevel(codes, multipliers, np.concatenate([part.steps for part in two_level]))
    scales = [part.scales for part in parts if isinstance(part, OneLevel)]
    return OneLevel(codes, np.concatenate(scales))
