"""What tokens of an image have in common, on GPUs (`numerics/diverse.py`): the first two launches of a selection.

`token_codes` sketches tokens and rounds them to 8-bit codes, `token_products` multiplies them. Products of codes are
integers that float32 holds; the rest is the reference's float32 arithmetic, operation for operation.
"""

# A `triton.jit` function's types are its specification's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated, misc"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qavp_export.engines.kernels.compile import KernelSpec
from qavp_export.engines.kernels.rounding import ROUND
from qavp_export.engines.kernels.types import load_values
from qavp_export.errors import InputError
from qavp_export.numerics.diverse import HASH, LARGEST_CODE, TINY, code_width, padded_width

# A program holds a whole token in registers, and one value of each of an image's tokens.
MOST_CHANNELS = 16384
MOST_TOKENS = 4096
_WARP = 32
_MOST_WARPS = 16
# Values of a token that one thread holds.
_THREAD_CHANNELS = 32
# Tokens by tokens of a tile of products, and channels of one step: three stages are 48 KB of shared memory.
_TILE_TOKENS = 64
_TILE_CHANNELS = 128
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
    code = tl.div_rn(values, step) + ROUND - ROUND
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
def _is_negated(channel):
    """Whether a sketch changes the sign of a channel."""
    bits = channel.to(tl.uint32) * _HASH
    bits = (bits ^ (bits >> 15)) * _HASH_AGAIN
    return (bits >> 31) != 0


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
    constants = {"WIDTH": width, "CODES": kept, "BLOCK": block, "FOLDS": folds}
    signature = {"features": f"*{dtype}", "codes": "*i8"}
    return KernelSpec(__name__, "token_codes", signature, constants, warps, 1, frozenset(signature))


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
    check_tokens(tokens)
    # A product of the tensor cores takes 32 channels.
    channels = max(32, min(_TILE_CHANNELS, triton.next_power_of_2(width)))
    constants = {"TOKENS": tokens, "WIDTH": width, "TILE": _TILE_TOKENS, "CHANNELS": channels}
    signature = {"codes": "*i8", "products": "*fp32"}
    return KernelSpec(__name__, "token_products", signature, constants, 4, 3, frozenset(signature))


def token_products_grid(images: int, tokens: int) -> tuple[int, int, int]:
    """Returns the programs that multiply the tokens of `images` images."""
    tiles = -(-tokens // _TILE_TOKENS)
    return tiles, tiles, images


def check_tokens(tokens: int) -> None:
    """Checks that the kernels take so many tokens of an image.

    Raises:
        InputError: They do not.
    """
    if not 1 <= tokens <= MOST_TOKENS:
        raise InputError(f"the selection kernels take at most {MOST_TOKENS} tokens of an image, not {tokens}")
