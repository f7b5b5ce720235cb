"""`w4a4_matmul`: packed 4-bit weights times int8 activations on INT8 tensor cores (numerics section 3).

    y[t, n] = steps[t] * scales[n] * sum_k products[t, k] * multipliers[n, k // G] * codes[n, k]

The multiplier is applied while a tile of weights is unpacked (`packing.py` says how codes are stored), four codes in
one multiply-add, so that all of K is one exact int8 product with int32 sums. The weight is the left operand, which
reaches the tensor cores from registers, the activations the right one, from shared memory: y is computed transposed.

`w4a4_gemv` (`gemv.py`) serves single tokens, `w4a4_matmul` everything else, and `w4a4_reduce` ends a `w4a4_matmul`
that is split along K to fill the GPU. `tilings.py` chooses. Inline PTX is what makes them fast; plain arithmetic
(`USE_PTX` false) gives the same integers and runs in the interpreter.
"""

# A `triton.jit` function's types are its specification's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qavp_export.engines.kernels.compile import KernelSpec
from qavp_export.engines.kernels.packing import check_group_size
from qavp_export.engines.kernels.tilings import GemvTiling, MatmulTiling
from qavp_export.errors import InputError

_REDUCE_OUTPUTS = 512
# Bands of token blocks whose programs run at the same time share weights in the L2 cache.
_BAND = 8

# With u = code + 8, u * m + (128 - 8 m) = code * m + 128 lies in [8, 233]: no byte carries into the next. The exclusive
# or takes the 128 away again.
_UNPACK_PTX = tl.constexpr("""
{
.reg .b32 low, high;
and.b32 low, $2, 0x0f0f0f0f;
shr.u32 high, $2, 4;
and.b32 high, high, 0x0f0f0f0f;
mad.lo.u32 low, low, $3, $7;
mad.lo.u32 high, high, $3, $7;
xor.b32 $0, low, 0x80808080;
xor.b32 $1, high, 0x80808080;
}
""")


@triton.jit
def _tile_place(token_blocks, ROW_BLOCKS: tl.constexpr, BAND: tl.constexpr):
    """Returns the token block and the row block of this program: BAND token blocks, then the next rows."""
    block = tl.program_id(0)
    band = block // (BAND * ROW_BLOCKS)
    within = block % (BAND * ROW_BLOCKS)
    band_size = tl.minimum(token_blocks - band * BAND, BAND)
    return band * BAND + within % band_size, within // band_size


@triton.jit
def _existing_tokens(token, last, first_token, SIZE: tl.constexpr):
    """Returns tokens of a program, and in place of those beyond the last those of the program before.

    Their sums are not stored. The last one again and again would be slow: all programs would read one cache line.
    """
    others = tl.where(first_token > 0, token - SIZE, token % (last + 1))
    return tl.where(token <= last, token, others)


@triton.jit
def _tile_channels(GROUP: tl.constexpr, BYTES: tl.constexpr, JOIN: tl.constexpr):
    """Returns which channels, from the first of a tile, its low halves hold; with JOIN, low and then high halves."""
    HALF: tl.constexpr = GROUP // 2
    if JOIN:
        index = tl.arange(0, 2 * BYTES)
        channel = index // BYTES * HALF + index % BYTES // HALF * GROUP + index % BYTES % HALF
    else:
        channel = tl.arange(0, BYTES) // HALF * GROUP + tl.arange(0, BYTES) % HALF
    # The compiler does not see by itself that channels come in runs, and would load them byte by byte.
    RUN: tl.constexpr = min(BYTES, HALF)
    return tl.max_contiguous(tl.multiple_of(channel, RUN), RUN)


@triton.jit
def _unpack(packed, multipliers, USE_PTX: tl.constexpr):
    """Returns code * multiplier of the low and the high halves, int8. Four bytes in a row share a multiplier."""
    if USE_PTX:
        factor, _ = tl.broadcast(multipliers.to(tl.int32), packed)
        offset = (128 - 8 * factor) * 0x01010101
        low, high = tl.inline_asm_elementwise(
            _UNPACK_PTX,
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, factor, offset],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed & 15) - 8) * multipliers
        high = (((packed >> 4) & 15) - 8) * multipliers
    return low, high


