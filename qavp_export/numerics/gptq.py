"""GPTQ: rounding with error compensation onto the two-level or the one-level grid (NumPy, float32).

Sources: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (ICLR
2023); Chee et al., "QuIP" (NeurIPS 2023), whose LDLQ form is proved equal to GPTQ and is the one computed here: it
needs one Cholesky factor of the Hessian and no inverse. Asymmetric calibration: Li et al., "GPTAQ" (ICML 2025), here
by a ridge regression before the rounding. The two-level grid: VS-Quant (Dai et al., MLSys 2021).

With `H = sum x^T x` over the inputs that the layer sees, the weighted error of rounding W to W^ is
`tr((W - W^) H (W - W^)^T)`. Channels are rounded one after the other, each towards its weight plus what cancels most of
the errors made so far. With `H = L L^T`, L lower triangular and the channels taken from the last to the first:

    target[i] = W[i] + sum_{j > i} (W[j] - W^[j]) * L[j, i] / L[i, i]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qavp_export.errors import CalibrationError, RecipeError
from qavp_export.numerics.clip import quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.groups import grouped
from qavp_export.numerics.one_level import OneLevel
from qavp_export.numerics.two_level import CODE_MAX, CODE_MIN, TwoLevel

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]

# A Hessian that is not positive definite in float32 gets ten times the damping, this many times.
DAMPING_RETRIES = 3
# Output channels per pass: weights, errors and codes of a pass take 100 MB at 11008 input channels.
ROWS_PER_PASS = 1024
CHOLESKY_BLOCK = 256


@dataclass(frozen=True)
class GptqSettings:
    """How GPTQ rounds.

    Attributes:
        damping: Added to the Hessian's diagonal, as a fraction of its mean; positive.
        activation_order: Round the input channels with the largest diagonal first; in order of their index otherwise.
        block_size: Input channels whose mutual corrections are applied one by one; the others go as matrix products.
        correction: Part of the way from the weight to the one that fits the unquantized outputs best, in [0, 1]; only
            with a cross-correlation.
        correction_damping: As `damping`, for that fit; positive. It has to be far larger: at 0.01 a few thousand tokens
            are overfitted and quality drops.

    Raises:
        RecipeError: A field is out of range.
    """

    damping: float = 0.01
    activation_order: bool = True
    block_size: int = 128
    correction: float = 0.5
    correction_damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise RecipeError(f"GPTQ damping is {self.damping}; it must be in (0, 1]")
        if self.block_size < 1:
            raise RecipeError(f"GPTQ block size is {self.block_size}; it must be at least 1")
        if not 0 <= self.correction <= 1:
            raise RecipeError(f"GPTQ correction is {self.correction}; it must be in [0, 1]")
        if not self.correction_damping > 0:
            raise RecipeError(f"GPTQ correction damping is {self.correction_damping}; it must be positive")


DEFAULT_SETTINGS = GptqSettings()


def gptq_two_level(
    weight: Float32,
    hessian: Float32,
    group_size: int,
    *,
    cross: Float32 | None = None,
    settings: GptqSettings = DEFAULT_SETTINGS,
) -> TwoLevel:
    """Rounds a weight to the two-level grid that the clip search finds for it, with error compensation.

    Layers that read the same input share the Hessian: stack their weights along N and call this once.

    Args:
        weight: `[N, K]` float32; `group_size` divides K.
        hessian: `[K, K]` float32, `sum xq^T xq` over the calibration tokens, xq the input as the engine quantizes it.
        group_size: Input channels that share a multiplier.
        cross: `[K, K]` float32, `sum xf^T xq` with xf the same tokens' input in the unquantized model: the layer then
            also corrects for what the quantized input lost (`correct_weight`). None calibrates on xq alone.
        settings: Damping, order and correction.

    Returns:
        Codes, multipliers and steps.

    Raises:
        RecipeError: `group_size` does not divide K.
        CalibrationError: Shapes do not match, a matrix holds NaN or infinity, or the Hessian is not positive definite
            even with a thousand times the damping.
    """
    grouped(weight, group_size)
    targets, rounding = _prepare(weight, hessian, cross, settings)
    codes = np.empty(weight.shape, np.int8)
    multipliers = np.empty((weight.shape[0], weight.shape[1] // group_size), np.uint8)
    steps = np.empty(weight.shape[0], np.float32)
    for rows in _passes(weight):
        grid = quantize_two_level_clipped(targets[rows], group_size)
        multipliers[rows], steps[rows] = grid.multipliers, grid.steps
        codes[rows] = rounding.codes(targets[rows], grid.scales())
    return TwoLevel(codes, multipliers, steps)


def gptq_one_level(
    weight: Float32,
    hessian: Float32,
    group_size: int,
    *,
    cross: Float32 | None = None,
    settings: GptqSettings = DEFAULT_SETTINGS,
) -> OneLevel:
    """Rounds a weight to 4-bit codes with a float scale per group; otherwise as `gptq_two_level`.

    Args:
        weight: `[N, K]` float32; `group_size` divides K.
        hessian: `[K, K]` float32.
        group_size: Input channels that share a scale.
        cross: `[K, K]` float32 or None.
        settings: As for `gptq_two_level`.

    Returns:
        Codes and scales.

    Raises:
        RecipeError: `group_size` does not divide K.
        CalibrationError: As for `gptq_two_level`.
    """
    grouped(weight, group_size)
    targets, rounding = _prepare(weight, hessian, cross, settings)
    codes = np.empty(weight.shape, np.int8)
    scales = np.empty((weight.shape[0], weight.shape[1] // group_size), np.float32)
    for rows in _passes(weight):
        scales[rows] = quantize_one_level_clipped(targets[rows], group_size).scales
        codes[rows] = rounding.codes(targets[rows], scales[rows])
    return OneLevel(codes, scales)


def correct_weight(
    weight: Float32, hessian: Float32, cross: Float32, settings: GptqSettings = DEFAULT_SETTINGS
) -> Float32:
    """Moves a float weight towards the one whose outputs on the quantized input are closest to the unquantized ones.

    With `r = correction_damping * mean(diag H)` the best fit is `W (cross + r I) (H + r I)^-1`: ridge regression
    towards W itself. `gptq_two_level` and `gptq_one_level` do this when they are given `cross`.

    Args:
        weight: `[N, K]` float32.
        hessian: `[K, K]` float32, `sum xq^T xq`.
        cross: `[K, K]` float32, `sum xf^T xq`.
        settings: How far to go, and the damping.

    Returns:
        `[N, K]` float32.

    Raises:
        CalibrationError: As for `gptq_two_level`.
    """
    _check(weight, hessian, cross)
    factor, ridge = _factorize(hessian, np.arange(weight.shape[1]), settings.correction_damping)
    corrected = np.empty(weight.shape, np.float32)
    strength = np.float32(settings.correction)
    for rows in _passes(weight):
        moment = weight[rows] @ cross + ridge * weight[rows]
        fitted = _solve(factor, np.ascontiguousarray(moment.T)).T
        corrected[rows] = weight[rows] + strength * (fitted - weight[rows])
    return corrected


class _Rounding:
    """Rounds rows with error compensation: the damped Hessian's Cholesky factor, in rounding order."""

    def __init__(self, hessian: Float32, settings: GptqSettings) -> None:
        diagonal = np.diagonal(hessian)
        # Stable: equal channels keep their order. Reversed, since rounding goes from the last channel to the first.
        descending = np.argsort(-diagonal, kind="stable") if settings.activation_order else np.arange(diagonal.size)
        self._order = descending[::-1]
        self._factor, _ = _factorize(hessian, self._order, settings.damping)
        self._block_size = settings.block_size

    def codes(self, targets: Float32, scales: Float32) -> Int8:
        """Returns the codes `[n, K]` of rows `[n, K]` on the grid `scales [n, K / group_size]`."""
        size, factor = targets.shape[1], self._factor
        group = self._order // (size // scales.shape[1])
        wanted = np.ascontiguousarray(targets.T[self._order])
        divisors = np.ascontiguousarray(np.where(scales > 0, scales, np.float32(1)).T)
        errors, codes = np.empty_like(wanted), np.empty(wanted.shape, np.int8)
        for stop in range(size, 0, -self._block_size):
            start = max(0, stop - self._block_size)
            ratios = factor[start:, start:stop] / np.diagonal(factor)[start:stop]
            wanted_block, error_block = wanted[start:stop], errors[start:stop]
            later = ratios[stop - start :].T @ errors[stop:]
            for i in range(stop - start - 1, -1, -1):
                target = wanted_block[i] + later[i] + ratios[i + 1 : stop - start, i] @ error_block[i + 1 :]
                scale = divisors[group[start + i]]
                code = np.clip(np.rint(target / scale), CODE_MIN, CODE_MAX)
                np.subtract(wanted_block[i], code * scale, out=error_block[i])
                codes[self._order[start + i]] = code
        return codes.T


