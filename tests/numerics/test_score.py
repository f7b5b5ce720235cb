"""The hybrid score against values worked out by hand and against float64 loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qavp_export.errors import InputError
from qavp_export.numerics.score import (
    hybrid_token_score,
    minmax,
    outlier_intensity,
    pairwise_sum,
    quantization_error,
    root_mean_square_normalize,
    simulated_int4,
)

FEATURES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 2), st.integers(1, 6), st.sampled_from([4, 8, 12])),
    elements=st.floats(-65504, 65504, width=32),
)


def test_simulated_int4_by_hand() -> None:
    # Scales 7 / 7 = 1 and 14 / 7 = 2. Half-way 2.5 goes to the even 2, and 5.2 to 3 * 2.
    v = np.array([[[7.0, 2.5, -14.0, 5.2]]], np.float32)
    np.testing.assert_array_equal(simulated_int4(v, 2), [[[7.0, 2.0, -14.0, 6.0]]])


def test_simulated_int4_keeps_a_group_of_zeros() -> None:
    v = np.array([[[0.0, 0.0, 7.0, 1.0]]], np.float32)
    np.testing.assert_array_equal(simulated_int4(v, 2), v)


def test_quantization_error_is_a_norm_and_not_its_square() -> None:
    # Residuals 0.4 and 0.3 in two groups of scale 1: norm 0.5.
    v = np.array([[[7.0, 2.4, 7.0, 1.3]]], np.float32)
    np.testing.assert_allclose(quantization_error(v, 2), [[0.5]], rtol=1e-6)


def test_outlier_intensity_is_a_range_and_not_a_largest_magnitude() -> None:
    v = np.array([[[5.0, 6.0, 9.0, 7.0], [-3.0, 1.0, 2.0, 0.0]]], np.float32)
    np.testing.assert_array_equal(outlier_intensity(v), [[4.0, 5.0]])


def test_minmax_by_hand_and_per_image() -> None:
    x = np.array([[1.0, 3.0, 2.0], [10.0, 10.0, 10.0]], np.float32)
    np.testing.assert_array_equal(minmax(x), [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])


def test_score_by_hand() -> None:
    # Token 0: E = 0.4, R = 4.6; token 1: twice that; token 2: zeros. minmax(E) = minmax(R) = [0.5, 1, 0].
    v = np.array([[[7.0, 2.4], [14.0, 4.8], [0.0, 0.0]]], np.float32)
    semantic = np.array([[1.0, 2.0, 5.0]], np.float32)
    # minmax(semantic) = [0, 0.25, 1]; alpha = 0.25.
    expected = [[0.75 * 0.5, 0.25 * 0.25 + 0.75 * 1.0, 0.25 * 1.0]]
    np.testing.assert_allclose(hybrid_token_score(v, semantic, group_size=2, alpha=0.25), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("outlier_weight", "sensitivity"), [(0.0, [1.0, 0.0, 0.0]), (0.25, [0.865, 0.25, 0.0]), (1.0, [0.46, 1.0, 0.0])]
)
def test_the_mix_of_error_and_outliers_by_hand(outlier_weight: float, sensitivity: list[float]) -> None:
    # Scales 1, 2, 0. Token 0: E = 0.4, R = 4.6; token 1: E = 0, R = 10; token 2: zeros.
    # minmax(E) = [1, 0, 0], minmax(R) = [0.46, 1, 0]; minmax(semantic) = [0, 0.25, 1].
    v = np.array([[[7.0, 2.4], [14.0, 4.0], [0.0, 0.0]]], np.float32)
    semantic = np.array([[1.0, 2.0, 5.0]], np.float32)
    alone = hybrid_token_score(v, semantic, group_size=2, alpha=0.0, outlier_weight=outlier_weight)
    np.testing.assert_allclose(alone, [sensitivity], atol=1e-6)
    mixed = hybrid_token_score(v, semantic, group_size=2, alpha=0.2, outlier_weight=outlier_weight)
    expected = 0.8 * np.array(sensitivity) + 0.2 * np.array([0.0, 0.25, 1.0])
    np.testing.assert_allclose(mixed, [expected], atol=1e-6)


def test_the_paper_s_mix_keeps_its_bits() -> None:
    rng = np.random.default_rng(4)
    v, semantic = rng.standard_normal((2, 31, 24)).astype(np.float32), rng.random((2, 31), dtype=np.float32)
    half = np.float32(0.5)
    sensitivity = minmax(quantization_error(v, 8)) * half + minmax(outlier_intensity(v)) * half
    expected = minmax(semantic) * np.float32(0.3) + sensitivity * (np.float32(1.0) - np.float32(0.3))
    np.testing.assert_array_equal(hybrid_token_score(v, semantic, group_size=8, alpha=0.3), expected)


def test_rms_input_ignores_a_token_s_norm() -> None:
    rng = np.random.default_rng(0)
    token = rng.standard_normal(16)
    v = np.stack([token, 8 * token, rng.standard_normal(16)])[np.newaxis].astype(np.float32)
    semantic = np.zeros((1, 3), np.float32)
    raw = hybrid_token_score(v, semantic, group_size=16, alpha=0.0)
    rms = hybrid_token_score(v, semantic, group_size=16, alpha=0.0, score_input="rms")
    assert raw[0, 1] > 2 * raw[0, 0]
    # 8 is a power of two, but the eps of 1e-8 is not scaled: float32 rounding of O(1) numbers is left.
    np.testing.assert_allclose(rms[0, 0], rms[0, 1], atol=1e-5)


def test_root_mean_square_by_hand() -> None:
    v = np.array([[[3.0, -4.0, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]]], np.float32)
    root = np.sqrt(50 / 4)
    expected = [[[3 / root, -4 / root, 0, 5 / root], [0, 0, 0, 0]]]
    np.testing.assert_allclose(root_mean_square_normalize(v), expected, rtol=1e-6)


@given(FEATURES)
def test_error_and_range_equal_float64_loops(v: np.ndarray) -> None:
    error, outliers = quantization_error(v, 4), outlier_intensity(v)
    for image, token in np.ndindex(v.shape[:2]):
        channels = v[image, token].astype(np.float64)
        squares = 0.0
        for group in channels.reshape(-1, 4):
            scale = max(abs(group)) / 7
            for value in group:
                squares += (value - round(value / (scale + 1e-8)) * scale) ** 2
        # Rounding may flip at half-way, where both neighbours are equally far: the error moves by float32
        # resolution of the largest channel, times the square root of the channels (12).
        tolerance = 12 * 2.0**-23 * float(abs(channels).max())
        # Squares below float32's smallest number vanish there.
        assert error[image, token] == pytest.approx(np.sqrt(squares), rel=1e-5, abs=tolerance + 1e-19)
        assert outliers[image, token] == pytest.approx(channels.max() - channels.min(), rel=1e-6)


@given(FEATURES, st.randoms(use_true_random=False))
def test_order_and_duplicates_of_tokens_do_not_change_their_scores(v: np.ndarray, random: object) -> None:
    rng = np.random.default_rng(random.randint(0, 2**32))  # type: ignore[attr-defined]
    semantic = rng.random(v.shape[:2], dtype=np.float32)
    order = np.concatenate([rng.permutation(v.shape[1]), [0]])
    score = hybrid_token_score(v, semantic, group_size=4)
    shuffled = hybrid_token_score(v[:, order], semantic[:, order], group_size=4)
    np.testing.assert_array_equal(shuffled, score[:, order])


@given(FEATURES)
def test_score_is_finite_and_between_zero_and_one(v: np.ndarray) -> None:
    score = hybrid_token_score(v, np.zeros(v.shape[:2], np.float32), group_size=4)
    assert score.dtype == np.float32
    assert score.min() >= 0
    assert score.max() <= 1


@given(st.integers(1, 40), st.integers(0, 1000))
def test_pairwise_sum_is_a_sum(n: int, seed: int) -> None:
    # Integers below 2^24: every order of summation is exact.
    x = np.random.default_rng(seed).integers(-1000, 1000, (3, n)).astype(np.float32)
    np.testing.assert_array_equal(pairwise_sum(x), x.sum(axis=-1))


def test_pairwise_sum_folds_the_second_half_onto_the_first() -> None:
    # (1e8 + -1e8) + (1 + 1): any order that adds 1 to 1e8 loses it.
    x = np.array([1e8, 1.0, -1e8, 1.0], np.float32)
    assert pairwise_sum(x) == 2.0


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_are_cast(dtype: type) -> None:
    v = np.random.default_rng(1).standard_normal((1, 4, 8)).astype(np.float16)
    semantic = np.arange(4, dtype=np.float32)[np.newaxis]
    expected = hybrid_token_score(v.astype(np.float32), semantic, group_size=8)
    np.testing.assert_array_equal(hybrid_token_score(v.astype(dtype), semantic, group_size=8), expected)


V = np.ones((1, 3, 8), np.float32)
P = np.ones((1, 3), np.float32)


@pytest.mark.parametrize(
    ("v", "semantic", "settings", "message"),
    [
        (V[0], P, {"group_size": 8}, "expected 3 dimensions"),
        (V, P[0], {"group_size": 8}, "expected 2 dimensions"),
        (V, P[:, :2], {"group_size": 8}, "semantic has shape"),
        (V, P, {"group_size": 3}, "does not divide the feature width 8"),
        (V, P, {"group_size": 0}, "does not divide"),
        (V, P, {"group_size": 8, "alpha": 1.5}, "alpha is 1.5"),
        (V, P, {"group_size": 8, "alpha": float("nan")}, "alpha is nan"),
        (V, P, {"group_size": 8, "outlier_weight": -0.1}, "outlier_weight is -0.1"),
        (V, P, {"group_size": 8, "score_input": "log"}, "score_input is 'log'"),
        (V.astype(np.int32), P, {"group_size": 8}, "dtype int32"),
        (V[:, :0], P, {"group_size": 8}, "must not be empty"),
        (np.where(np.arange(8) == 5, np.nan, V), P, {"group_size": 8}, r"holds nan at index \[0, 0, 5\]"),
        (np.where(np.arange(8) == 5, -np.inf, V), P, {"group_size": 8}, r"holds -inf at index \[0, 0, 5\]"),
        (V * 1e16, P, {"group_size": 8}, "features reach 1e"),
        (V, P * np.nan, {"group_size": 8}, "semantic holds nan"),
    ],
)
def test_bad_input_is_refused(v: np.ndarray, semantic: np.ndarray, settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hybrid_token_score(v, semantic, **settings)  # type: ignore[arg-type]
