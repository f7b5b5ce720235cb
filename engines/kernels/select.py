"""Selection of diverse tokens on GPUs (`numerics/diverse.py`) in three launches; indices are the reference's.

`token_codes` sketches tokens and rounds them to 8-bit codes, `token_products` multiplies them, and one program for each
image then chooses: `select_dpp` or `select_maxmin`. One launch for all of it would be one program for each image, whose
one multiprocessor would read and multiply everything. What chooses needs one row of products for each step, and its
steps follow one another.

Products of codes are integers that float32 holds, and so are the sums of products of Cholesky rows, in any order; the
rest is the reference's float32 arithmetic, operation for operation.
"""

# A `triton.jit` function's types are its specification's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated, misc"

from __future__ import annotations

from dataclasses import replace

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qavp_export.engines.kernels.compile import KernelSpec
from qavp_export.engines.kernels.types import load_values
from qavp_export.errors import InputError
from qavp_export.numerics.diverse import (
    FLOOR,
    FULL,
    HASH,
    LARGEST_CODE,
    MARGIN,
    MOST_KEPT,
    TINY,
    UNIT,
    code_width,
    padded_width,
)

# A program holds a whole token in registers, and one value of each of an image's tokens.
MOST_CHANNELS = 16384
MOST_TOKENS = 4096
_WARP = 32
_MOST_WARPS = 16
_REGISTERS = 65536
# Values of a token that one thread holds.
_THREAD_CHANNELS = 32
# Tokens of one thread: 16 bytes of a Cholesky row, which it reads at once.
_THREAD_TOKENS = 8
# Cholesky rows that are read before the first is used, and rows of products.
_ROWS = 8
# Tokens by tokens of a tile of products, and channels of one step: three stages are 48 KB of shared memory.
_TILE_TOKENS = 64
_TILE_CHANNELS = 128
# Adding and subtracting 1.5 * 2^23 rounds to an integer, half-way cases to even.
_ROUND: tl.constexpr = tl.constexpr(12582912.0)
_UNIT: tl.constexpr = tl.constexpr(UNIT)
_FULL: tl.constexpr = tl.constexpr(FULL)
_FLOOR: tl.constexpr = tl.constexpr(FLOOR)
_MARGIN: tl.constexpr = tl.constexpr(MARGIN)
_TINY: tl.constexpr = tl.constexpr(TINY)
_LEVELS: tl.constexpr = tl.constexpr(float(LARGEST_CODE))
_HASH: tl.constexpr = tl.constexpr(HASH[0])
_HASH_AGAIN: tl.constexpr = tl.constexpr(HASH[1])


@triton.jit
def token_codes(features, codes, WIDTH: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr, FOLDS: tl.constexpr):
    """Codes of one token: features `[tokens, WIDTH]`, codes `[tokens, CODES]` int8.

    A sketch adds up `2^FOLDS` blocks of channels; with no folds it is the token.
    """
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    blocks = ()
    for block in tl.static_range(1 << FOLDS):
        here = block * BLOCK + channel
        part = tl.load(features + token * WIDTH + here, mask=here < WIDTH, other=0.0).to(tl.float32)
        blocks += (tl.where(_is_negated(here), -part, part) if FOLDS > 0 else part,)
    for fold in tl.static_range(FOLDS):
        sums = ()
        for block in tl.static_range(1 << (FOLDS - 1 - fold)):
            sums += (blocks[block] + blocks[block + (1 << (FOLDS - 1 - fold))],)
        blocks = sums
    (values,) = blocks
    step = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), _LEVELS), _TINY)
    code = tl.div_rn(values, step) + _ROUND - _ROUND
    tl.store(codes + token * CODES + channel, code.to(tl.int8), mask=channel < CODES)


