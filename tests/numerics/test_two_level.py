"""Two-level quantization against hand-computed values and the properties that its definition promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qavp_export.errors import RecipeError
from qavp_export.numerics.groups import largest_group_size
from qavp_export.numerics.one_level import quantize_one_level
from qavp_export.numerics.two_level import (
    quantize_two_level,
)

FLOATS = st.floats(-65504, 65504, width=32, allow_subnormal=False)
MATRICES = arrays(np.float32, (3, 16), elements=FLOATS)


def test_hand_computed_vector() -> None:
    # Amplitudes 105/7 = 15 and 14/7 = 2, step 15/15 = 1, multipliers 15 and 2.
    values = np.array([[105.0, -52.5, 7.0, 22.5, 14.0, -14.0, 3.0, 1.0]], np.float32)
    result = quantize_two_level(values, 4)
    assert result.steps.tolist() == [1.0]
    assert result.multipliers.tolist() == [[15, 2]]
    # 52.5/15 = 3.5 and 22.5/15 = 1.5 and 3/2 = 1.5 and 1/2 = 0.5 are half-way: they round to even.
    assert result.codes.tolist() == [[7, -4, 0, 2, 7, -7, 2, 0]]
    assert result.dequantize().tolist() == [[105, -60, 0, 30, 14, -14, 4, 0]]


def test_multiplier_is_rounded_up_so_that_nothing_is_clipped() -> None:
    # Amplitudes 15 and 2.2 in steps of 1: the second multiplier is 3, not 2.
    values = np.array([105.0, 0, 15.4, 0], np.float32)
    result = quantize_two_level(values, 2)
    assert result.multipliers.tolist() == [15, 3]
    assert result.codes.tolist() == [7, 0, 5, 0]


def test_zeros_have_step_zero_and_codes_zero() -> None:
    result = quantize_two_level(np.zeros((2, 8), np.float32), 4)
    assert result.steps.tolist() == [0, 0]
    assert not result.codes.any()
    assert (result.multipliers == 1).all()
    assert not result.dequantize().any()


@given(MATRICES)
def test_error_is_at_most_half_a_group_scale(values: np.ndarray) -> None:
    result = quantize_two_level(values, 4)
    error = np.abs(result.dequantize() - values).reshape(3, 4, 4)
    # float32 rounding of the products adds at most a few units in the last place of the largest value.
    slack = 4 * np.finfo(np.float32).eps * np.abs(values).max()
    assert (error <= result.scales()[..., None] * 0.5 + slack).all()


@given(MATRICES)
def test_integers_stay_in_range_and_products_fit_int8(values: np.ndarray) -> None:
    result = quantize_two_level(values, 4)
    assert result.codes.min() >= -8
    assert result.codes.max() <= 7
    assert result.multipliers.min() >= 1
    assert result.multipliers.max() <= 15
    products = result.codes.reshape(3, 4, 4).astype(int) * result.multipliers[..., None]
    assert products.min() >= -120
    assert products.max() <= 105


@given(MATRICES, st.sampled_from([0.25, 2.0, 1024.0]))
def test_powers_of_two_scale_steps_and_leave_codes(values: np.ndarray, factor: float) -> None:
    values = np.where(np.abs(values) < 1e-20, 0, values).astype(np.float32)
    before, after = quantize_two_level(values, 4), quantize_two_level(values * np.float32(factor), 4)
    np.testing.assert_array_equal(before.codes, after.codes)
    np.testing.assert_array_equal(before.steps * np.float32(factor), after.steps)


def test_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match="group size 5 does not divide 16 channels"):
        quantize_two_level(np.zeros((1, 16), np.float32), 5)


def test_grouped_8bit_by_hand() -> None:
    result = quantize_one_level(np.array([[127.0, -63.5, 0, 0, 1.0, 0.5]], np.float32), 2, 8)
    np.testing.assert_allclose(result.scales, [[1, 1, 1 / 127]], rtol=1e-7)
    assert result.codes.tolist() == [[127, -64, 0, 0, 127, 64]]
    np.testing.assert_allclose(result.dequantize()[0, 4], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [((4096, 11008), 128), ((576, 1536), 64), ((96, 160), 32), ((48, 80), 16), ((), 128)],
)
def test_largest_group_size(channels: tuple[int, ...], expected: int) -> None:
    assert largest_group_size(channels) == expected


def test_no_usable_group_size_names_the_channels() -> None:
    with pytest.raises(RecipeError, match=r"none of 128, 64, 32, 16 divides all channel counts \(40, 96\)"):
        largest_group_size((96, 40))