@triton.jit
def _tile_multipliers(multipliers, group, row, column, BYTES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Returns the multipliers of a tile, `[BLOCK_N, 1]`, or `[BLOCK_N, BYTES]` where the tile covers several groups."""
    HALF: tl.constexpr = GROUP // 2
    values = tl.load(multipliers + tl.minimum(group, GROUPS - 1) + row * GROUPS)[:, None]
    for i in tl.static_range(1, BYTES // HALF):
        following = tl.load(multipliers + tl.minimum(group + i, GROUPS - 1) + row * GROUPS)[:, None]
        values = tl.where(column[None, :] >= i * HALF, following, values)
    return values


@triton.jit
def _unpacked_tile(
    weight,
    multipliers,
    row,
    first,
    BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    INPUTS: tl.constexpr,
    EVEN: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """Loads and unpacks a tile, `[BLOCK_N, BYTES]` from byte `first` of rows; beyond a row's last byte codes are -8."""
    ROW_BYTES: tl.constexpr = INPUTS // 2
    column = tl.arange(0, BYTES)
    offsets = row[:, None] * ROW_BYTES + column[None, :]
    if EVEN:
        packed = tl.load(weight + first + offsets)
    else:
        packed = tl.load(weight + first + offsets, mask=(column < ROW_BYTES - first)[None, :], other=0)
    group = first // (GROUP // 2)
    factor = _tile_multipliers(multipliers, group, row, column, BYTES, GROUP, INPUTS // GROUP)
    return _unpack(packed, factor, USE_PTX)


@triton.jit
def _part_of_row(part, ROW_BYTES: tl.constexpr, STEP: tl.constexpr, SPLIT_K: tl.constexpr):
    """Returns the first byte of a part of K and the one behind its last."""
    if SPLIT_K == 1:
        begin = 0
        end = ROW_BYTES
    else:
        PART: tl.constexpr = (ROW_BYTES + STEP * SPLIT_K - 1) // (STEP * SPLIT_K) * STEP
        begin = part * PART
        end = tl.minimum(begin + PART, ROW_BYTES)
    return begin, end


@triton.jit
def _load_products(products, offsets, remaining, BYTES: tl.constexpr, EVEN: tl.constexpr):
    """Loads channels of a tile `[BYTES or 2 BYTES, tokens]`; those beyond the last byte of a row are 0."""
    if EVEN:
        return tl.load(products + offsets)
    inside = tl.arange(0, offsets.shape[0]) % BYTES < remaining
    return tl.load(products + offsets, mask=inside[:, None], other=0)


@triton.jit
def _accumulate(
    acc,
    low,
    high,
    products,
    offsets,
    remaining,
    HALF: tl.constexpr,
    BYTES: tl.constexpr,
    EVEN: tl.constexpr,
    JOIN: tl.constexpr,
):
    """Adds a tile of weights times a tile of activations: one product of both halves, or two."""
    if JOIN:
        joined = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (low.shape[0], 2 * BYTES))
        acc = tl.dot(joined, _load_products(products, offsets, remaining, BYTES, EVEN), acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(low, _load_products(products, offsets, remaining, BYTES, EVEN), acc, out_dtype=tl.int32)
        acc = tl.dot(high, _load_products(products + HALF, offsets, remaining, BYTES, EVEN), acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _store_tile(acc, steps, scales, tokens, output, first_token, first_row, part, OUTPUTS: tl.constexpr):
    """Stores int32 sums of a part of K, or y where `output` is floating point."""
    token = tl.arange(0, acc.shape[1])
    row = first_row + tl.arange(0, acc.shape[0])
    is_token = first_token + token < tokens
    is_row = row < OUTPUTS
    y = tl.trans(acc)
    if output.dtype.element_ty != tl.int32:
        step = tl.load(steps + first_token + token, mask=is_token, other=0.0)
        scale = tl.load(scales + row, mask=is_row, other=0.0)
        y = (y.to(tl.float32) * (step[:, None] * scale[None, :])).to(output.dtype.element_ty)
    base = output + (part.to(tl.int64) * tokens + first_token) * OUTPUTS
    tl.store(base + token[:, None] * OUTPUTS + row[None, :], y, mask=is_token[:, None] & is_row[None, :])


@triton.jit
def w4a4_matmul(
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
    BLOCK_T: tl.constexpr,
    EXTRA_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BAND: tl.constexpr,
    JOIN: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """One tile of y, or of its sums over a part of K. A program has BLOCK_T tokens and EXTRA_T more."""
    part = tl.program_id(1)
    HALF: tl.constexpr = GROUP // 2
    ROW_BYTES: tl.constexpr = INPUTS // 2
    STEP: tl.constexpr = BYTES * UNROLL
    EVEN: tl.constexpr = ROW_BYTES % STEP == 0
    token_block, row_block = _tile_place(tl.cdiv(tokens, BLOCK_T + EXTRA_T), (OUTPUTS + BLOCK_N - 1) // BLOCK_N, BAND)
    first_token = token_block.to(tl.int64) * (BLOCK_T + EXTRA_T)
    first_row = row_block * BLOCK_N
    # Rows beyond the last repeat the last: their sums are not stored.
    row = tl.minimum(tl.arange(0, BLOCK_N), OUTPUTS - 1 - first_row)
    last_token = (tokens - 1 - first_token).to(tl.int32)
    # One scalar pointer that moves and offsets that do not take fewer registers than a tile of pointers.
    weight += first_row.to(tl.int64) * ROW_BYTES
    multipliers += first_row.to(tl.int64) * (INPUTS // GROUP)
    products += first_token * INPUTS
    channel = _tile_channels(GROUP, BYTES, JOIN)
    token = _existing_tokens(tl.arange(0, BLOCK_T), last_token, first_token, BLOCK_T + EXTRA_T)
    main = token[None, :] * INPUTS + channel[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.int32)
    # Tiles are powers of two, token counts are not.
    if EXTRA_T > 0:
        extra = _existing_tokens(BLOCK_T + tl.arange(0, EXTRA_T), last_token, first_token, BLOCK_T + EXTRA_T)
        beside = extra[None, :] * INPUTS + channel[:, None]
        more = tl.zeros((BLOCK_N, EXTRA_T), dtype=tl.int32)
    begin, end = _part_of_row(part, ROW_BYTES, STEP, SPLIT_K)
    for start in range(begin, end, STEP):
        for i in tl.static_range(UNROLL):
            first = start + i * BYTES
            shift = first // HALF * HALF + first
            remaining = ROW_BYTES - first
            low, high = _unpacked_tile(weight, multipliers, row, first, BYTES, GROUP, INPUTS, EVEN, USE_PTX)
            acc = _accumulate(acc, low, high, products + shift, main, remaining, HALF, BYTES, EVEN, JOIN)
            if EXTRA_T > 0:
                more = _accumulate(more, low, high, products + shift, beside, remaining, HALF, BYTES, EVEN, JOIN)
    _store_tile(acc, steps, scales, tokens, output, first_token, first_row, part, OUTPUTS)
    if EXTRA_T > 0:
        _store_tile(more, steps, scales, tokens, output, first_token + BLOCK_T, first_row, part, OUTPUTS)


@triton.jit
def w4a4_reduce(
    sums, steps, scales, tokens, output, OUTPUTS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr
):
    """BLOCK_N outputs of one token from the sums of SPLIT_K parts."""
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < OUTPUTS
    total = tl.zeros((BLOCK_N,), dtype=tl.int32)
    for part in tl.static_range(SPLIT_K):
        total += tl.load(sums + (token + part * tokens.to(tl.int64)) * OUTPUTS + row, mask=is_row, other=0)
    y = total.to(tl.float32) * (tl.load(steps + token) * tl.load(scales + row, mask=is_row, other=0.0))
    tl.store(output + token * OUTPUTS + row, y.to(output.dtype.element_ty), mask=is_row)


def w4a4_matmul_spec(
    inputs: int,
    outputs: int,
    group_size: int,
    tiling: MatmulTiling | GemvTiling,
    dtype: str = "fp16",
    use_ptx: bool = True,
) -> KernelSpec:
    """Specifies `w4a4_matmul`, or `w4a4_gemv` where the tiling is one; both take the same arguments.

    Run-time arguments: products `[T, K]` int8, steps `[T]` float32, weight `[N, K / 2]` int8, multipliers `[N, K / G]`
    int8, scales `[N]` float32, tokens T; output `[T, N]` of `dtype`, or int32 sums `[split_k, T, N]` for
    `w4a4_reduce` where the tiling splits K (steps and scales are not read then). Pointers are multiples of 16.

    Args:
        inputs: K.
        outputs: N.
        group_size: G, one of `packing.GROUP_SIZES`.
        tiling: How the work is cut, by `tilings.matmul_tiling`.
        dtype: Of y: `fp16`, `bf16` or `fp32`.
        use_ptx: Unpack with inline PTX; without, the interpreter runs it.

    Raises:
        RecipeError: The group size does not fit.
        InputError: There is no such output type.
    """
    check_group_size(inputs, group_size)
    constants: dict[str, int | float | bool | None] = {"OUTPUTS": outputs, "INPUTS": inputs, "GROUP": group_size}
    if isinstance(tiling, GemvTiling):
        module, function, stages, registers = "gemv", "w4a4_gemv", 1, None
        constants |= {"BLOCK_N": tiling.outputs, "BLOCK_G": max(1, tiling.words * 8 // group_size)}
    else:
        module, function, stages, registers = "matmul", "w4a4_matmul", tiling.num_stages, tiling.max_registers
        # A product takes at least 32 channels: small groups share a tile.
        tile_bytes = max(32, min(tiling.row_bytes, group_size // 2))
        constants |= {
            "BLOCK_T": tiling.tokens,
            "EXTRA_T": tiling.extra_tokens,
            "BLOCK_N": tiling.outputs,
            "BYTES": tile_bytes,
            "UNROLL": tiling.unroll,
            "SPLIT_K": tiling.split_k,
            "BAND": _BAND,
            "JOIN": tiling.join,
        }
    constants["USE_PTX"] = use_ptx
    signature = {
        "products": "*i8",
        "steps": "*fp32",
        "weight": "*i8",
        "multipliers": "*i8",
        "scales": "*fp32",
        "tokens": "i32",
        "output": "*i32" if tiling.split_k > 1 else _float_pointer(dtype),
    }
    aligned = frozenset(signature) - {"tokens"}
    module = f"{__package__}.{module}"
    return KernelSpec(module, function, signature, constants, tiling.num_warps, stages, aligned, registers)


def w4a4_matmul_grid(tokens: int, outputs: int, tiling: MatmulTiling | GemvTiling) -> tuple[int, int, int]:
    """Returns the programs of `w4a4_matmul` or `w4a4_gemv`."""
    if isinstance(tiling, GemvTiling):
        return triton.cdiv(outputs, tiling.outputs), tokens, 1
    token_blocks = triton.cdiv(tokens, tiling.tokens + tiling.extra_tokens)
    return triton.cdiv(outputs, tiling.outputs) * token_blocks, tiling.split_k, 1


def w4a4_reduce_spec(outputs: int, split_k: int, dtype: str = "fp16") -> KernelSpec:
    """Specifies `w4a4_reduce`.

    Run-time arguments: sums `[split_k, T, N]` int32, steps `[T]` float32, scales `[N]` float32, tokens T; output
    `[T, N]` of `dtype`.

    Args:
        outputs: N.
        split_k: Parts of K.
        dtype: Of y: `fp16`, `bf16` or `fp32`.

    Raises:
        InputError: There is no such output type.
    """
    constants = {"OUTPUTS": outputs, "SPLIT_K": split_k, "BLOCK_N": _REDUCE_OUTPUTS}
    signature = {"sums": "*i32", "steps": "*fp32", "scales": "*fp32", "tokens": "i32", "output": _float_pointer(dtype)}
    aligned = frozenset(signature) - {"tokens"}
    return KernelSpec(__name__, "w4a4_reduce", signature, constants, num_warps=4, num_stages=1, aligned=aligned)


def w4a4_reduce_grid(tokens: int, outputs: int) -> tuple[int, int, int]:
    """Returns the programs of `w4a4_reduce`."""
    return triton.cdiv(outputs, _REDUCE_OUTPUTS), tokens, 1


def _float_pointer(dtype: str) -> str:
    if dtype not in ("fp16", "bf16", "fp32"):
        raise InputError(f"the W4A4 kernel writes fp16, bf16 or fp32, not {dtype}")
    return f"*{dtype}"