def _prepare(
    weight: Float32, hessian: Float32, cross: Float32 | None, settings: GptqSettings
) -> tuple[Float32, _Rounding]:
    """Checks the inputs; returns the float weight to be rounded and how to round it."""
    _check(weight, hessian, cross)
    targets = weight if cross is None else correct_weight(weight, hessian, cross, settings)
    return targets.astype(np.float32, copy=False), _Rounding(hessian, settings)


def _passes(weight: Float32) -> Iterator[slice]:
    return (slice(start, start + ROWS_PER_PASS) for start in range(0, weight.shape[0], ROWS_PER_PASS))


def _solve(factor: Float32, right: Float32) -> Float32:
    """Solves `L L^T x = right [K, n]` by blocks, in place."""
    size = right.shape[0]
    blocks = [slice(start, min(start + CHOLESKY_BLOCK, size)) for start in range(0, size, CHOLESKY_BLOCK)]
    for block in blocks:
        right[block] -= factor[block, : block.start] @ right[: block.start]
        right[block] = np.linalg.solve(factor[block, block], right[block])
    for block in reversed(blocks):
        right[block] -= factor[block.stop :, block].T @ right[block.stop :]
        right[block] = np.linalg.solve(factor[block, block].T, right[block])
    return right


def _factorize(hessian: Float32, order: npt.NDArray[np.intp], damping: float) -> tuple[Float32, np.float32]:
    """Returns the lower Cholesky factor of the permuted and damped Hessian, and the ridge that damped it.

    Only the lower triangle and the diagonal blocks of the factor are valid.
    """
    # A layer without inputs is rounded to nearest, which any ridge does.
    mean = np.float32(np.mean(np.diagonal(hessian), dtype=np.float64)) or np.float32(1)
    factor = np.empty(hessian.shape, np.float32)
    for attempt in range(DAMPING_RETRIES + 1):
        ridge = np.float32(damping * 10**attempt) * mean
        # By rows, because a permutation of both axes at once would make a second copy.
        for row, channel in enumerate(order):
            factor[row] = hessian[channel][order]
            factor[row, row] += ridge
        try:
            _cholesky_in_place(factor)
        except np.linalg.LinAlgError:
            continue
        return factor, ridge
    raise CalibrationError(
        f"the calibration Hessian of {order.size} channels is not positive definite, even with damping "
        f"{damping * 10**DAMPING_RETRIES:g}: it is not a sum of x^T x; check how it was accumulated"
    )


