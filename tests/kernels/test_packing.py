"""The packed weight: its layout by hand, the way back, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from qavp_export.engines.kernels.packing import GROUP_SIZES, pack_weight, unpack_weight
from qavp_export.errors import RecipeError


def test_layout_is_the_documented_one() -> None:
    codes = np.zeros((32, 2), np.int8)
    codes[:, 1] = np.arange(32) % 16 - 8
    multipliers = np.array([[1, 2], [3, 15]], np.uint8)
    weight, packed_multipliers = pack_weight(codes, multipliers, group_size=16)
    # Channel j is code j - 8, stored as j, beside channel j + 8, stored as j + 8; the second group is the same.
    group = [j | (j + 8) << 4 for j in range(8)]
    assert weight.view(np.uint8).tolist() == [[0x88] * 16, group + group]
    assert packed_multipliers.tolist() == [[1, 3], [2, 15]]
    assert weight.dtype == packed_multipliers.dtype == np.int8


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_unpacking_undoes_packing(group_size: int) -> None:
    rng = np.random.default_rng(group_size)
    codes = rng.integers(-8, 8, (3 * group_size, 5), np.int8)
    multipliers = rng.integers(1, 16, (3, 5), np.int8)
    weight, packed_multipliers = pack_weight(codes, multipliers, group_size)
    assert weight.flags.c_contiguous
    assert packed_multipliers.flags.c_contiguous
    assert (weight.shape, packed_multipliers.shape) == ((5, 3 * group_size // 2), (5, 3))
    found_codes, found_multipliers = unpack_weight(weight, packed_multipliers, group_size)
    np.testing.assert_array_equal(found_codes, codes)
    np.testing.assert_array_equal(found_multipliers, multipliers)


@pytest.mark.parametrize(
    ("code", "multiplier", "group_size", "message"),
    [
        (8, 1, 16, "codes reach"),
        (-9, 1, 16, "codes reach"),
        (0, 16, 16, "multipliers reach"),
        (0, 0, 16, "multipliers reach"),
        (0, 1, 32, "multipliers are"),
        (0, 1, 128, "does not divide"),
        (0, 1, 24, "takes 16, 32"),
    ],
)
def test_what_does_not_fit_is_refused(code: int, multiplier: int, group_size: int, message: str) -> None:
    codes = np.full((64, 2), code, np.int8)
    with pytest.raises(RecipeError, match=message):
        pack_weight(codes, np.full((4, 2), multiplier, np.int8), group_size)
