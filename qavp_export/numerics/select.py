"""Which tokens survive: the NumPy reference."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qavp_export.errors import InputError
from qavp_export.numerics._checks import as_float32

Select: TypeAlias = Literal["topk"]


def tokens_to_keep(n: int, keep: float) -> int:
    """How many of n tokens a fraction keeps: `max(1, floor(keep * n + 0.5))`.

    Args:
        n: Tokens per image, at least 1.
        keep: The fraction kept, in (0, 1].

    Returns:
        A number from 1 to n.

    Raises:
        InputError: `n` or `keep` is out of range.
    """
    if n < 1:
        raise InputError(f"there are {n} tokens to choose from; expected at least 1")
    if not 0.0 < keep <= 1.0:
        raise InputError(f"keep is {keep}; it must be in (0, 1]")
    return max(1, math.floor(keep * n + 0.5))


def select_topk(score: npt.NDArray[Any], k: int) -> npt.NDArray[np.int64]:
    """The k highest scores of each image, in raster order; ties go to the lower index.

    Args:
        score: Shape [B, N], floating point.
        k: Tokens to keep, 1 to N.

    Returns:
        Shape [B, k], int64, ascending in each row.

    Raises:
        InputError: Bad shape or dtype; NaN or infinity; k out of range.
    """
    values = as_float32("score", score, 2)
    if not 1 <= k <= values.shape[1]:
        raise InputError(f"k is {k}; it must be from 1 to the {values.shape[1]} tokens of an image")
    best_first = np.argsort(-values, axis=-1, kind="stable")
    return np.sort(best_first[:, :k], axis=-1).astype(np.int64)
