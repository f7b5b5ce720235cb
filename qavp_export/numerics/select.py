"""Which tokens survive: the NumPy reference."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qavp_export.errors import InputError
from qavp_export.numerics._checks import as_float32
from qavp_export.numerics.diverse import choose_diverse

Select: TypeAlias = Literal["topk", "dpp", "maxmin"]


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


def select_tokens(
    select: Select,
    features: npt.NDArray[Any],
    score: npt.NDArray[Any],
    k: int,
    towards: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """The k tokens that a rule keeps of each image, in raster order.

    Args:
        select: `topk` takes the highest scores, `dpp` and `maxmin` what `choose_diverse` says.
        features: The vision projector's output, shape [B, N, D], floating point; `topk` does not read it.
        score: Shape [B, N], floating point.
        k: Tokens to keep, 1 to N.
        towards: See `choose_diverse`; `topk` does not read it.

    Returns:
        Shape [B, k], int64, ascending in each row.

    Raises:
        InputError: An unknown rule; bad shape or dtype; NaN or infinity; k out of range.
    """
    if select == "topk":
        return select_topk(score, k)
    return np.sort(choose_diverse(select, features, score, k, towards), axis=-1)
