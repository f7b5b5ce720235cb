"""Group sizes: how many channels share a scale."""

from __future__ import annotations

from collections.abc import Iterable

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
