"""Group quantization with one float scale per group: the reference (NumPy, float32)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qavp_export.numerics.groups import grouped

Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Bits = Literal[4, 8]


@dataclass(frozen=True)
class OneLevel:
    """A tensor with one float scale per group: `value = codes * scales`, groups along the last axis.

    Attributes:
        codes: `[..., K]` int8, in [-8, 7] for 4 bits and [-127, 127] for 8.
        scales: `[..., K / group_size]` float32, positive; 1 for a group of zeros.
    """

    codes: Int8
    scales: Float32

    def dequantize(self) -> Float32:
        """Returns the represented values, `[..., K]` float32."""
        group_size = self.codes.shape[-1] // self.scales.shape[-1]
        values: Float32 = grouped(self.codes, group_size).astype(np.float32) * self.scales[..., None]
        return values.reshape(self.codes.shape)


def largest_code(bits: Bits) -> int:
    """Returns the largest code of symmetric quantization: 7 or 127."""
    return {4: 7, 8: 127}[bits]


def quantize_one_level(values: Float32, group_size: int, bits: Bits) -> OneLevel:
    """Quantizes vectors along the last axis: `scale = max abs / largest code` of each group, `code = round(v / scale)`.

    Args:
        values: `[..., K]` float32; `group_size` divides K.
        group_size: Channels that share a scale; K for one scale per vector.
        bits: 4 or 8.

    Raises:
        RecipeError: `group_size` does not divide K.
    """
    groups = grouped(values.astype(np.float32, copy=False), group_size)
    top = largest_code(bits)
    scales = np.max(np.abs(groups), axis=-1) / np.float32(top)
    scales = np.where(scales > 0, scales, np.float32(1))
    codes = np.clip(np.rint(groups / scales[..., None]), -top, top)
    return OneLevel(codes.astype(np.int8).reshape(values.shape), scales)
