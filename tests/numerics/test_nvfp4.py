"""NVFP4 against hand-computed values, torch's FP8 and a search of the E2M1 table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qavp_export.errors import RecipeError
from qavp_export.numerics import nvfp4
from qavp_export.numerics.nvfp4 import Nvfp4, quantize_nvfp4_activations, quantize_nvfp4_weight

# OCP MX 1.0, table of E2M1: even places have an even mantissa.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FLOATS = st.floats(-65504, 65504, width=32, allow_subnormal=False)
MATRICES = arrays(np.float32, (3, 48), elements=FLOATS)


def _with_unit_scale(*blocks: list[float], loudest: float = 2688.0) -> np.ndarray:
    """One vector whose first block makes the global scale 1: 2688 = 6 * 448, for weights 1536 = 6 * 256."""
    padded = [[*block, *[0.0] * (16 - len(block))] for block in ([loudest], *blocks)]
    return np.array(padded, np.float32).reshape(1, -1)


def _block(array: np.ndarray, index: int) -> list[float]:
    return array.astype(np.float32)[0, 16 * index : 16 * (index + 1)].tolist()


def _scales(result: Nvfp4) -> list[list[float]]:
    return result.block_scales.astype(np.float32).tolist()


def _torch_e4m3(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.float8_e4m3fn).to(torch.float32).numpy()


def _nearest_codes(wanted: np.ndarray) -> np.ndarray:
    """The nearest of the table; of two at the same distance, the one at an even place."""
    distances = np.abs(np.abs(wanted.astype(np.float64))[..., None] - np.array(MAGNITUDES))
    ranks = np.lexsort((np.broadcast_to(np.arange(8) % 2, distances.shape), distances), axis=-1)
    return np.copysign(np.array(MAGNITUDES)[ranks[..., 0]], wanted)


def test_the_eight_magnitudes_are_exact() -> None:
    signed = [*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)]
    result = quantize_nvfp4_activations(_with_unit_scale(signed))
    assert result.global_scale.tolist() == [1]
    assert _scales(result) == [[448, 1]]
    assert _block(result.codes, 0) == [6, *[0] * 15]
    assert _block(result.codes, 1) == signed
    assert result.dequantize()[0, 0] == 2688


def test_half_way_cases_round_to_even() -> None:
    # The 6 keeps the block scale at 1.
    values = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5]
    result = quantize_nvfp4_activations(_with_unit_scale(values))
    assert _block(result.codes, 1)[:15] == [6, 0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4]


def test_block_scales_are_rounded_to_e4m3_and_values_above_them_saturate() -> None:
    # 6.375/6 = 1.0625 lies half-way between 1 and 1.125, whose last bit is 1; 7.125/6 = 1.1875 between 1.125 and 1.25.
    result = quantize_nvfp4_activations(_with_unit_scale([6.375, -6.375, 3], [7.125, 2.5]))
    assert _scales(result) == [[448, 1, 1.25]]
    assert _block(result.codes, 1)[:3] == [6, -6, 3]
    # 7.125/1.25 = 5.7 is nearer to 6 than to 4.
    assert _block(result.codes, 2)[:2] == [6, 2]
    assert result.dequantize()[0, 16:19].tolist() == [6, -6, 3]
    assert result.dequantize()[0, 32:34].tolist() == [7.5, 2.5]


def test_a_block_too_quiet_for_e4m3_has_scale_and_codes_zero() -> None:
    # The smallest E4M3 is 2^-9; 2^-10 is half-way to zero, which is even.
    result = quantize_nvfp4_activations(_with_unit_scale([6 * 2**-9], [6 * 2**-10], []))
    assert _scales(result) == [[448, 2**-9, 0, 0]]
    assert _block(result.codes, 1)[0] == 6
    assert not any(_block(result.codes, 2) + _block(result.codes, 3))


@pytest.mark.parametrize("quantize", [quantize_nvfp4_weight, quantize_nvfp4_activations])
def test_zeros_stay_zeros_without_warnings(quantize: Callable[[np.ndarray], Nvfp4]) -> None:
    with np.errstate(all="raise"):
        result = quantize(np.zeros((2, 32), np.float32))
    assert not result.codes.astype(np.float32).any()
    assert not result.block_scales.astype(np.float32).any()
    assert (result.global_scale > 0).all()
    assert result.dequantize().tolist() == np.zeros((2, 32)).tolist()


def test_a_weight_has_one_global_scale_and_activations_have_one_for_each_vector() -> None:
    values = np.zeros((2, 16), np.float32)
    values[0, 3], values[1, 5] = 2688, -1344
    whole, each = quantize_nvfp4_weight(values), quantize_nvfp4_activations(values)
    assert (whole.global_scale.tolist(), each.global_scale.tolist()) == (1.75, [1, 0.5])
    assert (_scales(whole), _scales(each)) == ([[256], [128]], [[448], [448]])
    assert each.normalized()[:, [3, 5]].tolist() == [[2688, 0], [0, -2688]]
    assert whole.dequantize().tolist() == each.dequantize().tolist() == values.tolist()


def test_a_weight_block_takes_the_closest_of_three_scales() -> None:
    # 6, 4, 3, 2 are exact with scale 1, 6, 4.5, 3 with scale 6/4. With 6.45 in front, the scale is 6.45/6 = 1.075, in
    # E4M3 1.125, which misses 6, or 6.45/6.5 = 0.99, in E4M3 1, which misses 6.45 alone.
    at_four, at_six, above = [6, 4.5, 4.5, 3], [6, 4, 3, 2], [6.45, 6, 6, 3, 2]
    result = quantize_nvfp4_weight(_with_unit_scale(at_four, at_six, above, loudest=1536))
    assert result.global_scale.shape == ()
    assert _scales(result) == [[256, 1.5, 1, 1]]
    assert _block(result.codes, 1)[:4] == [4, 3, 3, 2]
    assert _block(result.codes, 2)[:4] == at_six
    assert _block(result.codes, 3)[:5] == [6, 6, 6, 3, 2]


@given(MATRICES)
def test_no_target_is_closer_than_the_one_chosen(values: np.ndarray) -> None:
    result = quantize_nvfp4_weight(values)
    blocks = (values / result.global_scale).reshape(3, 3, 16)
    errors = []
    for target in (6, 4, 6.5):
        scales = _torch_e4m3(np.abs(blocks).max(-1) / np.float32(target))[..., None]
        represented = _nearest_codes(blocks / np.where(scales > 0, scales, np.float32(1))) * scales
        errors.append(np.sum((represented - blocks.astype(np.float64)) ** 2, axis=-1))
    actual = np.sum((result.normalized().reshape(3, 3, 16) - blocks.astype(np.float64)) ** 2, axis=-1)
    # The choice is made on sums of 16 float32 squares: two targets may tie within their rounding, or underflow.
    np.testing.assert_allclose(actual, np.min(errors, axis=0), rtol=1e-5, atol=1e-30)


def test_the_choice_of_scales_reduces_the_error_of_gaussian_weights() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    chosen, plain = quantize_nvfp4_weight(weight), quantize_nvfp4_activations(weight)
    errors = [np.square(result.dequantize() - weight).sum() for result in (chosen, plain)]
    # Measured: 0.77 on 2 million values; 65,536 values scatter by a percent.
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_runs_of_rows_do_not_show(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(rows).standard_normal((7, 48)).astype(np.float32)
    # First in runs: memory that a run leaves out must not hold the right result from before.
    with monkeypatch.context() as patch:
        patch.setattr(nvfp4, "_VALUES_AT_ONCE", rows * 48)
        result = quantize_nvfp4_weight(weight)
    expected = quantize_nvfp4_weight(weight)
    np.testing.assert_array_equal(result.codes, expected.codes)
    np.testing.assert_array_equal(result.block_scales, expected.block_scales)


@given(MATRICES)
def test_block_scales_equal_those_that_torch_rounds(values: np.ndarray) -> None:
    result = quantize_nvfp4_activations(values)
    normalized = values / result.global_scale[:, None]
    expected = _torch_e4m3(np.abs(normalized).reshape(3, 3, 16).max(-1) / np.float32(6))
    np.testing.assert_array_equal(result.block_scales.astype(np.float32), expected)


@given(MATRICES)
def test_codes_are_the_nearest_of_the_table(values: np.ndarray) -> None:
    result = quantize_nvfp4_activations(values)
    scales = result.block_scales.astype(np.float32)[..., None]
    normalized = (values / result.global_scale[:, None]).reshape(3, 3, 16)
    expected = _nearest_codes(normalized / np.where(scales > 0, scales, np.float32(1)))
    np.testing.assert_array_equal(result.codes.astype(np.float64).reshape(3, 3, 16), expected)


@given(MATRICES)
def test_a_vector_is_quantized_without_regard_to_the_others(values: np.ndarray) -> None:
    together, alone = quantize_nvfp4_activations(values), quantize_nvfp4_activations(values[1:2])
    np.testing.assert_array_equal(together.dequantize()[1:2], alone.dequantize())


@given(MATRICES, st.sampled_from([0.25, 2.0, 1024.0]))
def test_powers_of_two_scale_the_global_scale_alone(values: np.ndarray, factor: float) -> None:
    values = np.where(np.abs(values) < 1e-20, 0, values).astype(np.float32)
    values[:, 0] = 1
    before, after = quantize_nvfp4_weight(values), quantize_nvfp4_weight(values * np.float32(factor))
    np.testing.assert_array_equal(before.normalized(), after.normalized())
    assert before.global_scale * np.float32(factor) == after.global_scale


@pytest.mark.parametrize("quantize", [quantize_nvfp4_weight, quantize_nvfp4_activations])
def test_channels_that_are_no_multiple_of_the_block_are_refused(quantize: Callable[[np.ndarray], Nvfp4]) -> None:
    with pytest.raises(RecipeError, match="40 channels are not a multiple of NVFP4's block size 16"):
        quantize(np.zeros((1, 40), np.float32))
