"""Rounds weights to the grid of a scheme, in blocks of rows, and keeps count of the error."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qavp_export.numerics.clip import quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.one_level import OneLevel, quantize_one_level
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from qavp_export.passes._linear import by_output_channel
from qavp_export.passes._parallel import cut_rows, run_blocks
from qavp_export.passes.scheme import Scheme

Float32 = npt.NDArray[np.float32]
Quantized: TypeAlias = TwoLevel | OneLevel

# Elements of a block.
_BLOCK = 1 << 20
# Elements of a part whose temporaries stay in a core's cache.
_PART = 1 << 17


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
        errors: Takes the errors; None: a new dictionary.

    Attributes:
        errors: Relative error `norm2(W - W^) / norm2(W)` of each weight that was quantized so far, by initializer name.
    """

    def __init__(self, *, clip_search: bool = True, errors: MutableMapping[str, float] | None = None) -> None:
        self.errors: MutableMapping[str, float] = {} if errors is None else errors
        self._clip_search = clip_search

    def __call__(self, weight: ir.Value, scheme: Scheme, group_size: int) -> Quantized:
        """See `WeightQuantizer`."""
        values = by_output_channel(weight)
        quantize = self._rounding(scheme, scheme.weight_group(values.shape[1], group_size))
        rows = max(1, _BLOCK // values.shape[1])

        def block(rows: Float32) -> tuple[Quantized, float]:
            quantized = quantize(rows)
            return quantized, squared_error(rows, quantized)

        quantized, self.errors[str(weight.name)] = quantize_rows(values, block, rows)
        return quantized

    def _rounding(self, scheme: Scheme, group_size: int) -> Callable[[Float32], Quantized]:
        if scheme.weights == "int8":
            return lambda block: quantize_one_level(block, group_size, 8)
        if scheme.scales == "two-level":
            two_level = quantize_two_level_clipped if self._clip_search else quantize_two_level
            return lambda block: two_level(block, group_size)
        if self._clip_search:
            return lambda block: quantize_one_level_clipped(block, group_size)
        return lambda block: quantize_one_level(block, group_size, 4)


def quantize_rows(
    values: Float32, quantize: Callable[[Float32], tuple[Quantized, float]], rows: int
) -> tuple[Quantized, float]:
    """Quantizes a weight by blocks of rows, on as many threads as there are cores.

    Args:
        values: `[N,K]`.
        quantize: Quantizes a block and returns the squared norm of its error too; rows do not depend on one another.
        rows: Rows of a block.

    Returns:
        The quantized weight, and its relative error.
    """

    def one(start: int) -> tuple[Quantized, float, float]:
        block = values[start : start + rows]
        return *quantize(block), float(np.vdot(block, block))

    parts = run_blocks(one, range(0, len(values), rows))
    error = relative_error(sum(part[1] for part in parts), sum(part[2] for part in parts))
    return _joined([part[0] for part in parts]), error


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


def squared_error(values: Float32, quantized: Quantized) -> float:
    """Returns the squared norm of the error of rows `[N,K]`."""
    total = 0.0
    for rows in cut_rows(values.shape, _PART):
        difference = values[rows] - take_rows(quantized, rows).dequantize()
        total += float(np.vdot(difference, difference))
    return total


def take_rows(quantized: Quantized, rows: slice) -> Quantized:
    """Returns some rows of a quantized weight."""
    if isinstance(quantized, TwoLevel):
        return TwoLevel(quantized.codes[rows], quantized.multipliers[rows], quantized.steps[rows])
    return OneLevel(quantized.codes[rows], quantized.scales[rows])


def relative_error(error: float, size: float) -> float:
    """Returns the root of a ratio of squared norms; 0 for a weight of zeros."""
    return float(np.sqrt(error / size)) if size > 0 else 0.0


def _joined(parts: list[Quantized]) -> Quantized:
    codes = np.concatenate([part.codes for part in parts])
    two_level = [part for part in parts if isinstance(part, TwoLevel)]
    if two_level:
        multipliers = np.concatenate([part.multipliers for part in two_level])
        return TwoLevel(codes, multipliers, np.concatenate([part.steps for part in two_level]))
    scales = [part.scales for part in parts if isinstance(part, OneLevel)]
    return OneLevel(codes, np.concatenate(scales))
