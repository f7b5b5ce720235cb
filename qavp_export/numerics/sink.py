"""Rounding that keeps what a weight returns on a few given inputs (NumPy, float32).

The first token of a sequence is an attention sink (Xiao et al., "Efficient Streaming Language Models with Attention
Sinks", ICLR 2024): after its norm it is nearly the same vector whatever the token, and its value is tiny because large
terms cancel (Sun et al., "Massive Activations in Large Language Models", COLM 2024). Nearest rounding destroys that
cancellation. Those inputs are known without any calibration text.

This is GPTQ (`gptq.py`) with the Hessian `X^T X + lambda I` of r inputs X `[r, K]`. Its rank makes the compensation
cheap: with e = (W^ - W) x summed over the channels rounded so far, one value per input, the targets of all others are

    target[i] = W[i] - e^T (lambda I + M[i])^-1 x[i],    M[i] = sum of x[k] x[k]^T over the channels k not yet rounded

by the push-through identity, so no K x K matrix is formed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qavp_export.errors import CalibrationError, RecipeError
from qavp_export.numerics.clip import quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.one_level import OneLevel
from qavp_export.numerics.two_level import CODE_MAX, CODE_MIN, TwoLevel

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

DEFAULT_RIDGE = 0.1
# Input channels whose r x r systems are solved together: 16 MB in float64 at 32 inputs.
SOLVE_BLOCK = 1024
# Input channels whose mutual corrections are applied one by one; the others go as matrix products.
BLOCK_SIZE = 32
# Rows that are transposed at a time: they stay in a core's cache.
TURN_ROWS = 16


class SinkRounding:
    """Rounds weights that read the same inputs, by rows: rows do not depend on one another.

    Args:
        inputs: `[r, K]` float32, what the layers read; a few, since the work grows with r. Zeros count for nothing:
            with no others weights are rounded to nearest.
        ridge: Weight of the rounding error itself against that of the outputs, as a fraction of the mean over the
            channels of `sum x^2`; positive.

    Attributes:
        channels: Input channels, K.

    Raises:
        RecipeError: The ridge is not positive.
        CalibrationError: The inputs have another shape, or hold NaN or infinity.
    """

    def __init__(self, inputs: Float32, ridge: float = DEFAULT_RIDGE) -> None:
        if not 0 < ridge < np.inf:
            raise RecipeError(f"the ridge of the sink rounding is {ridge}; it must be positive")
        if inputs.ndim != 2 or inputs.size == 0:
            raise CalibrationError(f"the sink inputs have shape {list(inputs.shape)}; expected [r, K], not empty")
        _check_finite("sink inputs", inputs)
        self.channels = inputs.shape[1]
        # Loudest first, as in GPTQ: quiet channels that remain can still make up for them. Stable: a tie keeps order.
        self._order = np.argsort(-np.einsum("rk,rk->k", inputs, inputs, dtype=np.float64), kind="stable")
        ordered = np.ascontiguousarray(inputs.T[self._order].astype(np.float64))
        self._gains, self._directions = _gains(ordered, ridge), ordered.astype(np.float32)

    def two_level(self, weight: Float32, group_size: int) -> tuple[TwoLevel, float]:
        """Rounds rows to the two-level grid that the clip search finds for them, keeping their outputs on the inputs.

        Args:
            weight: `[n, K]` float32; `group_size` divides K.
            group_size: Input channels that share a multiplier.

        Returns:
            Codes, multipliers and steps; the latter two as `quantize_two_level_clipped` returns them. And the squared
            norm of the weight's error.

        Raises:
            RecipeError: `group_size` does not divide K.
            CalibrationError: The weight has other channels than the inputs, or holds NaN or infinity.
        """
        self._check(weight)
        grid = quantize_two_level_clipped(weight, group_size)
        codes, error = self.codes(weight, grid.scales())
        return TwoLevel(codes, grid.multipliers, grid.steps), error

    def one_level(self, weight: Float32, group_size: int) -> tuple[OneLevel, float]:
        """Rounds rows to 4-bit codes with a float scale per group; otherwise as `two_level`."""
        self._check(weight)
        scales = quantize_one_level_clipped(weight, group_size).scales
        codes, error = self.codes(weight, scales)
        return OneLevel(codes, scales), error

    def codes(self, weight: Float32, scales: Float32) -> tuple[Int8, float]:
        """Rounds rows on a given grid.

        Args:
            weight: `[n, K]` float32.
            scales: `[n, groups]` float32; a scale of 0 counts as 1. The number of groups divides K.

        Returns:
            `[n, K]` int8 in [-8, 7], input channels outermost in memory, and the squared norm of the error.

        Raises:
            CalibrationError: Shapes do not match, or the weight holds NaN or infinity.
        """
        self._check(weight)
        if scales.ndim != 2 or len(scales) != len(weight) or self.channels % max(scales.shape[1], 1):
            raise CalibrationError(f"scales of shape {list(scales.shape)} do not fit a weight of {list(weight.shape)}")
        group = self._order // (self.channels // scales.shape[1])
        codes = np.empty(weight.T.shape, np.int8)
        wanted = _by_channel(weight.astype(np.float32, copy=False), self._order)
        codes[self._order], error = _round(wanted, scales, group, self._gains, self._directions)
        return codes.T, error

    def _check(self, weight: Float32) -> None:
        if weight.ndim != 2 or weight.shape[1] != self.channels or not len(weight):
            raise CalibrationError(
                f"the weight has shape {list(weight.shape)}; the sink inputs have {self.channels} channels"
            )
        _check_finite("weights", weight)


def _gains(ordered: npt.NDArray[np.float64], ridge: float) -> Float32:
    """Returns `(lambda I + M[i])^-1 x[i]` of every channel, `[K, r]`, from the inputs `[K, r]` in rounding order."""
    channels, count = ordered.shape
    # Without inputs any ridge gives gains of zero.
    damping = ridge * (float(np.sum(ordered * ordered)) / channels or 1.0)
    remaining = damping * np.eye(count)
    gains = np.empty(ordered.shape, np.float32)
    for stop in range(channels, 0, -SOLVE_BLOCK):
        block = slice(max(0, stop - SOLVE_BLOCK), stop)
        x = ordered[block]
        moments = x[:, :, None] * x[:, None, :]
        moments = np.cumsum(moments[::-1], axis=0)[::-1] + remaining
        gains[block] = np.linalg.solve(moments, x[:, :, None])[:, :, 0]
        remaining = moments[0]
    return gains


def _by_channel(rows: Float32, order: npt.NDArray[np.intp]) -> Float32:
    """Returns rows `[n, K]` as `[K, n]` with the channels in another order."""
    turned = np.empty(rows.T.shape, np.float32)
    for start in range(0, len(rows), TURN_ROWS):
        part = slice(start, start + TURN_ROWS)
        turned[:, part] = rows[part][:, order].T
    return turned


def _round(
    wanted: Float32, scales: Float32, group: npt.NDArray[np.intp], gains: Float32, directions: Float32
) -> tuple[Int8, float]:
    """Rounds channels `[K, n]` in rounding order; `group [K]` is the column of each channel's scale.

    Returns:
        Codes `[K, n]` and the squared norm of the error.
    """
    divisors = np.ascontiguousarray(np.where(scales > 0, scales, np.float32(1)).T)
    codes = np.empty(wanted.shape, np.int8)
    outputs = np.zeros((gains.shape[1], wanted.shape[1]), np.float32)
    low, high, lost = np.float32(CODE_MIN), np.float32(CODE_MAX), 0.0
    for start in range(0, wanted.shape[0], BLOCK_SIZE):
        block = slice(start, start + BLOCK_SIZE)
        targets = wanted[block] - gains[block] @ outputs
        ratios = gains[block] @ directions[block].T
        errors = np.empty_like(targets)
        for i, target in enumerate(targets):
            divisor = divisors[group[start + i]]
            target -= ratios[i, :i] @ errors[:i]
            target /= divisor
            np.rint(target, out=target)
            np.maximum(target, low, out=target)
            np.minimum(target, high, out=target)
            codes[start + i] = target
            target *= divisor
            np.subtract(target, wanted[start + i], out=errors[i])
        outputs += directions[block].T @ errors
        lost += float(np.vdot(errors, errors))
    return codes, lost


def _check_finite(name: str, values: Float32) -> None:
    # A NaN or infinity anywhere shows in the sum; no mask of the tensor's size is made.
    if not np.isfinite(np.sum(values, dtype=np.float64)):
        raise CalibrationError(f"the {name} hold NaN or infinity; check the checkpoint")
