"""Choice of diverse tokens on GPUs (`numerics/diverse.py`): the last of three launches; indices are the reference's.

`similarity.py` has the first two, which fill the GPU; then one program for each image chooses: `select_dpp` or
`select_maxmin`. It needs one row of products for each step, and its steps follow one another. One launch for all of it
would be one program for each image, whose one multiprocessor reads and multiplies everything: it took four times as
long (481 and 533 us for 576 tokens of 4,096 float16 and float32 channels on an H100).

Products of codes are integers that float32 holds, and so are the sums of products of Cholesky rows, in any order; the
rest is the reference's float32 arithmetic, operation for operation.
"""

# A `triton.jit` function's types are its specification's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated, misc"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qavp_export.engines.kernels.compile import KernelSpec
from qavp_export.engines.kernels.rounding import ROUND
from qavp_export.engines.kernels.similarity import check_tokens
from qavp_export.errors import InputError
from qavp_export.numerics.diverse import FLOOR, FULL, MARGIN, MOST_KEPT, UNIT

_WARP = 32
_MOST_WARPS = 16
_REGISTERS = 65536
_MOST_REGISTERS = 255
# Tokens of one thread, as far as warps suffice: 16 bytes of a row of products, which it reads at once.
_THREAD_TOKENS = 4
# Warps of one program: more have to meet at every step.
_DPP_WARPS = 8
# Cholesky rows that are read before the first is used, and rows of products.
_ROWS = 8
# Cholesky rows start at multiples of so many numbers: 16 bytes.
_ROW_MULTIPLE = 4
_UNIT: tl.constexpr = tl.constexpr(UNIT)
_FULL: tl.constexpr = tl.constexpr(FULL)
_FLOOR: tl.constexpr = tl.constexpr(FLOOR)
_MARGIN: tl.constexpr = tl.constexpr(MARGIN)
# What `sqrt.rn` is compiled to, without the branch for numbers that are not normal, at which every root would wait.
_ROOT_PTX = tl.constexpr("""
{
.reg .f32 inverse, root, half, rest;
rsqrt.approx.ftz.f32 inverse, $1;
mul.rn.f32 root, $1, inverse;
mul.rn.f32 half, inverse, 0f3F000000;
neg.f32 rest, root;
fma.rn.f32 rest, rest, root, $1;
fma.rn.f32 $0, rest, half, root;
}
""")


