"""The hybrid token score on GPUs (`numerics/score.py`) in two launches.

`token_sensitivity` reads the features once and leaves two numbers per token; `mix_token_score` scales each image's
tokens and mixes them. One launch would need a meeting of all programs of an image.

Against the reference: sums run in another order, values are multiplied by the reciprocal of `scale + eps` instead of
divided (a GPU's exact division costs more than reading the value), and `v - code * scale` is rounded once, not twice. A
value at a half-way case may get the other code; its error is the same then. E differs by up to 1e-5 E + 1e-6 norm2(v),
R not at all (`raw`) or by 1e-6 of itself (`rms`).
"""

# A `triton.jit` function's types are its specification's.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from qavp_export.engines.kernels.compile import KernelSpec
from qavp_export.engines.kernels.rounding import ROUND
from qavp_export.engines.kernels.types import load_values
from qavp_export.errors import InputError
from qavp_export.numerics.score import ScoreInput, check_score_settings

_WARP = 32
# Values that a thread may hold while others need registers too.
_HELD_VALUES = 64
# Unrolled steps of a program: more would only lengthen the code.
_MAX_STEPS = 16
_MAX_MIX_BLOCK = 1024


@dataclass(frozen=True)
class SensitivityTiling:
    """How `token_sensitivity` cuts its work; all powers of two.

    Attributes:
        tokens: Tokens of a program.
        lanes: Threads that share a group: fewer exchange less, more read longer runs of memory.
        num_warps: Warps of a program.
    """

    tokens: int
    lanes: int
    num_warps: int


# A warp for each token: nothing goes through shared memory. For many tokens.
WARP_PER_TOKEN = SensitivityTiling(tokens=4, lanes=8, num_warps=4)
# A block for each token: for so few tokens that the latency of one counts.
BLOCK_PER_TOKEN = SensitivityTiling(tokens=1, lanes=8, num_warps=4)
# What the GPU check chooses from.
CANDIDATE_TILINGS = (
    WARP_PER_TOKEN,
    BLOCK_PER_TOKEN,
    SensitivityTiling(tokens=4, lanes=4, num_warps=4),
    SensitivityTiling(tokens=4, lanes=16, num_warps=4),
    SensitivityTiling(tokens=2, lanes=8, num_warps=4),
    SensitivityTiling(tokens=1, lanes=16, num_warps=2),
    SensitivityTiling(tokens=8, lanes=8, num_warps=4),
)


@triton.jit
def token_sensitivity(
    features,
    rows,
    error,
    outlier,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP_GROUPS: tl.constexpr,
    REPEATS: tl.constexpr,
    LANES: tl.constexpr,
    VALUES: tl.constexpr,
    RMS: tl.constexpr,
):
    """E and R of TOKENS tokens: features `[rows, GROUPS * G]`, error and outlier `[rows]` float32.

    A group is `[REPEATS, LANES, VALUES]`. REPEATS leads the tiles, so that one thread holds all of them: only the
    LANES threads of a group exchange anything before the end.
    """
    WIDTH: tl.constexpr = GROUPS * REPEATS * LANES * VALUES
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    held = _read(
        features + token.to(tl.int64)[None, :, None, None, None] * WIDTH,
        (token < rows)[None, :, None, None, None],
        GROUPS,
        STEPS,
        STEP_GROUPS,
        REPEATS,
        LANES,
        VALUES,
    )
    if RMS:
        inverse_rms = _inverse_rms(held, WIDTH, STEPS, TOKENS, STEP_GROUPS, LANES)[None, :, None, None, None]
    high = tl.full([TOKENS, STEP_GROUPS, LANES], -float("inf"), tl.float32)
    low = tl.full([TOKENS, STEP_GROUPS, LANES], float("inf"), tl.float32)
    squared_error = tl.zeros([REPEATS, TOKENS, STEP_GROUPS, LANES, VALUES], tl.float32)
    for step in tl.static_range(STEPS):
        values = held[step].to(tl.float32)
        if RMS:
            values *= inverse_rms
        step_high = tl.max(tl.max(values, axis=4), axis=0)
        step_low = tl.min(tl.min(values, axis=4), axis=0)
        if (step + 1) * STEP_GROUPS <= GROUPS:
            high, low = tl.maximum(high, step_high), tl.minimum(low, step_low)
        else:
            # What lies behind the last group must not count as a value of zero.
            counts = (tl.arange(0, STEP_GROUPS) < GROUPS - step * STEP_GROUPS)[None, :, None]
            high = tl.where(counts, tl.maximum(high, step_high), high)
            low = tl.where(counts, tl.minimum(low, step_low), low)
        amplitude = tl.max(tl.maximum(step_high, -step_low), axis=2)
        residual = _residual(values, (amplitude * (1.0 / 7.0))[None, :, :, None, None])
        squared_error = tl.fma(residual, residual, squared_error)
    squared_error = tl.sum(tl.sum(squared_error, axis=4), axis=0)
    # One reduction: where warps share a token they meet once.
    threads: tl.constexpr = [TOKENS, STEP_GROUPS * LANES]
    partial = (tl.reshape(squared_error, threads), tl.reshape(high, threads), tl.reshape(low, threads))
    total, highest, lowest = tl.reduce(partial, 1, _sum_and_range)
    tl.store(error + token, tl.sqrt_rn(total), mask=token < rows)
    tl.store(outlier + token, highest - lowest, mask=token < rows)


