"""`w4a4_gemv`: `w4a4_matmul` for single tokens, which wait for memory alone; see `matmul.py`.

No tensor cores and no shared memory until the end: a thread reads 16 bytes of each of its rows, and all its loads are
independent.
"""

# A `triton.jit` function's types are its specification's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def _dot4(unsigned, signed, acc, USE_PTX: tl.constexpr):
    """Returns acc plus the dot product of four unsigned bytes and four signed ones, each packed in an int32."""
    if USE_PTX:
        acc = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [unsigned, signed, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            acc += ((unsigned >> (8 * i)) & 255) * ((signed << (24 - 8 * i)) >> 24)
    return acc


@triton.jit
def _repeat(values, TIMES: tl.constexpr):
    """Returns `[TIMES * rows, columns]`."""
    repeated = tl.broadcast_to(values[None, :, :], (TIMES, values.shape[0], values.shape[1]))
    return tl.reshape(repeated, (TIMES * values.shape[0], values.shape[1]))


@triton.jit
def w4a4_gemv(
    products,
    steps,
    weight,
    multipliers,
    scales,
    tokens,
    output,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """BLOCK_N outputs of one token, BLOCK_G groups at a time; all loads of a program are independent."""
    GROUPS: tl.constexpr = INPUTS // GROUP
    WORDS: tl.constexpr = GROUP // 8
    # Rows and groups share an axis: with three axes it is the compiler's choice which threads hold what.
    PAIRS: tl.constexpr = BLOCK_N * BLOCK_G
    token = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0) * BLOCK_N
    row = tl.minimum(tl.arange(0, PAIRS) // BLOCK_G, OUTPUTS - 1 - first_row)
    pair_group = tl.arange(0, PAIRS) % BLOCK_G
    group = tl.arange(0, BLOCK_G)
    word = tl.arange(0, WORDS)
    weights = weight.to(tl.pointer_type(tl.int32)) + first_row.to(tl.int64) * (INPUTS // 8)
    offsets = (row * (INPUTS // 8) + pair_group * WORDS)[:, None] + word[None, :]
    factors = multipliers + first_row.to(tl.int64) * GROUPS + row * GROUPS + pair_group
    vector = products.to(tl.pointer_type(tl.int32)) + token * (INPUTS // 4)
    vector += group[:, None] * (2 * WORDS) + word[None, :]
    acc = tl.zeros((PAIRS, WORDS), dtype=tl.int32)
    for first in tl.static_range(0, GROUPS, BLOCK_G):
        if first + BLOCK_G <= GROUPS:
            packed = tl.load(weights + first * WORDS + offsets)
            low = tl.load(vector + first * (2 * WORDS))
            high = tl.load(vector + (first * (2 * WORDS) + WORDS))
            factor = tl.load(factors + first)
        else:
            inside = (pair_group < GROUPS - first)[:, None]
            packed = tl.load(weights + first * WORDS + offsets, mask=inside, other=0)
            low = tl.load(vector + first * (2 * WORDS), mask=(group < GROUPS - first)[:, None], other=0)
            high = tl.load(vector + (first * (2 * WORDS) + WORDS), mask=(group < GROUPS - first)[:, None], other=0)
            factor = tl.load(factors + first, mask=pair_group < GROUPS - first, other=0)
        # Codes are stored as code + 8: eight times the sum of the activations comes off.
        eights = tl.full((BLOCK_G, WORDS), 0x08080808, dtype=tl.int32)
        offset = -_dot4(eights, low, _dot4(eights, high, tl.zeros_like(eights), USE_PTX), USE_PTX)
        dot = _dot4(packed & 0x0F0F0F0F, _repeat(low, BLOCK_N), _repeat(offset, BLOCK_N), USE_PTX)
        dot = _dot4((packed >> 4) & 0x0F0F0F0F, _repeat(high, BLOCK_N), dot, USE_PTX)
        acc += dot * factor.to(tl.int32)[:, None]
    total = tl.sum(tl.reshape(tl.sum(acc, axis=1), (BLOCK_N, BLOCK_G)), axis=1)
    row = first_row + tl.arange(0, BLOCK_N)
    is_row = row < OUTPUTS
    y = total.to(tl.float32) * (tl.load(steps + token) * tl.load(scales + row, mask=is_row, other=0.0))
    tl.store(output + token * OUTPUTS + row, y.to(output.dtype.element_ty), mask=is_row & (token < tokens))
