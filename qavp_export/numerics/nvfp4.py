"""NVFP4, FP4 codes with FP8 scales per 16 values and a float scale above them: the reference (NumPy, float32).

Source: NVIDIA, "Introducing NVFP4 for Efficient and Accurate Low-Precision Inference" (2025); TensorRT, "Quantization
Schemes"; the E2M1 and E4M3 types are those of the Open Compute Project (OCP MX 1.0 and OFP8 1.0). The choice of block
scales for weights extends Four Over Six (Cook et al., arXiv 2512.02010, 2025). Every graph and kernel is tested
against this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qavp_export.errors import RecipeError

_T = TypeVar("_T", bound=np.generic)

Float32 = npt.NDArray[np.float32]
E2M1 = npt.NDArray[ml_dtypes.float4_e2m1fn]
E4M3 = npt.NDArray[ml_dtypes.float8_e4m3fn]

BLOCK_SIZE = 16
E2M1_MAX, E4M3_MAX = 6, 448
# What the two narrow types span together: an activation's scale is an amplitude divided by it.
RANGE = E2M1_MAX * E4M3_MAX
# Where a block of weights may put its largest value. 6 is E2M1's largest; at 4 the steps below are finer; 6.5 lets the
# largest saturate and the rest have finer steps. On Gaussian weights the squared error is 0.84 of 6 alone with 4, 0.77
# with 6.5 as well; a fourth gains no more than 0.02.
WEIGHT_TARGETS = (6.0, 4.0, 6.5)
# Leaves E4M3 room for the scale of the loudest block at target 4: 6 / 4 * 256 = 384.
WEIGHT_RANGE = E2M1_MAX * 256
# Keeps a vector of zeros from dividing by zero: the smallest normal float32, because hardware may flush smaller ones.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)

# Weights are quantized in runs of rows of about this many values: the largest has 131 million, and no temporary array
# may be as large.
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Nvfp4:
    """A tensor in NVFP4: `value = codes * block_scales * global_scale`, blocks of 16 along the last axis.

    Attributes:
        codes: `[..., K]` E2M1, one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign.
        block_scales: `[..., K / 16]` E4M3 in [0, 448]; 0 for a block whose codes are all 0.
        global_scale: Positive float32; `[]` for a whole tensor or `[...]` for each vector.
    """

    codes: E2M1
    block_scales: E4M3
    global_scale: Float32

    def normalized(self) -> Float32:
        """Returns `codes * block_scales`, `[..., K]` float32: what a matrix product of the narrow types multiplies."""
        return _products(_blocked(self.codes), self.block_scales).reshape(self.codes.shape)

    def dequantize(self) -> Float32:
        """Returns the represented values, `[..., K]` float32."""
        return self.normalized() * self.global_scale[..., None]


def quantize_nvfp4_weight(weight: Float32) -> Nvfp4:
    """Quantizes a weight with one global scale, offline.

    `global_scale = max abs / (6 * 256)` over the tensor. Each block takes the scale among
    `e4m3(max abs / target), target in WEIGHT_TARGETS` that leaves the smallest squared error; the first of equals.

    Args:
        weight: `[N, K]` float32, finite; 16 divides K.

    Raises:
        RecipeError: 16 does not divide K.
    """
    _check(weight)
    outputs, channels = weight.shape
    amplitude = max(np.max(weight, initial=0), -np.min(weight, initial=0))
    global_scale = _global_scale(amplitude, WEIGHT_RANGE)
    codes = np.empty(weight.shape, ml_dtypes.float4_e2m1fn)
    block_scales = np.empty((outputs, channels // BLOCK_SIZE), ml_dtypes.float8_e4m3fn)
    step = max(1, _VALUES_AT_ONCE // max(channels, 1))
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        best, block_scales[rows] = _closest(_blocked(weight[rows] / global_scale))
        codes[rows] = best.reshape(-1, channels)
    return Nvfp4(codes, block_scales, global_scale)


def quantize_nvfp4_activations(x: Float32) -> Nvfp4:
    """Quantizes vectors along the last axis with a global scale each, at run time.

    With `g` the vector's `max abs / (6 * 448)` and `n = x / g`, a block's scale is `e4m3(max abs n / 6)` and its codes
    are `e2m1(n / scale)`. Both round to nearest, half-way cases to even; codes saturate at 6. A block too quiet for
    E4M3 (its amplitude below 2e-6 of the vector's) has scale 0 and codes 0.

    Args:
        x: `[..., K]` float32, finite; 16 divides K.

    Raises:
        RecipeError: 16 does not divide K.
    """
    _check(x)
    global_scale = _global_scale(np.max(np.abs(x), axis=-1, initial=0), RANGE)
    codes, block_scales = _quantize(_blocked(x / global_scale[..., None]), E2M1_MAX)
    return Nvfp4(codes.reshape(x.shape), block_scales, global_scale)


def _check(values: Float32) -> None:
    if values.shape[-1] % BLOCK_SIZE:
        raise RecipeError(f"{values.shape[-1]} channels are not a multiple of NVFP4's block size {BLOCK_SIZE}")


def _global_scale(amplitude: npt.ArrayLike, span: int) -> Float32:
    scale = np.asarray(amplitude, np.float32) / np.float32(span)
    return np.asarray(np.maximum(scale, np.float32(SMALLEST_SCALE)))


def _blocked(values: npt.NDArray[_T]) -> npt.NDArray[_T]:
    return values.reshape(*values.shape[:-1], values.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)


def _products(codes: npt.NDArray[np.generic], scales: E4M3) -> Float32:
    return codes.astype(np.float32) * scales.astype(np.float32)[..., None]


def _closest(blocks: Float32) -> tuple[E2M1, E4M3]:
    """Quantizes blocks `[N, K / 16, 16]`, each to the target with the smallest squared error."""
    codes, scales = _quantize(blocks, WEIGHT_TARGETS[0])
    errors = _errors(blocks, codes, scales)
    for target in WEIGHT_TARGETS[1:]:
        other_codes, other_scales = _quantize(blocks, target)
        other_errors = _errors(blocks, other_codes, other_scales)
        better = other_errors < errors
        codes[better], scales[better], errors[better] = other_codes[better], other_scales[better], other_errors[better]
    return codes, scales


def _errors(blocks: Float32, codes: E2M1, scales: E4M3) -> Float32:
    difference = _products(codes, scales) - blocks
    errors: Float32 = np.einsum("...i,...i->...", difference, difference)
    return errors


def _quantize(blocks: Float32, target: float) -> tuple[E2M1, E4M3]:
    """Quantizes blocks `[..., 16]`; the largest value of each lands near `target`."""
    amplitudes = np.max(np.abs(blocks), axis=-1) / np.float32(target)
    # An amplitude may exceed E4M3's largest by the last bit of two divisions; the cast rounds that away.
    scales = amplitudes.astype(ml_dtypes.float8_e4m3fn)
    floats = scales.astype(np.float32)
    divisors = np.where(floats > 0, floats, np.float32(1))[..., None]
    # A scale that was rounded down leaves values above 6; the cast saturates.
    return (blocks / divisors).astype(ml_dtypes.float4_e2m1fn), scales
