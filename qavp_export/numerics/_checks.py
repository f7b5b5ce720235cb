"""Input checks shared by the reference implementations."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qavp_export.errors import InputError

Float32: TypeAlias = npt.NDArray[np.float32]

MAX_FEATURE = 1e15
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def as_float32(name: str, array: npt.NDArray[Any], rank: int) -> Float32:
    """Check an input of the reference and cast it to float32.

    Args:
        name: What the array is called in error messages.
        array: Values in any floating-point type.
        rank: The number of dimensions it must have.

    Returns:
        The same values, float32.

    Raises:
        InputError: The array is not floating point, has another rank, is empty, or holds NaN or infinity (a
            float64 beyond float32's range counts as infinity).
    """
    array = np.asarray(array)
    if array.dtype.name not in _FLOATS:
        raise InputError(f"{name} has dtype {array.dtype}; pass floating-point values")
    if array.ndim != rank:
        raise InputError(f"{name} has shape {list(array.shape)}; expected {rank} dimensions")
    if array.size == 0:
        raise InputError(f"{name} has shape {list(array.shape)}; it must not be empty")
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        where = [int(i) for i in np.argwhere(~finite)[0]]
        raise InputError(f"{name} holds {values[tuple(where)]} at index {where}; all values must be finite")
    return values


def as_features(array: npt.NDArray[Any]) -> Float32:
    """Check image features and cast them to float32.

    Args:
        array: Shape [B, N, D], any floating-point type.

    Returns:
        The same values, float32.

    Raises:
        InputError: As for `as_float32`, or a value exceeds `MAX_FEATURE`: sums of squares would overflow.
    """
    values = as_float32("features", array, 3)
    if (largest := float(np.abs(values).max())) > MAX_FEATURE:
        raise InputError(f"features reach {largest:.3g}; beyond {MAX_FEATURE:g} sums of squares overflow")
    return values