@triton.jit
def select_dpp(
    products,
    score,
    indices,
    order,
    rows,
    TOKENS: tl.constexpr,
    KEPT: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Chooses KEPT tokens of one image: products `[images, TOKENS, TOKENS]`, score `[images, TOKENS]` float32.

    Indices (ascending) and order (of choice) are `[images, KEPT]` int32. Rows `[images, PADDED, ROW]` float32
    are Cholesky rows: nobody else needs them. Whatever the score is, the tokens are KEPT different ones.
    """
    image = tl.program_id(0).to(tl.int64)
    products += image * (TOKENS * TOKENS)
    rows += image * (PADDED * ROW)
    token = tl.arange(0, BLOCK)
    is_token = token < TOKENS
    in_row = token < ROW
    # Rows that do not exist yet must not hide a NaN: they are multiplied, by zeros.
    for step in range(PADDED):
        tl.store(rows + step * ROW + token, tl.zeros([BLOCK], tl.float32), mask=in_row)
    square = tl.load(products + token * (TOKENS + 1), mask=is_token, other=0.0)
    scale = _scale(square)
    rest = tl.where(square >= 1.0, _FULL, _FLOOR)
    weight = _weight(score + image * TOKENS + token, is_token)
    tl.debug_barrier()
    for step in range(KEPT):
        limit = _root(rest, USE_PTX)
        # What is behind the last token may be anything.
        gain = tl.where(is_token, weight * rest, -float("inf"))
        _, j, limit_j, scale_j = tl.reduce((gain, token, limit, scale), 0, _first_of_largest)
        tl.store(order + image * KEPT + step, j)
        weight = tl.where(token == j, -1.0, weight)
        # Past the first cache, which is to hold the rows.
        product = tl.load(products + j * TOKENS + token, mask=is_token, other=0.0, cache_modifier=".cg")
        known = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, step, ROWS):
            held = ()
            for above in tl.static_range(ROWS):
                row = rows + (begin + above) * ROW
                held += ((tl.load(row + j), tl.load(row + token, mask=in_row, other=0.0)),)
            for above in tl.static_range(ROWS):
                known = tl.fma(held[above][0], held[above][1], known)
        row = _quotient(product * (scale * scale_j) - known, limit_j, USE_PTX)
        row = tl.minimum(tl.maximum(row, -limit), limit) + ROUND - ROUND
        rest = tl.maximum(rest - row * row, _FLOOR)
        tl.store(rows + step * ROW + token, row, mask=in_row)
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
    lone = tl.where(is_empty, _UNIT, closest * scale * inverse_unit + ROUND - ROUND)
    key = tl.where(is_token, lone, float("inf"))
    nearest = tl.where(is_token, tl.where(is_empty, _UNIT, -_UNIT), float("inf"))
    for step in range(KEPT):
        _, j, scale_j = tl.reduce((-key, token, scale), 0, _first_of_larger)
        tl.store(order + image * KEPT + step, j)
        product = tl.load(products + j * TOKENS + token, mask=is_token, other=0.0)
        cosine = product * (scale * scale_j) * inverse_unit + ROUND - ROUND
        nearest = tl.where(token == j, 2.0 * _UNIT, tl.maximum(nearest, cosine))
        key = nearest
    _store_sorted(indices + image * KEPT, token, (nearest == 2.0 * _UNIT) & is_token)


@triton.jit
def _scale(square):
    """2048 over the norms of tokens."""
    return tl.div_rn(_UNIT, tl.sqrt_rn(tl.maximum(square, 1.0)))


@triton.jit
def _root(square, USE_PTX: tl.constexpr):
    """The square root, rounded to nearest, of normal numbers: on an H100 of every integer from 1,024 to 2^23."""
    if USE_PTX:
        root = tl.inline_asm_elementwise(_ROOT_PTX, "=f,f", [square], dtype=tl.float32, is_pure=True, pack=1)
    else:
        root = tl.sqrt_rn(square)
    return root


@triton.jit
def _quotient(dividends, divisor, USE_PTX: tl.constexpr):
    """Quotients, rounded to nearest, by a common divisor."""
    if USE_PTX:
        # One division for all (Markstein 1990): with the nearest number to its inverse one correction is enough.
        inverse = tl.div_rn(1.0, divisor)
        first = dividends * inverse
        quotients = tl.fma(tl.fma(-divisor, first, dividends), inverse, first)
    else:
        quotients = tl.div_rn(dividends, divisor)
    return quotients


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
def _first_of_largest(gain, token, limit, scale, gain2, token2, limit2, scale2):
    second = (gain2 > gain) | ((gain2 == gain) & (token2 < token))
    gain, token = tl.where(second, gain2, gain), tl.where(second, token2, token)
    return gain, token, tl.where(second, limit2, limit), tl.where(second, scale2, scale)


@triton.jit
def _first_of_larger(gain, token, scale, gain2, token2, scale2):
    second = (gain2 > gain) | ((gain2 == gain) & (token2 < token))
    return tl.where(second, gain2, gain), tl.where(second, token2, token), tl.where(second, scale2, scale)


@triton.jit
def _store_sorted(indices, token, taken):
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(indices + place, token, mask=taken)


def select_dpp_spec(tokens: int, kept: int, use_ptx: bool = True) -> KernelSpec:
    """Specifies `select_dpp`: launch it with `select_grid`.

    Run-time arguments: products `[images, tokens, tokens]` and score `[images, tokens]` float32, indices and order
    `[images, kept]` int32, rows `[images, *rows_shape(tokens, kept)]` float32, which are scratch; pointers are
    multiples of 16.

    Args:
        tokens: Tokens of an image.
        kept: Tokens to choose.
        use_ptx: Take roots with inline PTX and quotients with fused operations; without, the interpreter runs it.

    Raises:
        InputError: The kernel has no such variant.
    """
    padded, row = rows_shape(tokens, kept)
    signature = {"products": "*fp32", "score": "*fp32", "indices": "*i32", "order": "*i32", "rows": "*fp32"}
    constants = {"PADDED": padded, "ROWS": _ROWS, "ROW": row, "USE_PTX": use_ptx}
    return _chooser("select_dpp", signature, tokens, kept, _DPP_WARPS, constants)


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
        _MOST_WARPS,
        {"ROWS": _ROWS},
    )


def rows_shape(tokens: int, kept: int) -> tuple[int, int]:
    """Returns the shape of `select_dpp`'s scratch for an image: as many rows and numbers as are read at once."""
    # Expressions of a plugin have no negation.
    return -(-kept // _ROWS) * _ROWS, (tokens + _ROW_MULTIPLE - 1) // _ROW_MULTIPLE * _ROW_MULTIPLE


def select_grid(images: int) -> tuple[int, int, int]:
    """Returns the programs that choose tokens of `images` images."""
    return images, 1, 1


def _chooser(
    function: str, signature: dict[str, str], tokens: int, kept: int, most_warps: int, constants: dict[str, int]
) -> KernelSpec:
    check_tokens(tokens)
    if not 1 <= kept <= min(tokens, MOST_KEPT):
        raise InputError(f"the selection kernels choose from 1 to all {tokens} tokens, not {kept}")
    block = triton.next_power_of_2(tokens)
    warps = min(most_warps, max(1, block // (_WARP * _THREAD_TOKENS)))
    constants = {"TOKENS": tokens, "KEPT": kept, "BLOCK": block, **constants}
    # Left alone the assembler saves registers, and waits for each row before it reads the next.
    registers = min(_MOST_REGISTERS, _REGISTERS // (_WARP * warps))
    return KernelSpec(__name__, function, signature, constants, warps, 1, frozenset(signature), registers)