def _cholesky_in_place(matrix: Float32) -> None:
    """Cholesky by block columns: NumPy's own takes two more copies, 1 GB at 11008 channels."""
    for start in range(0, matrix.shape[0], CHOLESKY_BLOCK):
        stop = start + CHOLESKY_BLOCK
        matrix[start:, start:stop] -= matrix[start:, :start] @ matrix[start:stop, :start].T
        corner = np.linalg.cholesky(matrix[start:stop, start:stop])
        matrix[start:stop, start:stop] = corner
        matrix[stop:, start:stop] = matrix[stop:, start:stop] @ np.linalg.inv(corner).T


def _check(weight: Float32, hessian: Float32, cross: Float32 | None) -> None:
    channels = weight.shape[-1]
    for name, matrix in (("Hessian", hessian), ("cross-correlation", cross)):
        if matrix is None:
            continue
        if matrix.shape != (channels, channels):
            raise CalibrationError(
                f"the {name} has shape {list(matrix.shape)}; a weight of {channels} input channels needs "
                f"[{channels}, {channels}]"
            )
        # A NaN or infinity anywhere shows in the sum; no mask of the matrix's size is made.
        if not np.isfinite(np.sum(matrix, dtype=np.float64)):
            raise CalibrationError(f"the {name} holds NaN or infinity: the model overflows on the calibration data")
    if not np.isfinite(np.sum(weight, dtype=np.float64)):
        raise CalibrationError("the weight holds NaN or infinity; check the checkpoint")
    if np.any(np.diagonal(hessian) < 0):
        raise CalibrationError("the Hessian has a negative diagonal: it is not a sum of x^T x")
