"""Group sizes: how many channels share a scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy.typing as npt

from qavp_export.errors import RecipeError

GROUP_SIZES = (128, 64, 32, 16)


def largest_group_size(channels: Iterable[int]) -> int:
    """Returns the largest of 128, 64, 32 and 16 that divides every channel count.

    Raises:
        RecipeError: None does.
    """
    counts = sorted(set(channels))
    for size in GROUP_SIZES:
        if all(count % size == 0 for count in counts):
            return size
    raise RecipeError(
        f"no usable group size: none of {', '.join(map(str, GROUP_SIZES))} divides all channel counts "
        f"({', '.join(map(str, counts))}); give a group size that does"
    )


def grouped(values: npt.NDArray[Any], group_size: int) -> npt.NDArray[Any]:
    """Returns `[..., K]` as `[..., K / group_size, group_size]`.

    Raises:
        RecipeError: `group_size` does not divide K.
    """
    channels = values.shape[-1]
    if group_size < 1 or channels % group_size:
        raise RecipeError(f"group size {group_size} does not divide {channels} channels")
    return values.reshape(*values.shape[:-1], channels // group_size, group_size)
