"""Dynamic two-level INT4 quantization of activations on GPUs (`numerics/two_level.py`), one program per token.

The products `code * multiplier` and the steps have the reference's bits for the same float32 values. With `rotate` the
values are first rotated by one Hadamard block per group (`numerics/rotation.py`, `block_rotation`), in float32 and in
another order than a matrix product's: where rounding moves a value across a half-way case, or a group's amplitude
across a whole multiple of the step, the code or multiplier is its neighbour.
"""

# A `triton.jit` function's types are its specification's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

import numpy as np
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qavp_export.engines.kernels.compile import KernelSpec
from qavp_export.engines.kernels.rounding import ROUND
from qavp_export.engines.kernels.types import load_values
from qavp_export.errors import InputError

_WARP = 32
# Values of a group that one thread holds: the others of its threads exchange every value once for each doubling.
_THREAD_VALUES = 32


@triton.jit
def quantize_two_level(
    x,
    products,
    steps,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    REPEATS: tl.constexpr,
    LANES: tl.constexpr,
    VALUES: tl.constexpr,
    ROTATE: tl.constexpr,
    INVERSE_ROOT: tl.constexpr,
):
    """Quantizes one token: x `[tokens, GROUPS * G]`, products like x in int8, steps `[tokens]` float32.

    A group is `[REPEATS, LANES, VALUES]`. REPEATS leads the tiles, so that one thread holds all of them.
    """
    GROUP: tl.constexpr = REPEATS * LANES * VALUES
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, TILE_GROUPS)[None, :, None, None]
    within = (
        tl.arange(0, REPEATS)[:, None, None, None] * (LANES * VALUES)
        + tl.arange(0, LANES)[None, None, :, None] * VALUES
        + tl.arange(0, VALUES)[None, None, None, :]
    )
    offsets = token * (GROUPS * GROUP) + (group * GROUP + within)
    # The token is held in registers.
    held = ()
    largest = tl.zeros([TILE_GROUPS], tl.float32)
    for tile in tl.static_range(TILES):
        values = tl.load(x + offsets + tile * TILE_GROUPS * GROUP, mask=group < GROUPS - tile * TILE_GROUPS, other=0.0)
        values = values.to(tl.float32)
        if ROTATE:
            values = _rotate(values, REPEATS, TILE_GROUPS, LANES, VALUES, INVERSE_ROOT)
        held += (values,)
        largest = tl.maximum(largest, _amplitudes(values))
    step = tl.div_rn(tl.max(tl.div_rn(largest, 7.0), axis=0), 15.0)
    divisor = tl.where(step > 0.0, step, 1.0)
    for tile in tl.static_range(TILES):
        ratio = tl.ceil(tl.div_rn(tl.div_rn(_amplitudes(held[tile]), 7.0), divisor))
        multiplier = tl.minimum(tl.maximum(ratio, 1.0), 15.0)[None, :, None, None]
        code = tl.div_rn(held[tile], multiplier * divisor) + ROUND - ROUND
        product = tl.minimum(tl.maximum(code, -8.0), 7.0) * multiplier
        within_token = group < GROUPS - tile * TILE_GROUPS
        tl.store(products + offsets + tile * TILE_GROUPS * GROUP, product.to(tl.int8), mask=within_token)
    tl.store(steps + token, step)


@triton.jit
def _amplitudes(values):
    """Largest magnitudes of the groups of `[REPEATS, TILE_GROUPS, LANES, VALUES]`."""
    return tl.max(tl.max(tl.max(tl.abs(values), axis=3), axis=0), axis=1)


@triton.jit
def _rotate(
    values,
    REPEATS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VALUES: tl.constexpr,
    INVERSE_ROOT: tl.constexpr,
):
    """Multiplies groups by Sylvester's Hadamard matrix over the square root of its order."""
    values = _transform(values, REPEATS, 1, TILE_GROUPS * LANES * VALUES)
    values = _transform(values, LANES, REPEATS * TILE_GROUPS, VALUES)
    values = _transform(values, VALUES, REPEATS * TILE_GROUPS * LANES, 1)
    return tl.reshape(values, [REPEATS, TILE_GROUPS, LANES, VALUES]) * INVERSE_ROOT


@triton.jit
def _transform(values, SIZE: tl.constexpr, BEFORE: tl.constexpr, BEHIND: tl.constexpr):
    """Fast Walsh-Hadamard transform along the middle axis of `[BEFORE, SIZE, BEHIND]`."""
    DOUBLINGS: tl.constexpr = SIZE.bit_length() - 1
    for doubling in tl.static_range(DOUBLINGS):
        pairs = tl.reshape(values, [BEFORE * (SIZE >> (doubling + 1)), 2, BEHIND << doubling])
        total = tl.sum(pairs, axis=1)[:, None, :]
        # From a + b it is 2b to a - b. A sum leaves its layout as it is: no shared memory.
        is_second = tl.arange(0, 2)[None, :, None] == 1
        values = tl.where(is_second, tl.fma(pairs, -2.0, total), total)
    return values


def quantize_two_level_spec(
    dtype: str, width: int, group_size: int, rotate: bool = False, num_warps: int | None = None
) -> KernelSpec:
    """Specifies `quantize_two_level`: launch it with `quantize_two_level_grid` and 32 threads per warp.

    Run-time arguments: x `[tokens, width]`, products `[tokens, width]` int8, steps `[tokens]` float32; pointers are
    multiples of 16.

    Args:
        dtype: Of x: `fp16`, `bf16` or `fp32`.
        width: Channels per token (K).
        group_size: Channels that share a multiplier, a power of two from 16 to 512 that divides `width`.
        rotate: Rotate x by one Hadamard block per group first.
        num_warps: Warps of a program; None for what holds 32 values in a thread, where 16 warps can.

    Raises:
        InputError: The kernel has no such variant.
    """
    if group_size & (group_size - 1) or not 16 <= group_size <= 512 or width % group_size:
        raise InputError(
            f"the quantization kernel takes group sizes 16, 32, ... 512 that divide the width {width}, not {group_size}"
        )
    values = load_values(dtype)
    lanes = max(1, min(group_size // values, max(4, group_size // _THREAD_VALUES)))
    groups = width // group_size
    if num_warps is None:
        num_warps = min(16, max(1, triton.next_power_of_2(groups * lanes) // _WARP))
    tile_groups = min(triton.next_power_of_2(groups), max(1, num_warps * _WARP // lanes))
    constants = {
        "GROUPS": groups,
        "TILES": -(-groups // tile_groups),
        "TILE_GROUPS": tile_groups,
        "REPEATS": group_size // (lanes * values),
        "LANES": lanes,
        "VALUES": values,
        "ROTATE": rotate,
        "INVERSE_ROOT": float(np.float32(group_size**-0.5)),
    }
    signature = {"x": f"*{dtype}", "products": "*i8", "steps": "*fp32"}
    return KernelSpec(
        __name__, "quantize_two_level", signature, constants, num_warps, aligned=frozenset({"x", "products", "steps"})
    )


def quantize_two_level_grid(tokens: int) -> tuple[int, int, int]:
    """Returns the programs that quantize `tokens` tokens."""
    return tokens, 1, 1
