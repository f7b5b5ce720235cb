"""Clip search: group scales that clip the largest weights where that lowers the squared error (NumPy, float32).

Offline only, for weights: activations use `quantize_two_level`. The criterion is the mean-squared-error range estimate
of Nagel et al., "A White Paper on Neural Network Quantization" (2021). A two-level scale (VS-Quant, Dai et al., MLSys
2021) moves in integer multiples of its vector's step, so the search runs over the multipliers of each group, for a few
steps per vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qavp_export.numerics.groups import grouped
from qavp_export.numerics.one_level import OneLevel, quantize_one_level
from qavp_export.numerics.two_level import (
    CODE_MAX,
    CODE_MIN,
    MULTIPLIER_MAX,
    TwoLevel,
    quantize_two_level,
)

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

# Gaussian groups of 64 and 128 lose least near 0.8 of their amplitude; the trials reach 0.6.
STEP_FACTORS = (1.0, 0.94, 0.88)
MULTIPLIER_TRIALS = 6
ONE_LEVEL_FACTORS = tuple(1 - 0.03 * trial for trial in range(1, 15))
# Values per block. Smaller ones would stay in a core's cache, but threads would then wait for the interpreter's lock
# at every small operation: two of them took longer than one.
BLOCK_VALUES = 1 << 18
# A scale gives way only to a gain that float32 sums can resolve, or "never worse" would not hold.
GAIN = np.float32(1 - 1e-4)


def quantize_one_level_clipped(values: Float32, group_size: int) -> OneLevel:
    """Quantizes like `quantize_one_level`, with each group's scale lowered where that lowers its squared error.

    Args:
        values: `[..., K]` float32, finite; `group_size` divides K.
        group_size: Channels that share a scale.

    Returns:
        Codes and scales; no group has a larger squared error than without the search, but for float32 rounding.

    Raises:
        RecipeError: `group_size` does not divide K.
    """
    groups = grouped(values, group_size)
    codes = np.empty(values.shape, np.int8)
    scales = np.empty(groups.shape[:-1], np.float32)
    for block, code_rows, scale_rows in _row_blocks(values, codes, scales):
        plain = quantize_one_level(block, group_size, 4).scales
        search = _Search(block, group_size, plain)
        best = np.ones_like(plain)
        lowest = search.error(best) * GAIN
        for factor in ONE_LEVEL_FACTORS:
            trial = np.full_like(best, factor)
            _keep_lower(lowest, best, search.error(trial), trial)
        scale_rows[...] = plain * best
        code_rows[...] = nearest_codes(block, scale_rows)
    return OneLevel(codes, scales)


def quantize_two_level_clipped(values: Float32, group_size: int) -> TwoLevel:
    """Quantizes like `quantize_two_level`, with multipliers and steps lowered where that lowers the squared error.

    Args:
        values: `[..., K]` float32, finite; `group_size` divides K.
        group_size: Channels that share a multiplier.

    Returns:
        Codes, multipliers and steps; no vector has a larger squared error than without the search, but for float32
        rounding. A vector of zeros has step 0 and codes 0.

    Raises:
        RecipeError: `group_size` does not divide K.
    """
    groups = grouped(values, group_size)
    codes = np.empty(values.shape, np.int8)
    multipliers = np.empty(groups.shape[:-1], np.uint8)
    steps = np.empty((*values.shape[:-1], 1), np.float32)
    for block, code_rows, multiplier_rows, step_rows in _row_blocks(values, codes, multipliers, steps):
        plain = quantize_two_level(block, group_size)
        search = _Search(block, group_size, plain.steps[:, None])
        best, factors = _search_multipliers(search, plain)
        multiplier_rows[...], step_rows[...] = best, plain.steps[:, None] * factors
        code_rows[...] = nearest_codes(block, best * step_rows)
    return TwoLevel(codes, multipliers, steps[..., 0])


def nearest_codes(values: Float32, scales: Float32) -> Int8:
    """Rounds to the nearest codes: `clamp(round(value / scale), -8, 7)`; a scale of 0 counts as 1.

    Args:
        values: `[..., K]` float32.
        scales: `[..., K / group_size]` float32.

    Returns:
        `[..., K]` int8.
    """
    divisors = np.where(scales > 0, scales, np.float32(1))[..., None]
    codes = np.rint(values.reshape(*scales.shape, -1) / divisors)
    return np.clip(codes, CODE_MIN, CODE_MAX, out=codes).astype(np.int8).reshape(values.shape)


class _Search:
    """Squared errors of one block of rows for trial scales; all scales are multiples of a unit per row or group."""

    def __init__(self, rows: Float32, group_size: int, units: Float32) -> None:
        groups = rows.reshape(rows.shape[0], -1, group_size)
        self._normalized = groups / np.where(units > 0, units, np.float32(1))[..., None]
        self._ratios, self._codes = np.empty_like(self._normalized), np.empty_like(self._normalized)

    def error(self, scales: Float32) -> Float32:
        """Returns the squared error of each group in squared units, `[rows, groups]`, given scales of that shape."""
        np.multiply(self._normalized, np.reciprocal(scales)[..., None], out=self._ratios)
        np.rint(self._ratios, out=self._codes)
        np.clip(self._codes, CODE_MIN, CODE_MAX, out=self._codes)
        np.subtract(self._codes, self._ratios, out=self._codes)
        total: Float32 = np.einsum("rgk,rgk->rg", self._codes, self._codes) * (scales * scales)
        return total


def _search_multipliers(search: _Search, plain: TwoLevel) -> tuple[Float32, Float32]:
    """Returns the best multipliers `[rows, groups]` and the factor on each row's step `[rows, 1]`."""
    start = plain.multipliers.astype(np.float32)
    multipliers, factors = start.copy(), np.ones((start.shape[0], 1), np.float32)
    unclipped = search.error(start)
    lowest = np.sum(unclipped, axis=-1, keepdims=True) * GAIN
    for factor in map(np.float32, STEP_FACTORS):
        top = np.minimum(np.ceil(start / factor), MULTIPLIER_MAX)
        best, errors = (start.copy(), unclipped) if factor == 1 else (top.copy(), np.full_like(top, np.inf))
        for below in range(1, MULTIPLIER_TRIALS):
            trial = np.maximum(top - np.float32(below), 1)
            _keep_lower(errors, best, search.error(trial * factor), trial)
        total = np.sum(errors, axis=-1, keepdims=True)
        improved = total < lowest
        np.copyto(multipliers, best, where=improved)
        np.copyto(factors, factor, where=improved)
        np.copyto(lowest, total, where=improved)
    return multipliers, factors


def _keep_lower(lowest: Float32, best: Float32, errors: Float32, trial: Float32) -> None:
    """Takes over the trial wherever its error is below the lowest so far."""
    improved = errors < lowest
    np.copyto(best, trial, where=improved)
    np.copyto(lowest, errors, where=improved)


def _row_blocks(values: Float32, *outputs: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """Cuts the rows of the values (as float32) and of the outputs into blocks."""
    channels = values.shape[-1]
    rows = max(1, BLOCK_VALUES // channels)
    flat = values.reshape(-1, channels)
    targets = [output.reshape(-1, output.shape[-1]) for output in outputs]
    for start in range(0, flat.shape[0], rows):
        chosen = slice(start, start + rows)
        yield flat[chosen].astype(np.float32, copy=False), *(target[chosen] for target in targets)
