"""Diverse selection: the NumPy references of `dpp` and `maxmin`.

Sources: L. Chen, G. Zhang, E. Zhou, "Fast Greedy MAP Inference for Determinantal Point Process to Improve
Recommendation Diversity", NeurIPS 2018; CDPruner (2025), which selects vision tokens by it; DivPrune (CVPR 2025) for
`maxmin`.

A greedy choice amplifies the last bit of a similarity, and matrix products round as their library pleases. So the
definition is in fixed point, and no product rounds:

1. Tokens of more than 1024 channels are sketched: each channel keeps or changes its sign by a fixed rule, and halves
   of the channels are added until 1024 are left (`sketch`). A sum of two rounds the same way everywhere.
2. Tokens become codes: `c = round(v / (max |v| / 64))` per token, half-way cases to even, so that every partial sum of
   `c_i . c_j` is an integer below 2^24, which float32 holds, in any order.
3. The cosine of two tokens is `G_ij * (u_i * u_j)` in units of 2^-22, where `G = C C^T` and `u = 2048 / norm2(c)`, each
   operation rounded to float32.
4. `dpp` keeps Cholesky rows as integers in units of 2^-11. Their columns have norms of at most 2 (`FLOOR` and
   `MOST_KEPT` see to it), so that every partial sum of `E_i . E_j` is an integer below 2^24.

Codes and rows have at most 11 significant bits: products in float16 or TF32 with float32 sums are as exact. All that is
left is elementwise float32. The ONNX function `qavp::SelectDiverse` yields the same indices for this reason.

Rounding the tokens moves a cosine by about 1e-3, the rows move what is left of a token by less. The sketch, a count
sketch (Charikar, Chen, Farach-Colton 2002; Weinberger et al. 2009), is unbiased, moves the cosine of unlike tokens by
0.03 or so, and leaves like ones like: their difference is sketched. What it costs, 4096 channels, 576 tokens to 72 and
2880 to 360, in `log det L` of the choice (with 2^-12 added to the diagonal of Z Z^T), against the same without sketch:

- random fields with clusters, and the demo model's features behind a random projector: at most 0.2% of what `dpp` gains
  over `topk`; 95 to 99% of the tokens are the same;
- clusters with six loud channels: it gains 3% at 2880, since codes of 4096 channels are coarse there; 82% are the same;
- the demo model's features under a random linear map, and 256 random directions, where `topk` is as good as `dpp` but
  for 7 to 9 of 350 to 2680, and 0.3 to 1 of 40: 0.1 to 2.6, and 0.1, which is up to 30% of so small a gain.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from qavp_export.errors import InputError
from qavp_export.numerics._checks import Float32, as_float32
from qavp_export.numerics.score import minmax

Diversity: TypeAlias = Literal["dpp", "maxmin"]

LARGEST_CODE = 64
# A power of two. Products of tokens take most of the time, in proportion to it.
MOST_CHANNELS = 1024
# A token of smaller values than TINY * 64 counts as zero.
TINY = 1e-30
# Cholesky rows are integers in units of 1 / UNIT.
UNIT = 2048.0
FULL = UNIT * UNIT
# Factors of the hash: odd, and about half of their bits are set.
HASH = (0x9E3779B1, 0x85EBCA77)
# The least that can be left of a token, 2^-12 of its square: less is the noise of the codes. Tokens of which nothing is
# left are taken by their quality.
FLOOR = 1024.0
# What keeps a token of the lowest score in the game.
MARGIN = 0.1
# What rounding of float32 features may change of what is left of a token: codes that move by one.
NEAR = 2.0 / UNIT
# A column of rows then has a sum of squares of at most 1 + k * 2^-12 and a rounding, less than 4.
MOST_KEPT = 12_000


def code_width(width: int) -> int:
    """Channels of the codes of tokens of `width` channels."""
    return min(width, MOST_CHANNELS)


def sketch_signs(width: int) -> Float32:
    """Signs of channels that a sketch adds up: 1 or -1 by the first bit of a hash of the channel's number.

    Args:
        width: How many.

    Returns:
        Shape [width], float32.
    """
    bits = np.arange(width, dtype=np.uint32) * np.uint32(HASH[0])
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(HASH[1])
    return np.where(bits >> np.uint32(31), np.float32(-1), np.float32(1))


def sketch(values: Float32) -> Float32:
    """Adds channels up, with signs, until `MOST_CHANNELS` are left; fewer stay as they are.

    Args:
        values: Shape [..., D]; magnitudes below 1e37.

    Returns:
        Shape [..., code_width(D)]. Channel c is the sum of channels c, c + 1024, c + 2048 and so on: first halves and
        second halves of all are added (with zeros behind them, to a power of two), then halves of these.
    """
    if values.shape[-1] <= MOST_CHANNELS:
        return values
    padded = padded_width(values.shape[-1])
    result = values * sketch_signs(values.shape[-1])
    result = np.pad(result, [(0, 0)] * (values.ndim - 1) + [(0, padded - values.shape[-1])])
    while result.shape[-1] > MOST_CHANNELS:
        first, second = np.split(result, 2, axis=-1)
        result = first + second
    return result


def padded_width(width: int) -> int:
    """The least power of two that holds `width` channels."""
    return 1 << (width - 1).bit_length()


def token_codes(features: npt.NDArray[Any]) -> Float32:
    """Sketches each token and rounds it to integers in [-64, 64]; its largest magnitude becomes 64. Zeros stay zeros.

    Args:
        features: Shape [B, N, D], floating point.

    Returns:
        Shape [B, N, code_width(D)], float32 that holds integers.

    Raises:
        InputError: Bad shape or dtype; NaN or infinity.
    """
    values = sketch(as_float32("features", features, 3))
    step = np.abs(values).max(axis=-1, keepdims=True) / np.float32(LARGEST_CODE)
    codes: Float32 = np.rint(values / np.maximum(step, np.float32(TINY)))
    return codes


def choose_diverse(
    select: Diversity,
    features: npt.NDArray[Any],
    score: npt.NDArray[Any],
    k: int,
    towards: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.int64]:
    """Chooses k tokens of each image that differ.

    `dpp`: greedy MAP of a determinantal point process with kernel `L = diag(w) Z Z^T diag(w)`, Z the L2-normalised
    tokens and `w = minmax(score) + 0.1`. The rows are those of Z Z^T alone: what is left of token i is `w_i^2 * r_i`,
    and one step takes the j of the largest, then::

        e = (cos_j - E^T E_j) / sqrt(r_j), clipped to [-sqrt(r), sqrt(r)], rounded to the grid
        r = max(r - e^2, 2^-12)

    `maxmin`: greedy max-min cosine distance; each choice is the token whose nearest chosen one is farthest, the first
    the one whose nearest neighbour is farthest. Similarities are rounded to multiples of 2^-11, so that equal distances
    are ties. Tokens of zeros count as similar to all. The score is not used.

    Args:
        select: `dpp` or `maxmin`.
        features: The vision projector's output, shape [B, N, D], floating point.
        score: Shape [B, N], floating point: the hybrid score.
        k: Tokens to choose, 1 to N.
        towards: Shape [B, k]: a choice that was made of nearly the same features. What is as good as the best up to
            `NEAR` is taken from it where it can be, so that the two differ by more than rounding where they differ.

    Returns:
        Shape [B, k], int64, in the order of choice; ties go to the lower index.

    Raises:
        InputError: An unknown rule; bad shape or dtype; NaN or infinity; k out of range.
    """
    if select not in get_args(Diversity):
        raise InputError(f"select is {select!r}; choose one of {list(get_args(Diversity))}")
    codes, values = token_codes(features), as_float32("score", score, 2)
    images, count, _ = codes.shape
    if values.shape != (images, count):
        raise InputError(f"score has shape {list(values.shape)}; expected {[images, count]}")
    if not 1 <= k <= min(count, MOST_KEPT):
        raise InputError(f"k is {k}; it must be from 1 to the {count} tokens of an image, {MOST_KEPT} at most")
    quality = minmax(values) + np.float32(MARGIN)
    wanted = np.zeros((images, count), np.bool_)
    if towards is not None:
        np.put_along_axis(wanted, towards, True, axis=1)
    chosen = np.zeros((images, k), np.int64)
    for image in range(images):
        if select == "dpp":
            chosen[image] = _dpp(codes[image], quality[image] * quality[image], k, wanted[image])
        else:
            chosen[image] = _maxmin(codes[image], k, wanted[image])
    return chosen


def _scale(codes: Float32) -> Float32:
    """u: 2048 over each token's norm, 2048 for a token of zeros."""
    squares = (codes * codes).sum(axis=-1)
    scale: Float32 = np.float32(UNIT) / np.sqrt(np.maximum(squares, np.float32(1)))
    return scale


