"""The arithmetic that the layouts share: integers packed into 32-bit words, and codes times scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
FloatArray = npt.NDArray[np.float32]

# Elements that are dequantized at a time: bounds the temporaries.
_CHUNK = 1 << 20


def words(count: int, bits: int) -> int:
    """Returns how many 32-bit words hold `count` integers of `bits` bits; `bits` divides 32."""
    return -(-count * bits // 32)


def unpack(packed: IntArray, bits: int, axis: int, order: Sequence[int] | None = None) -> npt.NDArray[np.uint8]:
    """Unpacks the 32-bit words of a matrix along one axis.

    Args:
        packed: int32 `[R, C]`, little-endian.
        bits: 4 or 8.
        axis: The axis along which a word's integers lie.
        order: Where in its word's run each integer belongs, from the lowest bits up; ascending if None.

    Returns:
        uint8 `[R * 32 / bits, C]` for axis 0, `[R, C * 32 / bits]` for axis 1; values in [0, 2^bits - 1].
    """
    count = 32 // bits
    unsigned = packed.view("<u4")
    rows, columns = unsigned.shape
    fields = np.empty((rows, count, columns) if axis == 0 else (rows, columns, count), np.uint8)
    for place, target in enumerate(order or range(count)):
        field = fields[:, target, :] if axis == 0 else fields[:, :, target]
        field[...] = unsigned >> np.uint32(bits * place) & np.uint32(2**bits - 1)
    return fields.reshape((rows * count, columns) if axis == 0 else (rows, columns * count))


def dequantize(codes: IntArray, zeros: IntArray, scales: FloatArray, groups: IntArray) -> FloatArray:
    """Returns `(codes - zeros) * scales` with each column's zero point and scale; exact up to one float32 rounding.

    Args:
        codes: `[N, K]`.
        zeros: int16 `[N, G]`.
        scales: float32 `[N, G]`.
        groups: The group of each column `[K]`, in [0, G).

    Returns:
        float32 `[N, K]`. For 8-bit codes and scales that were 16-bit floats no rounding happens at all.
    """
    rows, columns = codes.shape
    values = np.empty((rows, columns), np.float32)
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        np.subtract(codes[part], zeros[part].take(groups, axis=1), out=values[part])
        values[part] *= scales[part].take(groups, axis=1)
    return values
