"""Two-level group quantization to 4 bit: the reference (NumPy, float32).

Source: the two-level scheme of VS-Quant (Dai et al., MLSys 2021), with ceil for the integer multipliers so that no
value is clipped. Every graph and kernel is tested against this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qavp_export.numerics.groups import grouped

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
UInt8 = npt.NDArray[np.uint8]

CODE_MIN, CODE_MAX = -8, 7
MULTIPLIER_MAX = 15


@dataclass(frozen=True)
class TwoLevel:
    """A tensor in two-level form: `value = codes * multipliers * steps`, groups along the last axis.

    Attributes:
        codes: `[..., K]` int8 in [-8, 7].
        multipliers: `[..., K / group_size]` uint8 in [1, 15].
        steps: `[...]` float32, one per vector.
    """

    codes: Int8
    multipliers: UInt8
    steps: Float32

    def scales(self) -> Float32:
        """Returns the float scale of every group, `[..., K / group_size]`."""
        return self.multipliers.astype(np.float32) * self.steps[..., None]

    def dequantize(self) -> Float32:
        """Returns the represented values, `[..., K]` float32."""
        group_size = self.codes.shape[-1] // self.multipliers.shape[-1]
        groups = grouped(self.codes, group_size).astype(np.float32)
        return (groups * self.scales()[..., None]).reshape(self.codes.shape)


def quantize_two_level(values: Float32, group_size: int) -> TwoLevel:
    """Quantizes vectors along the last axis (numerics section 3).

    Args:
        values: `[..., K]` float32; `group_size` divides K.
        group_size: Channels that share a multiplier.

    Returns:
        Codes, multipliers and steps. A vector of zeros has step 0 and codes 0.

    Raises:
        RecipeError: `group_size` does not divide K.
    """
    groups = grouped(values.astype(np.float32, copy=False), group_size)
    amplitudes = np.max(np.abs(groups), axis=-1) / np.float32(CODE_MAX)
    steps = np.max(amplitudes, axis=-1) / np.float32(MULTIPLIER_MAX)
    divisors = np.where(steps > 0, steps, np.float32(1))[..., None]
    multipliers = np.clip(np.ceil(amplitudes / divisors), 1, MULTIPLIER_MAX)
    scales = (multipliers * divisors)[..., None]
    codes = np.clip(np.rint(groups / scales), CODE_MIN, CODE_MAX)
    return TwoLevel(codes.astype(np.int8).reshape(values.shape), multipliers.astype(np.uint8), steps)