@triton.jit
def token_products(
    codes, products, TOKENS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, CHANNELS: tl.constexpr
):
    """A tile of one image's products, and its mirror image: codes `[images, TOKENS, WIDTH]` int8.

    The products `[images, TOKENS, TOKENS]` are float32 that hold integers.
    """
    first, second = tl.program_id(0) * TILE, tl.program_id(1) * TILE
    # What is below the diagonal is written by what is above it.
    if second >= first:
        codes += tl.program_id(2).to(tl.int64) * (TOKENS * WIDTH)
        products += tl.program_id(2).to(tl.int64) * (TOKENS * TOKENS)
        row, column = first + tl.arange(0, TILE), second + tl.arange(0, TILE)
        channel = tl.arange(0, CHANNELS)
        left = codes + row[:, None] * WIDTH + channel[None, :]
        right = codes + column[None, :] * WIDTH + channel[:, None]
        sums = tl.zeros([TILE, TILE], tl.int32)
        for begin in range(0, WIDTH, CHANNELS):
            within = channel < WIDTH - begin
            a = tl.load(left + begin, mask=(row < TOKENS)[:, None] & within[None, :], other=0)
            b = tl.load(right + begin, mask=(column < TOKENS)[None, :] & within[:, None], other=0)
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        tile = sums.to(tl.float32)
        here = (row < TOKENS)[:, None] & (column < TOKENS)[None, :]
        tl.store(products + row[:, None] * TOKENS + column[None, :], tile, mask=here)
        if second > first:
            there = (column < TOKENS)[:, None] & (row < TOKENS)[None, :]
            tl.store(products + column[:, None] * TOKENS + row[None, :], tl.trans(tile), mask=there)


@triton.jit
def select_dpp(
    products,
    score,
    indices,
    order,
    rows,
    TOKENS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
):
    """Chooses KEPT tokens of one image: products `[images, TOKENS, TOKENS]`, score `[images, TOKENS]` float32.

    Indices (ascending) and order (of choice) are `[images, KEPT]` int32. Rows `[images, KEPT, ROW]` float16 are
    Cholesky rows: nobody else needs them. Whatever the score is, the tokens are KEPT different ones.
    """
    image = tl.program_id(0).to(tl.int64)
    products += image * (TOKENS * TOKENS)
    rows += image * (KEPT * ROW)
    token = tl.arange(0, BLOCK)
    is_token = token < TOKENS
    square = tl.load(products + token * (TOKENS + 1), mask=is_token, other=0.0)
    scale = _scale(square)
    rest = tl.where(square >= 1.0, _FULL, _FLOOR)
    weight = tl.where(is_token, _weight(score + image * TOKENS + token, is_token), -float("inf"))
    in_row = token < ROW
    for step in range(KEPT):
        _, j, rest_j, scale_j = tl.reduce((weight * rest, token, rest, scale), 0, _first_of_largest)
        tl.store(order + image * KEPT + step, j)
        weight = tl.where(token == j, -1.0, weight)
        product = tl.load(products + j * TOKENS + token, mask=is_token, other=0.0)
        known = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, step, ROWS):
            held = ()
            for above in tl.static_range(ROWS):
                row = rows + (begin + above) * ROW
                is_row = begin + above < step
                held += (
                    (tl.load(row + j, mask=is_row, other=0.0), tl.load(row + token, mask=is_row & in_row, other=0.0)),
                )
            for above in tl.static_range(ROWS):
                known = tl.fma(held[above][0].to(tl.float32), held[above][1].to(tl.float32), known)
        limit = tl.sqrt_rn(rest)
        row = tl.div_rn(product * (scale * scale_j) - known, tl.sqrt_rn(rest_j))
        row = tl.minimum(tl.maximum(row, -limit), limit) + _ROUND - _ROUND
        rest = tl.maximum(rest - row * row, _FLOOR)
        tl.store(rows + step * ROW + token, row.to(tl.float16), mask=in_row)
        # Other threads read what this one wrote.
        tl.debug_barrier()
    _store_sorted(indices + image * KEPT, token, (weight == -1.0) & is_token)


