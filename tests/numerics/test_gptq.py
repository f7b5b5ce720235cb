"""GPTQ against hand-computed compensation, the paper's own formulation, and rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qavp_export.errors import CalibrationError, RecipeError
from qavp_export.numerics import gptq
from qavp_export.numerics.clip import nearest_codes, quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.gptq import GptqSettings, correct_weight, gptq_one_level, gptq_two_level
from qavp_export.numerics.one_level import OneLevel
from qavp_export.numerics.two_level import TwoLevel

IN_ORDER = GptqSettings(activation_order=False)


def correlated(tokens: int, channels: int, seed: int = 0) -> np.ndarray:
    """Inputs whose channels share a few directions, with loud and quiet channels: like a language model's."""
    draw = np.random.default_rng(seed)
    shared = draw.standard_normal((tokens, channels // 4)) @ draw.standard_normal((channels // 4, channels))
    own = 0.5 * draw.standard_normal((tokens, channels))
    return ((shared + own) * np.exp(draw.standard_normal(channels))).astype(np.float32)


def gaussian(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weighted_error(result: TwoLevel | OneLevel, weight: np.ndarray, hessian: np.ndarray) -> float:
    error = weight.astype(np.float64) - result.dequantize()
    return float(np.einsum("nk,kl,nl->", error, hessian.astype(np.float64), error))


def test_compensation_by_hand() -> None:
    # Scale 1 (amplitude 7). Channel 0: 0.4 -> 0, error 0.4. Channel 1 is correlated with it by 0.8: its target is
    # 2.4 + 0.4 * 0.8 / 1.01 = 2.717 -> 3 instead of 2. Channel 2 is uncorrelated.
    hessian = np.array([[1, 0.8, 0], [0.8, 1, 0], [0, 0, 1]], np.float32)
    result = gptq_one_level(np.array([[0.4, 2.4, 7.0]], np.float32), hessian, 3, settings=IN_ORDER)
    assert result.scales.tolist() == [[1.0]]
    assert result.codes.tolist() == [[0, 3, 7]]


def test_activation_order_by_hand() -> None:
    # Channel 1 is the loudest: 2.4 -> 2, error 0.4. Channel 0: 0.4 + 0.4 * 0.8 / 1.02 = 0.714 -> 1.
    # In order: 0.4 -> 0, error 0.4; channel 1: 2.4 + 0.4 * 0.8 / 4.02 = 2.48 -> 2.
    hessian = np.array([[1, 0.8, 0], [0.8, 4, 0], [0, 0, 0.5]], np.float32)
    weight = np.array([[0.4, 2.4, 7.0]], np.float32)
    assert gptq_one_level(weight, hessian, 3).codes.tolist() == [[1, 2, 7]]
    assert gptq_one_level(weight, hessian, 3, settings=IN_ORDER).codes.tolist() == [[0, 2, 7]]


def papers_codes(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, damping: float) -> np.ndarray:
    """Algorithm 1 of the paper in float64, unblocked: Cholesky factor of the inverse, weights updated in place."""
    size = weight.shape[1]
    damped = hessian.astype(np.float64) + damping * np.mean(np.diag(hessian)) * np.eye(size)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rest, codes = weight.astype(np.float64), np.empty(weight.shape, np.int8)
    for channel in range(size):
        scale = scales[:, channel]
        codes[:, channel] = np.clip(np.rint(rest[:, channel] / scale), -8, 7)
        error = (rest[:, channel] - codes[:, channel] * scale) / upper[channel, channel]
        rest[:, channel:] -= np.outer(error, upper[channel, channel:])
    return codes


@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_equals_the_papers_algorithm(block_size: int) -> None:
    inputs, weight = correlated(200, 48), gaussian(10, 48)
    hessian = inputs.T @ inputs
    settings = GptqSettings(damping=0.05, activation_order=False, block_size=block_size)
    result = gptq_two_level(weight, hessian, 16, settings=settings)
    expected = papers_codes(weight, hessian, np.repeat(result.scales(), 16, axis=1), 0.05)
    np.testing.assert_array_equal(result.codes, expected)


def test_activation_order_equals_the_papers_algorithm_on_permuted_channels() -> None:
    inputs, weight = correlated(200, 48), gaussian(10, 48)
    hessian = inputs.T @ inputs
    result = gptq_one_level(weight, hessian, 16)
    order = np.argsort(-np.diag(hessian))
    scales = np.repeat(result.scales, 16, axis=1)[:, order]
    expected = papers_codes(weight[:, order], hessian[np.ix_(order, order)], scales, 0.01)
    np.testing.assert_array_equal(result.codes[:, order], expected)


@pytest.mark.parametrize("seed", range(3))
def test_weighted_error_is_far_below_rounding_to_nearest(seed: int) -> None:
    inputs, weight = correlated(512, 128, seed), gaussian(32, 128, seed=seed)
    hessian = inputs.T @ inputs
    # Measured 0.10 to 0.25 of it.
    nearest = weighted_error(quantize_two_level_clipped(weight, 32), weight, hessian)
    assert weighted_error(gptq_two_level(weight, hessian, 32), weight, hessian) < 0.5 * nearest
    nearest = weighted_error(quantize_one_level_clipped(weight, 32), weight, hessian)
    assert weighted_error(gptq_one_level(weight, hessian, 32), weight, hessian) < 0.5 * nearest


@pytest.mark.parametrize("settings", [IN_ORDER, GptqSettings()])
def test_uncorrelated_inputs_give_rounding_to_nearest(settings: GptqSettings) -> None:
    weight, hessian = gaussian(5, 64), np.diag(np.linspace(1, 2, 64)).astype(np.float32)
    two, plain = gptq_two_level(weight, hessian, 16, settings=settings), quantize_two_level_clipped(weight, 16)
    np.testing.assert_array_equal(two.codes, plain.codes)
    np.testing.assert_array_equal(two.multipliers, plain.multipliers)
    np.testing.assert_array_equal(two.steps, plain.steps)
    one = gptq_one_level(weight, hessian, 16, settings=settings)
    np.testing.assert_array_equal(one.codes, quantize_one_level_clipped(weight, 16).codes)


def test_integers_stay_in_range_when_compensation_pushes_beyond() -> None:
    inputs, weight = correlated(256, 64), gaussian(16, 64)
    result = gptq_two_level(weight * 1000, inputs.T @ inputs, 16)
    assert result.codes.min() == -8
    assert result.codes.max() == 7
    assert result.multipliers.min() >= 1
    assert result.multipliers.max() <= 15


def test_passes_over_the_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weight = correlated(256, 64), gaussian(10, 64)
    hessian = inputs.T @ inputs
    whole = gptq_two_level(weight, hessian, 16)
    monkeypatch.setattr(gptq, "ROWS_PER_PASS", 3)
    pieces = gptq_two_level(weight, hessian, 16)
    np.testing.assert_array_equal(whole.codes, pieces.codes)
    np.testing.assert_array_equal(whole.steps, pieces.steps)


def test_same_inputs_give_the_same_bytes_and_are_left_alone() -> None:
    inputs, weight = correlated(256, 64), gaussian(10, 64)
    hessian = inputs.T @ inputs
    before = weight.copy(), hessian.copy()
    first, second = gptq_two_level(weight, hessian, 16), gptq_two_level(weight, hessian, 16)
    assert first.codes.tobytes() == second.codes.tobytes()
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(hessian, before[1])


def test_dead_channels_are_rounded_to_nearest() -> None:
    inputs, weight = correlated(256, 64), gaussian(10, 64)
    inputs[:, [3, 40]] = 0
    result = gptq_two_level(weight, inputs.T @ inputs, 16)
    expected = nearest_codes(weight, result.scales())
    np.testing.assert_array_equal(result.codes[:, [3, 40]], expected[:, [3, 40]])


def test_a_layer_that_never_saw_an_input_is_rounded_to_nearest() -> None:
    weight = gaussian(4, 32)
    result = gptq_two_level(weight, np.zeros((32, 32), np.float32), 16)
    np.testing.assert_array_equal(result.codes, quantize_two_level_clipped(weight, 16).codes)


def test_weights_of_zero_stay_zero() -> None:
    inputs = correlated(64, 32)
    assert not gptq_two_level(np.zeros((3, 32), np.float32), inputs.T @ inputs, 16).dequantize().any()


def test_fewer_tokens_than_channels_are_enough() -> None:
    inputs, weight = correlated(5, 64), gaussian(8, 64)
    hessian = inputs.T @ inputs
    nearest = weighted_error(quantize_two_level_clipped(weight, 16), weight, hessian)
    assert weighted_error(gptq_two_level(weight, hessian, 16), weight, hessian) < 0.5 * nearest


def test_damping_grows_until_the_hessian_is_positive_definite() -> None:
    # Eigenvalues 3 and -1: needs a ridge above 1, a hundred times the damping of 0.01.
    hessian = np.array([[1, 2], [2, 1]], np.float32)
    assert gptq_two_level(np.ones((1, 2), np.float32), hessian, 2).codes.tolist() == [[7, 7]]


def test_correction_by_hand() -> None:
    # The quantized input is half of the true one: the weight must double. With a ridge of 1 the fit is
    # w * (2 + 1) / (1 + 1) = 1.5 w; half of the way there is 1.25 w, and the scale follows.
    eye = np.eye(2, dtype=np.float32)
    weight = np.array([[7.0, 3.0]], np.float32)
    np.testing.assert_allclose(correct_weight(weight, eye, 2 * eye), [[8.75, 3.75]], rtol=1e-6)
    result = gptq_one_level(weight, eye, 2, cross=2 * eye)
    np.testing.assert_allclose(result.scales, [[1.25]], rtol=1e-6)
    assert result.codes.tolist() == [[7, 3]]
    np.testing.assert_array_equal(correct_weight(weight, eye, 2 * eye, GptqSettings(correction=0)), weight)


def test_correction_solves_the_normal_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "CHOLESKY_BLOCK", 20)
    seen = correlated(300, 48)
    true = seen + 0.3 * gaussian(300, 48) * seen.std(axis=0)
    weight = gaussian(6, 48)
    hessian, cross = seen.T @ seen, true.T @ seen
    # Ridge regression of the true outputs on what the layer sees, towards the weight, in float64.
    ridge = 0.1 * np.mean(np.diag(hessian)) * np.eye(48)
    moment = weight.astype(np.float64) @ (cross + ridge)
    expected = np.linalg.solve(hessian.astype(np.float64) + ridge, moment.T).T
    corrected = correct_weight(weight, hessian, cross, GptqSettings(correction=1, correction_damping=0.1))
    # float32 at a condition number below 48 / 0.1: errors stay under 1e-3 of weights near 1.
    np.testing.assert_allclose(corrected, expected, atol=1e-3)


@pytest.mark.parametrize("quantize", [gptq_two_level, gptq_one_level])
def test_correction_brings_outputs_closer_to_the_true_ones(quantize: Callable[..., TwoLevel | OneLevel]) -> None:
    seen = correlated(1000, 64)
    true = 1.3 * seen + 0.2 * seen[:, ::-1]
    weight = gaussian(16, 64)
    hessian, cross = seen.T @ seen, true.T @ seen
    settings = GptqSettings(correction=1, correction_damping=0.01)
    with_cross = quantize(weight, hessian, 16, cross=cross, settings=settings)
    without = quantize(weight, hessian, 16, settings=settings)
    wanted = true @ weight.T
    distance = [np.linalg.norm(wanted - seen @ result.dequantize().T) for result in (with_cross, without)]
    assert distance[0] < 0.5 * distance[1]


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (np.eye(3, dtype=np.float32), r"the Hessian has shape \[3, 3\]; a weight of 4 input channels needs \[4, 4\]"),
        (np.full((4, 4), np.nan, np.float32), "the Hessian holds NaN or infinity"),
        (np.diag([1, 1, 1, np.inf]).astype(np.float32), "the Hessian holds NaN or infinity"),
        (np.diag([1, 1, 1, -1]).astype(np.float32), "the Hessian has a negative diagonal"),
        (np.ones((4, 4), np.float32) * 100 - 99 * np.eye(4, dtype=np.float32), "is not positive definite"),
    ],
)
def test_bad_hessians_are_refused(hessian: np.ndarray, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        gptq_two_level(gaussian(2, 4), hessian, 4)


def test_bad_weights_cross_correlations_and_group_sizes_are_refused() -> None:
    eye = np.eye(4, dtype=np.float32)
    with pytest.raises(CalibrationError, match="the weight holds NaN or infinity"):
        gptq_one_level(np.array([[1, 2, np.nan, 4]], np.float32), eye, 4)
    with pytest.raises(CalibrationError, match=r"the cross-correlation has shape \[2, 2\]"):
        gptq_one_level(gaussian(1, 4), eye, 4, cross=np.eye(2, dtype=np.float32))
    with pytest.raises(RecipeError, match="group size 3 does not divide 4 channels"):
        gptq_one_level(gaussian(1, 4), eye, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": 0.0}, r"GPTQ damping is 0.0; it must be in \(0, 1\]"),
        ({"damping": 1.5}, r"GPTQ damping is 1.5"),
        ({"block_size": 0}, r"GPTQ block size is 0; it must be at least 1"),
        ({"correction": 1.1}, r"GPTQ correction is 1.1; it must be in \[0, 1\]"),
        ({"correction_damping": 0.0}, r"GPTQ correction damping is 0.0; it must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GptqSettings(**settings)