@triton.jit
def _read(
    features,
    is_row,
    GROUPS: tl.constexpr,
    STEPS: tl.constexpr,
    STEP_GROUPS: tl.constexpr,
    REPEATS: tl.constexpr,
    LANES: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Tiles `[REPEATS, TOKENS, STEP_GROUPS, LANES, VALUES]` of the tokens at `features`, one for each step."""
    GROUP: tl.constexpr = REPEATS * LANES * VALUES
    within = (
        tl.arange(0, REPEATS)[:, None, None, None, None] * (LANES * VALUES)
        + tl.arange(0, LANES)[None, None, None, :, None] * VALUES
        + tl.arange(0, VALUES)[None, None, None, None, :]
    )
    group = tl.arange(0, STEP_GROUPS)[None, None, :, None, None]
    pointers = features + (group * GROUP + within)
    held = ()
    for step in tl.static_range(STEPS):
        if (step + 1) * STEP_GROUPS <= GROUPS:
            held += (tl.load(pointers + step * STEP_GROUPS * GROUP, mask=is_row, other=0.0),)
        else:
            is_group = group < GROUPS - step * STEP_GROUPS
            held += (tl.load(pointers + step * STEP_GROUPS * GROUP, mask=is_row & is_group, other=0.0),)
    return held


@triton.jit
def _inverse_rms(
    held, WIDTH: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr, STEP_GROUPS: tl.constexpr, LANES: tl.constexpr
):
    """One over the root mean square of each token."""
    squares = tl.zeros([TOKENS, STEP_GROUPS, LANES], tl.float32)
    for step in tl.static_range(STEPS):
        values = held[step].to(tl.float32)
        squares += tl.sum(tl.sum(values * values, axis=4), axis=0)
    mean_square = tl.div_rn(tl.sum(tl.reshape(squares, [TOKENS, STEP_GROUPS * LANES]), axis=1), WIDTH * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean_square) + 1e-8)


@triton.jit
def _residual(values, scale):
    """What simulated INT4 loses of each value."""
    inverse = 1.0 / (scale + 1e-8)
    code = tl.fma(values, inverse, ROUND) - ROUND
    return tl.fma(code, -scale, values)


@triton.jit
def _sum_and_range(total, high, low, total2, high2, low2):
    return total + total2, tl.maximum(high, high2), tl.minimum(low, low2)


@triton.jit
def mix_token_score(
    error,
    outlier,
    semantic,
    tokens,
    score,
    BLOCK: tl.constexpr,
    ALPHA: tl.constexpr,
    REST: tl.constexpr,
    OUTLIER: tl.constexpr,
    ERROR: tl.constexpr,
):
    """One image's scores: error, outlier, semantic and score `[images, tokens]` float32; the reference's bits.

    The first BLOCK tokens stay in registers; others are read twice.
    """
    start = tl.program_id(0).to(tl.int64) * tokens
    error += start
    outlier += start
    semantic += start
    score += start
    at = tl.arange(0, BLOCK)
    infinity = float("inf")
    first_error = tl.load(error + at, mask=at < tokens, other=0.0)
    first_outlier = tl.load(outlier + at, mask=at < tokens, other=0.0)
    first_semantic = tl.load(semantic + at, mask=at < tokens, other=0.0)
    error_low = tl.where(at < tokens, first_error, infinity)
    error_high = tl.where(at < tokens, first_error, -infinity)
    outlier_low = tl.where(at < tokens, first_outlier, infinity)
    outlier_high = tl.where(at < tokens, first_outlier, -infinity)
    semantic_low = tl.where(at < tokens, first_semantic, infinity)
    semantic_high = tl.where(at < tokens, first_semantic, -infinity)
    for begin in range(BLOCK, tokens, BLOCK):
        more = at + begin
        error_low = tl.minimum(error_low, tl.load(error + more, mask=more < tokens, other=infinity))
        error_high = tl.maximum(error_high, tl.load(error + more, mask=more < tokens, other=-infinity))
        outlier_low = tl.minimum(outlier_low, tl.load(outlier + more, mask=more < tokens, other=infinity))
        outlier_high = tl.maximum(outlier_high, tl.load(outlier + more, mask=more < tokens, other=-infinity))
        semantic_low = tl.minimum(semantic_low, tl.load(semantic + more, mask=more < tokens, other=infinity))
        semantic_high = tl.maximum(semantic_high, tl.load(semantic + more, mask=more < tokens, other=-infinity))
    # One reduction: the warps meet once.
    extremes = (error_low, error_high, outlier_low, outlier_high, semantic_low, semantic_high)
    low_e, high_e, low_o, high_o, low_s, high_s = tl.reduce(extremes, 0, _wider)
    span_e, span_o, span_s = high_e - low_e + 1e-8, high_o - low_o + 1e-8, high_s - low_s + 1e-8
    sensitivity = _sensitivity(first_error, low_e, span_e, first_outlier, low_o, span_o, OUTLIER, ERROR)
    mixed = _mix(sensitivity, first_semantic, low_s, span_s, ALPHA, REST)
    tl.store(score + at, mixed, mask=at < tokens)
    for begin in range(BLOCK, tokens, BLOCK):
        more = at + begin
        e = tl.load(error + more, mask=more < tokens, other=0.0)
        o = tl.load(outlier + more, mask=more < tokens, other=0.0)
        s = tl.load(semantic + more, mask=more < tokens, other=0.0)
        mixed = _mix(_sensitivity(e, low_e, span_e, o, low_o, span_o, OUTLIER, ERROR), s, low_s, span_s, ALPHA, REST)
        tl.store(score + more, mixed, mask=more < tokens)


@triton.jit
def _wider(low_e, high_e, low_o, high_o, low_s, high_s, low_e2, high_e2, low_o2, high_o2, low_s2, high_s2):
    """Joins three pairs of smallest and largest values."""
    low_e, low_o, low_s = tl.minimum(low_e, low_e2), tl.minimum(low_o, low_o2), tl.minimum(low_s, low_s2)
    high_e, high_o, high_s = tl.maximum(high_e, high_e2), tl.maximum(high_o, high_o2), tl.maximum(high_s, high_s2)
    return low_e, high_e, low_o, high_o, low_s, high_s


@triton.jit
def _sensitivity(e, low_e, span_e, o, low_o, span_o, OUTLIER: tl.constexpr, ERROR: tl.constexpr):
    return tl.div_rn(e - low_e, span_e) * ERROR + tl.div_rn(o - low_o, span_o) * OUTLIER


@triton.jit
def _mix(sensitivity, s, low_s, span_s, ALPHA: tl.constexpr, REST: tl.constexpr):
    return tl.div_rn(s - low_s, span_s) * ALPHA + sensitivity * REST


def default_tiling(rows: int, width: int, score_input: ScoreInput) -> SensitivityTiling:
    """Returns the tiling for a number of tokens, all images together, of `width` channels."""
    if rows <= 2048:
        return BLOCK_PER_TOKEN
    if score_input == "raw":
        return WARP_PER_TOKEN
    # The token's values are held until its root mean square is known.
    warps = min(4, triton.next_power_of_2(-(-width // (_HELD_VALUES * _WARP))))
    return SensitivityTiling(tokens=4 // warps, lanes=8, num_warps=4)


def token_sensitivity_spec(
    dtype: str,
    width: int,
    group_size: int,
    score_input: ScoreInput = "raw",
    tiling: SensitivityTiling = WARP_PER_TOKEN,
) -> KernelSpec:
    """Specifies `token_sensitivity`: launch it with `token_sensitivity_grid` and 32 threads per warp.

    Run-time arguments: features `[rows, width]`, rows, error `[rows]` float32, outlier `[rows]` float32; pointers are
    multiples of 16.

    Args:
        dtype: Of the features: `fp16`, `bf16` or `fp32`.
        width: Channels per token.
        group_size: Channels per simulated INT4 group, a power of two from 16 to 1024 that divides `width`.
        score_input: See `numerics.score`.
        tiling: How the work is cut.

    Raises:
        InputError: The kernel has no such variant.
    """
    check_score_settings(width, group_size, 0.0, score_input)
    if group_size & (group_size - 1) or not 16 <= group_size <= 1024:
        raise InputError(f"the scoring kernel takes group sizes 16, 32, ... 1024, not {group_size}")
    values = load_values(dtype)
    lanes = min(tiling.lanes, group_size // values)
    groups = width // group_size
    # As many as give each thread one place in the step.
    step_groups = max(1, _WARP * tiling.num_warps // (lanes * tiling.tokens))
    step_groups = min(step_groups, triton.next_power_of_2(groups))
    while -(-groups // step_groups) > _MAX_STEPS:
        step_groups *= 2
    constants = {
        "GROUPS": groups,
        "STEPS": -(-groups // step_groups),
        "TOKENS": tiling.tokens,
        "STEP_GROUPS": step_groups,
        "REPEATS": group_size // (lanes * values),
        "LANES": lanes,
        "VALUES": values,
        "RMS": score_input == "rms",
    }
    signature = {"features": f"*{dtype}", "rows": "i32", "error": "*fp32", "outlier": "*fp32"}
    aligned = frozenset({"features", "error", "outlier"})
    return KernelSpec(__name__, "token_sensitivity", signature, constants, tiling.num_warps, aligned=aligned)


def token_sensitivity_grid(rows: int, tiling: SensitivityTiling = WARP_PER_TOKEN) -> tuple[int, int, int]:
    """Returns the programs that score `rows` tokens."""
    return -(-rows // tiling.tokens), 1, 1


def mix_token_score_spec(
    tokens: int | None, alpha: float, outlier_weight: float = 0.5, num_warps: int = 8
) -> KernelSpec:
    """Specifies `mix_token_score`: launch it with `mix_token_score_grid`.

    Run-time arguments: error, outlier, semantic `[images, tokens]` float32, tokens, score `[images, tokens]` float32;
    pointers are multiples of 16.

    Args:
        tokens: Tokens of an image, where known: the kernel is right for other multiples of 16 too, and for any number
            if this is none or None.
        alpha: Weight of the semantic relevance.
        outlier_weight: Weight of the outlier intensity.
        num_warps: Warps of a program.

    Raises:
        InputError: A weight is outside [0, 1].
    """
    check_score_settings(1, 1, alpha, "raw", outlier_weight)
    # The reference's float32 weights.
    weight, of_outlier = np.float32(alpha), np.float32(outlier_weight)
    constants = {
        "BLOCK": min(_MAX_MIX_BLOCK, triton.next_power_of_2(tokens or _MAX_MIX_BLOCK)),
        "ALPHA": float(weight),
        "REST": float(np.float32(1.0) - weight),
        "OUTLIER": float(of_outlier),
        "ERROR": float(np.float32(1.0) - of_outlier),
    }
    signature = {"error": "*fp32", "outlier": "*fp32", "semantic": "*fp32", "tokens": "i32", "score": "*fp32"}
    pointers = {"error", "outlier", "semantic", "score"}
    aligned = frozenset(pointers | {"tokens"} if tokens and tokens % 16 == 0 else pointers)
    return KernelSpec(__name__, "mix_token_score", signature, constants, num_warps, aligned=aligned)


def mix_token_score_grid(images: int) -> tuple[int, int, int]:
    """Returns the programs that mix the scores of `images` images."""
    return images, 1, 1
