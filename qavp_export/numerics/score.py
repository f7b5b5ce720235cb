"""Hybrid token score: the NumPy reference.

Source: Wang et al., "QAPruner: Quantization-Aware Vision Token Pruning for Multimodal Large Language Models",
arXiv 2604.02816 (2026).

Everything is float32 and elementwise, and sums are taken in one stated order (`pairwise_sum`), so IEEE
arithmetic leaves no freedom: the ONNX function `qavp::HybridTokenScore` yields the same bits, and with them
the same kept tokens, near-ties included.

Features must be finite and at most 1e15 in magnitude: beyond that sums of their squares overflow float32.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from qavp_export.errors import InputError
from qavp_export.numerics._checks import Float32, as_features, as_float32

ScoreInput: TypeAlias = Literal["raw", "rms"]

EPS = 1e-8
INT4_MAX = 7.0
PAPER_ALPHA = 0.5
PAPER_OUTLIER_WEIGHT = 0.5


def check_score_settings(
    width: int, group_size: int, alpha: float, score_input: str, outlier_weight: float = PAPER_OUTLIER_WEIGHT
) -> None:
    """Check the settings of a hybrid score.

    Args:
        width: Channels per token, D.
        group_size: Channels that share one simulated INT4 scale.
        alpha: Weight of the semantic relevance.
        score_input: `raw` or `rms`.
        outlier_weight: Weight of the outlier intensity.

    Raises:
        InputError: The group size does not divide the width, a weight is outside [0, 1], or `score_input` is not
            known.
    """
    if group_size < 1 or width % group_size:
        raise InputError(f"group_size {group_size} does not divide the feature width {width}")
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha is {alpha}; it must be in [0, 1]")
    if not 0.0 <= outlier_weight <= 1.0:
        raise InputError(f"outlier_weight is {outlier_weight}; it must be in [0, 1]")
    if score_input not in get_args(ScoreInput):
        raise InputError(f"score_input is {score_input!r}; choose one of {list(get_args(ScoreInput))}")


def pairwise_sum(x: Float32) -> Float32:
    """Sum over the last axis by folding its second half onto its first until one element is left.

    An odd length keeps its last element for the next round. The order is part of the definition.

    Args:
        x: Shape [..., n], float32.

    Returns:
        Shape [...], float32.
    """
    while (length := x.shape[-1]) > 1:
        half = length // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = np.concatenate([folded, x[..., 2 * half :]], axis=-1) if length % 2 else folded
    return x[..., 0]


def simulated_int4(v: npt.NDArray[Any], group_size: int) -> Float32:
    """Round features to symmetric INT4 with one float scale per group, and back: `v^`.

    `s = max abs / 7` per group; `v^ = round(v / (s + eps)) * s`, half-way cases to even.

    Args:
        v: Features, shape [B, N, D], floating point.
        group_size: Channels per group; divides D.

    Returns:
        Shape [B, N, D], float32.

    Raises:
        InputError: Bad shape, dtype or group size; NaN or infinity.
    """
    values = as_float32("features", v, 3)
    check_score_settings(values.shape[-1], group_size, 0.0, "raw")
    groups = values.reshape(*values.shape[:2], -1, group_size)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(INT4_MAX)
    codes = np.rint(groups / (scale + np.float32(EPS)))
    simulated: Float32 = (codes * scale).reshape(values.shape)
    return simulated


def quantization_error(v: npt.NDArray[Any], group_size: int) -> Float32:
    """Quantization error `E = norm2(v - v^)` of each token; the norm is not squared.

    Args:
        v: Features, shape [B, N, D], floating point.
        group_size: Channels per group; divides D.

    Returns:
        Shape [B, N], float32.

    Raises:
        InputError: Bad shape, dtype or group size; NaN, infinity or values beyond 1e15.
    """
    values = as_features(v)
    residual = values - simulated_int4(values, group_size)
    error: Float32 = np.sqrt(pairwise_sum(residual * residual))
    return error


def outlier_intensity(v: npt.NDArray[Any]) -> Float32:
    """Outlier intensity `R = max - min` of each token's channels: a range, not a largest magnitude.

    Args:
        v: Features, shape [B, N, D], floating point.

    Returns:
        Shape [B, N], float32.

    Raises:
        InputError: Bad shape or dtype; NaN, infinity or values beyond 1e15.
    """
    values = as_features(v)
    return np.asarray(values.max(axis=-1) - values.min(axis=-1))


def minmax(x: npt.NDArray[Any]) -> Float32:
    """Scale each image's values to [0, 1]: `(x - min) / (max - min + eps)`; all zeros for a constant row.

    Args:
        x: Shape [B, N], floating point.

    Returns:
        Shape [B, N], float32.

    Raises:
        InputError: Bad shape or dtype; NaN or infinity.
    """
    values = as_float32("values", x, 2)
    low = values.min(axis=-1, keepdims=True)
    span = values.max(axis=-1, keepdims=True) - low
    scaled: Float32 = (values - low) / (span + np.float32(EPS))
    return scaled


def root_mean_square_normalize(v: npt.NDArray[Any]) -> Float32:
    """Divide each token by its root mean square: what the decoder's quantizers see, behind an RMSNorm.

    `v / (sqrt(mean(v^2)) + eps)`: a token of zeros stays zero.

    Args:
        v: Features, shape [B, N, D], floating point.

    Returns:
        Shape [B, N, D], float32.

    Raises:
        InputError: Bad shape or dtype; NaN, infinity or values beyond 1e15.
    """
    values = as_features(v)
    mean_square = pairwise_sum(values * values) / np.float32(values.shape[-1])
    rms: Float32 = np.sqrt(mean_square) + np.float32(EPS)
    normalized: Float32 = values / rms[..., np.newaxis]
    return normalized


def hybrid_token_score(
    image_features: npt.NDArray[Any],
    semantic: npt.NDArray[Any],
    *,
    group_size: int,
    alpha: float = PAPER_ALPHA,
    score_input: ScoreInput = "raw",
    outlier_weight: float = PAPER_OUTLIER_WEIGHT,
) -> Float32:
    """Hybrid score `S = alpha * minmax(semantic) + (1 - alpha) * SQ` of each token.

    `SQ = (1 - w) * minmax(E) + w * minmax(R)`; the paper's w is 0.5. The semantic relevance comes in as its scorer
    produced it; it is scaled here.

    Args:
        image_features: The vision projector's output, shape [B, N, D], floating point.
        semantic: A semantic scorer's output, shape [B, N], floating point.
        group_size: Channels per simulated INT4 group; divides D.
        alpha: 1 is semantic pruning alone, 0 quantization sensitivity alone.
        score_input: Compute E and R on the features as they are (`raw`, the paper) or divided by each token's
            root mean square (`rms`).
        outlier_weight: w: 1 is the outlier intensity R alone, 0 the quantization error E alone.

    Returns:
        Shape [B, N], float32: higher is kept first.

    Raises:
        InputError: Bad shape, dtype or setting; NaN, infinity or features beyond 1e15.
    """
    values = as_features(image_features)
    relevance = as_float32("semantic", semantic, 2)
    if relevance.shape != values.shape[:2]:
        raise InputError(f"semantic has shape {list(relevance.shape)}; expected {list(values.shape[:2])}")
    check_score_settings(values.shape[-1], group_size, alpha, score_input, outlier_weight)
    scored = root_mean_square_normalize(values) if score_input == "rms" else values
    error, outlier = quantization_error(scored, group_size), outlier_intensity(scored)
    return mix_token_score(error, outlier, relevance, alpha=alpha, outlier_weight=outlier_weight)


def mix_token_score(
    error: npt.NDArray[Any],
    outlier: npt.NDArray[Any],
    semantic: npt.NDArray[Any],
    *,
    alpha: float,
    outlier_weight: float,
) -> Float32:
    """The hybrid score from its parts, each scaled over the tokens of an image here.

    Args:
        error: Quantization error E, shape [B, N], floating point.
        outlier: Outlier intensity R, of that shape.
        semantic: Semantic relevance, of that shape.
        alpha: See `hybrid_token_score`.
        outlier_weight: See `hybrid_token_score`.

    Returns:
        Shape [B, N], float32.

    Raises:
        InputError: Bad shape, dtype or setting; NaN or infinity.
    """
    check_score_settings(1, 1, alpha, "raw", outlier_weight)
    one, weight, of_outlier = np.float32(1.0), np.float32(alpha), np.float32(outlier_weight)
    sensitivity: Float32 = minmax(error) * np.float32(one - of_outlier) + minmax(outlier) * of_outlier
    score: Float32 = minmax(semantic) * weight + sensitivity * np.float32(one - weight)
    return score
