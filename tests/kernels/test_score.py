"""The scoring kernels in Triton's interpreter against the NumPy reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qavp_export.engines.kernels.score import (
    BLOCK_PER_TOKEN,
    CANDIDATE_TILINGS,
    WARP_PER_TOKEN,
    SensitivityTiling,
    default_tiling,
    mix_token_score_grid,
    mix_token_score_spec,
    token_sensitivity_grid,
    token_sensitivity_spec,
)
from qavp_export.errors import InputError
from qavp_export.numerics.score import (
    ScoreInput,
    hybrid_token_score,
    minmax,
    outlier_intensity,
    quantization_error,
    root_mean_square_normalize,
)
from tests.kernels.interpreter import Array, Interpreter

NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
# Rows behind the last, which no program may write.
GUARD = 5


def _features(rows: int, width: int, dtype: str, seed: int) -> Array:
    """Tokens as models have them, and what is at the edge: zeros, a constant, one outlier channel, tiny values."""
    draw = np.random.default_rng(seed)
    features = draw.standard_normal((rows, width)) * np.exp(draw.standard_normal((rows, 1)))
    features[0] = 0.0
    features[1] = -2.5
    features[2, 3] = 6e4 if dtype == "fp16" else 1e15
    features[3] *= 1e-6
    # Multiples of 1/2 of a scale of 1: half-way cases.
    features[4] = draw.integers(-14, 15, width) / 2
    features[4, :: width // 4] = 7.0
    # The last channels decide: a tail that is cut off or counted twice shows.
    features[5, -1] = 100.0
    return features.astype(NUMPY[dtype])


def _sensitivity(
    interpreter: Interpreter,
    features: Array,
    dtype: str,
    group_size: int,
    score_input: ScoreInput,
    tiling: SensitivityTiling,
) -> tuple[Array, Array]:
    rows, width = features.shape
    results = interpreter.run(
        token_sensitivity_spec(dtype, width, group_size, score_input, tiling),
        token_sensitivity_grid(rows, tiling),
        {
            "features": features,
            "rows": rows,
            "error": np.full(rows + GUARD, np.nan, np.float32),
            "outlier": np.full(rows + GUARD, np.nan, np.float32),
        },
    )
    assert np.isnan(results["error"][rows:]).all()
    assert np.isnan(results["outlier"][rows:]).all()
    return results["error"][:rows], results["outlier"][:rows]


@pytest.mark.parametrize("score_input", ["raw", "rms"])
@pytest.mark.parametrize(
    ("dtype", "width", "group_size", "tiling"),
    [
        ("fp16", 4096, 128, WARP_PER_TOKEN),
        ("bf16", 1152, 128, WARP_PER_TOKEN),
        ("fp32", 3584, 128, BLOCK_PER_TOKEN),
        ("fp16", 5120, 128, BLOCK_PER_TOKEN),
        ("fp32", 48, 16, WARP_PER_TOKEN),
        ("bf16", 320, 64, BLOCK_PER_TOKEN),
        ("fp16", 96, 32, CANDIDATE_TILINGS[3]),
        ("fp32", 3072, 1024, CANDIDATE_TILINGS[2]),
    ],
)
def test_error_and_range_of_each_token(
    interpreter: Interpreter,
    dtype: str,
    width: int,
    group_size: int,
    tiling: SensitivityTiling,
    score_input: ScoreInput,
) -> None:
    features = _features(7, width, dtype, seed=width)
    error, outlier = _sensitivity(interpreter, features, dtype, group_size, score_input, tiling)
    values = features[np.newaxis].astype(np.float32)
    if score_input == "rms":
        values = root_mean_square_normalize(values)
    # Sums in another order, a reciprocal, one rounding less per residual: see the module.
    norms = np.linalg.norm(values[0].astype(np.float64), axis=-1)
    allowed = 1e-5 * quantization_error(values, group_size)[0] + 1e-6 * norms
    assert (np.abs(error - quantization_error(values, group_size)[0]) <= allowed).all()
    np.testing.assert_allclose(outlier, outlier_intensity(values)[0], rtol=0 if score_input == "raw" else 1e-6)


@pytest.mark.parametrize("tiling", CANDIDATE_TILINGS)
def test_every_tiling_scores_any_number_of_tokens(interpreter: Interpreter, tiling: SensitivityTiling) -> None:
    features = np.random.default_rng(11).standard_normal((tiling.tokens + 1, 640)).astype(np.float16)
    error, outlier = _sensitivity(interpreter, features, "fp16", 128, "raw", tiling)
    values = features[np.newaxis].astype(np.float32)
    np.testing.assert_allclose(error, quantization_error(values, 128)[0], rtol=1e-5)
    np.testing.assert_array_equal(outlier, outlier_intensity(values)[0])


def _mix(
    interpreter: Interpreter, error: Array, outlier: Array, semantic: Array, alpha: float, outlier_weight: float = 0.5
) -> Array:
    images, tokens = error.shape
    score = np.full(images * tokens + GUARD, np.nan, np.float32)
    results = interpreter.run(
        mix_token_score_spec(tokens, alpha, outlier_weight),
        mix_token_score_grid(images),
        {"error": error, "outlier": outlier, "semantic": semantic, "tokens": tokens, "score": score},
    )
    assert np.isnan(results["score"][images * tokens :]).all()
    return results["score"][: images * tokens].reshape(images, tokens)


@pytest.mark.parametrize(("alpha", "outlier_weight"), [(0.0, 0.25), (0.3, 0.5), (0.3, 1.0), (0.3, 0.0), (1.0, 0.5)])
@pytest.mark.parametrize(("images", "tokens"), [(3, 1), (2, 49), (2, 576), (1, 2049)])
def test_the_mix_has_the_references_bits(
    interpreter: Interpreter, images: int, tokens: int, alpha: float, outlier_weight: float
) -> None:
    draw = np.random.default_rng(tokens)
    error, outlier, semantic = draw.standard_normal((3, images, tokens)).astype(np.float32)
    # A constant image; the extremes at the end, where a cut tail would miss them.
    outlier[0] = 3.0
    # So close together that eps counts.
    outlier[-1] *= 1e-8
    error[-1, -1], semantic[-1, -1] = 50.0, -50.0
    one, weight, mix = np.float32(1.0), np.float32(alpha), np.float32(outlier_weight)
    sensitivity = minmax(error) * (one - mix) + minmax(outlier) * mix
    expected = minmax(semantic) * weight + sensitivity * (one - weight)
    np.testing.assert_array_equal(_mix(interpreter, error, outlier, semantic, alpha, outlier_weight), expected)


def test_one_specification_mixes_any_number_of_tokens(interpreter: Interpreter) -> None:
    values = np.random.default_rng(3).standard_normal((1, 1031)).astype(np.float32)
    results = interpreter.run(
        mix_token_score_spec(None, 1.0),
        mix_token_score_grid(1),
        {"error": values, "outlier": values, "semantic": values, "tokens": 1031, "score": np.full_like(values, np.nan)},
    )
    np.testing.assert_array_equal(results["score"], minmax(values))


@pytest.mark.parametrize("score_input", ["raw", "rms"])
def test_both_launches_are_the_hybrid_score(interpreter: Interpreter, score_input: ScoreInput) -> None:
    draw = np.random.default_rng(5)
    features = draw.standard_normal((2, 25, 384)).astype(np.float16)
    semantic = draw.random((2, 25), np.float32)
    tiling = default_tiling(50, 384, score_input)
    error, outlier = _sensitivity(interpreter, features.reshape(50, 384), "fp16", 128, score_input, tiling)
    score = _mix(interpreter, error.reshape(2, 25), outlier.reshape(2, 25), semantic, 0.4)
    expected = hybrid_token_score(features, semantic, group_size=128, alpha=0.4, score_input=score_input)
    # E to 1e-5 of itself, and its spread over an image's tokens is at least a tenth of it here.
    np.testing.assert_allclose(score, expected, rtol=0, atol=1e-4)


def test_equal_tokens_have_equal_sensitivity(interpreter: Interpreter) -> None:
    features = np.tile(np.random.default_rng(6).standard_normal(256).astype(np.float16), (9, 1))
    error, outlier = _sensitivity(interpreter, features, "fp16", 64, "rms", WARP_PER_TOKEN)
    assert len(set(error)) == len(set(outlier)) == 1
    ranks = np.arange(9, dtype=np.float32)[np.newaxis]
    assert (_mix(interpreter, error[np.newaxis], outlier[np.newaxis], ranks, 0.0) == 0).all()


def test_many_tokens_whose_values_are_held_are_cut_finer() -> None:
    assert default_tiling(576, 4096, "raw") == BLOCK_PER_TOKEN
    assert default_tiling(36864, 4096, "raw") == WARP_PER_TOKEN
    assert default_tiling(36864, 4096, "rms").tokens == 2
    assert default_tiling(36864, 1152, "rms").tokens == 4
    assert default_tiling(36864, 16384, "rms").tokens == 1


@pytest.mark.parametrize(
    ("dtype", "width", "group_size", "message"),
    [
        ("fp16", 960, 96, "not 96"),
        ("fp16", 4096, 8, "not 8"),
        ("fp16", 4096, 2048, "not 2048"),
        ("fp16", 100, 16, "does not divide"),
        ("fp64", 128, 16, "not fp64"),
    ],
)
def test_variants_that_do_not_exist(dtype: str, width: int, group_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        token_sensitivity_spec(dtype, width, group_size)


def test_a_weight_outside_its_range() -> None:
    with pytest.raises(InputError, match="alpha"):
        mix_token_score_spec(576, 1.5)
    with pytest.raises(InputError, match="outlier_weight"):
        mix_token_score_spec(576, 0.5, -1.0)
