"""Sink rounding against GPTQ with the dense Hessian, hand-computed compensation, and rounding to nearest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qavp_export.errors import CalibrationError, RecipeError
from qavp_export.numerics import sink
from qavp_export.numerics.clip import quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.gptq import GptqSettings, gptq_one_level, gptq_two_level
from qavp_export.numerics.one_level import OneLevel
from qavp_export.numerics.sink import SinkRounding
from qavp_export.numerics.two_level import TwoLevel

GROUP = 16
Sink = Callable[[np.ndarray, np.ndarray, int, float], TwoLevel | OneLevel]
Nearest = Callable[[np.ndarray, int], TwoLevel | OneLevel]


def sink_two_level(weight: np.ndarray, inputs: np.ndarray, group_size: int, ridge: float = 0.1) -> TwoLevel:
    return SinkRounding(inputs, ridge).two_level(weight, group_size)[0]


def sink_one_level(weight: np.ndarray, inputs: np.ndarray, group_size: int, ridge: float = 0.1) -> OneLevel:
    return SinkRounding(inputs, ridge).one_level(weight, group_size)[0]


def sink_codes(weight: np.ndarray, scales: np.ndarray, inputs: np.ndarray, ridge: float = 0.1) -> np.ndarray:
    return SinkRounding(inputs, ridge).codes(weight, scales)[0]


BOTH = [(sink_two_level, quantize_two_level_clipped), (sink_one_level, quantize_one_level_clipped)]


def gaussian(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sinks(count: int, channels: int, seed: int = 0) -> np.ndarray:
    """Inputs that are nearly the same vector, with loud and quiet channels: like the first tokens of sequences."""
    draw = np.random.default_rng(seed)
    shared = draw.standard_normal(channels) * np.exp(0.5 * draw.standard_normal(channels))
    return (shared + 0.05 * draw.standard_normal((count, channels))).astype(np.float32)


def output_error(result: TwoLevel | OneLevel, weight: np.ndarray, inputs: np.ndarray) -> float:
    return float(np.sum(((result.dequantize() - weight.astype(np.float64)) @ inputs.T.astype(np.float64)) ** 2))


def weight_error(result: TwoLevel | OneLevel, weight: np.ndarray) -> float:
    return float(np.sum((result.dequantize() - weight.astype(np.float64)) ** 2))


def test_compensation_by_hand() -> None:
    # x = (2, 1), lambda = 0.1 * (4 + 1) / 2 = 0.25. Channel 0 first: 2.4 -> 2, output error -0.8.
    # Channel 1: 0.2 + 0.8 * 1 / (0.25 + 1) = 0.84 -> 1 instead of 0. The error of the output falls from -1 to 0.
    weight, inputs = np.array([[2.4, 0.2]], np.float32), np.array([[2, 1]], np.float32)
    assert sink_codes(weight, np.ones((1, 1), np.float32), inputs, 0.1).tolist() == [[2, 1]]


def test_the_loudest_channel_is_rounded_first() -> None:
    # x = (1, 2): channel 1 first: 2.4 -> 2, output error -0.8; channel 0: 0.2 + 0.8 * 1 / 1.25 = 0.84 -> 1.
    # By index it would be 0.2 -> 0 and then 2.4 + 0.2 * 2 / 4.25 = 2.49 -> 2.
    weight, inputs = np.array([[0.2, 2.4]], np.float32), np.array([[1, 2]], np.float32)
    assert sink_codes(weight, np.ones((1, 1), np.float32), inputs, 0.1).tolist() == [[1, 2]]


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_equals_gptq_with_the_dense_hessian(count: int, ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "SOLVE_BLOCK", 10)
    monkeypatch.setattr(sink, "BLOCK_SIZE", 7)
    weight, inputs = gaussian(40, 64), sinks(count, 64)
    hessian = inputs.T @ inputs
    settings = GptqSettings(damping=ridge)
    two = sink_two_level(weight, inputs, GROUP, ridge)
    expected = gptq_two_level(weight, hessian, GROUP, settings=settings)
    np.testing.assert_array_equal(two.multipliers, expected.multipliers)
    np.testing.assert_array_equal(two.steps, expected.steps)
    # GPTQ factorizes in float32, so a target within about 1e-5 of a tie may go the other way, and with it the rest of
    # its row: of 40 rows at most one.
    assert np.sum(np.any(two.codes != expected.codes, axis=1)) <= 1
    one = sink_one_level(weight, inputs, GROUP, ridge)
    expected_one = gptq_one_level(weight, hessian, GROUP, settings=settings)
    np.testing.assert_array_equal(one.scales, expected_one.scales)
    assert np.sum(np.any(one.codes != expected_one.codes, axis=1)) <= 1


@pytest.mark.parametrize(("rounding", "nearest"), BOTH)
def test_keeps_the_outputs_and_nearly_the_weight(rounding: Sink, nearest: Nearest) -> None:
    weight, inputs = gaussian(64, 256), sinks(4, 256)
    result, plain = rounding(weight, inputs, GROUP, 0.1), nearest(weight, GROUP)
    # Each output has 256 channels to correct with; 100 in power is far from both 1 (nearest) and what is seen.
    assert output_error(result, weight, inputs) < output_error(plain, weight, inputs) / 100
    # The corrections of a channel are far below half a step, so few codes move, and by one.
    assert weight_error(result, weight) < 1.25 * weight_error(plain, weight)
    assert np.max(np.abs(result.codes.astype(int) - plain.codes)) <= 1


def test_a_larger_ridge_stays_closer_to_the_weight() -> None:
    weight, inputs = gaussian(64, 256), sinks(4, 256)
    close, far = (sink_two_level(weight, inputs, GROUP, ridge) for ridge in (1000.0, 0.01))
    assert weight_error(close, weight) < weight_error(far, weight)
    assert output_error(close, weight, inputs) > output_error(far, weight, inputs)


@pytest.mark.parametrize(("rounding", "nearest"), BOTH)
def test_without_inputs_it_is_nearest_rounding(rounding: Sink, nearest: Nearest) -> None:
    weight = gaussian(5, 64)
    weight[2] = 0
    result, plain = rounding(weight, np.zeros((3, 64), np.float32), GROUP, 0.1), nearest(weight, GROUP)
    np.testing.assert_array_equal(result.codes, plain.codes)
    np.testing.assert_array_equal(result.dequantize(), plain.dequantize())


def test_silent_channels_are_rounded_to_nearest() -> None:
    weight, inputs = gaussian(8, 64), sinks(2, 64)
    inputs[:, 10:30] = 0
    result = sink_two_level(weight, inputs, GROUP)
    np.testing.assert_array_equal(result.codes[:, 10:30], quantize_two_level_clipped(weight, GROUP).codes[:, 10:30])


def test_codes_stay_in_range() -> None:
    # Scales far too small: every code would leave the range, and so would the compensation.
    weight, inputs = 100 * gaussian(6, 32), sinks(2, 32)
    codes = sink_codes(weight, np.ones((6, 2), np.float32), inputs)
    assert codes.dtype == np.int8
    assert (codes.min(), codes.max()) == (-8, 7)


def test_only_the_span_of_the_inputs_counts() -> None:
    # Repeating an input, scaled or not, changes only its weight: X^T X is the same for (x, x) as for sqrt(2) x.
    weight, inputs = gaussian(16, 64), sinks(1, 64)
    twice = sink_two_level(weight, np.concatenate([inputs, inputs]), GROUP, 0.1)
    scaled = sink_two_level(weight, np.float32(np.sqrt(2)) * inputs, GROUP, 0.1)
    # Float rounding may move a tie and with it the rest of its row.
    assert np.sum(np.any(twice.codes != scaled.codes, axis=1)) <= 1


def test_is_deterministic_and_leaves_its_arguments_alone() -> None:
    weight, inputs = gaussian(16, 64), sinks(3, 64)
    kept = weight.copy(), inputs.copy()
    first, second = (sink_two_level(weight, inputs, GROUP) for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(weight, kept[0])
    np.testing.assert_array_equal(inputs, kept[1])


@pytest.mark.parametrize("rounding", [sink_two_level, sink_one_level])
@pytest.mark.parametrize(
    ("weight", "inputs", "message"),
    [
        (gaussian(64), gaussian(1, 64), r"the weight has shape \[64\]"),
        (gaussian(2, 64), gaussian(64), r"the sink inputs have shape \[64\]"),
        (gaussian(2, 64), gaussian(1, 32), "the sink inputs have 32 channels"),
        (gaussian(2, 64), np.zeros((0, 64), np.float32), r"the sink inputs have shape \[0, 64\]"),
        (gaussian(2, 64), np.full((1, 64), np.nan, np.float32), "the sink inputs hold NaN or infinity"),
        (np.full((2, 64), np.inf, np.float32), gaussian(1, 64), "the weights hold NaN or infinity"),
    ],
)
def test_unusable_arguments(rounding: Sink, weight: np.ndarray, inputs: np.ndarray, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        rounding(weight, inputs, GROUP, 0.1)
    assert "\n" not in str(caught.value)


def test_unusable_settings() -> None:
    weight, inputs = gaussian(2, 64), gaussian(1, 64)
    for ridge in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="ridge"):
            sink_two_level(weight, inputs, GROUP, ridge)
    with pytest.raises(RecipeError, match="group size"):
        sink_two_level(weight, inputs, 48)
    with pytest.raises(CalibrationError, match=r"scales of shape \[3, 4\] do not fit"):
        sink_codes(weight, np.ones((3, 4), np.float32), inputs)
