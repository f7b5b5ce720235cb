"""Runs NumPy work on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

_T = TypeVar("_T")
_Block = TypeVar("_Block")


def run_blocks(function: Callable[[_Block], _T], blocks: Sequence[_Block]) -> list[_T]:
    """Runs a function on independent blocks, on as many threads as there are cores.

    Blocks should take milliseconds: NumPy lets other threads run while it computes, and each change costs.

    Args:
        function: Called once for each block.
        blocks: Its arguments.

    Returns:
        The results, in order.
    """
    if len(blocks) == 1:
        return [function(blocks[0])]
    # BLAS threads of its own would wait for one another at every small product.
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, blocks))


def cut_rows(shape: tuple[int, ...], values: int) -> list[slice]:
    """Cuts the rows of a matrix into blocks.

    Args:
        shape: Rows, and values of a row.
        values: Values of a block; a block is at least one row.
    """
    count, width = shape
    step = max(1, values // width)
    return [slice(start, start + step) for start in range(0, count, step)]