@triton.jit
def select_maxmin(
    products,
    indices,
    order,
    TOKENS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Chooses KEPT tokens of one image that are far from one another: arguments as `select_dpp`'s."""
    image = tl.program_id(0).to(tl.int64)
    products += image * (TOKENS * TOKENS)
    token = tl.arange(0, BLOCK)
    is_token = token < TOKENS
    square = tl.load(products + token * (TOKENS + 1), mask=is_token, other=0.0)
    scale = _scale(square)
    inverse_unit: tl.constexpr = 1.0 / _UNIT
    closest = tl.full([BLOCK], -_FULL, tl.float32)
    for begin in range(0, TOKENS, ROWS):
        other = begin + tl.arange(0, ROWS)
        other_scale = _scale(tl.load(products + other * (TOKENS + 1), mask=other < TOKENS, other=0.0))
        both = (other < TOKENS)[:, None] & is_token[None, :]
        product = tl.load(products + other[:, None] * TOKENS + token[None, :], mask=both, other=0.0)
        masked = tl.where(both & (other[:, None] != token[None, :]), product * other_scale[:, None], -_FULL)
        closest = tl.maximum(closest, tl.max(masked, axis=0))
    is_empty = square < 1.0
    lone = tl.where(is_empty, _UNIT, closest * scale * inverse_unit + _ROUND - _ROUND)
    key = tl.where(is_token, lone, float("inf"))
    nearest = tl.where(is_token, tl.where(is_empty, _UNIT, -_UNIT), float("inf"))
    for step in range(KEPT):
        _, j, scale_j = tl.reduce((-key, token, scale), 0, _first_of_larger)
        tl.store(order + image * KEPT + step, j)
        product = tl.load(products + j * TOKENS + token, mask=is_token, other=0.0)
        cosine = product * (scale * scale_j) * inverse_unit + _ROUND - _ROUND
        nearest = tl.where(token == j, 2.0 * _UNIT, tl.maximum(nearest, cosine))
        key = nearest
    _store_sorted(indices + image * KEPT, token, (nearest == 2.0 * _UNIT) & is_token)


@triton.jit
def _is_negated(channel):
    """Whether a sketch changes the sign of a channel."""
    bits = channel.to(tl.uint32) * _HASH
    bits = (bits ^ (bits >> 15)) * _HASH_AGAIN
    return (bits >> 31) != 0


@triton.jit
def _scale(square):
    """2048 over the norms of tokens."""
    return tl.div_rn(_UNIT, tl.sqrt_rn(tl.maximum(square, 1.0)))


@triton.jit
def _weight(score, is_token):
    """Squares of what tokens are worth."""
    values = tl.load(score, mask=is_token, other=0.0)
    low = tl.min(tl.where(is_token, values, float("inf")), axis=0)
    high = tl.max(tl.where(is_token, values, -float("inf")), axis=0)
    quality = tl.div_rn(values - low, high - low + 1e-8) + _MARGIN
    # What is no number must not be compared: a token would be chosen twice.
    return tl.where(quality == quality, quality * quality, 0.0)


@triton.jit
def _first_of_largest(gain, token, rest, scale, gain2, token2, rest2, scale2):
    second = (gain2 > gain) | ((gain2 == gain) & (token2 < token))
    gain, token = tl.where(second, gain2, gain), tl.where(second, token2, token)
    return gain, token, tl.where(second, rest2, rest), tl.where(second, scale2, scale)


@triton.jit
def _first_of_larger(gain, token, scale, gain2, token2, scale2):
    second = (gain2 > gain) | ((gain2 == gain) & (token2 < token))
    return tl.where(second, gain2, gain), tl.where(second, token2, token), tl.where(second, scale2, scale)


@triton.jit
def _store_sorted(indices, token, taken):
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(indices + place, token, mask=taken)


def token_codes_spec(dtype: str, width: int) -> KernelSpec:
    """Specifies `token_codes`: launch it with `token_codes_grid`.

    Run-time arguments: features `[tokens, width]`, codes `[tokens, code_width(width)]` int8; pointers are multiples of
    16.

    Args:
        dtype: Of the features: `fp16`, `bf16` or `fp32`.
        width: Channels per token.

    Raises:
        InputError: The kernel has no such variant.
    """
    load_values(dtype)
    if not 1 <= width <= MOST_CHANNELS:
        raise InputError(f"the selection kernels take at most {MOST_CHANNELS} channels, not {width}")
    padded, kept = padded_width(width), code_width(width)
    warps = min(_MOST_WARPS, max(1, padded // (_WARP * _THREAD_CHANNELS)))
    block = min(padded, padded_width(kept))
    folds = (padded // block).bit_length() - 1
    constants: dict[str, int | float | bool | None]
    constants = {"WIDTH": width, "CODES": kept, "BLOCK": block, "FOLDS": folds}
    return _spec("token_codes", {"features": f"*{dtype}", "codes": "*i8"}, constants, warps)


def token_codes_grid(tokens: int) -> tuple[int, int, int]:
    """Returns the programs that round `tokens` tokens, all images together."""
    return tokens, 1, 1


def token_products_spec(tokens: int, width: int) -> KernelSpec:
    """Specifies `token_products`: launch it with `token_products_grid`.

    Run-time arguments: codes `[images, tokens, width]` int8, products `[images, tokens, tokens]` float32; pointers are
    multiples of 16.

    Args:
        tokens: Tokens of an image.
        width: Channels of the codes.

    Raises:
        InputError: The kernel has no such variant.
    """
    _check_tokens(tokens)
    # A product of the tensor cores takes 32 channels.
    channels = max(32, min(_TILE_CHANNELS, triton.next_power_of_2(width)))
    constants = {"TOKENS": tokens, "WIDTH": width, "TILE": _TILE_TOKENS, "CHANNELS": channels}
    return _spec("token_products", {"codes": "*i8", "products": "*fp32"}, constants, 4, num_stages=3)


def token_products_grid(images: int, tokens: int) -> tuple[int, int, int]:
    """Returns the programs that multiply the tokens of `images` images."""
    tiles = -(-tokens // _TILE_TOKENS)
    return tiles, tiles, images


def select_dpp_spec(tokens: int, kept: int) -> KernelSpec:
    """Specifies `select_dpp`: launch it with `select_grid`.

    Run-time arguments: products `[images, tokens, tokens]` and score `[images, tokens]` float32, indices and order
    `[images, kept]` int32, rows `[images, kept, row_width(tokens)]` float16, which are scratch; pointers are multiples
    of 16.

    Args:
        tokens: Tokens of an image.
        kept: Tokens to choose.

    Raises:
        InputError: The kernel has no such variant.
    """
    signature = {"products": "*fp32", "score": "*fp32", "indices": "*i32", "order": "*i32", "rows": "*fp16"}
    return _chooser("select_dpp", signature, tokens, kept, {"ROWS": _ROWS, "ROW": row_width(tokens)})


def select_maxmin_spec(tokens: int, kept: int) -> KernelSpec:
    """Specifies `select_maxmin`: launch it with `select_grid`.

    Run-time arguments: products `[images, tokens, tokens]` float32, indices and order `[images, kept]` int32; pointers
    are multiples of 16.

    Args:
        tokens: Tokens of an image.
        kept: Tokens to choose.

    Raises:
        InputError: The kernel has no such variant.
    """
    return _chooser(
        "select_maxmin",
        {"products": "*fp32", "indices": "*i32", "order": "*i32"},
        tokens,
        kept,
        {"ROWS": _ROWS},
    )


def row_width(tokens: int) -> int:
    """Returns the size of the last axis of `select_dpp`'s scratch: whole loads of 16 bytes."""
    return (tokens + _THREAD_TOKENS - 1) // _THREAD_TOKENS * _THREAD_TOKENS


def select_grid(images: int) -> tuple[int, int, int]:
    """Returns the programs that choose tokens of `images` images."""
    return images, 1, 1


def _chooser(function: str, signature: dict[str, str], tokens: int, kept: int, constants: dict[str, int]) -> KernelSpec:
    _check_tokens(tokens)
    if not 1 <= kept <= min(tokens, MOST_KEPT):
        raise InputError(f"the selection kernels choose from 1 to all {tokens} tokens, not {kept}")
    block = triton.next_power_of_2(tokens)
    warps = min(_MOST_WARPS, max(1, block // (_WARP * _THREAD_TOKENS)))
    spec = _spec(function, signature, {"TOKENS": tokens, "KEPT": kept, "BLOCK": block, **constants}, warps)
    # Left alone the assembler makes room for a second program, and spills.
    return replace(spec, max_registers=_REGISTERS // (_WARP * warps)) if warps == _MOST_WARPS else spec


def _check_tokens(tokens: int) -> None:
    if not 1 <= tokens <= MOST_TOKENS:
        raise InputError(f"the selection kernels take at most {MOST_TOKENS} tokens of an image, not {tokens}")


def _spec(
    function: str,
    signature: dict[str, str],
    constants: dict[str, int | float | bool | None],
    warps: int,
    num_stages: int = 1,
) -> KernelSpec:
    return KernelSpec(__name__, function, signature, constants, warps, num_stages, frozenset(signature))
