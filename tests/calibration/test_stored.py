"""Codes that calibration left on disk come back as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from qavp_export.calibration.stored import StoredWeights
from qavp_export.numerics.clip import quantize_two_level_clipped
from qavp_export.numerics.one_level import OneLevel
from qavp_export.numerics.two_level import TwoLevel
from qavp_export.passes import W4A4, RoundWeights

# Every pair of codes, in both halves of a byte.
CODES = np.stack(np.meshgrid(np.arange(-8, 8), np.arange(-8, 8)), axis=-1).reshape(16, 32).astype(np.int8)


def _weight(name: str) -> ir.Value:
    tensor = ir.Tensor(np.random.default_rng(1).standard_normal((32, 16)).astype(np.float32), name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def test_every_code_and_scale_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rounding = RoundWeights()
    stored = StoredWeights(tmp_path, rounding)
    two = TwoLevel(CODES, rng.integers(1, 16, (16, 2)).astype(np.uint8), rng.random(16).astype(np.float32))
    one = OneLevel(CODES[::-1].copy(), rng.random((16, 4)).astype(np.float32))
    stored.put("two", two, 0.25)
    stored.put("one", one, 0.5)
    for _ in range(2):
        # As often as it is asked for: the walk reads what the export reads again.
        again = stored(_weight("two"), W4A4, 16)
        assert isinstance(again, TwoLevel)
        for actual, expected in ((again.codes, CODES), (again.multipliers, two.multipliers), (again.steps, two.steps)):
            np.testing.assert_array_equal(actual, expected)
            assert actual.dtype == expected.dtype
    other = stored(_weight("one"), W4A4, 16)
    assert isinstance(other, OneLevel)
    np.testing.assert_array_equal(other.codes, one.codes)
    np.testing.assert_array_equal(other.scales, one.scales)
    assert rounding.errors == {"two": 0.25, "one": 0.5}


def test_codes_take_half_a_byte_each(tmp_path: Path) -> None:
    codes = np.tile(CODES, (8, 64))
    StoredWeights(tmp_path, RoundWeights()).put("w", OneLevel(codes, np.ones((128, 1), np.float32)), 0)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < codes.size / 2 + 2048


def test_part_of_a_larger_weight_is_stored_by_itself(tmp_path: Path) -> None:
    stored = StoredWeights(tmp_path, RoundWeights())
    # GPTQ hands over rows of a stack, in memory that it goes by columns.
    codes = np.asfortranarray(np.concatenate([CODES, -1 - CODES]))[16:]
    stored.put("w", OneLevel(codes, np.ones((16, 1), np.float32)), 0)
    np.testing.assert_array_equal(stored(_weight("w"), W4A4, 16).codes, -1 - CODES)


def test_what_was_not_stored_is_rounded(tmp_path: Path) -> None:
    rounding = RoundWeights()
    weight = _weight("w")
    actual = StoredWeights(tmp_path, rounding)(weight, W4A4, 16)
    assert weight.const_value is not None
    expected = quantize_two_level_clipped(np.ascontiguousarray(weight.const_value.numpy().T), 16)
    np.testing.assert_array_equal(actual.codes, expected.codes)
    assert rounding.errors.keys() == {"w"}
