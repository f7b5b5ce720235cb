"""The weight quantizer: blocks of rows change nothing, errors are what they say."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qavp_export.numerics.clip import quantize_one_level_clipped, quantize_two_level_clipped
from qavp_export.numerics.one_level import OneLevel, quantize_one_level
from qavp_export.numerics.two_level import TwoLevel, quantize_two_level
from qavp_export.passes import SCHEMES, RoundWeights, Scheme, quantizer
from qavp_export.passes.quantizer import quantize_activation

GROUP = 16
K, N = 48, 37


def _weight(array: npt.NDArray[np.float32], name: str = "w") -> ir.Value:
    """An initializer `[K,N]` from a weight `[N,K]`; it can be read once."""
    left = [array]
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(left.pop().T)),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(array.T.shape),
        name=name,
    )
    return ir.Value(name=name, shape=lazy.shape, type=ir.TensorType(lazy.dtype), const_value=lazy)


def _values(seed: int = 2) -> npt.NDArray[np.float32]:
    values = np.random.default_rng(seed).standard_t(4, (N, K)).astype(np.float32)
    values[5] = 0
    return values


REFERENCES = {
    ("w4a4", "two-level", True): lambda values: quantize_two_level_clipped(values, GROUP),
    ("w4a16", "two-level", False): lambda values: quantize_two_level(values, GROUP),
    ("w4a8", "one-level", True): lambda values: quantize_one_level_clipped(values, GROUP),
    ("w4a4", "one-level", False): lambda values: quantize_one_level(values, GROUP, 4),
    ("w8a16", "two-level", True): lambda values: quantize_one_level(values, GROUP, 8),
    ("w8a8", "two-level", True): lambda values: quantize_one_level(values, K, 8),
}


# Blocks of one row, of some rows with a shorter last one, and one block for all.
@pytest.mark.parametrize("block", [1, 10 * K, 1 << 17])
@pytest.mark.parametrize("case", REFERENCES)
def test_blocks_of_rows_give_what_the_whole_weight_gives(
    monkeypatch: pytest.MonkeyPatch, case: tuple[str, str, bool], block: int
) -> None:
    monkeypatch.setattr(quantizer, "_BLOCK", block)
    name, scales, clip = case
    scheme = Scheme(SCHEMES[name].weights, SCHEMES[name].activations, scales)  # type: ignore[arg-type]
    values = _values()
    actual = RoundWeights(clip_search=clip)(_weight(values), scheme, GROUP)
    expected = REFERENCES[case](values)
    assert type(actual) is type(expected)
    np.testing.assert_array_equal(actual.codes, expected.codes)
    if isinstance(actual, TwoLevel) and isinstance(expected, TwoLevel):
        np.testing.assert_array_equal(actual.multipliers, expected.multipliers)
        np.testing.assert_array_equal(actual.steps, expected.steps)
    if isinstance(actual, OneLevel) and isinstance(expected, OneLevel):
        np.testing.assert_array_equal(actual.scales, expected.scales)


def test_errors_are_relative_and_by_name() -> None:
    rounding = RoundWeights()
    for seed, name in enumerate(("a", "b")):
        rounding(_weight(_values(seed), name), SCHEMES["w4a4"], GROUP)
    for seed, name in enumerate(("a", "b")):
        values = _values(seed).astype(np.float64)
        rounded = quantize_two_level_clipped(_values(seed), GROUP).dequantize().astype(np.float64)
        expected = np.linalg.norm(values - rounded) / np.linalg.norm(values)
        # Sums of float32 squares over 1,776 weights.
        assert rounding.errors[name] == pytest.approx(expected, rel=1e-5)
    assert rounding.errors.keys() == {"a", "b"}


def test_a_weight_of_zeros_has_no_error() -> None:
    rounding = RoundWeights()
    zeros = rounding(_weight(np.zeros((N, K), np.float32)), SCHEMES["w4a4"], GROUP)
    assert rounding.errors == {"w": 0}
    assert not zeros.dequantize().any()


def test_the_clip_search_lowers_the_error() -> None:
    errors = {}
    for clip in (False, True):
        rounding = RoundWeights(clip_search=clip)
        rounding(_weight(_values()), SCHEMES["w4a4"], GROUP)
        errors[clip] = rounding.errors["w"]
    # Of heavy-tailed weights a good part of the error is due to their largest values.
    assert errors[True] < 0.97 * errors[False]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("scales", ["two-level", "one-level"])
def test_activations_are_quantized_as_the_graph_does(name: str, scales: str) -> None:
    scheme = Scheme(SCHEMES[name].weights, SCHEMES[name].activations, scales)  # type: ignore[arg-type]
    x = _values()
    if scheme.activations is None:
        expected = x
    elif scheme.activations == "int8":
        expected = quantize_one_level(x, K, 8).dequantize()
    elif scales == "two-level":
        expected = quantize_two_level(x, GROUP).dequantize()
    else:
        expected = quantize_one_level(x, GROUP, 4).dequantize()
    np.testing.assert_array_equal(quantize_activation(x, scheme, GROUP), expected)