def _dpp(codes: Float32, weight: Float32, k: int, wanted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    scale, floor, products = _scale(codes), np.float32(FLOOR), codes @ codes.T
    rest = np.where(codes.any(axis=-1), np.float32(FULL), floor)
    weight, rows, chosen = weight.copy(), np.zeros((k, len(codes)), np.float32), np.zeros(k, np.int64)
    for step in range(k):
        j = chosen[step] = _best(weight * rest, wanted, NEAR * FULL)
        weight[j] = -1
        cosine = products[j] * (scale * scale[j])
        limit = np.sqrt(rest)
        row = (cosine - rows[:, j] @ rows) / limit[j]
        rows[step] = np.rint(np.minimum(np.maximum(row, -limit), limit))
        rest = np.maximum(rest - rows[step] * rows[step], floor)
    return chosen


def _maxmin(codes: Float32, k: int, wanted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    scale, grid, most = _scale(codes), np.float32(1 / UNIT), np.float32(UNIT)
    zero, products = ~codes.any(axis=-1), codes @ codes.T
    others = products * scale
    np.fill_diagonal(others, -FULL)
    first = np.where(zero, most, np.rint(others.max(axis=-1) * scale * grid))
    nearest, chosen = np.where(zero, most, -most), np.zeros(k, np.int64)
    for step in range(k):
        j = chosen[step] = _best(-nearest if step else -first, wanted, NEAR * UNIT)
        nearest = np.maximum(nearest, np.rint(products[j] * (scale * scale[j]) * grid))
        nearest[j] = 2 * most
    return chosen


def _best(gain: Float32, wanted: npt.NDArray[np.bool_], near: float) -> int:
    """The first of the largest gains: of the wanted ones, where one is near the largest. It is wanted no more."""
    close = np.flatnonzero(wanted & (gain >= gain.max() - near))
    best = int(close[gain[close].argmax()] if close.size else gain.argmax())
    wanted[best] = False
    return best
